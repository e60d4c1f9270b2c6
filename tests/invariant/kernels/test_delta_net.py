"""The gated delta net block gives what Transformers' own class and autograd on it give."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from decoders import random_sample
from tiny_runs import lively, move_adapters
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from qingtune.adapters.lora import add_lora, member
from qingtune.data.batch import collate
from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.blocks import Parts, Pass
from qingtune.kernels.buffers import Arithmetic, Rows, Tally
from qingtune.kernels.delta.block import DeltaNetBlock
from qingtune.kernels.delta.rule import CHUNK
from qingtune.kernels.elementwise import Norm
from qingtune.kernels.layout import Layout, fill_up, lay_out
from qingtune.kernels.native import delta, delta_rule
from qingtune.kernels.native import elementwise as elementwise_in_c
from qingtune.kernels.projection import Projection
from qingtune.kernels.workspace import Workspace

HIDDEN = 24
# The last two are computed in C, where this machine can.
SIZES = {
    "one value head a key head": (2, 2, 8, 12),
    "three": (2, 6, 8, 8),
    "one, of whole groups": (2, 2, 16, 48),
    "three, of whole groups": (2, 6, 32, 16),
}
# Relative, in Frobenius norms, of the output and of each gradient. Measured in fp32 7e-7 and 4e-5, which is how far
# Transformers is from fp64 (in the gradient of A_log); in bf16 0.5 % and 1.8 %, Transformers' own 0.8 % and 5 %.
EXACT, BF16 = (2e-6, 1e-4), (0.01, 0.03)
# Lengths of samples, after a beginning of so many tokens that they share.
LAYOUTS: dict[str, tuple[int, Sequence[int]]] = {
    "two tokens": (0, [2]),
    "exactly a chunk": (0, [CHUNK]),
    "several chunks": (0, [2 * CHUNK + 5, CHUNK + 1]),
    "several samples": (0, [5, 1, 30, 2, CHUNK]),
    "common beginning": (7, [5, 1, CHUNK + 9, 2]),
    "common beginning of two tokens": (2, [4, 3, 1]),
    "common beginning of several chunks": (CHUNK + 20, [CHUNK + 1, 3]),
}


class Layer(torch.nn.Module):
    """What DeltaNetBlock takes of a decoder layer."""

    def __init__(self, sizes: tuple[int, int, int, int], decay: float = 1.0) -> None:
        super().__init__()
        key_heads, value_heads, key_size, value_size = sizes
        config = Qwen3_5TextConfig(
            hidden_size=HIDDEN,
            rms_norm_eps=0.02,
            num_hidden_layers=1,
            linear_num_key_heads=key_heads,
            linear_num_value_heads=value_heads,
            linear_key_head_dim=key_size,
            linear_value_head_dim=value_size,
            layer_types=["linear_attention"],
        )
        torch.manual_seed(0)
        self.config = config
        self.input_layernorm = Qwen3RMSNorm(HIDDEN)
        self.linear_attn = Qwen3_5GatedDeltaNet(config, 0)
        lively(self)
        self.linear_attn.A_log.data.add_(torch.tensor(decay).log())

    def get_output_embeddings(self) -> None:
        """As of a model; asked when adapters are added."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear_attn(self.input_layernorm(x)[None])[0]


@dataclass(frozen=True)
class Setup:
    """A block with the layer that it computes, a layout, and an input with the gradient of the output."""

    layer: Layer
    block: DeltaNetBlock
    layout: Layout
    x: torch.Tensor
    grad: torch.Tensor


Gradients = dict[str, torch.Tensor]


def make_setup(
    layer: Layer, layout: Layout, sizes: tuple[int, int, int, int], dtype: torch.dtype, *, last: bool = False
) -> Setup:
    workspace = Workspace(torch.device("cpu"))

    def projections(*groups: Sequence[torch.nn.Module]) -> list[Projection]:
        return [Projection([member(m) for m in group], 0.0, workspace, int8_units=False) for group in groups]

    def norm(module: Qwen3RMSNorm) -> Norm:
        return Norm(module.weight, module.variance_epsilon, workspace)

    parts = Parts(dtype, workspace, norm, projections)
    block = DeltaNetBlock(layer, 0, DeltaNet(*sizes, kernel=4), parts)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(layout.token_ids), HIDDEN, generator=generator)
    grad = torch.randn(len(layout.predicting) if last else len(x), HIDDEN, generator=generator)
    return Setup(layer, block, layout, x, grad)


def make_layout(name: str) -> Layout:
    shared, lengths = LAYOUTS[name]
    beginning = range(10, 10 + shared)
    batch = collate([random_sample(length, seed, beginning) for seed, length in enumerate(lengths)])
    layout = fill_up(lay_out(batch, share_prefix=True))
    assert any(segment.shared for segment in layout.segments) == bool(shared)
    return layout


def rows_of(layout: Layout, *, last: bool) -> torch.Tensor | None:
    return layout.predicting if last else None


def a_pass(layout: Layout) -> Pass:
    """No rotary table, no dropout."""
    return Pass(layout, {}, None)


def taken(module: torch.nn.Module) -> Gradients:
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad and p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def computed(setup: Setup, *, last: bool = False, times: int = 1) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """The block's output, the gradient of x, and those of parameters."""
    layout, block, rows = setup.layout, setup.block, rows_of(setup.layout, last=last)
    now = a_pass(layout)
    x = setup.x.to(block.dtype)
    out, grad_x = torch.empty(setup.grad.shape, dtype=block.dtype), None
    with torch.no_grad():
        for _ in range(times):
            block.forward(x, now, out, "layer0", rows)
            grad_x = block.backward(setup.grad.to(block.dtype, copy=True), x, now, "layer0", rows, wanted=True)
    assert grad_x is not None
    return out.clone(), grad_x.clone(), taken(setup.layer)


def wanted(setup: Setup, *, last: bool = False) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """The same by Transformers' class, a sample at a time, each with the beginning that it shares."""
    x = setup.x.clone().requires_grad_()
    parts = [
        setup.layer(torch.cat([x[: segment.shared], x[segment.start : segment.end]]))[segment.shared :]
        for segment in setup.layout.segments
    ]
    out = torch.cat(parts)
    rows = rows_of(setup.layout, last=last)
    out = out if rows is None else out[rows]
    out.backward(setup.grad)
    assert x.grad is not None
    return out.detach(), x.grad, taken(setup.layer)


def errors(
    found: tuple[torch.Tensor, torch.Tensor, Gradients], wanted: tuple[torch.Tensor, torch.Tensor, Gradients]
) -> tuple[float, dict[str, float]]:
    """Relative errors of the output, and of each gradient; small ones count as a tenth of the largest."""
    assert found[2].keys() == wanted[2].keys()
    ours, theirs = ({"x": grad_x, **grads} for _, grad_x, grads in (found, wanted))
    least = 0.1 * max(float(grad.norm()) for grad in theirs.values())
    apart = {
        name: float((ours[name].float() - grad).norm()) / max(float(grad.norm()), least)
        for name, grad in theirs.items()
    }
    return float((found[0].float() - wanted[0]).norm() / wanted[0].norm()), apart


def assert_same(setup: Setup, *, last: bool = False, times: int = 1) -> None:
    found, reference = computed(setup, last=last, times=times), wanted(setup, last=last)
    for gradient in reference[2].values():
        gradient.mul_(times)
    out, gradients = errors(found, reference)
    assert out < EXACT[0]
    assert max(gradients.values()) < EXACT[1], gradients


@pytest.fixture(params=["compiled", "plain"])
def elementwise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Elementwise work in C, where this machine can, and by PyTorch."""
    if request.param == "plain":
        monkeypatch.setattr(delta, "compiled", lambda: None)
        monkeypatch.setattr(delta_rule, "compiled", lambda: None)
        monkeypatch.setattr(elementwise_in_c, "elementwise", lambda: None)
    elif delta.compiled() is None:
        pytest.skip("no C compiler")
    return request.param


@pytest.mark.parametrize("last", [False, True], ids=["all rows", "rows that predict"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.usefixtures("elementwise")
def test_same_as_transformers_in_full_training(kind: str, name: str, last: bool) -> None:
    sizes = SIZES[kind]
    setup = make_setup(Layer(sizes), make_layout(name), sizes, torch.float32, last=last)
    assert_same(setup, last=last, times=2)


def test_one_token() -> None:
    sizes = SIZES["three"]
    sample = random_sample(1, 0)
    layout = lay_out(collate([sample]), share_prefix=True)
    setup = make_setup(Layer(sizes), layout, sizes, torch.float32)
    assert_same(setup)
    assert not len(layout.predicting)
    with torch.no_grad():
        setup.block.forward(setup.x, a_pass(layout), torch.empty(0, HIDDEN), "layer0", layout.predicting)


@pytest.mark.parametrize("decay", [1e-6, 1e3, 1e6], ids=["none", "strong", "all at once"])
def test_decays_of_any_strength(decay: float) -> None:
    sizes = SIZES["three"]
    assert_same(make_setup(Layer(sizes, decay), make_layout("several chunks"), sizes, torch.float32))


@pytest.mark.usefixtures("elementwise")
def test_lora_on_a_frozen_layer() -> None:
    sizes = SIZES["three"]
    layer = Layer(sizes)
    add_lora(layer, ["in_proj_qkv", "in_proj_b", "out_proj"], r=3, alpha=6, dropout=0.0)
    move_adapters(layer)
    setup = make_setup(layer, make_layout("common beginning"), sizes, torch.float32)
    assert_same(setup)
    found = computed(setup)[2]
    assert {name.rsplit(".", 1)[1] for name in found} == {"lora_A", "lora_B"}


def test_gradient_of_the_input_only_where_it_is_wanted() -> None:
    sizes = SIZES["three"]
    for last in (False, True):
        setup = make_setup(Layer(sizes), make_layout("several samples"), sizes, torch.float32, last=last)
        rows, now = rows_of(setup.layout, last=last), a_pass(setup.layout)
        reference = computed(setup, last=last)[2]
        with torch.no_grad():
            setup.block.forward(setup.x, now, torch.empty_like(setup.grad), "layer0", rows)
            assert setup.block.backward(setup.grad.clone(), setup.x, now, "layer0", rows, wanted=False) is None
        found = taken(setup.layer)
        del reference["input_layernorm.weight"]  # its gradient comes with the input's
        assert all(torch.equal(found[name], gradient) for name, gradient in reference.items())


@pytest.mark.parametrize("name", ["several chunks", "common beginning"])
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.usefixtures("elementwise")
def test_bf16_is_near_fp32(kind: str, name: str) -> None:
    sizes = SIZES[kind]
    layer, layout = Layer(sizes), make_layout(name)
    reference = wanted(make_setup(layer, layout, sizes, torch.float32))
    out, gradients = errors(computed(make_setup(layer, layout, sizes, torch.bfloat16)), reference)
    assert out < BF16[0]
    assert max(gradients.values()) < BF16[1], gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["all rows", "rows that predict"])
@pytest.mark.parametrize("name", ["several chunks", "several samples", "common beginning of two tokens"])
def test_every_buffer_has_its_planned_size(name: str, last: bool, dtype: torch.dtype, elementwise: str) -> None:
    sizes = SIZES["three"]
    setup = make_setup(Layer(sizes), make_layout(name), sizes, dtype, last=last)
    computed(setup, last=last)
    longest = max(segment.end - segment.start for segment in setup.layout.segments)
    rows = Rows(len(setup.x), len(setup.grad), longest, last=last, wanted=True)
    how = Arithmetic(dtype.itemsize, weight_itemsize=4, head_itemsize=4)
    passing, kept = Tally(how, trains=True), Tally(how, trains=True)
    setup.block.sizes.passing(rows, passing)
    setup.block.sizes.kept(rows, kept)
    planned = passing.found | {(f"layer0.{part}", itemsize): size for (part, itemsize), size in kept.found.items()}
    held = {
        (name, dtype.itemsize): buffer.numel() * buffer.element_size()
        for (name, dtype), buffer in setup.block.workspace._held.items()
        if not re.match("projection|product|weight", name) and buffer.numel()
    }
    if elementwise == "plain":
        assert planned == held
    else:
        assert all(size <= planned[key] for key, size in held.items())
