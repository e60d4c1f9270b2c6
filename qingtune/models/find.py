"""Name | folder | .gguf file -> where the weights are. Looks at names and headers only, without torch."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qingtune.config.training import DEFAULT_MODEL
from qingtune.errors import UserError, shorten
from qingtune.files.digests import sha256_of
from qingtune.files.paths import default_cache, refuse_odd_name
from qingtune.files.weights_file import read_header, read_weights_header
from qingtune.models.config_file import context_length as context_length
from qingtune.models.config_file import read_model_config
from qingtune.models.multimodal import is_text, text_name

ANSWER_WITHIN_S = 4.0
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_HEADER = ("config.json",)
# Ends the name of the tensor that says how a weight in 4 bits is packed; the weight's own name comes before it.
NF4_MARK = ".quant_state.bitsandbytes__nf4"
HEADERS = "headers"  # where config.json files without weights are kept, in the cache
CONVERTED = "gguf-2"  # where converted .gguf files are kept, in the cache; the number changes with what is read
_MODELS = Path("models")  # the folder, in the current one, where models are put by hand and by the demo
_MOST_AT_HAND = 5  # of its models, that an error names
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine: `path` is a folder of Transformers' layout or a .gguf file; `name` was asked for."""

    name: str
    path: Path

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are in a .gguf file, to be converted before use."""
        return self.path.is_file()


def converted_folder(path: Path, cache_dir: str | None) -> Path:
    """Where the converted copy of a .gguf file is kept, by the file's hash."""
    return cache_folder(cache_dir) / CONVERTED / f"{path.stem}-{sha256_of(path)[:32]}"


def cache_folder(cache_dir: str | None) -> Path:
    """The cache that a setting names, or the default one."""
    return Path(os.path.expanduser(cache_dir)) if cache_dir else default_cache()


def find_model(name: str, cache_dir: str | None, hub: str) -> ModelSource:
    """Find a model: as a path, under models/ and the cache by its last part, then on a hub.

    Args:
        name: a folder, a .gguf file or `owner/model`.
        cache_dir: the setting; None for the default cache.
        hub: "auto", "hf" or "modelscope".

    Raises:
        UserError: nothing found (says what was tried and three ways on), or what was found cannot be used.
    """
    return _checked(_find(name, cache_dir, hub, header=False))


def find_header(name: str, cache_dir: str | None, hub: str) -> ModelSource:
    """Find as much of a model as says its shape, as find_model does: config.json or a .gguf file, without weights."""
    return _find(name, cache_dir, hub, header=True)


def _find(name: str, cache_dir: str | None, hub: str, *, header: bool) -> ModelSource:
    found, tried = _find_here(name, cache_dir)
    if found is not None:
        refuse_odd_name(found, "the model")
        return ModelSource(name, found)
    hubs = {"hf": _from_hugging_face, "modelscope": _from_modelscope}
    for hub_name in hubs if hub == "auto" else [hub]:
        answer = hubs[hub_name](name, cache_dir, header)
        if isinstance(answer, Path):
            return ModelSource(name, answer)
        tried.append(answer)
    listing = "".join(f"\n  {place}" for place in tried)
    raise UserError(
        f"the model was not found. Tried:{listing}\n"
        f"To fix it, download it elsewhere and put the folder at models/{Path(name).name}; "
        f"pass a .gguf file or a folder as the model; or set HF_ENDPOINT to a mirror, or --hub modelscope.{_at_hand()}",
        where=name,
    )


def _find_here(name: str, cache_dir: str | None) -> tuple[Path | None, list[str]]:
    """The model on this machine, outside the hubs' caches, and the places tried; UserError if the name is a path."""
    tried: list[str] = []
    for place in _places(name, cache_dir):
        if place.is_dir() or (place.is_file() and place.suffix == ".gguf"):
            return place, tried
        if place.is_file():
            of_folder = place.name == "config.json"
            fix = f"Pass its folder, {place.parent}." if of_folder else None
            raise UserError("this is neither a model folder nor a .gguf file", where=str(place), fix=fix)
        tried.append(str(place))
    if not _is_hub_name(name):
        raise UserError(
            f"no model folder or .gguf file here (nor at {tried[1]} or {tried[2]})",
            where=name,
            fix=f"Check the path. A name such as {DEFAULT_MODEL} is looked up on a hub.{_at_hand()}",
        )
    return None, tried


def _at_hand() -> str:
    """A sentence on the models in models/, of which one may be meant; empty if there are none."""
    there = sorted([*_MODELS.glob("*.gguf"), *(config.parent for config in _MODELS.glob("*/config.json"))])
    if not there:
        return ""
    names = ", ".join(shorten(path.name) for path in there[:_MOST_AT_HAND])
    more = f" and {len(there) - _MOST_AT_HAND:,} more" * (len(there) > _MOST_AT_HAND)
    return f" {_MODELS}/ holds {names}{more}: pass {shorten(str(there[0]))} as the model."


def _places(name: str, cache_dir: str | None) -> tuple[Path, ...]:
    last = Path(name).name
    return Path(os.path.expanduser(name)), _MODELS / last, cache_folder(cache_dir) / last


def is_here(name: str, cache_dir: str | None, hub: str) -> bool:
    """Whether `find_model` finds a model without asking a hub."""
    if any(place.exists() for place in _places(name, cache_dir)):
        return True
    return hub != "modelscope" and _is_hub_name(name) and _downloaded(name, cache_dir, _MODEL_FILES) is not None


def _is_hub_name(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf")


def _from_hugging_face(name: str, cache_dir: str | None, header: bool) -> Path | str:
    """The folder of the model, downloaded if need be; or a line on why it could not be had.

    A header is downloaded to a separate cache: in the common one, a later run would take it for the whole model.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    files, place = (_HEADER, str(cache_folder(cache_dir) / HEADERS)) if header else (_MODEL_FILES, cache_dir)
    for each in dict.fromkeys((cache_dir, place)):
        local = _downloaded(name, each, files)
        if local and (not header or (local / "config.json").exists()):
            return local
    endpoint = os.environ.get("HF_ENDPOINT") or "Hugging Face"
    if any(os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE") for variable in _OFFLINE):
        return f"{endpoint}: not in the local cache, and HF_HUB_OFFLINE is set"
    answer = _within(ANSWER_WITHIN_S, lambda: huggingface_hub.HfApi().model_info(name, timeout=ANSWER_WITHIN_S))
    gated = f"{endpoint}: {name} requires that you accept its licence and log in (`hf auth login`)"
    if isinstance(answer, GatedRepoError):
        return gated
    if isinstance(answer, RepositoryNotFoundError):
        return f"{endpoint}: no such model, or it is private"
    if isinstance(answer, Exception):
        return f"{endpoint}: no answer ({type(answer).__name__})"
    try:
        return Path(huggingface_hub.snapshot_download(name, cache_dir=place, allow_patterns=list(files)))
    except GatedRepoError:  # the page of such a model is public, its files are not
        return gated
    except Exception as error:  # the transport raises many types of errors; each is reported
        return f"{endpoint}: the download was interrupted ({type(error).__name__})"


def _downloaded(name: str, cache_dir: str | None, files: tuple[str, ...]) -> Path | None:
    """The folder with a model's files, if they were downloaded before."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, cache_dir=cache_dir, allow_patterns=list(files), local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, FileNotFoundError, ValueError):
        return None


def _from_modelscope(name: str, cache_dir: str | None, header: bool) -> Path | str:
    """As _from_hugging_face."""
    try:
        import modelscope  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "ModelScope: its package is not installed (`pip install modelscope`)"

    def ask() -> object:
        if not header:
            return modelscope.HubApi().get_model(name)
        place = str(cache_folder(cache_dir) / HEADERS)
        return modelscope.snapshot_download(name, cache_dir=place, allow_patterns=list(_HEADER))

    answer = _within(ANSWER_WITHIN_S, ask)
    if isinstance(answer, Exception):
        return f"ModelScope: no answer or no such model ({type(answer).__name__})"
    try:
        return Path(str(answer) if header else modelscope.snapshot_download(name, cache_dir=cache_dir))
    except Exception as error:  # its errors have no common class
        return f"ModelScope: the download was interrupted ({type(error).__name__})"


def _within(seconds: float, ask: Callable[[], object]) -> object:
    """What `ask` returns or raises; TimeoutError if it takes longer (name look-ups have no time limit of their own)."""
    answer: list[object] = [TimeoutError()]

    def run() -> None:
        try:
            answer[0] = ask()
        except Exception as error:  # any failure of the network or the hub is reported to the user
            answer[0] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]


def _checked(source: ModelSource) -> ModelSource:
    """Refuse what cannot be loaded safely, before anything heavy is done."""
    if source.is_gguf:
        with source.path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError("not a GGUF file", where=str(source.path), fix="Download it again.")
        return source
    folder = source.path
    config = read_model_config(folder)
    if not config.get("model_type"):
        raise UserError("config.json names no model_type", where=str(folder))
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        raise UserError(
            "no .safetensors weights here" + pickled * "; .bin and .pt weights are pickles, which can run code",
            where=str(folder),
            fix="Use a safetensors version of the model." if pickled else "Check that the download is complete.",
        )
    _check_quantization(folder, config)
    return source


def _check_quantization(folder: Path, config: dict[str, Any]) -> None:
    """Refuse weights that are stored in a quantised form which is not read here."""
    if "quantization_config" not in config or stored_in_4bit(folder):
        return
    settings: dict[str, Any] = config["quantization_config"] or {}
    method = str(settings.get("quant_method") or "an unnamed method")
    if "bitsandbytes" in method:
        kind, storage = settings.get("bnb_4bit_quant_type", "fp4"), settings.get("bnb_4bit_quant_storage", "uint8")
        method += f" ({kind}, stored as {storage})" if settings.get("load_in_4bit") else " in 8 bits"
    raise UserError(
        f"the weights are quantised with {method}, which is not supported",
        where=str(folder),
        fix="Use the model in 16 bits, as a .gguf file, or in bitsandbytes' nf4, stored as uint8.",
    )


def stored_in_4bit(folder: Path) -> bool:
    """Whether linear layers are stored in 4 bits as bitsandbytes and Transformers do (NF4)."""
    settings: dict[str, Any] = read_model_config(folder).get("quantization_config") or {}
    by_bitsandbytes = settings.get("quant_method", "bitsandbytes") == "bitsandbytes"
    nf4 = bool(settings.get("load_in_4bit")) and settings.get("bnb_4bit_quant_type") == "nf4"
    return by_bitsandbytes and nf4 and settings.get("bnb_4bit_quant_storage", "uint8") == "uint8"


def fingerprint(folder: Path) -> str:
    """A short hash by which the weights are known again: every tensor's name, type, shape and 64 of its bytes.

    It does not depend on how the tensors are spread over files. Reads a few kilobytes of each file.
    """
    pieces: list[bytes] = []
    for path in sorted(folder.glob("*.safetensors")):
        header, start_of_data = read_header(path)
        with path.open("rb") as file:
            for name, entry in header.items():
                middle = (entry.start + entry.end) // 2
                file.seek(start_of_data + middle)
                some = file.read(min(64, entry.end - middle))
                pieces.append(f"{name} {entry.dtype} {list(entry.shape)} ".encode() + some)
    return hashlib.sha256(b"\n".join(sorted(pieces))).hexdigest()[:16]


def stored_numbers(folder: Path) -> int:
    """How many numbers the model's weights are, from the files' headers; a head that is the embedding counts once.

    Of a multimodal checkpoint the text alone counts. A weight in 4 bits counts with its original size, without its
    scales and tables.
    """
    tied = bool(read_model_config(folder).get("tie_word_embeddings"))
    shapes = {
        name: entry.shape
        for name, entry in read_weights_header(folder).items()
        if is_text(name) and not (tied and text_name(name) == "lm_head.weight")
    }
    packed = {name.removesuffix(NF4_MARK) for name in shapes if name.endswith(NF4_MARK)}
    return sum(
        math.prod(shape) * (2 if name in packed else 1)
        for name, shape in shapes.items()
        if name.partition(".weight.")[0] + ".weight" not in packed or name in packed
    )
