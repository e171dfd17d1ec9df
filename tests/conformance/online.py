"""A third correct implementation, as a kernel would do it: float32, one pass over blocks of odd
sizes with a running maximum, parts that are joined at the end. The suite must accept it: `pytest
tests/conformance --impl tests/conformance/online.py`."""

import torch
from torch import Tensor

KEYS, ROWS, PART = 149, 113, 101  # blocks of keys and rows; rows of a cache in one part


def _heads(k: Tensor, heads: int) -> Tensor:
    return k.repeat_interleave(heads // k.shape[1], 1).float()


def _scores(q: Tensor, k: Tensor, first: int, start: int, N: int, M: int, causal: bool, scale):
    """Of rows from `first` on and keys from `start` on."""
    scores = q.float() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        row = torch.arange(first, first + q.shape[2])[:, None] + N - M
        scores = scores.masked_fill(torch.arange(start, start + k.shape[2]) > row, -torch.inf)
    return scores


def attention_lse(q, k, *, causal=False, scale=None):
    keys, (M, N) = _heads(k, q.shape[1]), (q.shape[2], k.shape[2])
    top = torch.full(q.shape[:3], -torch.inf)
    total = torch.zeros(q.shape[:3])
    for start in range(0, N, KEYS):
        scores = _scores(q, keys[:, :, start : start + KEYS], 0, start, N, M, causal, scale)
        higher = torch.maximum(top, scores.amax(-1))
        shift = higher.masked_fill(higher == -torch.inf, 0)
        total = total * (top - shift).exp() + (scores - shift[..., None]).exp().sum(-1)
        top = higher
    return top + total.log()


def attention_colsum(q, k, *, causal=False, scale=None, lse=None):
    keys, (M, N) = _heads(k, q.shape[1]), (q.shape[2], k.shape[2])
    lse = attention_lse(q, k, causal=causal, scale=scale) if lse is None else lse
    sums = torch.zeros(*q.shape[:2], N)
    for first in range(0, M, ROWS):
        shift = lse[:, :, first : first + ROWS, None]
        shift = shift.masked_fill(shift == -torch.inf, 0)
        for start in range(0, N, KEYS):
            rows, block = q[:, :, first : first + ROWS], keys[:, :, start : start + KEYS]
            scores = _scores(rows, block, first, start, N, M, causal, scale)
            sums[:, :, start : start + KEYS] += (scores - shift).exp().sum(2)
    return sums


def decode_attention(q, k, v, *, length=None, scale=None):
    length = k.shape[2] if length is None else int(length)
    outs, weights = [], []
    for start in range(0, length, PART):
        stop = min(start + PART, length)
        keys, values = (_heads(x[:, :, start:stop], q.shape[1]) for x in (k, v))
        scores = _scores(q, keys, 0, start, length, 1, False, scale)
        weights.append(scores.logsumexp(-1))  # (B, H, 1)
        shift = weights[-1].masked_fill(weights[-1] == -torch.inf, 0)
        outs.append((scores - shift[..., None]).exp() @ values)
    weights = torch.stack(weights)
    shares = (weights - weights.logsumexp(0).nan_to_num(neginf=0)).exp()
    return (torch.stack(outs) * shares[..., None]).sum(0).to(q.dtype)


def select_tokens(scores, keep):
    """By ranks: all that are better than the last rank of which some are kept, and its first."""
    rows, chosen = scores.reshape(-1, scores.shape[-1]).double(), []
    for row in rows:
        ranks = torch.unique(-row, return_inverse=True)[1]  # 0 is the best; equals have one rank
        counts = torch.bincount(ranks).cumsum(0)
        last = int((counts < keep).sum())  # the rank of which perhaps not all are kept
        better, equal = (ranks < last).nonzero()[:, 0], (ranks == last).nonzero()[:, 0]
        chosen.append(torch.cat([better, equal[: keep - len(better)]]).sort().values)
    return torch.stack(chosen).view(*scores.shape[:-1], keep)


def w4a16_matmul(x, qweight, qzeros, scales, bias=None):
    """Group by group, x times the codes; what the zero takes off is the row's sum times it."""
    group = len(qweight) // len(qzeros)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]) * 4

    def codes(words: Tensor) -> Tensor:
        return (words[..., None] >> order & 15).flatten(1).float()

    rows = x.reshape(-1, len(qweight)).float()
    y = torch.zeros(len(rows), scales.shape[1])
    for g, (zeros, scale) in enumerate(zip(codes(qzeros), scales.float())):
        here = slice(g * group, (g + 1) * group)
        y += rows[:, here] @ ((codes(qweight[here]) - zeros) * scale)
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], scales.shape[1])
