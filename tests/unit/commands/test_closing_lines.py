"""The closing lines of training: the loss of the weights that were kept, and on how many samples it was measured."""

from __future__ import annotations

import pytest

from qingtune.commands.train import Result, _loss_line
from qingtune.config.training import TrainConfig


@pytest.mark.parametrize(
    ("best_kept", "line"),
    [
        (False, "eval_loss 3.0000 -> 2.5000 on 4 samples"),
        (True, "eval_loss 3.0000 -> 2.0000 on 4 samples, at step 6 (the best)"),
    ],
)
def test_the_loss_is_that_of_the_kept_weights(best_kept: bool, line: str) -> None:
    result = Result(True, 9, 1.0, 10**9, None, 1, 1, 3.0, 2.5, 2.0, 6, eval_samples=4)
    assert _loss_line(TrainConfig(load_best_model_at_end=best_kept), result) == [line]


def test_a_loss_of_which_none_was_the_best_is_shown() -> None:
    result = Result(True, 9, 1.0, 10**9, None, 1, 1, 3.0, float("nan"), None, None, eval_samples=4)
    assert _loss_line(TrainConfig(), result) == ["eval_loss 3.0000 -> nan on 4 samples"]
