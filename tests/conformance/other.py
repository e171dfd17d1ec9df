"""A second correct implementation, written as differently as possible: float64, key blocks from the
last to the first, sorting with Python, a cache that keeps lists and never packs. The suite must
accept it: `pytest tests/conformance --impl tests/conformance/other.py`."""

import math

import torch
from torch import Tensor

BLOCK = 144


def _blocks(q: Tensor, k: Tensor, causal: bool, scale: float | None):
    """Blocks of keys (start, scores (B, H, M, n) float64), the last keys first."""
    M, D, N = q.shape[2], q.shape[3], k.shape[2]
    heads = torch.arange(q.shape[1]) * k.shape[1] // q.shape[1]  # the key head of each query head
    for start in reversed(range(0, N, BLOCK)):
        keys = k[:, heads, start : start + BLOCK].double()
        scores = q.double() @ keys.mT * (D**-0.5 if scale is None else scale)
        if causal:
            behind = torch.arange(M)[:, None] + N - M - start
            scores = scores.where(torch.arange(keys.shape[2]) <= behind, -torch.inf)
        yield start, scores


def _lse(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Tensor:
    total = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for _, scores in _blocks(q, k, causal, scale):
        total = torch.logaddexp(total, scores.logsumexp(-1))
    return total


def attention_lse(q, k, *, causal=False, scale=None):
    return _lse(q, k, causal, scale).float()


def attention_colsum(q, k, *, causal=False, scale=None, lse=None):
    lse = _lse(q, k, causal, scale) if lse is None else lse.double()
    sums = torch.zeros(q.shape[0], q.shape[1], k.shape[2], dtype=torch.float64)
    for start, scores in _blocks(q, k, causal, scale):
        weights = (scores - lse[..., None]).exp().nan_to_num(0)
        sums[:, :, start : start + scores.shape[3]] = weights.sum(2)
    return sums.float()


def _attention(q, k, v, causal, scale):
    lse = _lse(q, k, causal, scale)
    lse = lse.masked_fill(lse == -torch.inf, 0)  # sees nothing: all its weights are 0
    heads = torch.arange(q.shape[1]) * k.shape[1] // q.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for start, scores in _blocks(q, k, causal, scale):
        values = v[:, heads, start : start + BLOCK].double()
        out += (scores - lse[..., None]).exp() @ values
    return out.to(q.dtype)


def decode_attention(q, k, v, *, length=None, scale=None):
    length = k.shape[2] if length is None else int(length)
    return _attention(q, k[:, :, :length], v[:, :, :length], False, scale)


def gather_tokens(x, index):
    rows = [x[b].detach().index_select(-2, index[b]) for b in range(len(x))]
    return torch.stack(rows)


def keep_count(n, sparsity):
    tenths = round(sparsity * 10**9) if sparsity == round(sparsity, 9) else None
    exact = tenths * n // 10**9 if tenths is not None else math.floor(sparsity * n + 1e-9)
    return max(n - exact, min(n, 1))


def select_tokens(scores, keep):
    if scores.dim() > 1:
        return torch.stack([select_tokens(row, keep) for row in scores])
    values = scores.tolist()
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]
    return torch.tensor(sorted(best), dtype=torch.int64)


def prune(features, salience, sparsity, *, scope="frame"):
    tokens = [(view, i) for view, scores in enumerate(salience) for i in range(len(scores))]
    groups = [tokens]
    if scope == "frame":
        groups = [[token for token in tokens if token[0] == view] for view in range(len(salience))]
    index = [[] for _ in salience]
    for group in groups:
        order = sorted(group, key=lambda token: (-float(salience[token[0]][token[1]]), token))
        for view, i in sorted(order[: keep_count(len(group), sparsity)]):
            index[view].append(i)
    kept = [x[i] for x, i in zip(features, index)]
    return kept, [torch.tensor(i, dtype=torch.int64) for i in index]


ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(codes):
    parts = codes.long().view(len(codes), -1, 8)[..., list(ORDER)]
    words = (parts * 16 ** torch.arange(8)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack(packed):
    words = packed.long() % 2**32
    parts = torch.stack([words // 16**i % 16 for i in range(8)], -1)
    return parts[..., [ORDER.index(i) for i in range(8)]].flatten(1).to(torch.int8)


def dequantize(qweight, qzeros, scales):
    codes, zeros = unpack(qweight).double(), unpack(qzeros).double()
    group = len(codes) // len(zeros)
    zeros, scales = (t.double().repeat_interleave(group, 0) for t in (zeros, scales))
    return ((codes - zeros) * scales).half()


def quantize_groups(weight, group_size=128):
    group_size = weight.shape[1] if group_size == -1 else group_size
    groups = weight.double().contiguous().view(len(weight), -1, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low).clamp(min=1e-5) / 15).half().double()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return codes.flatten(1).to(torch.int8), scales.half(), zeros.to(torch.int8)


def w4a16_matmul(x, qweight, qzeros, scales, bias=None):
    y = x.double() @ dequantize(qweight, qzeros, scales).double()
    return (y if bias is None else y + bias.double()).to(x.dtype)


class RetrievalCache:
    """Everything in lists; in an answer, the rows that were not retrieved are left out of the
    attention, and nothing is packed."""

    def __init__(self, layers, decode_sparsity=0.8, *, visual=None, capacity=0):
        self.sparsity = decode_sparsity
        self.visual = torch.empty(0, dtype=torch.int64) if visual is None else visual
        self.k, self.v = [[] for _ in range(layers)], [[] for _ in range(layers)]
        self.relevance, self.retrieved, self.answering, self.reading = [], [], False, False

    @property
    def length(self):
        return min(len(rows) for rows in self.k)

    def start_question(self):
        self.answering, self.reading, self.relevance = False, True, []

    def start_answer(self):
        if len(self.relevance) != len(self.k):
            raise ValueError("a question is read once in every layer")
        keep = keep_count(len(self.visual), self.sparsity)
        self.retrieved = [select_tokens(scores, keep) for scores in self.relevance]
        self.answering, self.reading = True, False

    def truncate(self, length):
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be in [0, {self.length}]")
        self.visual = self.visual[self.visual < length]
        self.k, self.v = ([rows[:length] for rows in side] for side in (self.k, self.v))
        self.answering = self.reading = False

    def attend(self, layer, q, k, v):
        self.k[layer] += k.clone().unbind(2)
        self.v[layer] += v.clone().unbind(2)
        keys, values = torch.stack(self.k[layer], 2), torch.stack(self.v[layer], 2)
        if self.reading:
            received = attention_colsum(q, keys, causal=True).double().sum((0, 1))
            share = received[self.visual] / (q.shape[1] * q.shape[2])
            self.relevance.append(share.float())
        if self.answering:
            kept = set(self.visual[self.retrieved[layer]].tolist())
            gone = set(self.visual.tolist()) - kept
            rows = [n for n in range(keys.shape[2]) if n not in gone]
            keys, values = keys[:, :, rows], values[:, :, rows]
        return _attention(q, keys, values, True, None)
