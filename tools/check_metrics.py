"""Compute the metrics of `qingtune evaluate` a second time by other code, on the 50 bundled held-out rows.

The answers are the references, damaged in ways that do not change from run to run. BLEU and chrF are computed from
their papers' formulas, ROUGE by rouge-score with a tokenizer of Chinese characters, intervals by resampling the texts
themselves, rules of form by the tables of the regex library, and with --model the loss by Transformers.
Needs `pip install rouge-score==0.1.2` besides.
Exits with 1 if any two numbers differ by more than TOLERANCE.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from qingtune.evaluation.form import form_of, kept_rules  # noqa: E402
from qingtune.evaluation.intervals import SEED, compare  # noqa: E402
from qingtune.evaluation.metrics import Metric, Outcome, is_chinese, metrics_of  # noqa: E402

FILES = ("store_xhs_heldout.jsonl", "store_posts_en_heldout.jsonl")
TOLERANCE = 1e-5
CHECKED_RESAMPLES = 100  # of texts, which take their time; --resamples
Pair = tuple[str, str]  # answer, reference


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()]


def damaged(text: str, number: int) -> str:
    """One of five ways to be wrong, by the row's number; every fifth row is right."""
    pieces = list(text) if is_chinese([text]) else [f"{word} " for word in text.split(" ")]
    if number % 5 == 1:
        pieces = [piece for place, piece in enumerate(pieces) if place % 7]
    elif number % 5 == 2:
        pieces = pieces[len(pieces) // 3 :] + pieces[: len(pieces) // 3]
    elif number % 5 == 3:
        pieces = [pieces[place // 3 * 3 + 2 - place % 3] for place in range(len(pieces) // 3 * 3)]
    elif number % 5 == 4:
        pieces = pieces[: len(pieces) // 2] * 2
    return "".join(pieces).strip()


# --- The second computation ------------------------------------------------------------------------------------------


def grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[place : place + n]) for place in range(len(tokens) - n + 1)]


def overlap(one: Sequence[Any], two: Sequence[Any]) -> int:
    first, second = Counter(one), Counter(two)
    return sum(min(first[key], second[key]) for key in first)


def bleu(pairs: Sequence[Pair], tokenize: Callable[[str], str]) -> float:
    """Papineni et al. 2002, equations 1 to 3, over a corpus; no order is without a match here."""
    texts = [(tokenize(answer).split(), tokenize(reference).split()) for answer, reference in pairs]
    logs: list[float] = []
    for n in range(1, 5):
        matches = sum(overlap(grams(answer, n), grams(reference, n)) for answer, reference in texts)
        logs.append(math.log(matches / sum(len(grams(answer, n)) for answer, _ in texts)))
    length, wanted = sum(len(answer) for answer, _ in texts), sum(len(reference) for _, reference in texts)
    return 100 * math.exp(min(0.0, 1 - wanted / length) + sum(logs) / 4)


def chrf(pairs: Sequence[Pair]) -> float:
    """Popovic 2015: F2 of the mean precision and the mean recall of character n-grams up to 6, without spaces."""
    texts = [("".join(answer.split()), "".join(reference.split())) for answer, reference in pairs]
    precisions, recalls = [], []
    for n in range(1, 7):
        matches = sum(overlap(grams(list(answer), n), grams(list(reference), n)) for answer, reference in texts)
        precisions.append(matches / sum(len(answer) - n + 1 for answer, _ in texts))
        recalls.append(matches / sum(len(reference) - n + 1 for _, reference in texts))
    precision, recall = sum(precisions) / 6, sum(recalls) / 6
    return 100 * 5 * precision * recall / (4 * precision + recall)


class OneByOne:
    """Tokens for rouge-score, found by looking at each character."""

    def tokenize(self, text: str) -> list[str]:
        """Chinese characters and lower-cased words."""
        found: list[str] = []
        word = ""
        for character in f"{text.lower()} ":
            chinese = any(
                part in _name(character) for part in ("CJK UNIFIED", "IDEOGRAPHIC NUMBER ZERO", "IDEOGRAPHIC ITERATION")
            )
            if character.isalnum() and not chinese:
                word += character
                continue
            found += [word] if word else []
            found += [character] if chinese else []
            word = ""
        return found


def _name(character: str) -> str:
    import unicodedata

    return unicodedata.name(character, "")


def rouges(pairs: Sequence[Pair]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=OneByOne())
    scores = [scorer.score(reference, answer) for answer, reference in pairs]
    names = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
    return {name: 100 * sum(score[key].fmeasure for score in scores) / len(scores) for name, key in names.items()}


def second(pairs: Sequence[Pair], ended: Sequence[bool]) -> dict[str, float]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    chinese = is_chinese([reference for _, reference in pairs])
    tokens = [OneByOne().tokenize(answer) for answer, _ in pairs]
    distinct = {n: [gram for answer in tokens for gram in grams(answer, n)] for n in (1, 2)}
    return {
        "exact match %": 100 * sum(answer == reference for answer, reference in pairs) / len(pairs),
        "BLEU": bleu(pairs, TokenizerZh() if chinese else Tokenizer13a()),
        "chrF": chrf(pairs),
        **rouges(pairs),
        "length ratio": len("".join(answer for answer, _ in pairs)) / len("".join(reference for _, reference in pairs)),
        **{f"distinct-{n}": len(set(of_n)) / len(of_n) for n, of_n in distinct.items()},
        "ended by itself %": 100 * sum(ended) / len(pairs),
    }


def forms(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> dict[str, float]:
    """The share of answers that keep each rule of the bundled rows, and all of them; the rules read anew."""
    import regex

    emoji = r"\p{Emoji_Presentation}|\p{Emoji}\uFE0F|\p{Extended_Pictographic}(?<=[\U0001F000-\U0001FAFF])"
    kept: dict[str, list[bool]] = {}
    for row, answer in zip(rows, answers, strict=True):
        form, text, first = row["form"], "".join(answer.split()), answer.strip().split("\n")[0]
        columns = len(first) + len(regex.findall(r"\p{East_Asian_Width=W}|\p{East_Asian_Width=F}", first))
        tags = [word for word in answer.split() if word[0] == "#" and any(c.isalpha() for c in word)]
        found = {
            "title": columns <= 80 and first[:1] != "#" and "\n" in answer.strip(),
            "emoji": bool(regex.search(emoji, answer)) == form.get("emoji"),
            "tags": len(tags) >= form.get("tags", 0),
            "min_characters": len(text) >= form.get("min_characters", 0),
            "max_characters": len(text) <= form.get("max_characters", 1e9),
            "contains": not [part for part in form.get("contains", []) if part not in answer],
            "excludes": not [part for part in form.get("excludes", []) if part in answer],
        }
        for name in form:
            kept.setdefault(name, []).append(found[name])
        kept.setdefault("all", []).append(all(found[name] for name in form))
    return {f"form: {name} %": 100 * sum(of_it) / len(of_it) for name, of_it in kept.items()}


def intervals_of_texts(pairs: Sequence[Pair], resamples: int) -> dict[str, tuple[float, float]]:
    """BLEU's and chrF's intervals by sacrebleu's corpus scores of resampled texts, with the draws of the package."""
    import sacrebleu

    count, chinese = len(pairs), is_chinese([reference for _, reference in pairs])
    draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=resamples)
    values: dict[str, list[float]] = {"BLEU": [], "chrF": []}
    for draw in draws:
        drawn = [pairs[place] for place in np.repeat(np.arange(count), draw)]
        answers, references = [answer for answer, _ in drawn], [[reference for _, reference in drawn]]
        tokenizer = "zh" if chinese else "13a"
        values["BLEU"].append(sacrebleu.corpus_bleu(answers, references, tokenize=tokenizer, force=True).score)
        values["chrF"].append(sacrebleu.corpus_chrf(answers, references).score)
    return {
        name: (float(np.quantile(of_it, 0.025)), float(np.quantile(of_it, 0.975))) for name, of_it in values.items()
    }


# --- The loss --------------------------------------------------------------------------------------------------------


def losses(model: str, data: Path, rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The mean loss a trained token in fp32: by the package, and by Transformers' own labels and chat template."""
    import torch
    import transformers

    from qingtune.answering.load import load_decoder
    from qingtune.answering.score import score_sample
    from qingtune.data.format import read_conversations
    from qingtune.data.tokenize import make_template, tokenize
    from qingtune.kernels.device import Hardware
    from qingtune.models.find import find_model
    from qingtune.models.load import load_model, load_tokenizer, local_folder, stop_ids

    folder = local_folder(find_model(model, None, "auto"), None)
    hardware = Hardware(torch.device("cpu"), torch.float32, "fp32")
    template = make_template(load_tokenizer(folder), stop_ids(folder))
    decoder = load_decoder(folder, None, None, hardware, None, 1)
    conversations = read_conversations([str(data)], None, "raise").conversations
    scores = [score_sample(decoder, sample) for sample in tokenize(template, conversations, 2048, "raise").samples]
    ours = sum(score.loss for score in scores) / sum(score.tokens for score in scores)
    del decoder

    plain, tokenizer = load_model(folder, torch.float32).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    total = count = 0.0
    for row in rows:
        asked = {"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"}
        turns = [asked, {"role": "assistant", "content": row["output"]}]
        prompt = tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        labels = ids.clone()
        labels[:, : len(tokenizer(prompt, add_special_tokens=False)["input_ids"])] = -100
        trained = int((labels != -100).sum())
        with torch.no_grad():
            total += float(plain(input_ids=ids, labels=labels).loss) * trained
        count += trained
    return ours, total / count


# --- Side by side ----------------------------------------------------------------------------------------------------


def compared(name: str, model: str | None, resamples: int) -> Iterator[tuple[str, float, float]]:
    """Each number of a file by the package and by other code."""
    rows = rows_of(name)
    pairs = [(damaged(row["output"], number), row["output"]) for number, row in enumerate(rows)]
    ended = [number % 3 > 0 for number in range(len(pairs))]
    outcomes: list[Outcome] = []
    for row, (answer, reference), over in zip(rows, pairs, ended, strict=True):
        form = form_of(row, name)
        kept = kept_rules(form, answer) if form else {}
        outcomes.append(Outcome(answer=answer, reference=reference, ended=over, form=kept))
    metrics: dict[str, Metric] = {metric.name: metric for metric in metrics_of(outcomes)}
    again = {**second(pairs, ended), **forms(rows, [answer for answer, _ in pairs])}
    if missing := metrics.keys() - again.keys():
        raise SystemExit(f"not computed a second time: {', '.join(sorted(missing))}")
    for metric, value in again.items():
        yield metric, metrics[metric].total, value
    for metric, ends in intervals_of_texts(pairs, resamples).items():
        for end, ours, theirs in zip(
            ("low", "high"), compare(None, metrics[metric], resamples).after.interval or (), ends, strict=True
        ):
            yield f"{metric} {end}", ours, theirs
    if model:
        yield "loss", *losses(model, ROOT / "data" / name, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="folder, .gguf file or name of a model to compute the loss of, in fp32")
    parser.add_argument("--only", choices=FILES, help="one of the files; default: both")
    parser.add_argument("--resamples", type=int, default=CHECKED_RESAMPLES, help="%(default)s; evaluate takes 1,000")
    options = parser.parse_args()
    largest = 0.0
    for name in [options.only] if options.only else FILES:
        print(f"\n{name:<28}{'qingtune':>14}{'other code':>14}{'apart':>10}")
        for metric, ours, theirs in compared(name, options.model, options.resamples):
            largest = max(largest, abs(ours - theirs))
            print(f"{metric:<28}{ours:>14.6f}{theirs:>14.6f}{abs(ours - theirs):>10.1e}")
    print(f"\nlargest difference: {largest:.1e} (at most {TOLERANCE:g})")
    return int(not largest <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
