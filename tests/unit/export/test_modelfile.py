"""A Modelfile's Go template renders what the model's own template renders, or there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence

import go_template
import modelfile_twin
import pytest
from conftest import CHATML

from qingtune.data.format import Message
from qingtune.data.templates import render_template
from qingtune.data.tokenize import PLAIN_TEMPLATE
from qingtune.export.modelfile import GO_PLAIN, Render, TemplateNotExpressible, find_turns, left_out, modelfile

DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
# Like Qwen3: thoughts are cut out of answers before the last question, and put around the one after it.
THINKING = (
    "{% set here = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set here.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.index0 > here.last %}<think>\n\n</think>\n\n{% endif %}{{ parts[-1].lstrip('\\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
EXPRESSIBLE = {
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "plain": PLAIN_TEMPLATE,
    "thinking": THINKING,
    "llama 3": LLAMA3,
    "no end of turn": (
        "{% for m in messages %}| {{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}| assistant: {% endif %}"
    ),
    "braces": CHATML.replace("<|im_start|>", "{{ '{{ .System }}' }}"),
    "braces at the edges": CHATML.replace("{{ message['content'] }}", "{{ '{{{' + message['content'] + '}}{' }}"),
}
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "Bread?")],
    [("system", "Be kind."), ("user", "面包在哪？\n第二行")],
    [("user", "a"), ("assistant", "b {{ .Role }}"), ("user", "c")],
    [("system", "s"), *[("user", "{{ end }}"), ("assistant", '"""')] * 3, ("user", "🥖")],
    [("system", ""), ("user", "")],
    [("user", "a"), ("user", "b")],
]


def renderer(template: str) -> Render:
    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return render_template(
            template, {"eos_token": "</s>", "bos_token": "<s>"}, turns, add_generation_prompt=add_generation_prompt
        )

    return render


def in_go(template: str, messages: Sequence[Message]) -> str:
    """As Ollama renders it."""
    return go_template.render(template, Messages=[{"Role": m.role, "Content": m.content} for m in messages])


@pytest.mark.parametrize("template", EXPRESSIBLE.values(), ids=EXPRESSIBLE)
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_go_renders_what_jinja_renders(template: str, conversation: list[tuple[str, str]]) -> None:
    messages = [Message(role, text) for role, text in conversation]  # pyright: ignore[reportArgumentType]
    render = renderer(template)
    turns = find_turns(template, render, None)
    assert in_go(turns.go_template(), messages) == render(messages, True)


def test_a_token_that_llama_cpp_puts_in_front_is_left_out() -> None:
    render = renderer(LLAMA3)
    template = find_turns(LLAMA3, render, "<s>").go_template()
    for first in ("system", "user"):
        messages = [Message(first, "a"), Message("user", "b")]
        assert "<s>" + in_go(template, messages) == render(messages, True)


@pytest.mark.parametrize(
    ("template", "changed"),
    [(DEFAULT_SYSTEM, []), (LLAMA3, ["spaces"]), (THINKING, ["thoughts"])],
    ids=["nothing", "trimmed", "thoughts"],
)
def test_what_the_model_changes_in_contents_is_told(template: str, changed: list[str]) -> None:
    assert [words.split()[0] for words in find_turns(template, renderer(template), None).changed] == changed


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML + "{{ strftime_now('%Y') }}", "today's date"),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% elif m.role == 'user' %}"
            "[INST] {% if messages[0].role == 'system' and loop.index0 == 1 %}<<SYS>>{{ messages[0].content }}<</SYS>>"
            "{% endif %}{{ m.content }} [/INST]{% endif %}{% endfor %}",
            "depends on the turns around it",
        ),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML, "no system"),
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] | upper }}"), "depends on its content"),
        (CHATML.replace("{{ message['content'] }}", "{{ messages | length }}{{ message['content'] }}"), "depends"),
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}{{ message['content'] }}"), "once"),
        (CHATML.replace("<|im_end|>", '"""'), "ends a text"),
        (CHATML.replace("<|im_end|>", "<\u200b>"), r"U\+200B, which Ollama drops"),
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}\n{% endfor %}", "depends"),
        ("{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}assistant:", "depends"),
    ],
    ids=[
        "date",
        "system in a turn",
        "no system",
        "upper case",
        "length",
        "twice",
        "quotes",
        "a letter that is not printed",
        "numbered",
        "always a prompt",
    ],
)
def test_what_go_cannot_render_alike_is_refused(template: str, reason: str) -> None:
    with pytest.raises(TemplateNotExpressible, match=reason):
        find_turns(template, renderer(template), None)


def test_a_start_token_that_the_template_lacks_is_refused() -> None:
    with pytest.raises(TemplateNotExpressible, match="does not begin with the token"):
        find_turns(CHATML, renderer(CHATML), "<s>")


def test_the_file_holds_everything() -> None:
    turns = find_turns(DEFAULT_SYSTEM, renderer(DEFAULT_SYSTEM), None)
    text = modelfile(
        "m.gguf", turns.go_template(), ["a remark"], ["<|im_end|>"], "Be\nkind.", {"top_p": 0.8, "top_k": 20}
    )
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert template is not None
    assert template[1] == turns.go_template()
    rest = text.replace(template[0], "TEMPLATE").splitlines()
    assert rest == [
        "# ollama create NAME -f Modelfile", "FROM ./m.gguf", "", "# a remark", "TEMPLATE",
        'PARAMETER stop "<|im_end|>"', "PARAMETER top_p 0.8", "PARAMETER top_k 20", 'SYSTEM """Be', 'kind."""',
    ]  # fmt: skip


# What a stranger's model could name its tokens, and what a system prompt may hold.
VALUES = [
    "<|im_end|>",
    '<e>"\nFROM http://evil/model\nSYSTEM "evil',
    '<e>"\rFROM http://evil/model',
    '"',
    '""',
    'a "quoted" end"',
    '"\n',
    '""\n"',
    "a\nb",
    "a\n# b\nPARAMETER stop c",
    " edges ",
    "",
    "\\",
    "}}{{ .System }}",
    "<\uff5cUser\uff5c>\u2581",
    "line\r\nline\ttab",
]
LOST = [
    'three """ quotes',
    '"""\nFROM http://evil/model\nSYSTEM """',
    "\x1b]52;c;\x07",
    "a\u200db",
    "\u3000",
    "a\x00",
    "\u2028",
]


@pytest.mark.parametrize("value", [*VALUES, *LOST])
def test_no_value_ends_before_its_end(value: str) -> None:
    text = modelfile("m.gguf", GO_PLAIN, [value, f"a remark: {value}"], [value, "</s>"], value, {"top_k": 20})
    stops = [("stop", value)] * (value in VALUES) + [("stop", "</s>")]
    *found, last = modelfile_twin.read(text)
    held = '"""' not in value and value
    system = [("system", "".join(c for c in value if c in VALUES[-1] or c.isprintable()))] if held else []
    assert [*found, last] == [("from", "./m.gguf"), ("template", GO_PLAIN), *stops, ("top_k", "20"), *system]


@pytest.mark.parametrize("value", LOST)
def test_what_a_modelfile_cannot_hold_is_told(value: str) -> None:
    stop, system = left_out([value], value)
    assert "is omitted from the Modelfile, because it contains" in stop
    assert ("No SYSTEM" if '"""' in value else "Ollama changes the SYSTEM text") in system
    assert left_out(["</s>", *VALUES], VALUES[1]) == left_out([], None) == []


def test_a_template_written_by_a_stranger_stays_within_its_quotes() -> None:
    hostile = CHATML.replace("<|im_end|>", '<e>"\nFROM http://evil/model\nSYSTEM "evil"')
    turns = find_turns(hostile, renderer(hostile), None)
    text = modelfile("m.gguf", turns.go_template(), [], [], None, {})
    assert modelfile_twin.read(text) == [("from", "./m.gguf"), ("template", turns.go_template())]


def test_plain_text_is_passed_on() -> None:
    assert go_template.render(GO_PLAIN, Prompt="a {{ b }}") == "a {{ b }}"
