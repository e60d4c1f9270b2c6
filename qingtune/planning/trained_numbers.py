"""How many numbers adapters train, from names and shapes alone: the rules of adapters/lora.py and adapters/whole.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from qingtune.adapters.names import choose_layers, is_within, match_modules, match_names, outermost, pattern_value
from qingtune.config.training import TrainConfig
from qingtune.kernels.footprint import Ranks
from qingtune.models.shape import ModelShape


@dataclass(frozen=True)
class Trained:
    """Numbers that are trained: in adapters, and in modules trained in full beside them."""

    adapters: int = 0
    whole: int = 0
    untied: int = 0  # numbers of a head that gets a matrix of its own
    whole_names: tuple[str, ...] = ()
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def numbers(self) -> int:
        """All of them."""
        return self.adapters + self.whole


def find_trained(shape: ModelShape, config: TrainConfig) -> Trained:
    """What adapters and modules_to_save train, by the rules of adapters/lora.py: A [r, in] and B [out, r] a layer.

    Raises:
        UserError: a setting names what the model has not.
    """
    whole = outermost(match_modules(shape.module_names(), config.modules_to_save))
    matched = match_names([module.name for module in shape.linear], config.lora_target_modules)
    names = [name for name in matched if not any(is_within(name, module) for module in whole)]
    patterns = {"rank_pattern": config.rank_pattern or {}, "alpha_pattern": config.alpha_pattern or {}}
    chosen = set(choose_layers(names, config.layers_to_transform, patterns))
    adapters, ranks = 0, dict[str, int]()
    for module in shape.linear:
        if module.name not in chosen:
            continue
        rank = int(pattern_value(config.rank_pattern or {}, module.name, config.lora_r))
        adapters += rank * sum(module.shape) + module.shape[0] * config.use_dora
        kind = module.name.rsplit(".", 1)[-1].removesuffix("_proj")
        ranks[kind] = max(rank, ranks.get(kind, 0))
    held = {module.name: module.parameters for module in shape.modules}
    if shape.tied:
        held["lm_head"] = shape.vocabulary * shape.hidden
    in_whole = [name for name in held if any(is_within(name, module) for module in whole)]
    ends = {"lm_head", "model.embed_tokens"} & set(in_whole)
    return Trained(
        adapters=adapters,
        whole=sum(held[name] for name in in_whole),
        untied=shape.vocabulary * shape.hidden if shape.tied and ends else 0,
        whole_names=tuple(in_whole),
        ranks=Ranks(**{name: ranks.get(name, 0) for name in ("q", "k", "v", "o", "gate", "up", "down")}),
    )
