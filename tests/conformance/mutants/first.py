"""Wrong implementations that were written beside the checks, as changes of plain right ones."""

import copy
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import awq
import kernels
import sparsevila
from model import KVCache
from sparsevila import RetrievalCache, SparseVILA, keep_count, select_tokens

# --- attention: a plain implementation in which one thing at a time can be changed ----------------


def scores_of(
    q: Tensor, k: Tensor, *, causal: bool = False, scale: float | None = None,
    align: str = "right", heads: str = "interleave", dims: int | None = None,
    scores_in=torch.float32,
) -> Tensor:  # fmt: skip
    """Scores (B, H, M, N) in float32."""
    M, N, D = q.shape[2], k.shape[2], q.shape[3]
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1) if heads == "interleave" else k.repeat(1, group, 1, 1)
    q, k = q[..., :dims].to(scores_in), k[..., :dims].to(scores_in)
    scores = ((q @ k.mT) * (D**-0.5 if scale is None else scale)).float()
    if causal:
        diagonal = N - M if align == "right" else 0 if align == "left" else N - M + 1
        mask = torch.ones(M, N, dtype=torch.bool).tril(diagonal)
        scores = scores.masked_fill(~mask, -math.inf)
    return scores


def lse(q: Tensor, k: Tensor, **changes) -> Tensor:
    return scores_of(q, k, **changes).logsumexp(-1)


def lse_without_maximum(q, k, **options):
    return scores_of(q, k, **options).exp().sum(-1).log()


def weights_of(
    q: Tensor, k: Tensor, *, lse: Tensor | None = None, sums_in=torch.float32,
    keys: slice = slice(None), **changes,
) -> Tensor:  # fmt: skip
    """Softmax weights (B, H, M, N) in float32."""
    scores = scores_of(q, k, **changes)
    if lse is None:
        most = scores.amax(-1, keepdim=True).clamp(min=-1e30)
        sums = (scores - most)[..., keys].to(sums_in).exp().sum(-1)
        lse = most[..., 0] + sums.log().float()
    return (scores - lse[..., None]).exp().nan_to_num(0)


def colsum(q: Tensor, k: Tensor, *, sums_in=torch.float32, **changes) -> Tensor:
    return weights_of(q, k, sums_in=sums_in, **changes).to(sums_in).sum(2).float()


def colsum_of_mean_scores(q, k, *, causal=False, scale=None, lse=None):
    """Heads averaged before the softmax."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).float()
    scores = (q.float() @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)).mean(1)
    if causal:
        mask = torch.ones(scores.shape[1:], dtype=torch.bool)
        scores = scores.masked_fill(~mask.tril(k.shape[2] - q.shape[2]), -math.inf)
    return scores.softmax(-1).nan_to_num(0).sum(1)[:, None].expand(-1, q.shape[1], -1).contiguous()


def colsum_in_random_order(q, k, **options):
    weights = weights_of(q, k, **options)
    sums = torch.zeros(weights.shape[:2] + weights.shape[3:])
    for row in torch.randperm(weights.shape[2]).tolist():
        sums += weights[:, :, row]
    return sums


def scale_doubled(q, k, *, scale=None, **options):
    return colsum(q, k, scale=2 * (q.shape[3] ** -0.5 if scale is None else scale), **options)


def colsum_where_large(q, k, **options):
    """Columns whose sum is tiny are never written."""
    sums = colsum(q, k, **options)
    return torch.where(sums > 1e-3, sums, torch.full_like(sums, 7.0))


def scale_ignored_under_a_mask(q, k, *, causal=False, scale=None, **options):
    return colsum(q, k, causal=causal, scale=None if causal else scale, **options)


def decode_without_maximum(q, k, v, *, length=None, scale=None):
    length = k.shape[2] if length is None else int(length)
    weights = scores_of(q, k[:, :, :length], scale=scale).exp()
    values = v[:, :, :length].repeat_interleave(q.shape[1] // v.shape[1], 1).float()
    return (weights @ values / weights.sum(-1, keepdim=True)).to(q.dtype)


def decode(q, k, v, *, length=None, scale=None, beyond=0, heads="interleave", swap=False):
    """`beyond`: how many rows too many."""
    length = k.shape[2] if length is None else int(length)
    length = max(1, min(length + beyond, k.shape[2]))
    k, v = (v, k) if swap else (k, v)
    weights = weights_of(q, k[:, :, :length], scale=scale, heads=heads)
    values = v[:, :, :length].repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (weights @ values.float()).to(q.dtype)


# --- choosing -------------------------------------------------------------------------------------


def ties_to_the_higher_index(scores, keep):
    last = scores.shape[-1] - 1
    return (last - select_tokens(scores.flip(-1), keep)).flip(-1)


def unsorted(scores, keep):
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep]


def prune_with(choose, features, salience, sparsity, *, scope="frame"):
    if scope == "global":
        return sparsevila.prune(features, salience, sparsity, scope=scope)
    index = choose(salience, sparsity)
    return [x[i] for x, i in zip(features, index)], index


def prune_out_of_order(features, salience, sparsity, *, scope="frame"):
    """The index is ascending, the features are not."""
    kept, index = sparsevila.prune(features, salience, sparsity, scope=scope)
    return [x.flip(0) for x in kept], index


def above_the_quantile(salience, sparsity):
    """What exceeds the quantile, strictly; rows are cut to the shortest."""
    kept = [(row > row.quantile(sparsity)).nonzero()[:, 0] for row in salience]
    return [row[: min(map(len, kept))] for row in kept]


def across_frames(salience, sparsity):
    """The scores of all frames together, applied as if per frame."""
    least = min(len(row) for row in salience)
    total = sum(row[:least] for row in salience)
    return [select_tokens(total, min(keep_count(len(row), sparsity), least)) for row in salience]


def gather_int16(x, index):
    return kernels.gather_tokens(x, index.to(torch.int16).long() % x.shape[-2])


def gather_shared(x, index):
    """The first batch entry's index for all."""
    return kernels.gather_tokens(x, index[:1].expand_as(index).contiguous())


def select_in_half(scores, keep):
    return select_tokens(scores.half(), keep)


def gather_sorted(x, index):
    return kernels.gather_tokens(x, index.sort().values)


def keep_count_of_two_digits(n, sparsity):
    return keep_count(n, min(round(sparsity, 2), 0.99))


# --- four-bit weights -----------------------------------------------------------------------------


def pack_naturally(codes):
    parts = codes.int().view(len(codes), -1, 8)
    return sum(parts[..., i] << (4 * i) for i in range(8)).int()


def unpack_naturally(packed):
    return torch.stack([packed >> (4 * i) & 15 for i in range(8)], -1).flatten(1).to(torch.int8)


def unpack_signed(packed):
    """The top nibble shifted arithmetically, its sign kept."""
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    parts = torch.stack([(packed >> (4 * i)) & (15 if i < 7 else -1) for i in range(8)], -1)
    return parts[..., order].flatten(1).to(torch.int8)


def dequantize_with(qweight, qzeros, scales, *, plus=0, shift=0, transpose=False):
    codes, zeros = awq.unpack(qweight).int(), awq.unpack(qzeros).int() + plus
    group = len(codes) // len(zeros)
    zeros = zeros.reshape(zeros.shape[::-1]).T.contiguous() if transpose else zeros
    zeros, scales = zeros.repeat_interleave(group, 0), scales.repeat_interleave(group, 0)
    scales = scales.roll(shift, 0)
    return ((codes - zeros) * scales.float()).half()


def matmul_with(
    x, qweight, qzeros, scales, bias=None, *, dequantize=awq.dequantize, keep_bias=True
):
    y = x.float() @ dequantize(qweight, qzeros, scales).float()
    return (y + bias.float() if bias is not None and keep_bias else y).to(x.dtype)


def matmul_in_half(x, qweight, qzeros, scales, bias=None):
    """Added up in bfloat16, a group at a time."""
    w = awq.dequantize(qweight, qzeros, scales).float()
    total = torch.zeros(len(x), w.shape[1], dtype=torch.bfloat16)
    for i in range(0, len(w), 4):
        total += (x[:, i : i + 4].float() @ w[i : i + 4]).bfloat16()
    return (total.float() if bias is None else total + bias).to(x.dtype)


def matmul_in_tf32(x, qweight, qzeros, scales, bias=None):
    """x rounded to the ten bits of TF32's fraction."""
    x, dtype = x.float(), x.dtype
    step = 2.0 ** (x.abs().clamp(min=1e-30).log2().floor() - 10)
    return matmul_with((x / step).round() * step, qweight, qzeros, scales, bias).to(dtype)


def quantize_one_sided(weight, group_size=128):
    """The range from the smallest to the largest weight, zero or not."""
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low).clamp(min=1e-5) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return codes.flatten(1).to(torch.int8), scales, zeros.to(torch.int8)


def quantize_to_floor(weight, group_size=128):
    codes, scales, zeros = awq.quantize_groups(weight, group_size)
    groups = weight.float().unflatten(1, (-1, group_size)) / scales.float()[..., None]
    codes = (groups.floor() + zeros[..., None]).clamp(0, 15)
    return codes.flatten(1).to(torch.int8), scales, zeros


def quantize_to_float_zeros(weight, group_size=128):
    codes, scales, zeros = awq.quantize_groups(weight, group_size)
    return codes, scales, zeros.half()


# --- the cache ------------------------------------------------------------------------------------


class VisualSoftmax(RetrievalCache):
    def score(self, q, k):
        _, H, M, _ = q.shape
        return kernels.attention_colsum(q, k[:, :, self.visual])[0].sum(0) / (H * M)


class LastRowOnly(RetrievalCache):
    def score(self, q, k):
        return super().score(q[:, :, -1:], k)


class SumOverHeads(RetrievalCache):
    """No mean over the heads."""

    def score(self, q, k):
        return super().score(q, k) * q.shape[1]


class ScaledForSixteen(RetrievalCache):
    def score(self, q, k):
        _, H, M, _ = q.shape
        received = kernels.attention_colsum(q, k, causal=True, scale=0.25)[0].sum(0)
        return received[self.visual] / (H * M)


class OneIndexSet(RetrievalCache):
    def start_answer(self):
        self.relevance = [torch.stack(self.relevance).mean(0)] * len(self.k)
        super().start_answer()


class SwappedKV(RetrievalCache):
    def start_answer(self):
        super().start_answer()
        self.packed.k, self.packed.v = self.packed.v, self.packed.k


class RotatedAgain(RetrievalCache):
    """Packed keys are turned to their new places."""

    def start_answer(self):
        super().start_answer()
        for k in self.packed.k:
            angle = torch.arange(k.shape[2])[:, None] * 0.1
            a, b = k.chunk(2, -1)
            turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
            k.copy_(torch.cat(turned, -1))


class MutatedByATurn(RetrievalCache):
    """What was not retrieved is cleared in the main cache."""

    def start_answer(self):
        super().start_answer()
        for layer, chosen in enumerate(self.retrieved):
            gone = torch.ones(len(self.visual), dtype=torch.bool)
            gone[chosen] = False
            self.v[layer][:, :, self.visual[gone]] = 0


class ForgetsItsAnswers(RetrievalCache):
    """Generated rows go to the packed buffer only."""

    def attend(self, layer, q, k, v):
        if self.packed is not None:
            return self.packed.attend(layer, q, k, v)
        return super().attend(layer, q, k, v)


class AnswersNotPacked(RetrievalCache):
    """Generated rows go to the main cache only."""

    def attend(self, layer, q, k, v):
        if self.packed is None:
            return super().attend(layer, q, k, v)
        self.append(layer, k, v)
        rows = self.packed.filled[layer]
        keys, values = self.packed.k[layer][:, :, :rows], self.packed.v[layer][:, :, :rows]
        return kernels.decode_attention(q, keys, values)


class SparseFirstToken(RetrievalCache):
    """The question's last row, from which the first answer token comes, sees the best rows only."""

    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        if self.scoring:
            keep = keep_count(len(self.visual), self.decode_sparsity)
            chosen = self.visual[select_tokens(self.relevance[-1], keep)].tolist()
            gone = set(self.visual.tolist()) - set(chosen)
            rows = [row for row in range(self.filled[layer]) if row not in gone]
            keys, values = self.k[layer][:, :, rows], self.v[layer][:, :, rows]
            out[:, :, -1:] = kernels.decode_attention(q[:, :, -1:].contiguous(), keys, values)
        return out


class DropsOtherText(RetrievalCache):
    """Text between visual rows is taken for visual."""

    def packed_rows(self, chosen):
        rows = super().packed_rows(chosen)
        first, last = int(self.visual[0]), int(self.visual[-1])
        visual = set(self.visual.tolist())
        kept = [r for r in rows.tolist() if not first < r < last or r in visual]
        return torch.tensor(kept)


class LeastRelevant(RetrievalCache):
    def start_answer(self):
        relevance = self.relevance
        self.relevance = [-scores for scores in relevance]
        super().start_answer()
        self.relevance = relevance


class SelectsOnce(RetrievalCache):
    """The first question's choice for all questions."""

    first = None

    def start_answer(self):
        super().start_answer()
        self.first = self.first or self.retrieved
        if self.retrieved is not self.first:
            self.retrieved = self.first


class DeletesForGood(RetrievalCache):
    """Retrieved rows only stay for later questions."""

    def start_answer(self):
        super().start_answer()
        self.kept_rows = [self.visual[chosen] for chosen in self.retrieved]
        for layer, chosen in enumerate(self.kept_rows):
            gone = self.visual[~torch.isin(self.visual, chosen)]
            self.k[layer][:, :, gone] = -50.0


class StaleTruncate(RetrievalCache):
    """Truncating leaves the packed buffer in use."""

    def truncate(self, length):
        KVCache.truncate(self, length)


class OffByOneTruncate(RetrievalCache):
    def truncate(self, length):
        super().truncate(length)
        self.filled = [rows + 1 for rows in self.filled]


# --- the session ----------------------------------------------------------------------------------


class PositionsShifted(SparseVILA):
    """After the pruned tokens, text is numbered one too far."""

    def __init__(self, model, processor, **settings):
        super().__init__(model, copy.copy(processor), **settings)

        def layout(*arguments):
            ids, positions, next_position = processor.layout(*arguments)
            last = max(i for i, token in enumerate(ids) if token == processor.image_token_id)
            positions[last + 1 :] += 1
            return ids, positions, next_position + 1

        self.processor.layout = layout


class PositionsKept(SparseVILA):
    """Kept tokens stay where they were, though the method numbers them anew."""

    def __init__(self, model, processor, **settings):
        super().__init__(model, processor, positions="original", **settings)


class LeastSalient(SparseVILA):
    def prune(self, features, salience):
        return super().prune(features, [-scores for scores in salience])


class SparsityOfAllTokens(SparseVILA):
    """The decode sparsity is a share of what was encoded, not of what was kept."""

    def new_cache(self, visual, capacity):
        encoded = len(visual) / (1 - self.prefill_sparsity)
        keep = encoded * (1 - self.decode_sparsity) / len(visual)
        self.decode_sparsity, asked = 1 - keep, self.decode_sparsity
        cache = super().new_cache(visual, capacity)
        self.decode_sparsity = asked
        return cache


class NeverForgets(SparseVILA):
    """The turn before leaks into the next."""

    def forget(self):
        pass


class SparseFirstTokenSession(SparseVILA):
    cache_type = SparseFirstToken


class OneSetting(SparseVILA):
    """The sparsities asked for are ignored."""

    def __init__(self, model, processor, *, prefill_sparsity=0.75, decode_sparsity=0.9):
        super().__init__(model, processor, prefill_sparsity=0.75, decode_sparsity=0.9)


class FirstPictureForAll(SparseVILA):
    """Every picture keeps the tokens that are salient in the first."""

    def prune(self, features, salience):
        return super().prune(features, salience[:1] * len(features))


# --- the list -------------------------------------------------------------------------------------

CORRECT = {  # where nothing is changed
    "attention_lse": lse,
    "attention_colsum": colsum,
    "decode_attention": decode,
    "dequantize": dequantize_with,
    "w4a16_matmul": matmul_with,
}
MUTANTS: dict[str, dict[str, Any]] = {  # operation -> mistake -> implementation
    "attention_lse": {
        "log-sum-exp to base 2": lambda q, k, **o: lse(q, k, **o) / math.log(2),
        "log-sum-exp without the maximum": lse_without_maximum,
        "mask of the log-sum-exp aligned top-left": partial(lse, align="left"),
    },
    "attention_colsum": {
        "mask aligned top-left": partial(colsum, align="left"),
        "mask one key too far": partial(colsum, align="beyond"),
        "repeat in place of repeat_interleave": partial(colsum, heads="repeat"),
        "scale missing": lambda q, k, scale=None, **o: colsum(q, k, scale=1.0, **o),
        "scale doubled": scale_doubled,
        "a given scale ignored": lambda q, k, scale=None, **o: colsum(q, k, **o),
        "half of the head size": lambda q, k, **o: colsum(q, k, dims=q.shape[3] // 2, **o),
        "heads averaged before the softmax": colsum_of_mean_scores,
        "softmax without the first key": partial(colsum, keys=slice(1, None)),
        "a given scale ignored under a mask": scale_ignored_under_a_mask,
        "head size cut to 80": lambda q, k, **o: colsum(
            q[..., :80], k[..., :80], **{"scale": q.shape[3] ** -0.5} | o
        ),
        "scores in bfloat16": partial(colsum, scores_in=torch.bfloat16),
        "sums in bfloat16": partial(colsum, sums_in=torch.bfloat16),
        "sums in float16": partial(colsum, sums_in=torch.float16),
        "columns written only where large": colsum_where_large,
        "a sum in random order": colsum_in_random_order,
        "mean in place of sum": lambda q, k, **o: colsum(q, k, **o) / q.shape[2],
    },
    "decode_attention": {
        "one row too few": partial(decode, beyond=-1),
        "a stale row past the length": partial(decode, beyond=1),
        "length ignored": partial(decode, beyond=10**6),
        "keys and values swapped": partial(decode, swap=True),
        "no maximum subtracted": decode_without_maximum,
        "head groups interleaved": partial(decode, heads="repeat"),
    },
    "gather_tokens": {
        "index truncated to 16 bits": gather_int16,
        "one index for the whole batch": gather_shared,
        "index sorted first": gather_sorted,
    },
    "keep_count": {
        "keep count by the floor of a float": lambda n, sparsity: max(
            math.floor(n * (1 - sparsity)), min(n, 1)
        ),
        "dropped count by the floor of a float": lambda n, sparsity: n - math.floor(n * sparsity),
        "sparsity to two digits": keep_count_of_two_digits,
        "keep count rounded": lambda n, sparsity: max(round(n * (1 - sparsity)), min(n, 1)),
        "nothing may be left": lambda n, sparsity: int(n * (1 - sparsity) + 1e-9),
    },
    "select_tokens": {
        "ties to the higher index": ties_to_the_higher_index,
        "unsorted indices": unsorted,
        "scores compared in float16": select_in_half,
        "one token too many": lambda scores, keep: select_tokens(
            scores, min(keep + 1, scores.shape[-1])
        ),
    },
    "prune": {
        "strictly above the quantile": partial(prune_with, above_the_quantile),
        "frames compared with each other": partial(prune_with, across_frames),
        "features not gathered in order": prune_out_of_order,
    },
    "pack": {"natural nibble order when packing": pack_naturally},
    "unpack": {
        "natural nibble order when unpacking": unpack_naturally,
        "sign of the top nibble": unpack_signed,
        "codes unpacked to int32": lambda packed: awq.unpack(packed).int(),
    },
    "dequantize": {
        "zero plus one": partial(dequantize_with, plus=1),
        "scale of the neighbouring group": partial(dequantize_with, shift=1),
        "zeros transposed": partial(dequantize_with, transpose=True),
    },
    "quantize_groups": {
        "a range without zero": quantize_one_sided,
        "codes rounded down": quantize_to_floor,
        "groups of 64 unless told otherwise": lambda weight, group_size=64: awq.quantize_groups(
            weight, group_size
        ),
        "zeros as float16": quantize_to_float_zeros,
    },
    "w4a16_matmul": {
        "zero plus one in the product": partial(
            matmul_with, dequantize=partial(dequantize_with, plus=1)
        ),
        "bias (of q, k, v) dropped": partial(matmul_with, keep_bias=False),
        "product added up in bfloat16": matmul_in_half,
        "product in TF32": matmul_in_tf32,
    },
    "RetrievalCache": {
        "relevance by a softmax over visual keys only": VisualSoftmax,
        "relevance of the last question row only": LastRowOnly,
        "relevance summed over heads": SumOverHeads,
        "one index set for all layers": OneIndexSet,
        "packed keys and values swapped": SwappedKV,
        "rotation applied again on packing": RotatedAgain,
        "main cache changed by a turn": MutatedByATurn,
        "answers missing from the main cache": ForgetsItsAnswers,
        "answers missing from the packed buffer": AnswersNotPacked,
        "first answer token computed sparsely": SparseFirstToken,
        "text between pictures dropped": DropsOtherText,
        "the least relevant retrieved": LeastRelevant,
        "retrieved only once": SelectsOnce,
        "rows deleted for later questions": DeletesForGood,
        "truncate leaves the packed buffer": StaleTruncate,
        "truncate off by one": OffByOneTruncate,
        "relevance scaled for heads of 16": ScaledForSixteen,
    },
    "SparseVILA": {
        "positions shifted by one after pruning": PositionsShifted,
        "positions with gaps where tokens were pruned": PositionsKept,
        "the least salient kept": LeastSalient,
        "decode sparsity as a share of all tokens": SparsityOfAllTokens,
        "an evicted turn still there": NeverForgets,
        "first answer token computed sparsely, in a session": SparseFirstTokenSession,
        "settings ignored": OneSetting,
        "the first picture's salience for all": FirstPictureForAll,
    },
}
