"""A mixture of experts with its norm, forward and backward written out (Shazeer et al. 2017,
https://arxiv.org/abs/1701.06538; experts that are all chosen, Dai et al. 2024, https://arxiv.org/abs/2401.06066).

Each token goes to the k experts of the largest shares of a softmax over all. Tokens are sorted by expert, and an expert
multiplies its rows at once, filled up to one of few numbers of rows (buffers.filled_up). A share multiplies the hidden
layer instead of the output, which is the same, as the output is linear in it, and narrower; so backward needs no
output. Kept are the router's logits and all gates and ups.

Shapes: T tokens, E experts, k chosen ones, D hidden size, I size of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qingtune.kernels.architecture import Experts
from qingtune.kernels.blocks import Parts, Pass
from qingtune.kernels.elementwise import Norm, swiglu, swiglu_backward
from qingtune.kernels.experts.buffers import ExpertsSizes, filled_up
from qingtune.kernels.experts.matrices import ExpertMatrices, stacks
from qingtune.kernels.native import few_rows
from qingtune.kernels.projection import gradient
from qingtune.kernels.workspace import Workspace


@dataclass(frozen=True)
class Routing:
    """Which experts the tokens go to.

    Attributes:
        probabilities: of all experts, fp32 (fp64 for fp64) [T, E].
        chosen: numbers of experts, [T, k].
        shares: of the chosen ones, like probabilities, [T, k].
        order: places of `chosen`, flattened, sorted by expert, [T k]; experts with fewer rows come first, so that
            products of one shape follow one another.
        counts: rows of each expert that has any, by its number, in that order.
    """

    probabilities: torch.Tensor
    chosen: torch.Tensor
    shares: torch.Tensor
    order: torch.Tensor
    counts: dict[int, int]

    @property
    def places(self) -> torch.Tensor:
        """Where each token's rows lie among the sorted ones, [T, k]."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        return places.view_as(self.chosen)

    def experts(self) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Each expert that a token goes to: its number, its rows among the sorted ones, and their tokens."""
        tokens, start = self.order // self.chosen.shape[1], 0
        for number, count in self.counts.items():
            rows = slice(start, start + count)
            yield number, rows, tokens[rows]
            start += count


@dataclass(frozen=True)
class Router:
    """softmax(W x), of which the k largest are taken.

    Attributes:
        module: holds W as `weight`, [E, D].
        chosen: k.
        normalised: whether their shares are divided by their sum.
    """

    module: Any
    chosen: int
    normalised: bool
    workspace: Workspace

    def logits(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x: [T, D] -> W x [T, E], kept under the name."""
        out = self.workspace.take(name, (len(x), len(self.module.weight)), x.dtype)
        return torch.mm(x, self._weight(x.dtype).t(), out=out)

    def route(self, logits: torch.Tensor) -> Routing:
        """logits: [T, E]; the same ones give the same routing."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        probabilities = torch.softmax(logits, -1, dtype=wide)
        shares, chosen = torch.topk(probabilities, self.chosen, -1)
        if self.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        counts = torch.bincount(chosen.flatten(), minlength=logits.shape[1])
        by_count = torch.argsort(counts, stable=True)
        order = torch.argsort(torch.argsort(by_count)[chosen.flatten()], stable=True)
        sizes = zip(by_count.tolist(), counts[by_count].tolist(), strict=True)
        return Routing(probabilities, chosen, shares, order, {number: count for number, count in sizes if count})

    def backward(self, grad: torch.Tensor, routing: Routing, x: torch.Tensor, grad_x: torch.Tensor) -> None:
        """Add to the gradient of W, if it is trained, and to that of x.

        Args:
            grad: gradient of the chosen ones' shares, [T, k].
            routing: of the forward pass.
            x: [T, D].
            grad_x: [T, D].
        """
        if self.normalised:  # shares = p / sum(p)
            total = routing.probabilities.gather(1, routing.chosen).sum(-1, keepdim=True)
            grad = (grad - (grad * routing.shares).sum(-1, keepdim=True)) / total
        of_all = torch.zeros_like(routing.probabilities).scatter_(1, routing.chosen, grad)
        of_all.sub_((of_all * routing.probabilities).sum(-1, keepdim=True)).mul_(routing.probabilities)
        grad_logits = of_all.to(x.dtype)
        grad_x.addmm_(grad_logits, self._weight(x.dtype))
        if self.module.weight.requires_grad:
            gradient(self.module.weight).add_(self.workspace.product(grad_logits.t(), x, self.module.weight.dtype))

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self.workspace.cast("experts.router", self.module.weight.detach(), dtype)


class SharedExpert:
    """sigmoid(w x) down(silu(gate(x)) * up(x)), for every token.

    Args:
        mlp: the module of the mixture.
        number: of the layer.
    """

    def __init__(self, mlp: Any, number: int, parts: Parts) -> None:
        expert = mlp.shared_expert
        self.number, self.workspace = number, parts.workspace
        self.reads, self.down = parts.projections(
            [expert.gate_proj, expert.up_proj, mlp.shared_expert_gate], [expert.down_proj]
        )
        self.size = self.down.members[0].shape[1]

    def forward(self, x: torch.Tensor, now: Pass, out: torch.Tensor | None, slot: str) -> None:
        """x: [T, D], added to out: [T, D]; without out, as much as backward needs to have been done."""
        gate, up, logit = self._kept(x, slot)
        self.reads.forward(slot + ".shared", x, [gate, up, logit], now.dropout_seed(self.number, 2))
        hidden = self._take("experts.hidden", x)
        swiglu(gate, up, hidden, hidden).mul_(logit.sigmoid())
        seed = now.dropout_seed(self.number, 3)
        if out is None:
            self.down.keep_low(slot + ".shared_down", hidden, seed)
        else:
            self.down.forward(slot + ".shared_down", hidden, [out], seed, add=True)

    def backward(self, grad: torch.Tensor, x: torch.Tensor, now: Pass, grad_x: torch.Tensor, slot: str) -> None:
        """grad: of what forward added, [T, D]; grad_x: [T, D], overwritten; gate gives way to its gradient."""
        gate, up, logit = self._kept(x, slot)
        activated, hidden = self._take("experts.activated", x), self._take("experts.hidden", x)
        scaled, grad_hidden = self._take("experts.scaled", x), self._take("experts.grad_hidden", x)
        share = logit.sigmoid()
        torch.mul(swiglu(gate, up, activated, hidden), share, out=scaled)
        self.down.backward(slot + ".shared_down", scaled, [grad], grad_hidden, now.dropout_seed(self.number, 3))
        torch.mul(grad_hidden, hidden, out=scaled)
        grad_share = scaled.sum(-1, keepdim=True)
        grad_up = swiglu_backward(grad_hidden.mul_(share), gate, up, activated)
        logit.copy_(grad_share.mul_(share * (1 - share)))
        self.reads.backward(slot + ".shared", x, [gate, grad_up, logit], grad_x, now.dropout_seed(self.number, 2))

    def _kept(self, x: torch.Tensor, slot: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate and up [T, I], and the logit of the share [T, 1]."""
        logit = self.workspace.take(slot + ".shared_share", (len(x), 1), x.dtype)
        return self._take(slot + ".shared_gate", x), self._take(slot + ".shared_up", x), logit

    def _take(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.workspace.take(name, (len(x), self.size), x.dtype)


class Part:
    """Buffers of one expert, until the next one's: rows of tokens, then zeros, filled up where products want that.

    Args:
        block: the expert's.
        tokens: of the pass, the most that an expert may get; buffers are made for them.
        count: of this expert's.
    """

    def __init__(self, block: ExpertsBlock, tokens: int, count: int) -> None:
        self._block, self._count = block, count
        self._most, self._rows = (filled_up(number, block.fills_beyond) for number in (tokens, count))

    def take(self, name: str, width: int) -> torch.Tensor:
        """[filled rows, width], undefined but for the rows that were filled up."""
        rows = self._block.workspace.take(f"experts.{name}", (self._most, width), self._block.dtype)[: self._rows]
        if self._rows > self._count:
            rows[self._count :].zero_()
        return rows

    def place(self, name: str, kept: torch.Tensor) -> torch.Tensor:
        """Where to write rows that are kept, [n, width]: there, or where they are filled up, for `keep` to copy."""
        return kept if self._rows == self._count else self.take(name, kept.shape[1])

    def keep(self, kept: torch.Tensor, written: torch.Tensor) -> None:
        """Rows that were written to their `place` are kept."""
        if written is not kept:
            kept.copy_(written[: self._count])

    def read(self, name: str, kept: torch.Tensor) -> torch.Tensor:
        """Rows that were kept, [n, width], filled up."""
        rows = self.place(name, kept)
        if rows is not kept:
            rows[: self._count] = kept
        return rows

    def gather(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of x, [filled rows, D], until the next that are gathered."""
        rows = self.take("input", x.shape[1])
        torch.index_select(x, 0, tokens, out=rows[: self._count])
        return rows


class ExpertsBlock:
    """x -> x + sum of shares times experts, of norm(x), and the shared expert.

    Args:
        layer: the decoder layer.
        number: the layer's.
        kind: its description.
        norm: of its input.
    """

    def __init__(self, layer: Any, number: int, kind: Experts, parts: Parts, *, norm: Norm) -> None:
        mlp = layer.mlp
        self.number, self.dtype, self.workspace = number, parts.dtype, parts.workspace
        self.norm = norm
        self.router = Router(mlp.gate, kind.chosen, kind.normalised, parts.workspace)
        self.gate_up, self.down = (
            ExpertMatrices(stack, parts.workspace, int8_units=parts.int8_units) for stack in stacks(mlp.experts)
        )
        self.shared = SharedExpert(mlp, number, parts) if kind.shared else None
        self.size = kind.size
        # On a CPU, oneDNN makes code for each shape of products in bf16 and int8, which takes as long as the product
        # of a few rows.
        on_cpu = mlp.gate.weight.device.type in ("cpu", "meta")
        self.fills_beyond = 0 if on_cpu and (parts.dtype.itemsize == 2 or self.gate_up.in_int8) else None
        if all(
            stack.multiplies_few_rows_in_c(parts.dtype, mlp.gate.weight.device) for stack in (self.gate_up, self.down)
        ):
            self.fills_beyond = few_rows.MOST

    @property
    def sizes(self) -> ExpertsSizes:
        """What it takes memory for."""
        weight, shared = self.router.module.weight, self.shared
        return ExpertsSizes(
            count=len(weight),
            chosen=self.router.chosen,
            gate_up=self.gate_up.sizes,
            down=self.down.sizes,
            router_itemsize=weight.dtype.itemsize,
            trains_router=weight.requires_grad,
            fills_beyond=self.fills_beyond,
            shared=(shared.reads.sizes, shared.down.sizes) if shared else None,
        )

    def forward(self, x: torch.Tensor, now: Pass, out: torch.Tensor, slot: str) -> None:
        """x: [T, D] -> out: [T, D]."""
        self._forward(x, now, out, slot)

    def forward_again(self, x: torch.Tensor, now: Pass, slot: str) -> None:
        """As much of forward as backward needs to have been done."""
        self._forward(x, now, None, slot)

    def _forward(self, x: torch.Tensor, now: Pass, out: torch.Tensor | None, slot: str) -> None:
        normed = self.norm.forward(x)
        routing = self.router.route(self.router.logits(slot + ".router", normed))
        gates, ups, lows, down_lows = self._kept(routing, slot)
        outs = self._take("experts.rows", len(gates), x.shape[1])
        shares = self._sorted_shares(routing)
        for number, rows, tokens in routing.experts():
            part, count = Part(self, len(x), len(tokens)), len(tokens)
            both = part.take("gate_up", 2 * self.size)
            low = part.place("rank", kept_low := lows[rows])
            self.gate_up.forward(number, part.gather(normed, tokens), low, both)
            part.keep(kept_low, low)
            gate, up, hidden = gates[rows], ups[rows], part.take("hidden", self.size)
            for kept, mine in zip((gate, up), both[:count].chunk(2, 1), strict=True):
                kept.copy_(mine)
            swiglu(gate, up, hidden[:count], hidden[:count]).mul_(shares[rows])
            low = part.place("rank", kept_low := down_lows[rows])
            if out is None:
                self.down.keep_low(number, hidden, low)
            else:
                product = part.place("output", kept_out := outs[rows])
                self.down.forward(number, hidden, low, product)
                part.keep(kept_out, product)
            part.keep(kept_low, low)
        if out is not None:
            torch.add(x, F.embedding_bag(routing.places, outs, mode="sum"), out=out)
        if self.shared:
            self.shared.forward(normed, now, out, slot)

    def backward(self, grad: torch.Tensor, x: torch.Tensor, now: Pass, slot: str) -> torch.Tensor:
        """grad: gradient of out, which becomes that of x; gates and ups give way to their gradients."""
        normed = self.norm.forward(x)
        routing = self.router.route(self.workspace.take(slot + ".router", self._logits_shape(x), self.dtype))
        rows_grad, grad_shares = self._experts_backward(grad, normed, routing, slot)
        grad_normed = self._take("experts.grad_normed", *x.shape)
        if self.shared:
            self.shared.backward(grad, normed, now, grad_normed, slot)
            grad_normed.add_(F.embedding_bag(routing.places, rows_grad, mode="sum"))
        else:
            grad_normed.copy_(F.embedding_bag(routing.places, rows_grad, mode="sum"))
        self.router.backward(grad_shares, routing, normed, grad_normed)
        return self.norm.add_backward(grad, grad_normed, x)

    def _experts_backward(
        self, grad: torch.Tensor, normed: torch.Tensor, routing: Routing, slot: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the experts' inputs, [T k, D] sorted by expert, and of the shares, [T, k]."""
        gates, ups, lows, down_lows = self._kept(routing, slot)
        rows_grad = self._take("experts.rows", len(gates), normed.shape[1])
        grad_shares = torch.empty(routing.shares.numel(), dtype=routing.shares.dtype, device=normed.device)
        shares = self._sorted_shares(routing)
        for number, rows, tokens in routing.experts():
            part, count = Part(self, len(normed), len(tokens)), len(tokens)
            hidden, activated = (part.take(name, self.size)[:count] for name in ("hidden", "activated"))
            scaled, grad_hidden = (part.take(name, self.size) for name in ("scaled", "grad_hidden"))
            gate, up, product = gates[rows], ups[rows], scaled[:count]
            torch.mul(swiglu(gate, up, activated, hidden), shares[rows], out=product)
            self.down.backward(
                number, scaled, part.read("rank", down_lows[rows]), part.gather(grad, tokens), grad_hidden
            )
            torch.mul(grad_hidden[:count], hidden, out=product)
            grad_shares[routing.order[rows]] = product.sum(-1, dtype=grad_shares.dtype)
            grad_up = swiglu_backward(grad_hidden[:count].mul_(shares[rows]), gate, up, activated)
            both, grad_x = part.take("gate_up", 2 * self.size), part.place("output", kept := rows_grad[rows])
            torch.cat([gate, grad_up], 1, out=both[:count])
            low = part.read("rank", lows[rows])
            self.gate_up.backward(number, part.gather(normed, tokens), low, both, grad_x)
            part.keep(kept, grad_x)
        return rows_grad, grad_shares.view_as(routing.shares)

    def _kept(self, routing: Routing, slot: str) -> tuple[torch.Tensor, ...]:
        """What stays from forward to backward, sorted by expert: gates and ups [T k, I], and what adapters keep."""
        rows = len(routing.order)
        return (
            self._take(slot + ".gate", rows, self.size),
            self._take(slot + ".up", rows, self.size),
            self.gate_up.low(slot + ".gate_up", rows, self.dtype),
            self.down.low(slot + ".down", rows, self.dtype),
        )

    def _sorted_shares(self, routing: Routing) -> torch.Tensor:
        """[T k, 1] in the dtype that is computed in."""
        return routing.shares.flatten()[routing.order, None].to(self.dtype)

    def _logits_shape(self, x: torch.Tensor) -> tuple[int, int]:
        return len(x), len(self.router.module.weight)

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        return self.workspace.take(name, shape, self.dtype)
