"""Whether each kind of adapter means here what it means in PEFT: the largest logit difference, both ways.

python benchmarks/variants.py --model NAME --output FILE.json [--kinds DoRA PiSSA ...] trains each kind for a few steps
in fp32, here by the engine that a run would use and there by PEFT's modules, and opens the result on the other side, on
the base as it is. Kinds that the output file holds are not tried again; the table of all is printed as Markdown.

here -> PEFT   ours in training against what PEFT makes of our files
PEFT -> here   PEFT's in training against what we make of its files
merged         the model merged from stored weights against the adapter, the larger of both ways
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import workload  # noqa: F401  puts the clone on the path

from qingtune.adapters.full_modules import find_modules, train_in_full, untie
from qingtune.adapters.lora import add_lora
from qingtune.adapters.peft_files import load_adapter, read_adapter, save_adapter
from qingtune.adapters.variants import Variant
from qingtune.config.training import TrainConfig
from qingtune.data.batch import collate
from qingtune.data.format import read_conversations
from qingtune.data.prompts import bundled_data
from qingtune.data.tokenize import Sample, make_template, tokenize
from qingtune.kernels.device import Hardware
from qingtune.models.find import find_model
from qingtune.models.layers import linear_layers
from qingtune.models.load import load_model, load_tokenizer, local_folder, stop_ids
from qingtune.training.engine import make_engine

RANK, ALPHA, LEARNING_RATE, STEPS = 8, 16, 1e-3, 4
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 4, "layers.3.mlp.up_proj": 16}}
    | {"alpha_pattern": {"down_proj": 4}},
    "layers_to_transform": {"layers_to_transform": [0, 7, 29]},
    "modules_to_save: head": {"modules_to_save": ["lm_head"]},
    "modules_to_save: embedding, norms": {"modules_to_save": ["embed_tokens", "model.norm", "input_layernorm"]},
    "DoRA, rsLoRA, PiSSA, head": {"use_dora": True, "use_rslora": True, "init_lora_weights": "pissa"}
    | {"modules_to_save": ["lm_head"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, a .gguf file or a name on a hub")
    parser.add_argument("--output", type=Path, required=True, help="where differences are kept, as JSON")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    folder = local_folder(find_model(arguments.model, None, "auto"), None)
    found = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    samples = _samples(folder)
    for kind in arguments.kinds:
        if kind not in found:
            found[kind] = _both_ways(folder, KINDS[kind], samples)
            arguments.output.write_text(json.dumps(found), encoding="utf-8")
            _say(f"{kind}: {found[kind]}")
    print("| kind | here -> PEFT | PEFT -> here | merged | moved by training |\n|---|---|---|---|---|")
    for kind, (out, back, merged, moved) in found.items():
        print(f"| {kind} | {out:.1e} | {back:.1e} | {merged:.1e} | {moved:.1f} |")


def _both_ways(folder: Path, settings: dict[str, Any], samples: list[Sample]) -> tuple[float, float, float, float]:
    """The largest difference of any logit: here -> PEFT, PEFT -> here, merged; and what training here moved it by."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def base() -> Any:
        return load_model(folder, torch.float32).eval()

    def logits(model: Any) -> torch.Tensor:
        ids = torch.tensor(samples[0].token_ids[:200]).long()
        with torch.no_grad():
            return model.eval()(input_ids=ids[None], use_cache=False).logits[0]

    def apart(one: torch.Tensor, two: torch.Tensor) -> float:
        return float((one - two).abs().max())

    def merged(adapter: Path) -> torch.Tensor:
        model, stored = base(), read_adapter(adapter)
        if stored.unties(model.config.to_dict()):
            untie(model)
        model.load_state_dict({name: stored.merged(name, weight) for name, weight in model.state_dict().items()})
        return logits(model)

    with tempfile.TemporaryDirectory() as place:
        ours_at, theirs_at = Path(place) / "ours", Path(place) / "theirs"
        ours_at.mkdir()
        ours = base()
        before = logits(ours)
        _train_here(ours, settings, samples)
        save_adapter(ours, ours_at, str(folder), 0.0)
        ours = logits(ours)
        out = apart(logits(PeftModel.from_pretrained(base(), str(ours_at))), ours)
        joined = apart(merged(ours_at), ours)

        names = sorted({name.rpartition(".")[2] for name in linear_layers(base())})
        config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=names, **settings)
        theirs = get_peft_model(base(), config)
        _train_there(theirs, samples)
        theirs.save_pretrained(str(theirs_at))
        wanted = logits(theirs)
        back = base()
        load_adapter(back, theirs_at)
        return out, apart(logits(back), wanted), max(joined, apart(merged(theirs_at), wanted)), apart(ours, before)


def _train_here(model: Any, settings: dict[str, Any], samples: list[Sample]) -> None:
    settings = dict(settings)
    whole = find_modules(model, settings.pop("modules_to_save", None))
    add_lora(model, None, RANK, ALPHA, 0.0, variant=Variant(**settings), leave=whole)
    train_in_full(model, whole)
    hardware = Hardware(torch.device("cpu"), torch.float32, "")
    longest = max(len(sample.token_ids) for sample in samples)
    engine = make_engine(TrainConfig(use_lora=True), model, hardware, longest)
    optimizer = _optimizer(model)
    for sample in samples[1 : 1 + STEPS]:
        batch = collate([sample])
        engine.add_gradients(batch, torch.tensor(1 / len(batch.targets)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def _train_there(model: Any, samples: list[Sample]) -> None:
    optimizer = _optimizer(model)
    for sample in samples[1 : 1 + STEPS]:
        ids = torch.tensor(sample.token_ids).long()[None]
        labels = ids.masked_fill(~torch.tensor(sample.trained)[None], -100)
        model.train()(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _optimizer(model: Any) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)


def _samples(folder: Path) -> list[Sample]:
    template = make_template(load_tokenizer(folder), stop_ids(folder))
    rows = read_conversations([str(bundled_data() / "store_posts_en_samples.jsonl")], None, "raise").conversations
    return tokenize(template, rows[: STEPS + 1], 512, "raise").samples


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
