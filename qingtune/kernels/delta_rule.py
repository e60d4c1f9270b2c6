"""The gated delta rule, a chunk of tokens at a time, forward and backward written out.

A head keeps a state S [key size, value size]. A token lets it decay, corrects what it holds under the token's key, and
reads it (Yang et al. 2024, https://arxiv.org/abs/2412.06464):

    S_t = exp(g_t) S_(t-1) + beta_t k_t (v_t - exp(g_t) k_t S_(t-1)),    o_t = q_t S_t

Within a chunk all corrections follow from one triangular system (the UT transform of Yang et al. 2024,
https://arxiv.org/abs/2406.06484), so that a chunk costs a few matrix products. With G the sum of g from the chunk's
first token on, D_ij = exp(G_i - G_j) for i >= j, and rows scaled by what stands before them:

    (I + strictly lower(beta K K' D)) N = beta (V - exp(G) K S)          N: what each token adds under its key
    O = exp(G) Q S + (Q K' D) N,    S <- exp(G_last) S + K' exp(G_last - G) N

All in fp32 (fp64 for fp64), as in Transformers. No factor exceeds 1, however strong the decay is.

Shapes: n tokens of a chunk, K key heads, R value heads a key head, d and e the sizes of keys and values.
"""

from __future__ import annotations

import torch

from qingtune.kernels.workspace import Workspace

CHUNK = 64  # tokens; why so many is in docs/performance.md
EPSILON = 1e-6  # added to the squared lengths by which queries and keys are divided (l2norm in Transformers and fla)


class DeltaRule:
    """The rule for one chunk of one sequence; what it gives lies in the workspace until the next chunk.

    Keys and queries come as one tensor [K, 2, n, d], keys first, as both are multiplied by the same matrices; both of
    length 1, queries times d^-0.5. Values and what is read: [K, n, R, e]. Decays (sums of g from the chunk's first
    token on) and beta: [K, R, n]. States: [K, d, R, e].
    """

    def __init__(self, workspace: Workspace, dtype: torch.dtype) -> None:
        """dtype: in which all is held, fp32 or fp64."""
        self.workspace, self.dtype = workspace, dtype

    def forward(
        self, kq: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        """What each token reads, [K, n, R, e]; the state becomes that after the chunk."""
        _, scores, solved = self._scores(kq, decay, beta)
        reads = self._reads(kq, decay, state)
        added = self._added(v, reads, solved)
        out = self._take("out", *v.shape)
        for head in range(v.shape[2]):
            read, share = reads[:, 1, :, head], scores[:, head, 1]
            torch.baddbmm(read, share, added[:, :, head], out=out[:, :, head])
        kept = torch.mul(added, self._kept(decay), out=self._take("kept", *v.shape))
        self._decay_state(state, decay).flatten(2).baddbmm_(kq[:, 0].transpose(1, 2), kept.flatten(2))
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
        within, scores, solved = self._scores(kq, decay, beta)
        reads = self._reads(kq, decay, state)
        added = self._added(v, reads, solved)
        missing = self._take("missing", *v.shape)
        heads = range(v.shape[2])

        # Through the state after the chunk, what was read of it, and the triangular system.
        kept = torch.mul(added, self._kept(decay), out=self._take("kept", *v.shape))
        grad_added = self._take("grad_added", *v.shape)
        torch.bmm(kq[:, 0], grad_state.flatten(2), out=grad_added.flatten(2))
        through_state = self._dots(grad_added, kept)
        grad_added.mul_(self._kept(decay))
        # Gradients of -(what keys read) and of what queries read, both before their decay.
        grad_reads = self._take("grad_reads", *reads.shape)
        grad_v = self._take("grad_v", *v.shape)
        grad_reads[:, 1].copy_(grad)
        for head in heads:
            of_head = grad_added[:, :, head]
            torch.baddbmm(of_head, scores[:, head, 1].transpose(1, 2), grad_reads[:, 1, :, head], out=of_head)
            torch.bmm(solved[:, head].transpose(1, 2), of_head, out=grad_v[:, :, head])
        torch.neg(grad_v, out=grad_reads[:, 0])
        grad_decay, grad_beta, weights = self._through_scores(grad_reads, added, within, scores)
        grad_beta.add_(self._dots(grad_v, missing))
        grad_decay.add_(self._dots(grad_reads, reads).sum(1)).sub_(through_state)
        grad_reads.mul_(self._since_start(decay)[:, None])

        # Keys and queries as rows of scores and readers of the state; then keys as columns, and as what is written.
        grad_kq = self._take("grad_kq", *kq.shape)
        rows, state_rows = grad_kq.flatten(1, 2), state.flatten(2)
        torch.bmm(grad_reads.flatten(3).flatten(1, 2), state_rows.transpose(1, 2), out=rows)
        rows.baddbmm_(weights, kq[:, 0])
        grad_k = self._take("grad_k", *kq[:, 0].shape)
        torch.bmm(weights.transpose(1, 2), kq.flatten(1, 2), out=grad_k)
        grad_kq[:, 0].add_(grad_k.baddbmm_(kept.flatten(2), grad_state.flatten(2).transpose(1, 2)))

        held = self._decay_state(grad_state, decay)
        lost = torch.mul(held, state, out=self._take("state_product", *state.shape)).sum((1, 3))
        grad_decay[..., -1].add_(through_state.sum(-1)).add_(lost)
        held.flatten(2).baddbmm_(kq.flatten(1, 2).transpose(1, 2), grad_reads.flatten(3).flatten(1, 2))
        return grad_kq, grad_v, grad_decay.flip(-1).cumsum(-1).flip(-1), grad_beta

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        return self.workspace.take("delta." + name, shape, self.dtype)

    def _scores(
        self, kq: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What tokens of the chunk are to each other; entries above the diagonal are 0.

        Returns:
            D, [K, R, n, n].
            K K' D (strictly lower) and Q K' D, [K, R, 2, n, n].
            The inverse of the triangular system, times beta, [K, R, n, n].
        """
        key_heads, heads, count = decay.shape
        within = torch.sub(
            decay[..., None], decay[..., None, :], out=self._take("within", key_heads, heads, count, count)
        )
        within.exp_().tril_()  # infinite above the diagonal where the decay is strong
        products = self._take("products", key_heads, 2, count, count)
        torch.bmm(kq.flatten(1, 2), kq[:, 0].transpose(1, 2), out=products.flatten(1, 2))
        scores = self._take("scores", key_heads, heads, 2, count, count)
        torch.mul(products[:, None], within[:, :, None], out=scores)
        scores[:, :, 0].diagonal(dim1=-2, dim2=-1).zero_()
        system = torch.mul(scores[:, :, 0], beta[..., None], out=self._take("system", *within.shape))
        unit = torch.eye(count, dtype=self.dtype, device=decay.device)
        solved = self._take("solved", *within.shape)
        torch.linalg.solve_triangular(system, unit.expand_as(system), upper=False, unitriangular=True, out=solved)
        return within, scores, solved.mul_(beta[..., None, :])

    def _reads(self, kq: torch.Tensor, decay: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What keys and queries find in the decayed state of the chunk's start, [K, 2, n, R, e]."""
        reads = self._take("reads", *kq.shape[:3], *state.shape[2:])
        torch.bmm(kq.flatten(1, 2), state.flatten(2), out=reads.flatten(3).flatten(1, 2))
        return reads.mul_(self._since_start(decay)[:, None])

    def _added(self, v: torch.Tensor, reads: torch.Tensor, solved: torch.Tensor) -> torch.Tensor:
        """N; what is missing under the keys stays in the workspace."""
        missing = torch.sub(v, reads[:, 0], out=self._take("missing", *v.shape))
        added = self._take("added", *v.shape)
        for head in range(v.shape[2]):
            torch.bmm(solved[:, head], missing[:, :, head], out=added[:, :, head])
        return added

    def _through_scores(
        self, grad_reads: torch.Tensor, added: torch.Tensor, within: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the sums of g and of log beta, [K, R, n], and of K K' and Q K', [K, 2 n, n]."""
        grad_scores = self._take("grad_scores", *scores.shape)
        for head in range(scores.shape[1]):
            values = added[:, :, head].transpose(1, 2)
            rows = grad_reads[..., head, :]
            torch.bmm(rows.flatten(1, 2), values, out=grad_scores[:, head].flatten(1, 2))
        grad_scores[:, :, 0].diagonal(dim1=-2, dim2=-1).zero_()
        exponents = torch.mul(grad_scores, scores, out=self._take("exponents", *scores.shape))
        exponents.diagonal(dim1=-2, dim2=-1).zero_()  # would cancel, but for rounding
        by_row = exponents.sum(-1)
        grad_decay = by_row.sum(2).sub_(exponents.sum((2, 3)))
        grad_scores.mul_(within[:, :, None])
        weights = grad_scores[:, 0] if scores.shape[1] == 1 else grad_scores.sum(1)
        return grad_decay, by_row[:, :, 0].clone(), weights.flatten(1, 2)

    def _dots(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        """Sums over a value's numbers: [..., n, R, e] -> [..., R, n]."""
        return torch.mul(one, two, out=self._take("dots", *one.shape)).sum(-1).transpose(-1, -2)

    def _since_start(self, decay: torch.Tensor) -> torch.Tensor:
        """The decay of each token since the chunk's start, [K, n, R, 1]."""
        return decay.exp().transpose(1, 2)[..., None]

    def _kept(self, decay: torch.Tensor) -> torch.Tensor:
        """The decay of each token until the chunk's end, [K, n, R, 1]."""
        return torch.sub(decay[..., -1:], decay).exp_().transpose(1, 2)[..., None]

    def _decay_state(self, state: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        """Let a state, or its gradient, decay by a whole chunk in place."""
        return state.mul_(decay[:, None, :, -1:].exp())


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
