"""The gated delta rule in chunks is the rule a token at a time, forward and backward; in answering, Transformers'."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_runs import lively
from transformers import Qwen3_5TextConfig
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from qingtune.kernels.architecture import DeltaNet
from qingtune.kernels.delta.answer import DeltaCore
from qingtune.kernels.delta.rule import CHUNK, DeltaRule, chunk, step
from qingtune.kernels.native import delta_step
from qingtune.kernels.workspace import Workspace

# Tokens, key heads, value heads a key head, sizes of keys and values, and the largest decay of a token.
SHAPES = {
    "several tokens": (7, 2, 1, 4, 6, 1.0),
    "three value heads a key head": (13, 3, 3, 5, 4, 1.0),
    "one token": (1, 2, 2, 4, 4, 1.0),
    "a chunk": (CHUNK, 1, 2, 16, 16, 0.1),
    "strong decay": (40, 2, 1, 8, 8, 900.0),
    "no decay": (40, 2, 1, 8, 8, 0.0),
}
EXACT = 1e-12  # fp64, relative to the largest number; measured 2e-14


@dataclass(frozen=True)
class Tokens:
    """q, k [n, K, d]; v [n, H, e]; g and log beta [n, H]; the state before them [H, d, e]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    log_beta: torch.Tensor
    state: torch.Tensor

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.log_beta, self.state

    def asking(self) -> Tokens:
        return Tokens(*(x.clone().requires_grad_() for x in self.all))


def make_tokens(name: str) -> Tokens:
    count, key_heads, share, key_size, value_size, decay = SHAPES[name]
    torch.manual_seed(0)
    heads = key_heads * share
    q, k = torch.nn.functional.normalize(torch.randn(2, count, key_heads, key_size, dtype=torch.float64), dim=-1)
    v = torch.randn(count, heads, value_size, dtype=torch.float64)
    g, log_beta = -decay * torch.rand(count, heads).double(), -torch.rand(count, heads).double()
    return Tokens(q, k, v, g, log_beta, torch.randn(heads, key_size, value_size, dtype=torch.float64))


def token_by_token(these: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token reads and the state after the last one, as the paper defines them."""
    state, outs = these.state, []
    share = these.v.shape[1] // these.k.shape[1]
    q, k = (x.repeat_interleave(share, 1) for x in (these.q, these.k))
    for place in range(len(q)):
        state = state * these.g[place].exp()[:, None, None]
        held = torch.einsum("hd,hde->he", k[place], state)
        added = (these.v[place] - held) * these.log_beta[place].exp()[:, None]
        state = state + torch.einsum("hd,he->hde", k[place], added)
        outs.append(torch.einsum("hd,hde->he", q[place], state))
    return torch.stack(outs), state


def assert_near(found: torch.Tensor, wanted: torch.Tensor, bound: float = EXACT) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= bound * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("name", SHAPES)
def test_a_chunk_is_its_tokens_one_by_one(name: str) -> None:
    these = make_tokens(name).asking()
    out, after = token_by_token(these)
    grad_out, grad_after = torch.randn_like(out), torch.randn_like(after)
    torch.autograd.backward([out, after], [grad_out, grad_after])
    key_heads = these.k.shape[1]
    rule = DeltaRule(Workspace(torch.device("cpu")), torch.float64)

    def grouped(x: torch.Tensor) -> torch.Tensor:
        """[n, H, ...] -> [K, n, R, ...]"""
        return x.detach().unflatten(1, (key_heads, -1)).transpose(0, 1)

    def states(x: torch.Tensor) -> torch.Tensor:
        """[H, d, e] -> [K, d, R, e]"""
        return x.detach().unflatten(0, (key_heads, -1)).transpose(1, 2).clone(memory_format=torch.contiguous_format)

    with torch.no_grad():
        kq = torch.stack([these.k, these.q]).permute(2, 0, 1, 3).contiguous()
        v = grouped(these.v).contiguous()
        decay = grouped(these.g).transpose(1, 2).cumsum(-1)
        beta = grouped(these.log_beta.exp()).transpose(1, 2)
        state = states(these.state)
        assert_near(rule.forward(kq, v, decay, beta, state), grouped(out))
        assert_near(state, states(after))
        grad_state = states(grad_after)
        grad_kq, grad_v, grad_g, grad_beta = rule.backward(
            grouped(grad_out), kq, v, decay, beta, states(these.state), grad_state
        )
        wanted = [x.grad for x in these.all]
        found = (
            *(grad_kq[:, part].transpose(0, 1) for part in (1, 0)),
            grad_v.transpose(0, 1).flatten(1, 2),
            *(x.permute(2, 0, 1).flatten(1) for x in (grad_g, grad_beta)),
            grad_state.transpose(1, 2).flatten(0, 1),
        )
        for one, two in zip(found, wanted, strict=True):
            assert two is not None
            assert_near(one, two)


@pytest.mark.parametrize("name", SHAPES)
def test_new_tokens_of_a_sequence(name: str) -> None:
    these = make_tokens(name)
    wanted, after = token_by_token(these)
    beta, given = these.log_beta.exp(), these.state.clone()
    out, state = chunk(these.q, these.k, these.v, these.g, beta, given)
    assert torch.equal(given, these.state)
    assert_near(out, wanted)
    assert_near(state, after)
    states = given[None]
    for place in range(len(wanted)):
        here = slice(place, place + 1)
        read = step(these.q[here], these.k[here], these.v[here], these.g[here], beta[here], states)
        assert_near(read, wanted[here])
    assert_near(states[0], after)


def test_more_tokens_than_a_chunk() -> None:
    these = make_tokens("a chunk")
    twice = Tokens(*(torch.cat([x, x.flip(0), x[:5]]) for x in these.all[:-1]), these.state)
    wanted, after = token_by_token(twice)
    out, state = chunk(twice.q, twice.k, twice.v, twice.g, twice.log_beta.exp(), twice.state)
    assert_near(out, wanted)
    assert_near(state, after)


@pytest.mark.parametrize("in_c", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (2, 6)])
def test_answering_is_transformers(heads: tuple[int, int], in_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in two parts, then single tokens of two sequences together."""
    if not in_c:
        monkeypatch.setattr(delta_step, "fits", lambda *_: False)
    config = Qwen3_5TextConfig(
        hidden_size=24,
        num_hidden_layers=1,
        linear_num_key_heads=heads[0],
        linear_num_value_heads=heads[1],
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        rms_norm_eps=0.02,
        layer_types=["linear_attention"],
    )
    torch.manual_seed(0)
    net = lively(Qwen3_5GatedDeltaNet(config, 0))
    core = DeltaCore.of(net, DeltaNet(*heads, 8, 12, 4))
    lengths, new = (CHUNK + 9, 2), 4
    inputs = [torch.randn(length + new, 24) for length in lengths]
    states = [core.new_states() for _ in inputs]
    found: list[list[torch.Tensor]] = [[] for _ in inputs]

    def projected(x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in (net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a)]

    with torch.no_grad():
        wanted = []
        for x, length in zip(inputs, lengths, strict=True):
            cache = DynamicCache(config=config)
            parts = [net(x[None, :length], cache), *(net(x[None, i : i + 1], cache) for i in range(length, len(x)))]
            wanted.append(torch.cat(parts, 1)[0])
        for x, length, state, outs in zip(inputs, lengths, states, found, strict=True):
            outs += [net.out_proj(core.chunk(*projected(part), *state)) for part in (x[:1], x[1:length])]
        rows, recurrent = (torch.stack(parts) for parts in zip(*states, strict=True))
        for place in range(new):
            tokens = torch.stack([x[length + place] for x, length in zip(inputs, lengths, strict=True)])
            read = net.out_proj(core.step(*projected(tokens), rows, recurrent))
            for outs, row in zip(found, read, strict=True):
                outs.append(row[None])
    for outs, reference in zip(found, wanted, strict=True):
        assert_near(torch.cat(outs), reference, 2e-5)
