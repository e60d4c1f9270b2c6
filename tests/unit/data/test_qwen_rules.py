"""Text that Qwen's pre-tokenizer cuts in its own ways gets the tokenizer's ids, in training and in inference.

The rules are those that Qwen2 publishes in its tokenizer.json: NFC, a regular expression, bytes. The vocabulary is
small and trained on the texts themselves, so that merges across a wrong cut would show.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, write_jsonl

from qingtune.data.format import Message, read_conversations
from qingtune.data.prompts import rows_with_prompts
from qingtune.data.tokenize import Template, make_template, prompt_ids, tokenize

CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = {
    "digits": "In 2024, 1234567890 of 3.14159 and １２３ or ٣٤٥ cost ¥1,299.00.",
    "contractions": "I'm sure they'LL say we've don't; it's O'Neil's, 'twas I'd",
    "CJK": "蓝门面包房，地址：磨坊巷4号。東京タワーと한국어、ｶﾀｶﾅ。",
    "emoji": "🥖🥐 👩‍👩‍👧‍👦 👍🏽 🇨🇳🇫🇷 ❤️ #️⃣ 🫖.",
    "whitespace": "a  b   c \t d\u00a0e\u3000f \n\n  g\r\n\r\nh \n",
    "combining": "e\u0301 a\u030a n\u0303o Z\u0351\u0343\u0310 \u1100\u1161\u11a8 q\u0307\u0323",
    "not NFC": "\u212b \u2126 \u0958 \uf900 \u00c5 \ufb01",
    "code": "def f(x):\n    return {'a': x**2}  # ok\n\n\n\tif x>=1e-3: pass",
    "markup as text": "<|im_end |> < |im_start|> <think> &amp; \\n",
    "rare": "\u200b\ufeffx\u202ey \U0001d54f \ue000 \x7f\x01 ﷽ ʼn",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def qwen_like() -> Any:
    """A tokenizer by Qwen2's rules."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(CUT), behavior="isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    inner.train_from_iterator([*TEXTS.values()] * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML,
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def template() -> Template:
    return make_template(qwen_like(), [])


def test_the_rules_are_qwens(template: Template) -> None:
    """Digits and contractions stand alone; words take the last space before them, punctuation the line ends after."""
    inner = template.tokenizer.backend_tokenizer.pre_tokenizer

    def pieces(text: str) -> list[str]:
        return [text[start:end] for _, (start, end) in inner.pre_tokenize_str(text)]

    assert pieces("In 2024") == ["In", " ", "2", "0", "2", "4"]
    assert pieces("they'LL we've") == ["they", "'LL", " we", "'ve"]
    assert pieces("a   b") == ["a", "  ", " b"]
    assert pieces("x!\r\n\r\ny \n z") == ["x", "!\r\n\r\n", "y", " \n", " z"]
    assert pieces("。蓝门4号") == ["。蓝门", "4", "号"]


@pytest.mark.parametrize("answer", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("asked", ["digits", "whitespace", "combining"])
def test_training_and_inference_give_the_tokenizers_ids(
    asked: str, answer: str, template: Template, tmp_path: Path
) -> None:
    question, tokenizer = TEXTS[asked], template.tokenizer
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"instruction": question, "output": answer}]))
    (conversation,) = read_conversations([path], None, "raise").conversations
    shown, said = (message.content for message in conversation.messages)
    assert (shown.strip(), said) == (question.strip(), answer)

    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": shown}], tokenize=False, add_generation_prompt=True
    )
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{text}{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
    (sample,) = tokenize(template, [conversation], 4096, "raise").samples
    assert sample.token_ids.tolist()[: len(whole)] == whole
    ((_, messages),) = rows_with_prompts(path)
    assert not isinstance(messages, str)
    assert prompt_ids(template, messages) == prompt == whole[: len(prompt)]
    trained = sample.token_ids[sample.trained].tolist()
    assert trained[: len(whole) - len(prompt)] == whole[len(prompt) :]
    assert tokenizer.decode(whole[len(prompt) : -1]) == unicodedata.normalize("NFC", answer)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_that_holds_a_control_token_is_cut_by_the_same_rules(text: str, template: Template) -> None:
    """Forged markup takes another way to ids, through a copy of the tokenizer; the text around it stays the same."""
    forged = prompt_ids(template, [Message("user", f"{text}\n\n<|im_end|>")])
    honest = prompt_ids(template, [Message("user", f"{text}\n\n")])
    start = len(honest) - honest[::-1].index(template.tokenizer.convert_tokens_to_ids("<|im_end|>")) - 1
    assert forged[:start] == honest[:start]
    assert forged.count(honest[start]) == honest.count(honest[start])
