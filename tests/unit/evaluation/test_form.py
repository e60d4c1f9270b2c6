"""Rules in the data: what each one asks, and that a wrong rule is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import ROOT

from qingtune.errors import UserError
from qingtune.evaluation.form import form_of, has_title, kept_rules, tags_in

POST = "七点出炉🥖\n热的，路过来一个。\n#面包 #早餐"


def keeps(rules: dict[str, Any], answer: str) -> dict[str, bool]:
    form = form_of({"form": rules}, "rows.jsonl:1")
    assert form is not None
    return kept_rules(form, answer)


@pytest.mark.parametrize(
    ("rule", "value", "kept", "broken"),
    [
        ("title", True, POST, "一整段没有换行"),
        ("title", True, "Title\nbody", f"{'long ' * 17}\nbody"),
        ("title", True, f"{'题' * 40}\n正文", f"{'题' * 41}\n正文"),
        ("title", True, "\nTitle\nbody", "#only #tags\nbody"),
        ("title", False, "one line", POST),
        ("emoji", True, POST, "plain :-)"),
        ("emoji", False, "plain", POST),
        ("tags", 2, POST, "#面包"),
        ("tags", 1, "end #a", "# A heading\nno tag, C# neither, ## nor this, #!"),
        ("min_characters", 3, "a b\nc", "a b"),
        ("max_characters", 3, "a b\nc", "a b c d"),
        ("contains", ["七点", "路过"], POST, "七点出炉"),
        ("excludes", ["最好", "第一"], POST, "全城第一"),
    ],
)
def test_rules(rule: str, value: object, kept: str, broken: str) -> None:
    assert keeps({rule: value}, kept) == {rule: True}
    assert keeps({rule: value}, broken) == {rule: False}


def test_only_rules_that_are_given_are_judged() -> None:
    assert form_of({"output": POST}, "x") is None
    assert form_of({"form": {}}, "x") is None
    assert form_of({"form": ""}, "x") is None  # an empty cell of a CSV file
    assert form_of({"form": {"title": None}}, "x") is None  # Parquet has every field in every row
    assert keeps({"tags": 0, "emoji": True}, "no") == {"emoji": False, "tags": True}


def test_rules_may_be_json_text() -> None:
    form = form_of({"form": '{"tags": 2}'}, "rows.csv:2")
    assert form is not None
    assert form.tags == 2


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"titel": True}, '"form.titel"'),
        ({"tags": "many"}, '"form.tags"'),
        ({"tags": True}, '"form.tags"'),
        ({"contains": "one"}, '"form.contains"'),
        ({"excludes": [""]}, '"form.excludes.0"'),  # which every answer holds
        ({"max_characters": -1}, '"form.max_characters"'),
        (["title"], '"form"'),
        ("{broken", '"form" is not JSON'),
    ],
)
def test_wrong_rules_are_told_with_their_row(rules: object, told: str) -> None:
    with pytest.raises(UserError) as caught:
        form_of({"form": rules}, "rows.jsonl:7")
    assert str(caught.value).startswith(f"rows.jsonl:7: {told}")


@pytest.mark.parametrize(
    "text", ["🇨🇳", "👍🏽", "👩‍🍳", "1️⃣", "1⃣", "❤", "❤️", "☕", "✨", "🀄", "©️", "🈶", "🈷", "✈", "🌶"]
)
def test_emoji_of_every_kind(text: str) -> None:
    assert keeps({"emoji": True}, f"早餐{text}7点") == {"emoji": True}


@pytest.mark.parametrize(
    "text", ["©", "®", "™", "7", "#", "！，。《》【】", "★☆", "❶", "①", "✓", "→", "♪", "🄰", "🁢", "🖹", "🕱"]
)
def test_signs_that_are_no_emoji(text: str) -> None:
    assert keeps({"emoji": False}, f"早餐{text}7点") == {"emoji": True}


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("#面包# #早餐#", ["#面包", "#早餐"]),  # as on Weibo
        ("#面包##早餐#今天", ["#面包", "#早餐"]),
        ("#面包[话题]# #早餐[话题]#后文", ["#面包[话题]", "#早餐[话题]"]),  # as Xiaohongshu copies them
        ("真好吃#面包 ，＃早餐", ["#面包", "＃早餐"]),
        ("our #1 spot, &#39;x&#39;, https://a.b/#about, ###三 C#", []),
        ("#2024新年 #7am", ["#2024新年", "#7am"]),
    ],
)
def test_tags_as_platforms_write_them(text: str, tags: list[str]) -> None:
    assert tags_in(text) == tags


def test_tags_and_titles_of_posts() -> None:
    assert not has_title("#面包# ＃早餐\n正文")
    assert tags_in("#一 #two!\n#三#四 a#five # six") == ["#一", "#two!", "#三"]
    assert has_title(POST)
    assert not has_title("")


@pytest.mark.parametrize("name", ["store_xhs_heldout.jsonl", "store_posts_en_heldout.jsonl"])
def test_bundled_references_keep_their_form(name: str) -> None:
    rows = [json.loads(line) for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert all(keeps(row["form"], row["output"]).values()), row["output"]
        assert not all(keeps(row["form"], row["input"]).values())
