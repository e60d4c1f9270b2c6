"""What secrets look like: a list to maintain. A group named `secret` is the part to hide, where that is not all of it.

No pattern has a repetition within a repetition, so that none is slow on a hostile text.
"""

from __future__ import annotations

import re

# What is recognised as a secret in any text; a Chinese character before it is no part of it.
TOKENS: dict[str, re.Pattern[str]] = {
    kind: re.compile(pattern, re.ASCII)
    for kind, pattern in {
        "a private key": (
            r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY[A-Z ]{0,10}-----[\w+/=\s\\:,.-]*|\bAGE-SECRET-KEY-1[A-Z0-9]{50,}|"
            r"\bPuTTY-User-Key-File-\d"
        ),
        "a token of Hugging Face": r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{20,})",
        "a token of ModelScope": r"\bms-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b",
        "a key of OpenAI, Anthropic or alike": (
            r"\bsk-(?:(?:proj|svcacct|admin|ant|or)-[\w-]{16,}|(?=[A-Za-z]{0,40}\d)[A-Za-z0-9]{16,}[\w-]*)|"
            r"\b(?:gsk_|r8_|xai-|pplx-)[A-Za-z0-9]{20,}|\bnvapi-[\w-]{20,}"
        ),
        "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})",
        "a token of GitLab": r"\bgl(?:pat|dt|rt|cbt|ptt|ft|soat|agent|oas|imt)-[\w-]{16,}",
        "a key of Amazon, Alibaba or Tencent": (
            r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b|\bLTAI[A-Za-z0-9]{12,26}\b|\bAKID[A-Za-z0-9]{13,40}\b"
        ),
        "a key of Google": r"\bAIza[\w-]{35}|\bGOCSPX-[\w-]{20,}|\bya29\.[\w-]{20,}",
        "a key of Azure": r"\bAccountKey=(?P<secret>[A-Za-z0-9+/=]{40,})",
        "a token of Slack": (
            r"\bxox[abeoprs]-[\w-]{10,}|\bxapp-\d-[\w-]{10,}|hooks\.slack\.com/services/(?P<secret>T\w+/\w+/\w+)"
        ),
        "a key of Stripe": r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}|\bwhsec_[A-Za-z0-9+/=]{16,}",
        "a token of a package registry": r"\bnpm_[A-Za-z0-9]{36}|\bpypi-[\w-]{40,}|\bdckr_pat_[\w-]{20,}",
        "a key of SendGrid or Telegram": r"\bSG\.[\w-]{16,}\.[\w-]{16,}|\b\d{8,10}:AA[\w-]{33}\b",
        "a JSON web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*",
        "a password in an address": r"(?<=://)(?P<secret>[^/\s@\"']+)(?=@)",
    }.items()
}

# Secrets by the name in front of them. A name with its type, or the place of a secret, is not one.
NAMED: dict[str, re.Pattern[str]] = {
    kind: re.compile(pattern, re.IGNORECASE | re.ASCII)
    for kind, pattern in {
        "a secret in an address": (
            r"[?&][\w.-]{0,40}(?:token|key|secret|password|signature|sig)=(?P<secret>[^&\s\"']+)"
        ),
        "an authorization": r"authorization\W{1,4}(?:bearer|basic)\s{1,4}(?P<secret>[\w.~+/=-]+)",
        "a password or key": (
            r"(?:password|passwd|passphrase|api[_-]?key|secret[_-]?key|access[_-]?key|access[_-]?token|auth[_-]?token|"
            r"client[_-]?secret|private[_-]?key(?:[_-]?id)?)[\"']?[ \t]{0,4}[:=][ \t]{0,4}[\"']?"
            r"(?!none|null|true|false|str\b|string|bytes|optional|required|your|os\.|getenv|env\b|[-\d.]+(?:[\s,;}\]]|$))"
            r"(?P<secret>[^\s\"',;<>{}$*()\[\]]{6,})"
        ),
    }.items()
}

# Variables of the environment whose values are secrets, unless their names end in a word for a place or a kind.
SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSWO?R?D|PASSPHRASE|API_?KEY|ACCESS_?KEY|CREDENTIAL|"
    r"(?:^|_)(?:PASS|PWD|PW|PAT|KEY|AUTH|APIKEY)\d*(?:_|$)",
    re.IGNORECASE,
)
NO_SECRET_NAME = re.compile(
    r"(?:OLD)?PWD|.*_?(?:FILE|PATH|DIR|URL|URI|ENDPOINT|HOST|SOCK|SOCKET|TYPE|METHOD|MODE|NAME|LAYOUT|LIMIT|LENGTH|COUNT)",
    re.IGNORECASE,
)
SHORTEST_VALUE = 8  # characters; shorter values would be found in ordinary words
# A single word, too, is found in ordinary text, where stars would change what is meant: a password of `instruction`.
WORD = re.compile(r"[A-Za-z]?[a-z]{1,13}")
