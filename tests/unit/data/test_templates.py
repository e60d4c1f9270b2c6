"""Chat templates are code of strangers: they render as Transformers renders them, and can do nothing else."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer

from qingtune.data import templates
from qingtune.data.templates import TemplateError, render_template
from qingtune.data.tokenize import PLAIN_TEMPLATE, make_template
from qingtune.errors import UserError

TURNS = [
    {"role": "system", "content": "<b>短</b> & 'plain'"},
    {"role": "user", "content": 'Say "hi"\n  twice  '},
    {"role": "assistant", "content": "hi 🥖\\n"},
    {"role": "user", "content": ""},
]
# What the templates of Qwen, Llama, Mistral, Gemma and SmolLM are made of.
PARTS = {
    "chatml": CHATML,
    "plain": PLAIN_TEMPLATE,
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "whitespace": "  {% if true %}\n  x\n  {%- endif %}\n\n"
    "{% for m in messages -%}\n  {{ m['content'] | trim }}\n{% endfor %}",
    "loop control": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{{ loop.last }}{% break %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m.role %}{% endfor %}{{ ns.n }}{{ ns.last }}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages[1] | tojson(ensure_ascii=True) }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ messages[::-1][0].content }}",
    "dict": "{{ dict(a=1).a }}{{ dict.fromkeys(['x'], 2) }}",
    "macro": "{% macro turn(m) %}[{{ m.role }}]{{ m.content.split('\\n')[-1].strip() }}{% endmacro %}"
    "{{ turn(messages[1]) }}",
    "tools": "{% if tools %}t{% endif %}{% if documents is defined %}d{% endif %}{% if not missing %}m{% endif %}",
    "prompt": "{% if add_generation_prompt %}yes{% else %}no{% endif %}",
    "strings": "{{ messages[0].content is string }}{{ '%s-%d' | format('a', 3) }}{{ messages | length }}{{ 'a' ~ 1 }}",
}


@pytest.fixture
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A second for each conversation, in a process of this test's own."""
    templates._worker.cache_clear()
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    yield
    templates._worker.cache_clear()


def render(template: str, messages: list[dict[str, str]] = TURNS, **variables: str) -> str:
    return render_template(template, variables, messages, add_generation_prompt=True)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_templates_render_as_transformers_renders_them(name: str, prompt: bool) -> None:
    tokenizer = make_tokenizer(PARTS[name])
    theirs = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompt)
    ours = render_template(PARTS[name], tokenizer.special_tokens_map, TURNS, add_generation_prompt=prompt)
    assert ours == theirs


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append({}) }}",
    "{{ (messages | map(attribute='__class__') | first).mro() }}",
    "{{ dict.__class__.__base__.__subclasses__() }}",
    "{% set ns = namespace() %}{% set ns.__class__ = dict %}",
    "{{ lipsum.__globals__['os'].popen('touch owned').read() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ strftime_now.__globals__['os'].system('touch owned') }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_no_way_leads_out(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TemplateError):
        render(template)
    assert list(tmp_path.iterdir()) == []


BOTTOMLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for a in range(99999) %}{% for b in range(9999) %}{{ 'x' }}{% endfor %}{% endfor %}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "a long text": "{{ 'x' * 10 ** 11 }}",
    "doubling": "{% set ns = namespace(s='x' * 99) %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "padding": "{{ 'x' | center(10 ** 11) }}",
}


@pytest.mark.parametrize("name", BOTTOMLESS)
@pytest.mark.usefixtures("_short_patience")
def test_time_and_memory_are_bounded(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError):
        render(BOTTOMLESS[name])
    assert time.monotonic() - began < 8
    assert render("{{ messages[0].role }}") == "system"  # the next one gets a process that works


@pytest.mark.usefixtures("_short_patience")
def test_a_looping_template_is_refused_with_a_message() -> None:
    with pytest.raises(UserError, match=r"the model's chat template fails: it was stopped after 1 s"):
        make_template(make_tokenizer(BOTTOMLESS["nested loops"]), [])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'x' * 3000000 }}", r"fails: it writes 3,000,000 characters for a conversation of 5\."),
        ("{{ raise_exception('x' * 3000000) }}", r"fails: x{150}\.\.\.x{75} \(1,000 characters\)\."),
        ("", None),
        ("{{ undefined }}", "does not write the user's text"),
        ("no messages at all", "does not write the user's text"),
        ("{% for m in messages[1:] %}{{ m.content }}{% endfor %}", "does not write the user's text"),
    ],
)
def test_templates_write_the_conversation_and_not_much_else(template: str, said: str | None) -> None:
    tokenizer = make_tokenizer(template)
    if said is None:  # an empty one is none
        assert make_template(tokenizer, []).notices
        return
    with pytest.raises(UserError, match=said):
        make_template(tokenizer, [])


def test_long_conversations_are_written() -> None:
    content = "x" * 2_000_000
    assert render("{{ messages[0].content * 3 }}", [{"role": "user", "content": content}]) == content * 3


def test_a_row_on_which_a_template_never_ends_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from qingtune.data.format import Conversation, Message
    from qingtune.data.tokenize import tokenize

    templates._worker.cache_clear()
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    trap = CHATML + "{% if messages[0].content == 'trap' %}" + BOTTOMLESS["nested loops"] + "{% endif %}"
    template = make_template(make_tokenizer(trap), [])
    rows = [
        Conversation((Message("user", text), Message("assistant", "a")), f"rows:{number}")
        for number, text in enumerate(["fine", "trap", "fine"])
    ]
    found = tokenize(template, rows, 100, "drop")
    templates._worker.cache_clear()
    assert [fault.origin for fault in found.faults] == ["rows:1"]
    assert [sample.origin for sample in found.samples] == ["rows:0", "rows:2"]


def test_secrets_of_the_environment_are_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    templates._worker.cache_clear()
    render("x")
    environment = Path(f"/proc/{templates._worker()._process.pid}/environ")
    if not environment.exists():
        pytest.skip("no /proc here")
    assert b"hf_planted" not in environment.read_bytes()


def test_ctrl_c_is_the_parents_to_answer() -> None:
    render("x")
    process: Any = templates._worker()._process
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert render("{{ 1 + 1 }}") == "2"
    assert templates._worker()._process is process


def test_what_ctrl_c_broke_off_does_not_answer_the_next_question() -> None:
    render("x")
    process: Any = templates._worker()._process
    pipe = process.stdout

    class InterruptedOnce:
        def readline(self) -> bytes:
            process.stdout = pipe
            raise KeyboardInterrupt

    process.stdout = InterruptedOnce()
    with pytest.raises(KeyboardInterrupt):
        render("first")
    assert render("second") == "second"


def test_a_lower_limit_of_the_shell_is_no_hindrance(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (5 * 10**8, 5 * 10**8))\n"
        "from qingtune.data.templates import render_template\n"
        "print(render_template('{{ 1 + 1 }}', {}, [], add_generation_prompt=True))"
    )
    assert run("-c", code).stdout == "2\n"
