"""A step does not depend on how its window is split: batch x accumulation 1x8 = 8x1 = 2x4."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_jsonl
from tiny_runs import METHODS, assert_close, losses, metrics, save_model, train, weights

SPLITS = ((8, 1), (1, 8), (2, 4))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_split_of_window_changes_nothing(method: str, tmp_path: Path) -> None:
    # Answers of 2 or 62 tokens, in a mix that differs from micro-batch to micro-batch: a mean of means is far off.
    # 20 rows make a last window of 4, which the larger batch does not fill.
    long = {number for number in range(20) if number % 3 == 0}
    rows = [{"prompt": f"{number}", "completion": "bread " * (30 if number in long else 1)} for number in range(20)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    model = save_model(tmp_path / "model")
    for batch, accumulation in SPLITS:
        # SGD, as its step is the gradient itself: Adam makes a difference of 1e-9 in a zero gradient look large.
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        settings = METHODS[method] | split | {"max_steps": 3, "optim": "sgd", "learning_rate": 0.3}
        train(tmp_path / f"{batch}x{accumulation}", model, data, **settings)

    whole = tmp_path / "8x1"
    assert len(losses(whole)) == 3
    for batch, accumulation in SPLITS[1:]:
        split_run = tmp_path / f"{batch}x{accumulation}"
        assert losses(split_run) == pytest.approx(losses(whole), rel=1e-5)
        counts = [[(line["tokens"], line["trained_tokens"]) for line in metrics(run)] for run in (split_run, whole)]
        assert counts[0] == counts[1]
        assert_close(weights(split_run), weights(whole), share=1e-4)
