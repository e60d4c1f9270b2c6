"""Metrics against values worked out by hand, other formulas, and sacrebleu's own corpus scores."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from qingtune.evaluation.metrics import (
    Metric,
    Outcome,
    is_chinese,
    longest_common_subsequence,
    metrics_of,
    rouge,
    signatures,
    tokens_of,
)

ENGLISH = [
    ("the cat sat on the mat by the door", "a cat sat on the mat near the old door"),
    ("fresh bread at seven every morning", "fresh bread every morning at seven"),
    ("nothing alike here", "completely different words all along"),
]
CHINESE = [
    ("今天的面包很好吃，七点出炉。", "今天的面包特别好吃，早上七点出炉！"),
    ("人均28元 open 到晚上", "人均 28 元，开到晚上"),
    ("海边的书店", "山里的茶馆很安静"),
]


def measured(*outcomes: Outcome) -> dict[str, float]:
    return {metric.name: metric.total for metric in metrics_of(outcomes)}


def paired(pairs: list[tuple[str, str]]) -> dict[str, float]:
    return measured(*(Outcome(answer=answer, reference=reference) for answer, reference in pairs))


# --- ROUGE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "one", "two", "longest"),
    [
        # 今天天气很好 / 今天天气真好: 5 of 6 characters, bigrams 今天 天天 天气 of 5, subsequence 今天天气好 of 5.
        ("今天天气很好", "今天天气真好", Fraction(5, 6), Fraction(3, 5), Fraction(5, 6)),
        # 我爱北京 / 北京我爱: all 4 characters, bigrams 我爱 北京 of 3, subsequence 2 of 4.
        ("我爱北京", "北京我爱", Fraction(1), Fraction(2, 3), Fraction(1, 2)),
        # 好 is there once in the reference, so it counts once of four: P 1/4, R 1/2, F1 1/3.
        ("好好好好", "很好", Fraction(1, 3), Fraction(0), Fraction(1, 3)),
        # A word is one token beside characters: 买 iphone 手 机 / 买 iphone 吧.
        ("买iPhone手机", "买iphone吧！", Fraction(4, 7), Fraction(2, 5), Fraction(4, 7)),
        # Lin 2004, section 3: police killed the gunman / police kill the gunman / the gunman kill police.
        ("police kill the gunman", "police killed the gunman", Fraction(3, 4), Fraction(1, 3), Fraction(3, 4)),
        ("the gunman kill police", "police killed the gunman", Fraction(3, 4), Fraction(1, 3), Fraction(1, 2)),
        ("🙂🙂", "好", Fraction(0), Fraction(0), Fraction(0)),
        ("", "", Fraction(0), Fraction(0), Fraction(0)),
    ],
)
def test_rouge_by_hand(answer: str, reference: str, one: Fraction, two: Fraction, longest: Fraction) -> None:
    assert rouge(answer, reference) == pytest.approx((one, two, longest))
    assert rouge(reference, answer) == pytest.approx((one, two, longest))


def test_a_chinese_character_is_a_token_and_so_is_a_word() -> None:
    assert tokens_of("人均28元，It's 𠮷野家!\n#标签_A") == [
        "人", "均", "28", "元", "it", "s", "𠮷", "野", "家", "标", "签", "a",
    ]  # fmt: skip
    assert tokens_of("二〇〇八年，人々") == [
        "二",
        "〇",
        "〇",
        "八",
        "年",
        "人",
        "々",
    ]  # of the Han script, outside its blocks


@given(st.text("abc", max_size=70), st.text("abc", max_size=70))
def test_subsequence_is_the_table_of_the_textbook(one: str, two: str) -> None:
    row = [0] * (len(two) + 1)
    for left in one:
        diagonal = 0
        for place, right in enumerate(two, 1):
            above = row[place]
            row[place] = diagonal + 1 if left == right else max(above, row[place - 1])
            diagonal = above
    assert longest_common_subsequence(list(one), list(two)) == row[-1]


# --- BLEU and chrF ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "tokenizer"), [(ENGLISH, "13a"), (CHINESE, "zh")])
def test_bleu_and_chrf_are_sacrebleus(pairs: list[tuple[str, str]], tokenizer: str) -> None:
    answers, references = [answer for answer, _ in pairs], [reference for _, reference in pairs]
    found = paired(pairs)
    assert found["BLEU"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references], tokenize=tokenizer).score)
    assert found["chrF"] == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    assert found["BLEU"] > 5
    assert f"tok:{tokenizer}" in signatures(references)["BLEU"]


def test_bleu_of_a_chinese_sentence_by_hand() -> None:
    # 今 天 天 气 很 好: precisions 5/6, 3/5, 2/4, 1/3, as long as the reference.
    value = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert paired([("今天天气很好", "今天天气真好")])["BLEU"] == pytest.approx(value)


def test_a_few_chinese_characters_do_not_make_a_text_chinese() -> None:
    assert not is_chinese(["The character 好 means good, and nothing else here is Chinese."])
    assert is_chinese(["一家 coffee shop，人均 28 元"])
    assert not is_chinese([])


# --- The others ------------------------------------------------------------------------------------------------------


def test_loss_is_weighted_by_tokens() -> None:
    found = measured(Outcome(loss=2.0, trained_tokens=1), Outcome(loss=4.0, trained_tokens=7), Outcome())
    assert found == pytest.approx({"loss": 0.75, "perplexity": math.exp(0.75)})


def test_shares_ratios_and_distinct() -> None:
    found = measured(
        Outcome(answer="a b a b", ended=True, reference="a b"),
        Outcome(answer="猫", ended=False, reference="猫"),
        Outcome(answer="a b", ended=True),
        Outcome(reference="never answered"),
    )
    assert found["exact match %"] == 50
    assert found["length ratio"] == pytest.approx(8 / 4)
    assert found["ended by itself %"] == pytest.approx(200 / 3)
    assert found["distinct-1"] == pytest.approx(3 / 7)  # a, b, 猫 of seven
    assert found["distinct-2"] == pytest.approx(2 / 4)  # a b, b a of four


def test_each_rule_counts_the_rows_that_give_it() -> None:
    found = measured(
        Outcome(answer="x", form={"title": True, "tags": False}),
        Outcome(answer="y", form={"title": True}),
        Outcome(answer="z"),
    )
    assert found["form: title %"] == 100
    assert found["form: tags %"] == 0
    assert found["form: all %"] == 50


def test_rows_without_references_have_no_comparison() -> None:
    assert "BLEU" not in measured(Outcome(answer="alone", ended=True))
    assert measured() == {}


def test_what_is_undefined_is_no_number() -> None:
    found = measured(Outcome(answer="!", reference="?"))
    assert math.isnan(found["distinct-1"])


def test_the_sums_of_a_row_are_those_of_the_row_alone() -> None:
    outcomes = [Outcome(3.0, 2, a, True, b, {"title": True}) for a, b in ENGLISH + CHINESE]
    alone = [{metric.name: metric for metric in metrics_of([outcome])} for outcome in outcomes]
    for metric in metrics_of(outcomes):
        assert isinstance(metric, Metric)
        assert not metric.additive or metric.rows.tolist() == [one[metric.name].rows[0].tolist() for one in alone], (
            metric.name
        )
