"""Training and evaluation data: which rows are held out, and by what runs know that these are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import make_tokenizer

from qingtune.config.training import TrainConfig
from qingtune.data.prepare import Data, load_data
from qingtune.data.tokenize import make_template


def prepared(data_file: Path, **settings: Any) -> Data:
    config = TrainConfig.model_validate({"data_path": str(data_file), **settings})
    return load_data(config, make_template(make_tokenizer(), [2]), None)


def test_held_out_rows_go_by_val_seed_and_without_it_by_seed(data_file: Path) -> None:
    one, same = (prepared(data_file, val_size=5, seed=seed, val_seed=1) for seed in (7, 8))
    assert len(one.evaluation) == 5
    assert (one.evaluation_hash, one.hash) == (same.evaluation_hash, same.hash)
    by_seed = {prepared(data_file, val_size=5, seed=seed).evaluation_hash for seed in (7, 8)}
    assert len(by_seed) == 2
    assert prepared(data_file, val_size=5, seed=1).evaluation_hash == one.evaluation_hash


def test_without_evaluation_data_there_is_no_hash_of_it(data_file: Path) -> None:
    assert prepared(data_file).evaluation_hash is None
