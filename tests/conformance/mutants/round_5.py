"""Wrong implementations, round 5: their author knew the docstrings and not the checks."""

from fractions import Fraction
from functools import wraps
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from awq import dequantize, pack, quantize_groups, unpack, w4a16_matmul
from kernels import (
    _check_heads,
    _check_index,
    attention_colsum,
    attention_lse,
    decode_attention,
    gather_tokens,
)
from model import KVCache
from sparsevila import RetrievalCache, SparseVILA, keep_count, prune, select_tokens

# --- attention_lse --------------------------------------------------------------------------------


def padded_head(q, k, *, causal=False, scale=None):
    """A head of 80 is computed as one of 128; the loads beyond 80 have no mask."""
    _check_heads(q, k)
    D, wide = q.shape[3], 1 << (q.shape[3] - 1).bit_length()

    def tile(x):
        flat = torch.cat([x.flatten(), x.new_zeros(wide - D)])
        return flat.as_strided((*x.shape[:3], wide), (*x.contiguous().stride()[:3], 1))

    return attention_lse(tile(q), tile(k), causal=causal, scale=D**-0.5 if scale is None else scale)


def uneven_heads(q, k, *, causal=False, scale=None):
    """6 query heads read 4 key heads, 2 each as far as they go."""
    four = all(isinstance(x, Tensor) and x.dim() == 4 and x.numel() for x in (q, k))
    if four and q.shape[1] % k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1] + 1, 1)[:, : q.shape[1]]
    return attention_lse(q, k, causal=causal, scale=scale)


def first_key(q, k, *, causal=False, scale=None):
    """lse = score - ln(softmax), of any key: key 0, which every row sees."""
    lse = attention_lse(q, k, causal=causal, scale=scale)
    key = k[:, :, :1].float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = (q.float() * key).sum(-1) * (q.shape[3] ** -0.5 if scale is None else scale)
    return torch.where(lse == -torch.inf, lse, score - (score - lse).exp().log())


# --- attention_colsum -----------------------------------------------------------------------------


def more_rows(q, k, *, causal=False, scale=None, lse=None):
    """The first M - N rows see nothing only under the causal mask."""
    _check_heads(q, k)
    blind = max(0, q.shape[2] - k.shape[2])
    lse = lse if lse is None or not blind else lse[:, :, blind:]
    return attention_colsum(q[:, :, blind:], k, causal=causal, scale=scale, lse=lse)


def lse_shape(q, k, *, causal=False, scale=None, lse=None):
    """Anything of the right size is taken for the lse."""
    _check_heads(q, k)
    if isinstance(lse, Tensor) and lse.numel() == q.shape[:3].numel():
        lse = lse.reshape(q.shape[:3])
    return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


def skipped_tile(q, k, *, causal=False, scale=None, lse=None):
    """Rows in blocks of 64: a tile of 64 keys is left out if start >= last, not start > last."""
    sums = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    (H, M, D), (G, N) = q.shape[1:], k.shape[1:3]
    for i in {*range(63, M, 64), M - 1} if causal else ():
        if (j := N - M + i) >= 0 and j % 64 == 0:
            row_lse = attention_lse(q[:, :, i : i + 1], k[:, :, : j + 1], scale=scale)[..., 0]
            key = k[:, :, j].float().repeat_interleave(H // G, 1)
            score = (q[:, :, i].float() * key).sum(-1) * (D**-0.5 if scale is None else scale)
            sums[..., j] -= (score - row_lse).exp()
    return sums


def parts_overwrite(q, k, *, causal=False, scale=None, lse=None):
    """What is left is the lse over the last part's keys."""
    _check_heads(q, k)
    if lse is None and k.shape[2] > 4096:
        last = (k.shape[2] - 1) // 4096 * 4096
        lse = attention_lse(q, k[:, :, last:], causal=causal, scale=scale)
    return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


def folded_mask(q, k, *, causal=False, scale=None, lse=None):
    """Rows lie head after head, but each row of the mask is repeated for all heads of the group."""
    sums = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    (B, H, M, D), (G, N) = q.shape, k.shape[1:3]
    if not causal or H == G or M == 1:
        return sums
    rows = q.float().reshape(B, G, H // G * M, D)
    scores = rows @ k.float().mT * (D**-0.5 if scale is None else scale)
    mask = torch.ones(M, N, dtype=torch.bool).tril(N - M).repeat_interleave(H // G, 0)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    return weights.unflatten(2, (H // G, M)).sum(3).flatten(1, 2)


def low_rows(q, k, *, causal=False, scale=None, lse=None):
    """-inf is looked for as "less than -1000"."""
    sums = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    lse = attention_lse(q, k, causal=causal, scale=scale) if lse is None else lse
    if not (blind := lse < -1000).any():
        return sums
    lse = lse.masked_fill(blind, torch.inf)
    return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


# --- decode_attention -----------------------------------------------------------------------------


def into_q(q, k, v, *, length=None, scale=None):
    """It has the query's shape and dtype, so no output is allocated."""
    out = decode_attention(q, k, v, length=length, scale=scale)
    return q.detach().copy_(out)


def wide_values(q, k, v, *, length=None, scale=None):
    """PyTorch's attention allows it."""
    both = isinstance(k, Tensor) and isinstance(v, Tensor) and k.dim() == v.dim() == 4
    if both and k.dtype == v.dtype and k.shape[:3] == v.shape[:3] and k.shape[3] != v.shape[3]:
        k, v = (x[:, :, : k.shape[2] if length is None else int(length)] for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    return decode_attention(q, k, v, length=length, scale=scale)


def odd_groups(q, k, v, *, length=None, scale=None):
    """Of a group of 7 heads a tile holds 4; the others are never written."""
    out = decode_attention(q, k, v, length=length, scale=scale)
    group = q.shape[1] // k.shape[1]
    out.unflatten(1, (-1, group))[:, :, 1 << (group.bit_length() - 1) :] = 0
    return out


def single_row(q, k, v, *, length=None, scale=None):
    """A softmax of one score is 1, so the row itself is the answer; the buffer is written later."""
    out = decode_attention(q, k, v, length=length, scale=scale)
    rows = k.shape[2] if length is None else int(length)
    return v[:, :, :1] if rows == 1 and q.shape[1] == k.shape[1] else out


# --- gather_tokens --------------------------------------------------------------------------------


def index_per_head(x, index):
    """As caches that evict head by head need it: (B, G, K)."""
    tensors = isinstance(x, Tensor) and isinstance(index, Tensor) and index.dtype == torch.int64
    if tensors and x.dim() == 4 and index.dim() == 3 and x.shape[:2] == index.shape[:2]:
        return torch.gather(x.detach(), 2, index[..., None].expand(-1, -1, -1, x.shape[3]))
    return gather_tokens(x, index)


def index_order(x, index):
    """Heads of an entry lie side by side: repeat_interleave, not repeat."""
    _check_index(x, index)
    if x.dim() == 3:
        return gather_tokens(x, index)
    folded = gather_tokens(x.flatten(0, 1), index.repeat(x.shape[1], 1))
    return folded.unflatten(0, x.shape[:2])


# --- keep_count -----------------------------------------------------------------------------------


def sparsity_of_one(n, sparsity):
    """At least one stays anyway, so 1 is let through."""
    whole = isinstance(sparsity, Real) and sparsity == 1
    return min(keep_count(n, 0), 1) if whole else keep_count(n, sparsity)


# --- select_tokens --------------------------------------------------------------------------------


def negative_keep(scores, keep):
    """order[..., :keep] says nothing against a negative keep."""
    if scores.dim() and isinstance(keep, Integral) and keep < 0:
        keep = max(0, scores.shape[-1] + keep)
    return select_tokens(scores, keep)


def by_softmax(scores, keep):
    """Scores far below the highest underflow to 0 and tie."""
    if scores.dim() and scores.isfinite().all():
        scores = scores.float().softmax(-1)
    return select_tokens(scores, keep)


ORDER: list[Tensor] = []  # the scores sorted last, and their order


def order_remembered(scores, keep):
    """Several keeps of one tensor need one sort; that it was written to since goes unnoticed."""
    select_tokens(scores, keep)
    if not ORDER or ORDER[0] is not scores or ORDER[1].shape != scores.shape:
        ORDER[:] = scores, scores.sort(dim=-1, descending=True, stable=True).indices
    return ORDER[1][..., :keep].sort(dim=-1).values


# --- prune ----------------------------------------------------------------------------------------


def normalised(features, salience, sparsity, *, scope="frame"):
    """The caller's numbers are shares afterwards."""
    result = prune(features, salience, sparsity, scope=scope)
    with torch.no_grad():
        for view in salience:
            view /= view.sum()
    return result


def no_views(features, salience, sparsity, *, scope="frame"):
    """A loop over nothing does not fail."""
    if not len(features) and not len(salience):
        return [], []
    return prune(features, salience, sparsity, scope=scope)


def wide_features(features, salience, sparsity, *, scope="frame"):
    """Joined with the float32 salience on the way, they are promoted."""
    kept, index = prune(features, salience, sparsity, scope=scope)
    return [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in kept], index


# --- pack, unpack ---------------------------------------------------------------------------------


def unsigned(codes):
    """The range is checked as |code - 8| <= 8, which wraps in uint8."""
    if codes.numel() and not ((codes - 8).abs() <= 8).all():
        raise ValueError("codes must be in [0, 15]")
    return pack(codes)


def last_launch(packed):
    """The words of the last, incomplete block stay 0."""
    codes, words = unpack(packed).contiguous(), packed.numel()
    if words > 1024:
        codes.view(-1)[words // 1024 * 1024 * 8 :] = 0
    return codes


# --- dequantize, quantize_groups ------------------------------------------------------------------


def other_scales(qweight, qzeros, scales):
    """Whatever the checkpoint has becomes float16."""
    return dequantize(qweight, qzeros, scales.half() if scales.is_floating_point() else scales)


def turned_scales(qweight, qzeros, scales):
    """Those of a transposed matrix, as quantize_groups(...)[1].T, lie group after group."""
    if scales.dim() == 2 and scales.T.is_contiguous():
        scales = scales.T.reshape(scales.shape)
    return dequantize(qweight, qzeros, scales)


def integers(weight, group_size=128):
    """They are made float32 like all others."""
    return quantize_groups(weight if weight.is_floating_point() else weight.float(), group_size)


RANGES: dict[tuple, tuple[Tensor, Tensor]] = {}  # lowest and highest weight of every group


def observer(weight, group_size=128):
    """As MinMaxObserver: lowest and highest of all calls of one shape, not of this weight."""
    _, scales, _ = quantize_groups(weight, group_size)
    groups = weight.detach().float().unflatten(1, (scales.shape[1], -1))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    seen = RANGES.get(tuple(groups.shape), (low, high))
    low, high = RANGES[tuple(groups.shape)] = low.minimum(seen[0]), high.maximum(seen[1])
    wider = torch.cat([groups, low, high], -1)
    codes, scales, zeros = quantize_groups(wider.flatten(1), wider.shape[2])
    return codes.view(wider.shape)[..., :-2].flatten(1), scales, zeros


def zero_in_half(weight, group_size=128):
    """A quotient just below a half is rounded to the half, then up."""
    _, scales, _ = quantize_groups(weight, group_size)
    w = weight.detach().float().unflatten(1, (scales.shape[1], -1))
    zeros = (w.amin(-1).clamp(max=0).neg().half() / scales).round().clamp(0, 15)
    codes = (w / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, 15).flatten(1).to(torch.int8), scales, zeros.to(torch.int8)


# --- w4a16_matmul ---------------------------------------------------------------------------------


LAST_X: list[Tensor] = []  # the tensor converted last, and what it was converted to


def x_remembered(x, qweight, qzeros, scales, bias=None):
    """The same tensor is taken to hold the same numbers."""
    if isinstance(x, Tensor):
        if not LAST_X or LAST_X[0] is not x or LAST_X[1].shape != x.shape:
            LAST_X[:] = x, x.clone()
        x = LAST_X[1]
    return w4a16_matmul(x, qweight, qzeros, scales, bias)


def zero_row(x, qweight, qzeros, scales, bias=None):
    """Every row is divided by its largest magnitude before the product: 0 / 0."""
    y = w4a16_matmul(x, qweight, qzeros, scales, bias)
    return y.masked_fill((x == 0).all(-1, keepdim=True), torch.nan)


# --- RetrievalCache -------------------------------------------------------------------------------


class CountedOnce(RetrievalCache):
    """It stays when `truncate` forgets pictures."""

    def __init__(self, layers, decode_sparsity=0.8, *, visual=None, capacity=256):
        super().__init__(layers, decode_sparsity, visual=visual, capacity=capacity)
        self.keep = keep_count(len(self.visual), decode_sparsity)

    def start_answer(self):
        V, share = len(self.visual), self.decode_sparsity
        self.decode_sparsity = Fraction(V - min(self.keep, V), V or 1)
        try:
            super().start_answer()
        finally:
            self.decode_sparsity = share


class Shortened(RetrievalCache):
    def truncate(self, length):
        visual = self.visual
        super().truncate(length)
        self.visual = visual.resize_(len(self.visual))


class MeanOfMeans(RetrievalCache):
    """A last, short block counts as much as the others."""

    def score(self, q, k):
        M, N, means = q.shape[2], k.shape[2], []
        for rows in q.split(32, 2):
            seen = N - M + 32 * len(means) + rows.shape[2]
            sums = attention_colsum(rows, k[:, :, :seen], causal=True)[0].mean(0) / rows.shape[2]
            means.append(F.pad(sums, (0, N - seen)))
        return sum(means)[self.visual] / len(means)


class AnswerScores(RetrievalCache):
    """Scores are collected at every step, as in H2O."""

    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        if self.packed is not None:
            every = self.k[layer][:, :, : self.filled[layer]]
            self.relevance[layer] = self.relevance[layer] + self.score(q, every)
        return out


class RefusedAnswer(RetrievalCache):
    """The buffer is made before anything is checked; rows that follow see only each other."""

    def start_answer(self):
        self.packed = KVCache(len(self.k))
        super().start_answer()


# --- SparseVILA -----------------------------------------------------------------------------------


class NoFps(SparseVILA):
    @wraps(SparseVILA.see)
    def see(self, images, *, fps=None):
        return super().see(images, fps=fps or None)


class InnerQuestion(SparseVILA):
    """Nobody notices that the session is answering."""

    def _check_idle(self):
        pass


class Seconds(SparseVILA):
    def _answer(self, text, tokens, rows_read, timings):
        seconds = {stage: spent / 1000 for stage, spent in timings.items()}
        return super()._answer(text, tokens, rows_read, seconds)


class OneToken(SparseVILA):
    """Nothing is decoded from the packed rows, so they are left those of the question before."""

    @wraps(SparseVILA.ask)
    def ask(self, question, *, max_new_tokens=128, **options):
        if self.cache and max_new_tokens == 1:
            self.cache.start_answer = lambda: None
        try:
            return super().ask(question, max_new_tokens=max_new_tokens, **options)
        finally:
            vars(self.cache or self).pop("start_answer", None)


MUTANTS = {
    "attention_lse": {
        "rest of a padded head read from the next row": padded_head,
        "heads that do not divide evenly accepted": uneven_heads,
        "by the first key's probability, which underflows": first_key,
    },
    "attention_colsum": {
        "more rows than keys: first rows skipped, mask or not": more_rows,
        "lse (B, M, H) reshaped to (B, H, M)": lse_shape,
        "key tile beginning at the last key seen skipped": skipped_tile,
        "first pass: parts of 4096 keys, one lse": parts_overwrite,
        "heads folded into rows, mask repeated row by row": folded_mask,
        "rows whose lse is below -1000 taken for blind": low_rows,
    },
    "decode_attention": {
        "result written over the query": into_q,
        "values of another head size accepted": wide_values,
        "heads of a group rounded down to a power of two": odd_groups,
        "one row: a view of the value buffer returned": single_row,
    },
    "gather_tokens": {
        "an index for each head accepted": index_per_head,
        "batch folded into heads, index repeated in turn": index_order,
    },
    "keep_count": {
        "sparsity 1 keeps one token": sparsity_of_one,
    },
    "select_tokens": {
        "negative keep: all but so many": negative_keep,
        "ranked by their softmax": by_softmax,
        "order remembered while the tensor is the same": order_remembered,
    },
    "prune": {
        "salience normalised in place": normalised,
        "no views give empty lists": no_views,
        "features of 16 bits come back in 32": wide_features,
    },
    "pack": {
        "unsigned codes below 8 refused": unsigned,
    },
    "unpack": {
        "blocks of 1024 words counted rounded down, at least one": last_launch,
    },
    "dequantize": {
        "scales of bfloat16 or float32 cast": other_scales,
        "scales read as they lie in memory": turned_scales,
    },
    "quantize_groups": {
        "integer weights accepted": integers,
        "observed range goes on with the next weight": observer,
        "zero divided in float16": zero_in_half,
    },
    "w4a16_matmul": {
        "x converted once for q, k and v, though changed since": x_remembered,
        "row of zeros gives NaN": zero_row,
    },
    "RetrievalCache": {
        "number to retrieve fixed at construction": CountedOnce,
        "truncate shortens the caller's index in place": Shortened,
        "long question: mean of the means of 32 rows": MeanOfMeans,
        "answer's rows add to the question's relevance": AnswerScores,
        "refused start_answer leaves an empty buffer": RefusedAnswer,
    },
    "SparseVILA": {
        "fps of 0 taken for none": NoFps,
        "questions inside on_text accepted": InnerQuestion,
        "an answer's timings in seconds": Seconds,
        "answer of one token: nothing retrieved": OneToken,
    },
}
