"""Attacks by GGUF files."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from attack_case import CHECK_TOKENS, EXPORT, INFER, PLAN, TRAIN, Argv, Case, Expected, Place, Spoil, nothing, with_word
from attack_values import ESCAPES, fifo, made_folder, replaced, shown

GROUP = "GGUF"
FILE = "model.gguf"
NEEDS = (FILE, "rows.jsonl")
TEXT, ARRAY = 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NAMES = (FILE, "model.gguf:", "GGUF", "template", "tokenizer")


def _of_gguf(argv: Argv) -> Argv:
    return with_word(argv, "model", FILE)


COMMANDS: tuple[Argv, ...] = tuple(_of_gguf(argv) for argv in (INFER, TRAIN, PLAN, CHECK_TOKENS, EXPORT))
LOADING: tuple[Argv, ...] = (COMMANDS[0], COMMANDS[1])


@dataclass
class Gguf:
    """A file's parts: values as their kind and bytes, tensors as sizes, kind and offset."""

    version: int
    values: list[tuple[str, int, bytes]]
    tensors: list[tuple[str, tuple[int, ...], int, int]]
    data: bytes
    counts: tuple[int, int] | None = None
    alignment: int = 32
    begin: bytes = field(default=b"GGUF")

    def set(self, name: str, kind: int, raw: bytes) -> None:
        """Set a value, in its place where it has one."""
        if all(name != known for known, _, _ in self.values):
            self.values.append((name, kind, raw))
        self.values = [(known, kind, raw) if known == name else (known, old, its) for known, old, its in self.values]

    def written(self) -> bytes:
        """The file."""
        tensors, values = self.counts or (len(self.tensors), len(self.values))
        head = self.begin + struct.pack("<IQQ", self.version, tensors, values)
        head += b"".join(text(name) + struct.pack("<I", kind) + raw for name, kind, raw in self.values)
        for name, sizes, kind, offset in self.tensors:
            head += text(name) + struct.pack("<I", len(sizes)) + b"".join(struct.pack("<Q", size) for size in sizes)
            head += struct.pack("<IQ", kind, offset % 2**64)
        return head + bytes(-len(head) % self.alignment) + self.data


def text(value: str | bytes) -> bytes:
    """A text as GGUF keeps it."""
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def parse(content: bytes) -> Gguf:
    """A good file's parts."""
    at = 24
    version, tensors, values = struct.unpack("<IQQ", content[4:24])

    def take(code: str) -> Any:
        nonlocal at
        size = struct.calcsize(f"<{code}")
        at += size
        return struct.unpack(f"<{code}", content[at - size : at])[0]

    def take_text() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return content[at - length : at].decode()

    def pass_by(kind: int) -> None:
        if kind == TEXT:
            take_text()
        elif kind == ARRAY:
            inner, count = take("I"), take("Q")
            for _ in range(count):
                pass_by(inner)
        else:
            take(_CODES[kind])

    found = Gguf(version, [], [], b"")
    for _ in range(values):
        name, kind, start = take_text(), take("I"), at
        pass_by(kind)
        found.values.append((name, kind, content[start:at]))
    for _ in range(tensors):
        name, count = take_text(), take("I")
        sizes = tuple(take("Q") for _ in range(count))
        found.tensors.append((name, sizes, take("I"), take("Q")))
    found.data = content[at + (-at % 32) :]
    return found


def changed(change: Callable[[Gguf], None]) -> Spoil:
    """Rewrite the file with changed parts."""

    def spoil(place: Place) -> None:
        parts = parse((place / FILE).read_bytes())
        change(parts)
        place.write(FILE, parts.written())

    return spoil


def _u32(value: int) -> tuple[int, bytes]:
    return 4, struct.pack("<I", value)


def _texts(*values: str | bytes) -> tuple[int, bytes]:
    return ARRAY, struct.pack("<IQ", TEXT, len(values)) + b"".join(text(value) for value in values)


_OTHER_KINDS: dict[str, tuple[int, bytes]] = {
    "zero": _u32(0),
    "huge": _u32(2**32 - 1),
    "text": (TEXT, text("eight")),
    "nan": (6, struct.pack("<f", float("nan"))),
    "array": (ARRAY, struct.pack("<IQI", 4, 1, 2)),
    "unknown-kind": (99, b""),
    "long-text": (TEXT, struct.pack("<Q", 2**62)),
    "array-of-2**60": (ARRAY, struct.pack("<IQ", 4, 2**60)),
    "deep-array": (ARRAY, struct.pack("<IQ", ARRAY, 1) * 50_000),
}
_KEYS = (
    "general.architecture", "qwen2.embedding_length", "qwen2.block_count", "qwen2.attention.head_count",
    "qwen2.attention.head_count_kv", "qwen2.context_length", "qwen2.rope.freq_base", "qwen2.feed_forward_length",
    "qwen2.attention.layer_norm_rms_epsilon", "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.model", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "tokenizer.chat_template",
)  # fmt: skip
_VALUES: dict[str, tuple[str, int, bytes]] = {
    "architecture-evil": ("general.architecture", TEXT, text("evil")),
    "architecture-escapes": ("general.architecture", TEXT, text(ESCAPES)),
    "architecture-up": ("general.architecture", TEXT, text("../../x")),
    "architecture-not-utf8": ("general.architecture", TEXT, text(b"\xff\xfe")),
    "eos-beyond": ("tokenizer.ggml.eos_token_id", *_u32(10**9)),
    "bos-beyond": ("tokenizer.ggml.bos_token_id", *_u32(10**9)),
    "no-tokens": ("tokenizer.ggml.tokens", *_texts()),
    "one-token": ("tokenizer.ggml.tokens", *_texts("a")),
    "same-tokens": ("tokenizer.ggml.tokens", *_texts(*["a"] * 320)),
    "bad-merges": ("tokenizer.ggml.merges", *_texts("a", "b c d", "")),
    "unknown-merges": ("tokenizer.ggml.merges", *_texts("nowhere here")),
    "model-evil": ("tokenizer.ggml.model", TEXT, text("evil")),
    "pre-evil": ("tokenizer.ggml.pre", TEXT, text("evil")),
    "template-escape": ("tokenizer.chat_template", TEXT, text("{{ ''.__class__.__mro__[1].__subclasses__() }}")),
    "template-code": ("tokenizer.chat_template", TEXT, text("{{ cycler.__init__.__globals__.os.system('id') }}")),
    "template-not-utf8": ("tokenizer.chat_template", TEXT, text(b"\xff{{ messages }}")),
    "alignment-0": ("general.alignment", *_u32(0)),
    "alignment-7": ("general.alignment", *_u32(7)),
    "alignment-huge": ("general.alignment", *_u32(2**31)),
    "alignment-text": ("general.alignment", TEXT, text("32")),
    "key-empty": ("", *_u32(1)),
    "key-huge": ("x" * 300_000, *_u32(1)),
    "key-null-byte": ("a\0b", *_u32(1)),
    "key-escapes": (ESCAPES, 99, b""),
    "file-type": ("general.file_type", *_u32(9999)),
    "split": ("split.count", 2, struct.pack("<H", 5)),
}  # fmt: skip


def _tensor(field_number: int, value: Any) -> Callable[[Gguf], None]:
    """Set a field of the second tensor: 0 name, 1 sizes, 2 kind, 3 offset."""

    def change(parts: Gguf) -> None:
        entry: list[Any] = [*parts.tensors[1]]
        entry[field_number] = value(entry, parts) if callable(value) else value
        parts.tensors[1] = (entry[0], entry[1], entry[2], entry[3])

    return change


_TENSORS: dict[str, Callable[[Gguf], None]] = {
    **{f"kind-{kind}": _tensor(2, kind) for kind in (4, 5, 31, 99, 2**32 - 1, 0, 1, 30, 12, 16, 24)},
    **{f"sizes-{shown(sizes)}": _tensor(1, sizes)
       for sizes in ((), (0,), (2**63,), (2**32, 2**32), (1,) * 200, (33,), (31, 320), (2**64 - 1, 2), (32,))},
    "offset-end": _tensor(3, lambda entry, parts: len(parts.data)),
    "offset-huge": _tensor(3, 2**63),
    "offset-negative": _tensor(3, 2**64 - 32),
    "offset-odd": _tensor(3, lambda entry, parts: entry[3] + 1),
    "offset-first": _tensor(3, 0),
    "name-empty": _tensor(0, ""),
    "name-up": _tensor(0, "../../evil"),
    "name-escapes": _tensor(0, f"blk.0.{ESCAPES}"),
    "name-twice": _tensor(0, lambda entry, parts: parts.tensors[0][0]),
    "name-unknown": _tensor(0, "blk.0.evil.weight"),
    "name-layer-99": _tensor(0, "blk.99.attn_q.weight"),
    "no-tensors": lambda parts: parts.tensors.clear(),
    "no-values": lambda parts: parts.values.clear(),
    "data-cut": lambda parts: setattr(parts, "data", parts.data[:-100]),
    "data-none": lambda parts: setattr(parts, "data", b""),
    "data-nan": lambda parts: setattr(parts, "data", b"\xff" * len(parts.data)),
    **{f"version-{version}": (lambda parts, version=version: setattr(parts, "version", version))
       for version in (0, 1, 4, 2**24 * 3, 2**32 - 1)},
    **{f"counts-{shown(counts)}": (lambda parts, counts=counts: setattr(parts, "counts", counts))
       for counts in ((2**63, 5), (5, 2**63), (0, 0), (10**9, 10**9), (2**64 - 1, 2**64 - 1))},
}  # fmt: skip


def gguf_cases() -> Iterator[Case]:
    """Broken headers, tensors that lie about themselves, tokenizers that do not fit, and flipped bits."""
    number = 0
    for name, (key, kind, raw) in _VALUES.items():
        number += 1
        spoil = changed(lambda parts, key=key, kind=kind, raw=raw: parts.set(key, kind, raw))
        yield _case(f"value-{name}", spoil, COMMANDS[number % 5], "either", tty="escapes" in name)
    for key in _KEYS:
        for name, (kind, raw) in [*_OTHER_KINDS.items()][number % 3 :: 3]:
            number += 1
            spoil = changed(lambda parts, key=key, kind=kind, raw=raw: parts.set(key, kind, raw))
            yield _case(f"{key}-{name}", spoil, COMMANDS[number % 5], "either")
    for name, change in _TENSORS.items():
        number += 1
        yield _case(f"tensor-{name}", changed(change), LOADING[number % 2], "either", tty="escapes" in name)
    files: dict[str, Spoil] = {
        "empty": replaced(FILE, b""), "magic-only": replaced(FILE, b"GGUF"), "zeros": replaced(FILE, bytes(5000)),
        "pickle": replaced(FILE, b"\x80\x04cos\nsystem\n(S'id'\ntR."), "ggml": replaced(FILE, b"lmgg" + bytes(100)),
        "lfs": replaced(FILE, b"version https://git-lfs.github.com/spec/v1\n"), "fifo": fifo(FILE),
        "folder": made_folder(FILE),
        **{f"cut-{share}": replaced(FILE, lambda content, share=share: content[: len(content) * share // 100])
           for share in (1, 5, 10, 20, 30, 50, 90, 99)},
    }  # fmt: skip
    for index, (name, spoil) in enumerate(files.items()):
        yield _case(f"file-{name}", spoil, COMMANDS[index % 2], "refused")
    for index in range(24):
        yield _case(f"flipped-{index}", _flip, COMMANDS[index % 5], "either")
    for argv in COMMANDS:
        yield Case(GROUP, f"control-{argv[0]}", nothing, (argv,), "fine", NEEDS)
    harmless = changed(lambda parts: parts.set("general.a_new_key", TEXT, text("of tomorrow")))
    for argv in LOADING:
        yield Case(GROUP, f"control-new-key-{argv[0]}", harmless, (argv,), "fine", NEEDS)


def _case(name: str, spoil: Spoil, argv: Argv, expect: Expected, tty: bool = False) -> Case:
    return Case(GROUP, name, spoil, (argv,), expect, NEEDS, names=NAMES, tty=tty)


def _flip(place: Place) -> None:
    """Flip some bits of the header."""
    content = bytearray((place / FILE).read_bytes())
    for _ in range(place.draw.choice((1, 1, 3, 10))):
        content[place.draw.randrange(4, min(len(content), 12_000))] ^= 1 << place.draw.randrange(8)
    place.write(FILE, bytes(content))
