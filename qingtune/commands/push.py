"""The recipe of publishing a folder: what would be done is shown first; nothing is uploaded without being asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qingtune.config.commands import PushConfig
from qingtune.errors import UserError, raise_all
from qingtune.output.console import give, say, show
from qingtune.output.redaction import find_secret, find_token, redact
from qingtune.output.units import counted
from qingtune.runs.folder import LOCK
from qingtune.runs.record import CURVE, FACTS, LATEST, METRICS, PAGE, RECORD, SETTINGS
from qingtune.runs.result_folder import RESULT_FILES

# What a model, adapter or export consists of; anything else is a person's to decide on.
_PUBLISHED = re.compile(
    r"README\.md|LICENSE(\.\w+)?|NOTICE|Modelfile|[\w.-]+\.gguf|[\w.-]+\.safetensors|[\w.-]+\.safetensors\.index\.json|"
    r"config\.json|generation_config\.json|adapter_config\.json|tokenizer[\w.]*|special_tokens_map\.json|"
    r"added_tokens\.json|chat_template\.jinja|vocab\.json|merges\.txt|" + re.escape(RECORD)
)
# What a run leaves that others have no use for.
_LEFT_OUT = {
    SETTINGS, METRICS, CURVE, LATEST, FACTS, PAGE, LOCK, RESULT_FILES, "demo_answers.json", "trackers", ".DS_Store",
    "evaluation.json", "evaluation.md", "eval_samples.jsonl", "predictions_before.jsonl", "predictions_after.jsonl",
}  # fmt: skip
# Weights hold text at their beginning only; names of tokens are words, of which some look like paths or settings.
_WEIGHTS = re.compile(r".*\.(gguf|safetensors)")
_WORDS = re.compile(r"tokenizer\.(json|model)|vocab\.json|merges\.txt")
_BEGINNING = 1 << 20  # bytes of weights that are looked at
_WINDOW, _OVERLAP = 1 << 20, 1 << 14  # of a file, looked at in pieces; no secret is longer than what they share
# A text that is an absolute path, and anywhere in a text the folders of people and of data.
_ROOTS = (
    r"home\d*|Users|root|u\d*|data\d*|datasets?|models?|mnt|media|srv|opt|scratch|work|workspace|projects?|storage|disk\d*|"
    r"nfs|nas|gpfs|lustre|cluster|share|shared|export|Volumes|private|var|tmp|content|kaggle"
)
_PATHS = re.compile(
    r"""(?<=["'`])/[\w.-]+/[\w./-]+|(?<![\w/:.~)\]}*-])(?:file://)?/(?:"""
    + _ROOTS
    + r""")/[\w.@~-]+|(?<!\w)[A-Za-z]:(?:\\+|/Users/)[\w.-]+"""
)


def push(config: PushConfig) -> None:
    """Show what would be uploaded, or, where that is confirmed, upload it.

    Raises:
        UserError: the folder holds what should not be published, or the hub refuses.
    """
    folder = Path(config.folder)
    published, left_out = look_through(folder)
    where = {"hf": "Hugging Face", "modelscope": "ModelScope"}[config.to]
    seen = "private" if config.private else "public"
    listing = [f"{folder} -> {where}, {config.repo} ({seen} if the repository is new):"]
    listing += [f"  {name}  {_size(size)}" for name, size in published.items()]
    total = sum(published.values())
    listing.append(f"{counted(len(published), 'file')}, {_size(total)}.")
    if left_out:
        listing.append(f"Left out: {', '.join(left_out)}.")
    if not config.confirm:
        give("\n".join([*listing, "Nothing was uploaded. To upload, run the same command with --confirm."]))
        return
    show("\n".join(listing))
    show(f"Published: {_upload(config, list(published))}")


def _size(number: int) -> str:
    return f"{number / 1e6:,.1f} MB" if number >= 100_000 else f"{number:,} bytes"


# --- What may be published -------------------------------------------------------------------------------------------


def look_through(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Sort a folder's files into those to publish, with their sizes in bytes, and those left out.

    Raises:
        UserError: the folder holds no model, files that are unknown, or texts with secrets or paths in them; names all.
    """
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(folder), fix="Check --folder.")
    paths = sorted(folder.iterdir())
    if not any(_WEIGHTS.fullmatch(path.name) or _is_checkpoint(path) for path in paths):
        fix = "Pass the --output_dir of train, merge or export as --folder."
        raise UserError("no model or adapter here", where=str(folder), fix=fix)
    published: dict[str, int] = {}
    left_out: list[str] = []
    problems: list[UserError] = []
    for path in paths:
        if path.name in _LEFT_OUT:
            left_out.append(path.name)
            continue
        problem = _why_not(path)
        if problem and path.name == RECORD:
            left_out.append(f"{path.name}, which {problem.what}")
        elif problem:
            problems.append(problem)
        else:
            published[path.name] = path.stat().st_size
    raise_all(problems)
    return published, left_out


def _is_checkpoint(path: Path) -> bool:
    return path.name.startswith("checkpoint-")


def _why_not(path: Path) -> UserError | None:
    """What speaks against publishing a file."""
    if _is_checkpoint(path):
        return UserError(
            "a checkpoint with the optimizer's state, which is not published",
            where=str(path),
            fix="Publish an export or a merged model, or move the checkpoints away.",
        )
    if path.is_symlink() or not path.is_file() or not _PUBLISHED.fullmatch(path.name):
        return UserError("is not part of a model, so it is not published", where=str(path), fix="Move it elsewhere.")
    find = find_secret if _is_prose(path) else find_token
    for text in _windows(path):
        if found := find(text):
            return UserError(
                f"holds what looks like a token or a password: {found}", where=str(path), fix="Take it out."
            )
        if _is_prose(path) and (place := _PATHS.search(text)):
            what = f"contains a path of this machine, {place[0]}"
            return UserError(what, where=str(path), fix="Replace it with a public name.")
    return None


def _is_prose(path: Path) -> bool:
    return not (_WEIGHTS.fullmatch(path.name) or _WORDS.fullmatch(path.name))


def _windows(path: Path) -> Iterator[str]:
    """A file's text in pieces that overlap; of weights the beginning."""
    most = _BEGINNING if _WEIGHTS.fullmatch(path.name) else path.stat().st_size
    kept = b""
    with path.open("rb") as file:
        while file.tell() < most and (piece := file.read(_WINDOW)):
            yield (kept + piece).decode("utf-8", "replace")
            kept = piece[-_OVERLAP:]


def _upload(config: PushConfig, files: list[str]) -> str:
    """Upload files in one commit, to a repository that is made if there is none yet; returns its address.

    The token is that of HF_TOKEN or `hf auth login`, or of MODELSCOPE_API_TOKEN or `modelscope login`.

    Raises:
        UserError: ModelScope's package is not installed, or the hub refuses.
    """
    login = "hf auth login" if config.to == "hf" else "modelscope login"
    api = _api_of(config)
    try:
        if config.to == "hf":
            address = str(api.create_repo(config.repo, private=config.private, exist_ok=True))
        else:
            visibility = "private" if config.private else "public"
            api.create_repo(config.repo, repo_type="model", visibility=visibility, exist_ok=True)
            address = f"{api.endpoint}/models/{config.repo}"
        say(f"Uploading to {address} ...")
        api.upload_folder(
            repo_id=config.repo, folder_path=config.folder, allow_patterns=files, commit_message="Upload by qingtune"
        )
    except Exception as error:  # of no common class
        reason = str(error).strip().splitlines() or [""]
        raise UserError(
            f"the hub refused the upload: {type(error).__name__}: {redact(reason[0])}",
            fix=f"Log in with `{login}`, or check the token in the environment and your rights to the repository.",
        ) from error
    return address


def _api_of(config: PushConfig) -> Any:
    if config.to == "hf":
        import huggingface_hub

        return huggingface_hub.HfApi()
    try:
        from modelscope.hub.api import HubApi  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("ModelScope's package is not installed", fix="pip install modelscope") from None
    return HubApi()
