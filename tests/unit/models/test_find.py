"""Models are looked up in a known order, hubs answer within seconds or are told of, and unsafe folders are refused."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from qingtune.errors import UserError
from qingtune.files.paths import default_cache
from qingtune.models import find
from qingtune.models.find import HEADERS, find_header, find_model

NAME = "owner/tiny-model"


@pytest.fixture(autouse=True)
def _empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder with an empty cache, and let a hub that a test does not set up fail it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QINGTUNE_CACHE", str(tmp_path / "default-cache"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def model_folder(folder: Path, config: str = '{"model_type": "llama"}', weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / weights).touch()
    return folder


def hubs(monkeypatch: pytest.MonkeyPatch, hf: Path | str = "HF: no", modelscope: Path | str = "MS: no") -> list[str]:
    """Set what the hubs answer; returns the list of those asked."""
    asked: list[str] = []
    for name, answer in (("hugging_face", hf), ("modelscope", modelscope)):
        monkeypatch.setattr(find, f"_from_{name}", lambda *_, name=name, answer=answer: asked.append(name) or answer)
    return asked


# --- The order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dir", [None, "my-cache"])
def test_a_path_comes_before_models_and_models_before_the_cache(
    cache_dir: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hubs(monkeypatch)
    cache = Path(cache_dir) if cache_dir else default_cache()
    places = [cache / "tiny-model", Path("models/tiny-model"), Path(NAME)]
    for place in places:  # each wins over those before it
        model_folder(place)
        found = find_model(NAME, cache_dir, "auto")
        assert (found.name, found.path, found.is_gguf) == (NAME, place, False)
    assert asked == []


def test_a_gguf_file_is_found_in_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hubs(monkeypatch)
    for place in (default_cache(), Path("models"), Path("elsewhere")):
        place.mkdir()
        (place / "tiny.gguf").write_bytes(b"GGUF rest")
        found = find_model("elsewhere/tiny.gguf", None, "auto")
        assert (found.path, found.is_gguf) == (place / "tiny.gguf", True)
    assert asked == []


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    place = model_folder(tmp_path / "home" / "m")
    cached = model_folder(tmp_path / "home" / "c" / "other")
    assert find_model("~/m", None, "auto").path == place
    assert find_model("owner/other", "~/c", "auto").path == cached


@pytest.mark.parametrize(
    ("hub", "expected"),
    [("auto", ["hugging_face", "modelscope"]), ("hf", ["hugging_face"]), ("modelscope", ["modelscope"])],
)
def test_what_is_not_here_is_told_with_all_that_was_tried(
    hub: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hubs(monkeypatch)
    with pytest.raises(UserError) as caught:
        find_model(NAME, None, hub)
    assert asked == expected
    answers = [{"hugging_face": "HF: no", "modelscope": "MS: no"}[name] for name in expected]
    head, *tried, ways = str(caught.value).split("\n")
    assert head == f"{NAME}: the model was not found. Tried:"
    assert [line.strip() for line in tried] == [
        str(place) for place in (Path(NAME), Path("models/tiny-model"), default_cache() / "tiny-model", *answers)
    ]
    for way in ("models/tiny-model", ".gguf file or a folder", "HF_ENDPOINT", "--hub modelscope"):
        assert way in ways


@pytest.mark.parametrize("name", [NAME, "./none", "none.gguf"])
def test_what_models_holds_is_named_where_a_model_is_not_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hubs(monkeypatch)
    with pytest.raises(UserError) as caught:
        find_header(name, None, "auto")
    assert "models/ holds" not in str(caught.value)
    for folder in ("mine", "no-model"):
        (Path("models") / folder).mkdir(parents=True)
    (Path("models") / "mine" / "config.json").write_text("{}")
    for number in range(5):
        (Path("models") / f"SmolLM2-{number}.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError) as caught:
        find_header(name, None, "auto")
    few = ", ".join(f"SmolLM2-{number}.gguf" for number in range(5))
    pass_it = f"pass {Path('models') / 'SmolLM2-0.gguf'} as the model."
    assert str(caught.value).endswith(f" models/ holds {few} and 1 more: {pass_it}")


@pytest.mark.parametrize("name", ["./owner/m", "/no/such", "~/m", "a/b/c", "m.gguf", "owner/m.gguf", "../m"])
def test_paths_are_not_looked_up_on_a_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hubs(monkeypatch)
    last = name.rsplit("/", 1)[-1]
    with pytest.raises(UserError) as caught:
        find_model(name, None, "auto")
    assert asked == []
    assert str(Path("models") / last) in str(caught.value)
    assert "Check the path" in str(caught.value)


def test_the_first_hub_that_has_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "downloaded")
    asked = hubs(monkeypatch, hf=folder)
    assert find_model(NAME, None, "auto").path == folder
    assert asked == ["hugging_face"]
    asked = hubs(monkeypatch, modelscope=folder)
    assert find_model(NAME, None, "auto").path == folder
    assert asked == ["hugging_face", "modelscope"]


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face(
    monkeypatch: pytest.MonkeyPatch, *, info: object = None, local: object = None, download: object = None
) -> list[dict[str, Any]]:
    """Set what the library's calls return, or raise where it is an exception; returns the downloads asked for."""
    calls: list[dict[str, Any]] = []

    def answer(value: object) -> object:
        if isinstance(value, Exception):
            raise value
        return value() if callable(value) else value

    def snapshot_download(name: str, **options: Any) -> object:
        calls.append({"name": name, **options})
        return answer((local or LocalEntryNotFoundError("none")) if options.get("local_files_only") else download)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: answer(info))
    return calls


def bare(kind: type[Exception]) -> Exception:
    """An error of the hub's library without the response that it is made of."""
    return kind.__new__(kind)


def test_a_model_downloaded_before_is_used_without_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "snapshot")
    calls = hugging_face(monkeypatch, info=AssertionError("asked"), local=str(folder))
    assert find_model(NAME, "my-cache", "hf").path == folder
    assert [(call["name"], call["cache_dir"], call.get("local_files_only")) for call in calls] == [
        (NAME, "my-cache", True)
    ]


def test_a_model_is_downloaded_without_pickles_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "snapshot")
    calls = hugging_face(monkeypatch, download=str(folder))
    assert find_model(NAME, None, "hf").path == folder
    patterns = calls[-1]["allow_patterns"]
    assert {"*.safetensors", "*.json"} <= set(patterns)
    assert not any(pattern.endswith((".bin", ".pt", ".py", ".gguf", "*")) for pattern in patterns)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_no_hub_is_asked(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    hugging_face(monkeypatch, info=lambda: pytest.fail("asked"))
    with pytest.raises(UserError, match="not in the local cache, and HF_HUB_OFFLINE is set"):
        find_model(NAME, None, "hf")


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"info": bare(GatedRepoError)}, "accept its licence and log in"),
        ({"download": bare(GatedRepoError)}, "accept its licence and log in"),  # the usual way: its page is public
        ({"info": bare(RepositoryNotFoundError)}, "no such model, or it is private"),
        ({"info": ConnectionError("x")}, "no answer (ConnectionError)"),
        ({"info": bare(HfHubHTTPError)}, "no answer (HfHubHTTPError)"),
        ({"download": bare(HfHubHTTPError)}, "the download was interrupted (HfHubHTTPError)"),
        ({"download": OSError("disk full")}, "the download was interrupted (OSError)"),
        ({"download": HfHubHTTPError.__mro__[1]("x")}, "the download was interrupted (HTTPError)"),  # of the transport
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_hugging_face_says_is_told(answers: dict[str, object], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face(monkeypatch, **answers)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    with pytest.raises(UserError) as caught:
        find_model(NAME, None, "hf")
    line = next(line for line in str(caught.value).splitlines() if "mirror.example:" in line)
    assert told in line


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(find, "ANSWER_WITHIN_S", 0.05)
    hugging_face(monkeypatch, info=lambda: over.wait(1.5), download=AssertionError("downloaded"))
    with pytest.raises(UserError, match="Hugging Face: no answer \\(TimeoutError\\)"):
        find_model(NAME, None, "hf")
    over.set()


# --- ModelScope ------------------------------------------------------------------------------------------------------


def test_modelscope_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError, match="package is not installed \\(`pip install modelscope`\\)") as caught:
        find_model(NAME, None, "modelscope")
    assert "Hugging Face" not in str(caught.value)


class FileDownloadError(Exception):
    """Named and made as modelscope has it."""


def fails(error: Exception) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({}, ""),
        ({"get_model": fails(ValueError("x"))}, "no answer or no such model (ValueError)"),
        ({"snapshot_download": fails(OSError("x"))}, "the download was interrupted (OSError)"),
        ({"snapshot_download": fails(FileDownloadError())}, "the download was interrupted (FileDownloadError)"),
    ],
)
def test_modelscopes_answers(
    answers: dict[str, Callable[..., object]], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "downloaded")
    calls = {"get_model": lambda *_: {}, "snapshot_download": lambda *_, **__: str(folder)} | answers
    package = SimpleNamespace(
        HubApi=lambda: SimpleNamespace(get_model=calls["get_model"]), snapshot_download=calls["snapshot_download"]
    )
    monkeypatch.setitem(sys.modules, "modelscope", package)  # type: ignore[arg-type]
    if told:
        with pytest.raises(UserError) as caught:
            find_model(NAME, None, "modelscope")
        assert f"ModelScope: {told}" in str(caught.value)
    else:
        assert find_model(NAME, None, "modelscope").path == folder


# --- Headers ---------------------------------------------------------------------------------------------------------


def test_a_header_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hubs(monkeypatch)
    folder = tmp_path / "models" / "tiny-model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert find_header(NAME, None, "auto").path == Path("models/tiny-model")
    with pytest.raises(UserError, match=r"no \.safetensors weights here"):
        find_model(NAME, None, "auto")


def test_only_the_header_is_fetched_and_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "snapshot"
    calls = hugging_face(monkeypatch, download=str(folder))
    assert find_header(NAME, "my-cache", "hf").path == folder
    fetched = calls[-1]
    assert fetched["allow_patterns"] == ["config.json"]
    assert fetched["cache_dir"] == str(Path("my-cache") / HEADERS)  # a run must not take it for the whole model
    assert [call["cache_dir"] for call in calls[:-1]] == ["my-cache", str(Path("my-cache") / HEADERS)]


def test_the_header_of_a_downloaded_model_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "snapshot")
    hugging_face(monkeypatch, info=AssertionError("asked"), local=str(folder))
    assert find_header(NAME, None, "hf").path == folder


def test_a_header_from_modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    package = SimpleNamespace(snapshot_download=lambda name, **how: asked.append(how) or str(tmp_path))
    monkeypatch.setitem(sys.modules, "modelscope", package)  # type: ignore[arg-type]
    assert find_header(NAME, None, "modelscope").path == tmp_path
    assert asked == [{"cache_dir": str(default_cache() / HEADERS), "allow_patterns": ["config.json"]}]


def test_a_header_that_is_nowhere_is_told_as_a_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    hugging_face(monkeypatch, info=bare(RepositoryNotFoundError))
    with pytest.raises(UserError, match="the model was not found") as caught:
        find_header(NAME, None, "auto")
    for told in ("no such model", "ModelScope: its package is not installed", "To fix it, download"):
        assert told in str(caught.value)


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "no config.json here: this is not a model folder"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "holds an adapter, not a model.*--lora_model"),
        ({"config.json": '{"model_type": "llama"}', "pytorch_model.bin": ""}, "pickles, which can run code"),
        ({"config.json": '{"model_type": "llama"}', "model.pth": ""}, "pickles, which can run code"),
        (
            {"config.json": '{"model_type": "llama"}'},
            "no .safetensors weights here. Check that the download is complete",
        ),
        ({"config.json": "{}", "model.safetensors": ""}, "names no model_type"),
        (
            {"config.json": '{"model_type": ["llama"]}', "model.safetensors": ""},
            '"model_type".* a name of at most 100 characters is expected',
        ),
        ({"config.json": '{"model_type"', "model.safetensors": ""}, r"config\.json:1:14: not valid JSON"),
        ({"config.json": "[]", "model.safetensors": ""}, r"config\.json: a JSON object is expected"),
    ],
)
def test_folders_that_hold_no_usable_model(files: dict[str, str], told: str, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "bad"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        find_model("owner/bad", None, "auto")


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b""])
def test_a_config_that_is_no_text(content: bytes, tmp_path: Path) -> None:
    (model_folder(tmp_path / "bad") / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"bad.config\.json:?.*: not (valid JSON|UTF-8)"):
        find_model("bad", None, "auto")


def test_a_download_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face(monkeypatch, download=str(model_folder(tmp_path / "snapshot", weights="pytorch_model.bin")))
    with pytest.raises(UserError, match="pickles"):
        find_model(NAME, None, "hf")


@pytest.mark.parametrize(
    ("name", "told"), [("a.gguf", "not a GGUF file"), ("a.txt", "neither a model folder nor a .gguf file")]
)
def test_files_that_are_no_model(name: str, told: str) -> None:
    Path(name).write_text("<html>Not found</html>", encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}: .*{told}"):
        find_model(name, None, "auto")
