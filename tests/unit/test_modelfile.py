"""A Modelfile's Go template renders what the model's own template renders, or there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence

import go_template
import pytest
from conftest import CHATML

from qingtune.data.format import Message
from qingtune.data.templates import render_template
from qingtune.data.tokenize import PLAIN_TEMPLATE
from qingtune.modelfile import GO_PLAIN, Render, TemplateNotExpressible, find_turns, modelfile

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
        (CHATML.replace("<|im_end|>", '"""'), "ends it"),
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
        "numbered",
        "always a prompt",
    ],
)
def test_what_go_cannot_render_alike_is_refused(template: str, reason: str) -> None:
    with pytest.raises(TemplateNotExpressible, match=reason):
        find_turns(template, renderer(template), None)


def test_a_start_token_that_the_template_lacks_is_refused() -> None:
    with pytest.raises(TemplateNotExpressible, match="begins with another token"):
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


def test_what_a_modelfile_cannot_hold_is_left_out_and_told() -> None:
    text = modelfile("m.gguf", None, ["why"], [], 'three """ quotes', {})
    assert "TEMPLATE" not in text
    assert not re.search("(?m)^SYSTEM", text)
    assert "# No SYSTEM" in text


def test_plain_text_is_passed_on() -> None:
    assert go_template.render(GO_PLAIN, Prompt="a {{ b }}") == "a {{ b }}"
