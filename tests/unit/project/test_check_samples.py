"""The sample checker must find each kind of fault, and must stay silent on sound rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import load_tool

check_samples = load_tool("check_samples")
Sample = dict[str, Any]

BAKERY = {
    "instruction": "写一篇小红书探店笔记，风格：甜美",
    "input": "店名：麦粒小屋\n品类：面包店\n地址：苏州市柳荫巷38号\n"
    "营业时间：10:00-20:30\n亮点：海盐卷现烤\n人均：25-40元",
    "output": "刚出炉的香气会拐弯🍞\n"
    "还没走到柳荫巷38号，黄油味先来牵我的手。海盐卷刚从炉子里端出来，外壳轻轻一碰就响。\n"
    "麦粒小屋早上十点开门，晚上八点半收工，人均25到40元，带两只回家当明天的早饭刚好🥰\n"
    "#苏州面包 #海盐卷",
}
REPAIRS = {
    "instruction": "用专业风格介绍这家店",
    "input": "店名：阿木修表\n品类：钟表维修\n地址：天津市石桥道5号\n亮点：换电池20元\n人均：150",
    "output": "机芯该不该洗，先看走时误差⌚\n"
    "阿木修表把拆机、超声清洗、点油、校表四步分开记录，每一步都写进随表的卡片。\n"
    "换电池20元，整机清洗人均一百五十元。上链发涩、日期跳得慢，这两种情况适合送来看看🔧\n"
    "地址在石桥道5号，去之前打个电话问营业时间。\n"
    "#天津修表 #机芯保养",
}
CAFE = {
    "instruction": "Write a funny post for this cafe.",
    "input": "Name: Kettle & Cat\nCategory: Cafe\nAddress: 12 Fern Lane, Leeds\nHours: 8:00-17:30\n"
    "Highlights: oat scones; two window seats\nPrice: $4-$12",
    "output": "The cat runs the till ☕\n"
    "I ordered an oat scone and was judged by somebody with whiskers. Fair enough, my hair was wet and my "
    "umbrella had lost an argument with the wind.\n"
    "Kettle & Cat opens at 8 am and closes at 5:30 pm, with two window seats that everyone pretends not to "
    "race for. Plates run $4 to $12 at 12 Fern Lane 🐾\n"
    "#LeedsCafe #OatScones",
}


def changed(sample: Sample, **edits: tuple[str, str]) -> Sample:
    """The sample with one piece of text replaced in each named value."""
    copy = dict(sample)
    for key, (old, new) in edits.items():
        assert old in copy[key]
        copy[key] = copy[key].replace(old, new)
    return copy


def write(path: Path, *lines: Sample | str) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def test_sound_rows_pass_and_are_summarised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "train.jsonl", BAKERY, REPAIRS)
    heldout = write(tmp_path / "heldout.jsonl", CAFE)
    assert check_samples.main([str(train), "--heldout", str(heldout)]) == 0
    head, train_line, heldout_line = capsys.readouterr().out.splitlines()
    assert "min/median/max" in head
    assert train_line.split()[1] == "2"
    assert "甜美 1 专业 1" in train_line
    assert heldout_line.split()[1:4] == ["1", "66/66/66", "0"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "invalid JSON"),
        ("", "invalid JSON"),
        ("[]", "keys instruction, input, output"),
        (json.dumps(dict(reversed(list(CAFE.items())))), "keys instruction, input, output"),
        (json.dumps(CAFE | {"note": "x"}), "keys instruction, input, output"),
        (json.dumps(CAFE | {"output": " "}), "each value must be text"),
        (json.dumps(CAFE | {"input": "Category: Cafe"}), "店名：… or Name: …"),
    ],
)
def test_unreadable_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    path = write(tmp_path / "train.jsonl", BAKERY, line, REPAIRS)
    assert check_samples.main([str(path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{path}:2: ")
    assert message in out.splitlines()[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(CAFE, input=("Price:", "Cost:")), "empty or unknown: Cost"),
        (changed(CAFE, input=("oat scones; two window seats", "")), "empty or unknown: Highlights"),
        (changed(CAFE, instruction=("funny", "gloomy")), "one style of sweet practical"),
        (changed(CAFE, instruction=("funny", "funny, sweet")), "one style of sweet practical"),
        (changed(BAKERY, instruction=("甜美", "清新")), "one style of 甜美 干货"),
        (changed(CAFE, output=("till ☕", "till")), "title has no emoji"),
        (changed(CAFE, output=("\n#LeedsCafe", "\nsee #LeedsCafe")), "hashtags only"),
        (changed(CAFE, output=("\n#LeedsCafe #OatScones", "")), "hashtags only"),
        (changed(BAKERY, output=("海盐卷刚", "海盐卷" * 80)), "long, not 90-320"),
        (changed(CAFE, output=("my hair", "my hair " * 80)), "long, not 45-150"),
        (CAFE | {"output": "Short ☕\nbody\n#tag"}, "3 long, not 45-150"),
        (changed(BAKERY, output=("25到40元", "25到48元")), "money amount not in the input: 25到48元"),
        (changed(BAKERY, output=("人均25到40元", "一只￥38")), "money amount not in the input: ¥38"),
        (changed(REPAIRS, output=("20元", "三十元")), "money amount not in the input: 30元"),
        (changed(CAFE, output=("$12 at", "$15 at")), "money amount not in the input: $15"),
        (changed(CAFE, output=("$4 to", "13 dollars to")), "money amount not in the input: 13 dollars"),
        (changed(BAKERY, output=("八点半", "九点半")), "clock time not in the input: 9点半"),
        (changed(REPAIRS, output=("问营业时间", "，10：00前")), "clock time not in the input: 10:00"),
        (changed(BAKERY, output=("轻轻一碰", "三点二十停住")), "clock time not in the input: 3点20"),
        (changed(BAKERY, output=("早上十点开门", "到21：00，400")), "clock time not in the input: 21:00"),
        (changed(CAFE, output=("8 am", "7 am")), "clock time not in the input: 7 am"),
        (CAFE | {"form": {"tags": 2, "emoji": False}}, "output breaks its own rule of form: emoji"),
        (CAFE | {"form": {"tag": 2}}, '"form.tag"'),
    ],
)
def test_faulty_row(tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Sample, message: str) -> None:
    path = write(tmp_path / "train.jsonl", row)
    assert check_samples.main([str(path)]) == 1
    (fault,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{path}:1: ")]
    assert message in fault


@pytest.mark.parametrize(
    "row",
    [
        changed(BAKERY, output=("轻轻一碰", "切成两块，早一点来，五点建议")),
        changed(BAKERY, output=("晚上八点半", "20：30")),
        changed(BAKERY, input=("现烤", "15:00两次出炉"), output=("轻轻一碰", "15:00这一炉")),
        changed(BAKERY, output=("人均25到40元", "十几元到几十元")),
        changed(REPAIRS, output=("人均一百五十元", "￥150.00"), input=("150", "150 起")),
        changed(CAFE, input=("8:00-17:30", "8-17:30"), output=("5:30 pm", "5:30 p.m.")),
        changed(CAFE, input=("$4-$12", "4-1,200"), output=("$12 at", "$1200 at")),
    ],
)
def test_same_facts_in_other_words_are_no_fault(tmp_path: Path, row: Sample) -> None:
    assert check_samples.main([str(write(tmp_path / "train.jsonl", row))]) == 0


OTHER_NAME = changed(CAFE, input=("Kettle & Cat", "Pot & Dog"))
OTHER_OUTPUT = CAFE | {"output": "Fig 🌿\n" + "leaf " * 50 + "\n#fig"}
OTHER_SHOP = OTHER_OUTPUT | {"input": OTHER_NAME["input"]}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (CAFE, changed(OTHER_OUTPUT, input=("Kettle & Cat", "KETTLE & CAT")), "same shop name as"),
        (CAFE, OTHER_NAME, "same whole output as"),
        (CAFE, changed(OTHER_NAME, output=("The cat", "Our cat")), "near-duplicate 0.9"),
        (CAFE, changed(OTHER_SHOP, output=("Fig 🌿", "The CAT runs the ☕")), "same opening as"),
        (BAKERY, changed(REPAIRS, output=("机芯该不该洗，", "刚出炉的香气会拐")), "same opening as"),
    ],
)
@pytest.mark.parametrize("in_heldout", [False, True])
def test_repetition_within_and_across_files(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    first: Sample,
    second: Sample,
    message: str,
    in_heldout: bool,
) -> None:
    train = write(tmp_path / "train.jsonl", *([first] if in_heldout else [first, second]))
    heldout = write(tmp_path / "heldout.jsonl", second if in_heldout else REPAIRS)
    assert check_samples.main([str(train), "--heldout", str(heldout)]) == 1
    place = f"{heldout}:1: " if in_heldout else f"{train}:2: "
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith(place)]
    assert any(message in fault and f"{train}:1" in fault for fault in faults)


def test_bundled_pairs_are_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_samples, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    names = [name for pair in check_samples.BUNDLED_PAIRS for name in pair]
    for name, row in zip(names, (BAKERY, REPAIRS, CAFE, "broken"), strict=True):
        write(tmp_path / name, row)
    assert check_samples.main([]) == 1
    assert capsys.readouterr().out.startswith(f"{names[3]}:1: invalid JSON")


@pytest.mark.parametrize("arguments", [["--heldout", "x.jsonl"], ["missing.jsonl"], ["--unknown"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        check_samples.main(arguments)
    assert stop.value.code == 2
