"""The mixture of experts written out gives what Transformers' modules give under autograd, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, Qwen3MoeSparseMoeBlock

from qingtune.kernels.architecture import Experts
from qingtune.kernels.blocks import Parts, Pass
from qingtune.kernels.elementwise import Norm
from qingtune.kernels.experts.block import ExpertsBlock
from qingtune.kernels.experts.modules import ExpertAdapter, LoRAExperts
from qingtune.kernels.projection import Member, Projection
from qingtune.kernels.workspace import Workspace

HIDDEN, SIZE, SHARED = 32, 24, 40
NOW: Any = Pass(layout=None, rotary=None, seed=None)  # pyright: ignore[reportArgumentType]


def make_mlp(*, experts: int = 6, chosen: int = 3, normalised: bool = True, shared: bool = False) -> nn.Module:
    """A layer's norm and mixture, of Transformers' modules, all trained."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": SIZE,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "norm_topk_prob": normalised,
    }
    if shared:
        config: Any = transformers.Qwen3_5MoeTextConfig(**sizes, shared_expert_intermediate_size=SHARED)
        mlp: nn.Module = Qwen3_5MoeSparseMoeBlock(config)
    else:
        mlp = Qwen3MoeSparseMoeBlock(transformers.Qwen3MoeConfig(**sizes))
    layer = nn.ModuleDict({"mlp": mlp, "post_attention_layernorm": Qwen3MoeRMSNorm(HIDDEN)})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def make_block(layer: Any, dtype: torch.dtype) -> ExpertsBlock:
    workspace, router = Workspace(torch.device("cpu")), layer["mlp"].gate

    def projections(*groups: Any) -> list[Projection]:
        return [Projection([Member(one, None) for one in group], 0.0, workspace, int8_units=False) for group in groups]

    def norm(module: Any) -> Norm:
        return Norm(module.weight, module.variance_epsilon, workspace)

    parts = Parts(dtype, workspace, norm, projections)
    kind = Experts(
        count=len(router.weight),
        chosen=router.top_k,
        size=SIZE,
        normalised=getattr(router, "norm_topk_prob", True),
        shared=SHARED * hasattr(layer["mlp"], "shared_expert"),
    )
    return ExpertsBlock(SimpleNamespace(mlp=layer["mlp"]), 0, kind, parts, norm=norm(layer["post_attention_layernorm"]))


def compare(layer: Any, block: ExpertsBlock, x: torch.Tensor, bound: float, *, again: bool = False) -> None:
    """Outputs and all gradients, as shares of the largest value of each; a single expert's share has no gradient."""
    grad = torch.randn_like(x)
    read = x.clone().requires_grad_()
    wanted = read + layer["mlp"](layer["post_attention_layernorm"](read)[None])[0]
    wanted.backward(grad)
    found, parameters = {}, dict(layer.named_parameters())
    references = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    out = torch.empty_like(x)
    with torch.no_grad():
        block.forward(x, NOW, out, "layer")
        if again:
            block.forward(torch.randn_like(x), NOW, torch.empty_like(x), "layer")
            block.forward_again(x, NOW, "layer")
        found["x"] = block.backward(grad.clone(), x, NOW, "layer")
    references |= {"x": read.grad, "out": wanted.detach()}
    found |= {"out": out} | {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert found.keys() == references.keys()
    for name, reference in references.items():
        assert reference is not None
        assert (found[name] - reference).abs().max() <= bound * reference.abs().max().clamp_min(1e-2), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
def test_outputs_and_gradients_are_those_of_transformers(dtype: torch.dtype, shared: bool) -> None:
    layer = make_mlp(shared=shared).to(dtype)
    compare(layer, make_block(layer, dtype), torch.randn(17, HIDDEN, dtype=dtype), 1e-5)


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"normalised": False}, 17),
        ({"experts": 40, "chosen": 2}, 3),  # most experts get no token
        ({"experts": 4, "chosen": 4}, 9),  # all get all
        ({"experts": 4, "chosen": 1}, 9),
        ({"experts": 4, "chosen": 1, "normalised": False}, 9),
        ({}, 1),
    ],
    ids=["not-normalised", "idle-experts", "all-experts", "one-chosen", "one-share", "one-token"],
)
def test_every_number_of_experts_and_tokens(settings: dict[str, Any], tokens: int) -> None:
    layer = make_mlp(**settings).double()
    compare(layer, make_block(layer, torch.float64), torch.randn(tokens, HIDDEN, dtype=torch.float64), 1e-5)


def test_all_tokens_go_to_one_expert() -> None:
    layer: Any = make_mlp(experts=4, chosen=1, normalised=False).double()
    x = torch.randn(9, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        x[:, 0] = 5
        layer["post_attention_layernorm"].weight[0] = 3
        layer["mlp"].gate.weight[2, 0] = 9
    compare(layer, make_block(layer, torch.float64), x, 1e-5)
    assert [index for index, grad in enumerate(layer["mlp"].experts.down_proj.grad) if grad.any()] == [2]


@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
def test_a_forward_pass_that_keeps_less_is_enough_for_backward(shared: bool) -> None:
    layer = make_mlp(shared=shared).double()
    x = torch.randn(17, HIDDEN, dtype=torch.float64)
    compare(layer, make_block(layer, torch.float64), x, 1e-5, again=True)


def test_the_gradient_passes_a_frozen_router() -> None:
    layer: Any = make_mlp().double().requires_grad_(False)
    compare(layer, make_block(layer, torch.float64), torch.randn(17, HIDDEN, dtype=torch.float64), 1e-5)
    assert layer["mlp"].gate.weight.grad is None


def test_a_pass_without_gradients_makes_none() -> None:
    layer: Any = make_mlp()
    x = torch.randn(17, HIDDEN)
    with torch.no_grad():
        make_block(layer, torch.float32).forward(x, NOW, torch.empty_like(x), "layer")
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_gradients_add_up() -> None:
    layer: Any = make_mlp()
    block, x = make_block(layer, torch.float32), torch.randn(17, HIDDEN)
    grads = []
    with torch.no_grad():
        for _ in range(2):
            block.forward(x, NOW, torch.empty_like(x), "layer")
            block.backward(torch.ones_like(x), x, NOW, "layer")
            grads.append(layer["mlp"].experts.gate_up_proj.grad.clone())
    torch.testing.assert_close(grads[1], 2 * grads[0])


def test_adapters_of_experts_are_a_change_of_their_weights() -> None:
    """Outputs and gradients of A and B, through W + s B A under autograd."""
    layer: Any = make_mlp().double().requires_grad_(False)
    experts, rank, scaling = layer["mlp"].experts, 4, 0.7
    adapters: dict[str, ExpertAdapter] = {}
    for name in ("gate_up_proj", "down_proj"):
        count, out, width = getattr(experts, name).shape
        adapters[name] = ExpertAdapter(
            0.2 * torch.randn(count, rank, width), 0.2 * torch.randn(count, out, rank), scaling
        )
        adapters[name].double()
    layer["mlp"].experts = LoRAExperts(experts, adapters)
    block = make_block(layer, torch.float64)
    layer["mlp"].experts = experts
    x, grad = (torch.randn(17, HIDDEN, dtype=torch.float64) for _ in range(2))
    read = x.clone().requires_grad_()
    merged = {name: getattr(experts, name) + scaling * one.lora_B @ one.lora_A for name, one in adapters.items()}
    normed = layer["post_attention_layernorm"](read)[None]
    wanted = (
        read
        + torch.func.functional_call(
            layer["mlp"], {f"experts.{name}": weight for name, weight in merged.items()}, (normed,)
        )[0]
    )
    parameters = [matrix for one in adapters.values() for matrix in (one.lora_A, one.lora_B)]
    references = torch.autograd.grad(wanted, [read, *parameters], grad)
    out = torch.empty_like(x)
    with torch.no_grad():
        block.forward(x, NOW, out, "layer")
        found = [block.backward(grad.clone(), x, NOW, "layer"), *(parameter.grad for parameter in parameters)]
    torch.testing.assert_close(out, wanted)
    for mine, reference in zip(found, references, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


def test_in_16_bits_it_is_no_further_off_than_transformers() -> None:
    layer: Any = make_mlp(experts=16, chosen=8)
    x = torch.randn(64, HIDDEN)
    exact = x + layer["mlp"](layer["post_attention_layernorm"](x)[None])[0]
    layer.bfloat16()
    with torch.no_grad():
        theirs = x.bfloat16() + layer["mlp"](layer["post_attention_layernorm"](x.bfloat16())[None])[0]
        out = torch.empty_like(theirs)
        make_block(layer, torch.bfloat16).forward(x.bfloat16(), NOW, out, "layer")
        assert (out - exact).norm() <= 1.05 * (theirs - exact).norm()
