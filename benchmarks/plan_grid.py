"""The plan beside what runs really take: method x length x batch x rank x checkpointing, each a run of its own.

python benchmarks/plan_grid.py --model FOLDER --output FILE.json [--most N] [--smaller]
python benchmarks/plan_grid.py --shape NAME --layers N --output FILE.json [--within GB]

Each point is the training command as a user types it, two steps on random words of one length, every token trained.
FILE.json keeps what was measured; points that it holds are not run again. The plan is computed anew each time, from the
model's config.json, so that the table always shows today's formulas.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from workload import ROOT, SHAPES, cache_folder, random_model  # which also lets a clone be imported as it is

from qingtune.config.training import TrainConfig
from qingtune.machine.resources import Machine, find_machine
from qingtune.planning.blueprint import Blueprint, read_blueprint
from qingtune.planning.planner import METHODS, SETTINGS, Planner, Samples, as_method

STEPS = 2


@dataclass(frozen=True)
class Point:
    """A run by a method of this name; rank is 0 in full training."""

    method: str
    length: int
    batch: int
    rank: int
    checkpointing: bool

    @property
    def key(self) -> str:
        return json.dumps(list(asdict(self).values()))

    @property
    def planned(self) -> str:
        """The method as plans name it."""
        return next(key for key, name in METHODS.items() if name == self.method)

    @property
    def flags(self) -> list[str]:
        settings = {
            **SETTINGS[self.planned], **({"lora_r": self.rank} if self.rank else {}), "max_seq_length": self.length,
            "per_device_train_batch_size": self.batch, "gradient_checkpointing": self.checkpointing,
        }  # fmt: skip
        return [f"--{name}={str(value).lower()}" for name, value in settings.items()]

    def plan(self, blueprint: Blueprint, machine: Machine) -> int:
        """Planned bytes of such a run: two steps of samples of one length, no evaluation."""
        config = TrainConfig(
            lora_r=self.rank or 16,
            per_device_train_batch_size=self.batch,
            gradient_checkpointing=self.checkpointing,
            max_seq_length=self.length,
        )
        samples = Samples(self.length, self.length, 1.0, STEPS * self.batch, False, "")
        return Planner(blueprint, as_method(config, self.planned), machine).plan_for(samples).total


LARGER = [
    *(Point("LoRA", *rest) for rest in (
        (128, 1, 8, False), (128, 8, 64, False), (512, 1, 64, False), (512, 8, 8, False), (1024, 1, 8, False),
        (1024, 8, 64, False), (512, 1, 64, True), (1024, 1, 64, True),
    )),
    *(Point("QLoRA 4", *rest) for rest in (
        (128, 1, 64, False), (512, 8, 8, False), (1024, 1, 64, False), (1024, 1, 8, True),
    )),
    *(Point("QLoRA 8", *rest) for rest in (
        (128, 1, 8, False), (512, 1, 64, False), (1024, 1, 64, False), (512, 1, 8, True),
    )),
    *(Point("full", *rest) for rest in (
        (128, 1, 0, False), (512, 8, 0, False), (1024, 1, 0, False), (1024, 1, 0, True),
    )),
    *(Point("full, 8-bit states", *rest) for rest in (
        (128, 1, 0, False), (512, 1, 0, False), (1024, 1, 0, False), (1024, 1, 0, True),
    )),
]  # fmt: skip
SMALLER = [
    *(Point("LoRA", *rest) for rest in (
        (128, 1, 8, False), (128, 8, 64, False), (512, 8, 64, False), (1024, 1, 64, False), (1024, 8, 8, False),
        (1024, 1, 64, True),
    )),
    *(Point("QLoRA 4", *rest) for rest in ((128, 1, 8, False), (1024, 1, 64, False), (512, 8, 64, True))),
    *(Point("QLoRA 8", *rest) for rest in ((128, 8, 64, False), (1024, 1, 8, False))),
    *(Point("full", *rest) for rest in ((128, 1, 0, False), (1024, 8, 0, False), (512, 1, 0, True))),
    *(Point("full, 8-bit states", *rest) for rest in ((128, 8, 0, False), (1024, 1, 0, False))),
]  # fmt: skip
# Of each family of models; full training in the order of what it takes.
OF_A_SHAPE = [
    *(Point(method, 256, 1, 16, False) for method in ("LoRA", "QLoRA 4", "QLoRA 8")),
    *(Point(method, 256, 1, 0, False) for method in ("full, 8-bit states", "full")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", help="a Transformers folder")
    models.add_argument("--shape", choices=list(SHAPES), help="random weights of a published shape, and a short list")
    parser.add_argument("--layers", type=int, help="of the shape's, how many")
    parser.add_argument("--within", type=float, default=1000.0, help="GB beyond which a plan is not tried")
    parser.add_argument("--output", required=True, help="where measured peaks are kept, as JSON")
    parser.add_argument("--most", type=int, default=1000, help="points to measure now, at most")
    parser.add_argument("--smaller", action="store_true", help="the shorter list of points, for a small model")
    parser.add_argument("--cache_dir", help="where quantised weights are kept")
    arguments = parser.parse_args()
    points, model = SMALLER if arguments.smaller else LARGER, Path(arguments.model or "")
    if arguments.shape:
        folder = cache_folder() / f"plan-{arguments.shape}-{arguments.layers or 'all'}"
        points, model = OF_A_SHAPE, random_model(folder, arguments.shape, arguments.layers, wide=True)
    blueprint, machine = read_blueprint(model), find_machine()
    points = [point for point in points if point.plan(blueprint, machine) < arguments.within * 1e9]
    output = Path(arguments.output)
    measured = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    for point in [point for point in points if point.key not in measured][: arguments.most]:
        measured[point.key] = measure(point, model, arguments.cache_dir)
        output.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        print(f"{point}: {measured[point.key] / 1e9:.3f} GB", file=sys.stderr, flush=True)
    print(table(points, measured, blueprint, machine, model.name))


def table(points: list[Point], measured: dict[str, int], blueprint: Blueprint, machine: Machine, name: str) -> str:
    """Plan and measured peak of each point as Markdown, and the largest errors."""
    lines = [
        f"{machine.name}, {machine.dtype}; {name}",
        "",
        "| method | tokens a sample | samples a micro-batch | rank | recomputed | plan | measured | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    errors: list[tuple[float, int, Point]] = []
    for point in (point for point in points if point.key in measured):
        planned, peak = point.plan(blueprint, machine), measured[point.key]
        errors.append((abs(planned / peak - 1), abs(planned - peak), point))
        cells = (
            point.method, f"{point.length:,}", point.batch, point.rank or "-", "all" if point.checkpointing else "none",
            f"{planned / 1e9:.3f} GB", f"{peak / 1e9:.3f} GB", f"{planned / peak - 1:+.1%}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if errors:
        share, size, worst = max(errors, key=lambda error: error[0])
        lines += ["", f"{len(errors)} points; the largest error is {share:.1%} ({size / 1e6:.0f} MB): {worst.key}"]
    return "\n".join(lines)


def measure(point: Point, model: Path, cache_dir: str | None) -> int:
    """The peak of a run, in bytes, as its record has it."""
    with tempfile.TemporaryDirectory() as scratch:
        data, result = Path(scratch) / "rows.jsonl", Path(scratch) / "result"
        write_rows(data, STEPS * point.batch, point.length)
        command = [
            sys.executable, "-m", "qingtune", "train", "--model_name_or_path", str(model), "--data_path", str(data),
            "--output_dir", str(result), "--on_long", "truncate", "--max_steps", str(STEPS), "--logging_steps", "1",
            "--save_strategy", "no", "--report_to", "none", *point.flags,
            *(["--cache_dir", cache_dir] if cache_dir else []),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{point} failed:\n{done.stdout[-3000:]}")
        return int(json.loads((result / "qingtune.json").read_text(encoding="utf-8"))["results"]["peak_bytes"])


def write_rows(path: Path, count: int, length: int) -> None:
    """Rows of plain text that are longer than so many tokens, to be cut; no two begin alike."""
    draw = random.Random(0)
    words = ["apple", "river", "stone", "green", "walk", "seven", "window", "paper", "light", "music", "garden"]
    rows = [" ".join(draw.choices(words, k=length + 8)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
