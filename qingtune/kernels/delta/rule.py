"""The gated delta rule, a chunk of tokens at a time, forward and backward written out.

A head keeps a state S [key size, value size]. A token lets it decay, corrects what it holds under the token's key, and
reads it (Yang et al. 2024, https://arxiv.org/abs/2412.06464):

    S_t = exp(g_t) S_(t-1) + beta_t k_t (v_t - exp(g_t) k_t S_(t-1)),    o_t = q_t S_t

Within a chunk all corrections follow from one triangular system (the UT transform of Yang et al. 2024,
https://arxiv.org/abs/2406.06484), so that a chunk costs a few matrix products. With G the sum of g from the chunk's
first token on, D_ij = exp(G_i - G_j) for i >= j, and rows scaled by what stands before them:

    (I + strictly lower(beta K K' D)) N = beta (V - exp(G) K S)          N: what each token adds under its key
    O = exp(G) Q S + (Q K' D) N,    S <- exp(G_last) S + K' exp(G_last - G) N

All in fp32 (fp64 for fp64), as in Transformers, but for products, whose factors may be rounded to 16 bits; the
triangular system stays in fp32. No factor exceeds 1, however strong the decay is.

Shapes: n tokens of a chunk, K key heads, R value heads a key head, d and e the sizes of keys and values.
"""

from __future__ import annotations

import torch

from qingtune.kernels.delta.sizes import CHUNK
from qingtune.kernels.native.delta import delta_kernels
from qingtune.kernels.workspace import Workspace

EPSILON = 1e-6  # added to the squared lengths by which queries and keys are divided (l2norm in Transformers and fla)


class DeltaRule:
    """The rule for one chunk of one sequence; what it gives lies in the workspace until the next chunk.

    Keys and queries come as one tensor [K, 2, n, d], keys first, as both are multiplied by the same matrices; both of
    length 1, queries times d^-0.5. Values and what is read: [K, n, R, e]. Decays (sums of g from the chunk's first
    token on) and beta: [K, R, n]. States: [K, d, R, e].
    """

    def __init__(self, workspace: Workspace, dtype: torch.dtype, products: torch.dtype | None = None) -> None:
        """dtype: in which all is held, fp32 or fp64; products: in which matrices are multiplied, if another."""
        self.workspace, self.dtype, self.products = workspace, dtype, products or dtype

    def forward(
        self, kq: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        """What each token reads, [K, n, R, e]; the state becomes that after the chunk."""
        narrow_kq, narrow_state = self._narrow("kq", kq), self._narrow("state", state)
        _, scores, solved = self._scores(narrow_kq, decay, beta)
        reads = self._reads(narrow_kq, decay, narrow_state)
        added, _ = self._added(v, reads, solved)
        out = self._take("out", *v.shape).copy_(reads[:, 1])
        shares, factor = self._narrow("shares", scores[:, :, 1]), self._narrow("added", added)
        for head in range(v.shape[2]):
            self._multiply(shares[:, head], factor[:, :, head], out[:, :, head], add=True)
        kept = torch.mul(added, self._kept(decay), out=self._take("kept", *v.shape))
        after, factor = self._decay_state(state, decay).flatten(2), self._narrow("kept", kept).flatten(2)
        self._multiply(narrow_kq[:, 0].transpose(1, 2), factor, after, add=True)
        return out

    def backward(
        self,
        grad: torch.Tensor,
        kq: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
        grad_state: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of kq, v, g (of each token, not of their sums) and log beta, shaped as what they are of.

        Args:
            grad: of what forward gave.
            state: at the chunk's start.
            grad_state: of the state after the chunk; becomes that of the state at its start.
        """
        narrow_kq, narrow_state = self._narrow("kq", kq), self._narrow("state", state)
        narrow_grad_state = self._narrow("grad_state", grad_state).flatten(2)
        within, scores, solved = self._scores(narrow_kq, decay, beta)
        reads = self._reads(narrow_kq, decay, narrow_state)
        added, missing = self._added(v, reads, solved)

        # Through the state after the chunk, what was read of it, and the triangular system.
        kept = torch.mul(added, self._kept(decay), out=self._take("kept", *v.shape))
        grad_added = self._take("grad_added", *v.shape)
        self._multiply(narrow_kq[:, 0], narrow_grad_state, grad_added.flatten(2))
        through_state = self._dots(grad_added, kept)
        grad_added.mul_(self._kept(decay))
        # Gradients of -(what keys read) and of what queries read, both before their decay.
        grad_reads, grad_v = self._take("grad_reads", *reads.shape), self._take("grad_v", *v.shape)
        grad_reads[:, 1].copy_(grad)
        shares, narrow_grad = self._narrow("shares", scores[:, :, 1]), self._narrow("grad", grad_reads[:, 1])
        for head in range(v.shape[2]):
            self._multiply(shares[:, head].transpose(1, 2), narrow_grad[:, :, head], grad_added[:, :, head], add=True)
        narrow_grad = self._narrow("grad", grad_added)
        for head in range(v.shape[2]):
            self._multiply(solved[:, head].transpose(1, 2), narrow_grad[:, :, head], grad_v[:, :, head])
        torch.neg(grad_v, out=grad_reads[:, 0])
        grad_decay, grad_beta, weights = self._through_scores(grad_reads, added, within, scores)
        grad_beta.add_(self._dots(grad_v, missing))
        grad_decay.add_(self._dots(grad_reads, reads).sum(1)).sub_(through_state)
        grad_reads.mul_(self._since_start(decay)[:, None])

        # Keys and queries as rows of scores and readers of the state; then keys as columns, and as what is written.
        grad_kq, grad_k = self._take("grad_kq", *kq.shape), self._take("grad_k", *kq[:, 0].shape)
        narrow_reads = self._narrow("grad_reads", grad_reads).flatten(3).flatten(1, 2)
        self._multiply(narrow_reads, narrow_state.flatten(2).transpose(1, 2), grad_kq.flatten(1, 2))
        self._multiply(weights, narrow_kq[:, 0], grad_kq.flatten(1, 2), add=True)
        self._multiply(weights.transpose(1, 2), narrow_kq.flatten(1, 2), grad_k)
        factor = self._narrow("kept", kept).flatten(2)
        self._multiply(factor, narrow_grad_state.transpose(1, 2), grad_k, add=True)
        grad_kq[:, 0].add_(grad_k)

        held = self._decay_state(grad_state, decay)
        lost = torch.mul(held, state, out=self._take("state_product", *state.shape)).sum((1, 3))
        grad_decay[..., -1].add_(through_state.sum(-1)).add_(lost)
        self._multiply(narrow_kq.flatten(1, 2).transpose(1, 2), narrow_reads, held.flatten(2), add=True)
        return grad_kq, grad_v, grad_decay.flip(-1).cumsum(-1).flip(-1), grad_beta

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        return self.workspace.take("delta." + name, shape, self.dtype)

    def _narrow(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A factor of products in their dtype."""
        if self.products == self.dtype:
            return x
        return self.workspace.take("delta.narrow_" + name, x.shape, self.products).copy_(x)

    def _multiply(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
        """Put or add left @ right to out, which may be wider than they are."""
        if left.dtype == out.dtype:
            torch.baddbmm(out, left, right, beta=int(add), out=out)
            return
        product = self.workspace.take("delta.product", out.shape, left.dtype)
        torch.bmm(left, right, out=product)
        if add:
            out.add_(product)
        else:
            out.copy_(product)

    def _scores(
        self, kq: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What tokens of the chunk are to each other; entries above the diagonal are 0.

        Returns:
            D, [K, R, n, n].
            K K' D (strictly lower) and Q K' D, [K, R, 2, n, n].
            The inverse of the triangular system, times beta, [K, R, n, n], as a factor of products.
        """
        key_heads, heads, count = decay.shape
        products = self._take("products", key_heads, 2, count, count)
        self._multiply(kq.flatten(1, 2), kq[:, 0].transpose(1, 2), products.flatten(1, 2))
        within = self._take("within", key_heads, heads, count, count)
        scores = self._take("scores", key_heads, heads, 2, count, count)
        solved = self._take("solved", *within.shape)
        if kernels := delta_kernels(count, products, decay):
            kernels.scores(products, decay, beta.contiguous(), within, scores, solved)
            return within, scores, self._narrow("solved", solved)
        torch.sub(decay[..., None], decay[..., None, :], out=within)
        _factors(within).tril_()
        torch.mul(products[:, None], within[:, :, None], out=scores)
        scores[:, :, 0].diagonal(dim1=-2, dim2=-1).zero_()
        system = torch.mul(scores[:, :, 0], beta[..., None], out=self._take("system", *within.shape))
        unit = torch.eye(count, dtype=self.dtype, device=decay.device)
        torch.linalg.solve_triangular(system, unit.expand_as(system), upper=False, unitriangular=True, out=solved)
        return within, scores, self._narrow("solved", solved.mul_(beta[..., None, :]))

    def _reads(self, kq: torch.Tensor, decay: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What keys and queries find in the decayed state of the chunk's start, [K, 2, n, R, e]."""
        reads = self._take("reads", *kq.shape[:3], *state.shape[2:])
        self._multiply(kq.flatten(1, 2), state.flatten(2), reads.flatten(3).flatten(1, 2))
        return reads.mul_(self._since_start(decay)[:, None])

    def _added(self, v: torch.Tensor, reads: torch.Tensor, solved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """N and V - exp(G) K S."""
        missing = torch.sub(v, reads[:, 0], out=self._take("missing", *v.shape))
        factor, added = self._narrow("missing", missing), self._take("added", *v.shape)
        for head in range(v.shape[2]):
            self._multiply(solved[:, head], factor[:, :, head], added[:, :, head])
        return added, missing

    def _through_scores(
        self, grad_reads: torch.Tensor, added: torch.Tensor, within: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the sums of g and of log beta, [K, R, n], and of K K' and Q K', [K, 2 n, n]."""
        grad_scores = self._take("grad_scores", *scores.shape)
        rows, added = self._narrow("grad_reads", grad_reads), self._narrow("added", added)
        for head in range(scores.shape[1]):
            values = added[:, :, head].transpose(1, 2)
            self._multiply(rows[..., head, :].flatten(1, 2), values, grad_scores[:, head].flatten(1, 2))
        grad_scores[:, :, 0].diagonal(dim1=-2, dim2=-1).zero_()
        exponents = torch.mul(grad_scores, scores, out=self._take("exponents", *scores.shape))
        exponents.diagonal(dim1=-2, dim2=-1).zero_()  # would cancel, but for rounding
        by_row = exponents.sum(-1)
        grad_decay = by_row.sum(2).sub_(exponents.sum((2, 3)))
        grad_scores.mul_(within[:, :, None])
        weights = grad_scores[:, 0] if scores.shape[1] == 1 else grad_scores.sum(1)
        return grad_decay, by_row[:, :, 0].clone(), self._narrow("weights", weights.flatten(1, 2))

    def _dots(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        """Sums over a value's numbers: [..., n, R, e] -> [..., R, n]."""
        return torch.mul(one, two, out=self._take("dots", *one.shape)).sum(-1).transpose(-1, -2)

    def _since_start(self, decay: torch.Tensor) -> torch.Tensor:
        """The decay of each token since the chunk's start, [K, n, R, 1]."""
        return _factors(decay.clone()).transpose(1, 2)[..., None]

    def _kept(self, decay: torch.Tensor) -> torch.Tensor:
        """The decay of each token until the chunk's end, [K, n, R, 1]."""
        return _factors(torch.sub(decay[..., -1:], decay)).transpose(1, 2)[..., None]

    def _decay_state(self, state: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        """Let a state, or its gradient, decay by a whole chunk in place."""
        return state.mul_(_factors(decay[:, None, :, -1:].clone()))


def _factors(exponents: torch.Tensor) -> torch.Tensor:
    """Their exponentials in their place, those above 0 (of pairs that do not count) as if they were 0.

    None is smaller than exp(-50) = 2e-22, which is nothing compared with 1; with numbers too small for fp32's full
    precision, products and exponentials take several times as long.
    """
    return exponents.clamp_(-50, 0).exp_()


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Any number of new tokens of one sequence, without gradients.

    Args:
        q: [tokens, K, d] in fp32 or fp64, of length d^-0.5.
        k: [tokens, K, d], of length 1.
        v: [tokens, H, e]; each key head serves H / K consecutive ones.
        g: [tokens, H], at most 0; likewise beta, from 0 to 1.
        state: [H, d, e] before them.
        workspace: for buffers; a new one unless given.

    Returns:
        What each token reads, [tokens, H, e], and the state after them.
    """
    groups = (k.shape[1], v.shape[1] // k.shape[1])
    rule = DeltaRule(workspace or Workspace(q.device), q.dtype)
    held = state.unflatten(0, groups).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    out = torch.empty_like(v)
    for first in range(0, len(q), CHUNK):
        here = slice(first, first + CHUNK)
        kq = torch.stack([k[here], q[here]]).permute(2, 0, 1, 3).contiguous()
        values = v[here].unflatten(1, groups).transpose(0, 1).contiguous()
        gates = (x[here].t().unflatten(0, groups) for x in (g, beta))
        decay, strength = next(gates).cumsum(-1), next(gates)
        out[here] = rule.forward(kq, values, decay, strength, held).transpose(0, 1).flatten(1, 2)
    return out, held.transpose(1, 2).flatten(0, 1)


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """One new token of each of B sequences; as chunk, with B for tokens.

    states: [B, H, d, e], changed in place.
    """
    share = v.shape[1] // k.shape[1]
    q, k = (x.repeat_interleave(share, 1) for x in (q, k))
    states.mul_(g.exp()[..., None, None])
    missing = v.sub((k[:, :, None] @ states)[:, :, 0]).mul_(beta[..., None])
    states.addcmul_(k[..., None], missing[:, :, None])
    return (q[:, :, None] @ states)[:, :, 0]
