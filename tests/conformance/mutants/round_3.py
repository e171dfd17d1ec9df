"""Wrong implementations, round 3: their author knew the docstrings and not the checks."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import awq
import kernels
from awq import dequantize, pack, quantize_groups, unpack, w4a16_matmul
from kernels import attention_colsum, attention_lse, decode_attention, gather_tokens
from sparsevila import RetrievalCache, SparseVILA, keep_count, prune, select_tokens

INF = float("inf")

# --- attention_lse --------------------------------------------------------------------------------


def lse_root_of_scale(q, k, *, causal=False, scale=None):
    """sqrt(scale) goes into queries and keys, as in PyTorch's own attention: NaN if negative."""
    kernels._check_heads(q, k)
    root = torch.tensor(q.shape[3] ** -0.5 if scale is None else scale).sqrt()
    return attention_lse(q.float() * root, k.float() * root, causal=causal, scale=1.0)


def lse_offset_saturates(q, k, *, causal=False, scale=None):
    """N - M of unsigned numbers is 0 where it would be negative."""
    kernels._check_heads(q, k)
    N, settings = k.shape[2], {"scale": scale}
    if not causal or q.shape[2] <= N:
        return attention_lse(q, k, causal=causal, **settings)
    first = attention_lse(q[:, :, :N], k, causal=True, **settings)
    return torch.cat([first, attention_lse(q[:, :, N:], k, **settings)], 2)


def lse_scores_clamped(q, k, *, causal=False, scale=None):
    """Scores are clamped to what float16 can hold, in every dtype."""
    kernels._check_heads(q, k)
    lse = torch.full(q.shape[:3], -INF, device=q.device)
    for b, rows, scores in kernels._score_chunks(q, k, causal, scale):
        scores = scores.where(scores == -INF, scores.clamp(-65504, 65504))
        lse[b, :, rows] = scores.logsumexp(-1).flatten(0, 1)
    return lse


# --- attention_colsum -----------------------------------------------------------------------------


def colsum_fixed_point(q, k, *, causal=False, scale=None, lse=None):
    """Added by integer atomics, 2^-20 a unit, where floats have none: sums of 2048 wrap."""
    sums = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    units = (sums.double() * 2**20).round().long()
    return units.to(torch.int32).float() / 2**20


def colsum_chunk_aligned_to_all_keys(q, k, *, causal=False, scale=None, lse=None):
    """Every 512 rows are a call of their own, whose mask ends at the last of all keys."""
    kernels._check_heads(q, k)
    if not causal or q.shape[2] <= 512 or lse is not None:
        return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    return sum(attention_colsum(x, k, causal=True, scale=scale) for x in q.split(512, 2))


SCALES = {}


def colsum_compiled_scale(q, k, *, causal=False, scale=None, lse=None):
    """The scale is a constant of the compiled function, which is looked up by shapes alone."""
    kernels._check_heads(q, k)
    scale = SCALES.setdefault((q.shape, k.shape, q.dtype, causal), scale)
    return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


SUMS = {}


def colsum_not_cleared(q, k, *, causal=False, scale=None, lse=None):
    """The accumulator stays between calls; it is cleared only when its shape changes."""
    sums = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    if SUMS.get("shape") != sums.shape:
        SUMS.update(shape=sums.shape, sums=torch.zeros_like(sums))
    SUMS["sums"] += sums
    return SUMS["sums"].clone()


def colsum_workgroups(q, k, *, causal=False, scale=None, lse=None):
    """One workgroup a column, of which an axis of the launch takes 65,535."""
    sums = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    sums[..., 65535:] = 0
    return sums


def colsum_lse_not_shifted(q, k, *, causal=False, scale=None, lse=None):
    """First rows that see nothing are skipped in the queries, but not in the given lse."""
    kernels._check_heads(q, k)
    M, N = q.shape[2], k.shape[2]
    if causal and M > N and lse is not None and lse.shape == q.shape[:3]:
        q, lse = q[:, :, M - N :], lse[:, :, :N]
    return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


# --- decode_attention -----------------------------------------------------------------------------


def _rows(k, length):
    return int(kernels._check_length(length, k))


def _scores(q, k, n, scale):
    """Scores (B, G, H/G, n) float32 of the first n rows."""
    rows = q.unflatten(1, (k.shape[1], -1))[..., 0, :].float()
    return rows @ k[:, :, :n].float().mT * (q.shape[3] ** -0.5 if scale is None else scale)


CONVERTED = WeakTensorKeyDictionary()


def decode_converted_once(q, k, v, *, length=None, scale=None):
    """Rows of a key buffer are converted once, each when it is new: not those that a rewound
    buffer gets in place of others."""
    kernels._check_heads(q, k)
    n = _rows(k, length)
    keys, done = CONVERTED.get(k, (k.clone(), 0))
    keys[:, :, done:n] = k[:, :, done:n]
    CONVERTED[k] = keys, max(done, n)
    return decode_attention(q, keys, v, length=n, scale=scale)


CAPTURED = {}


def decode_captured_buffers(q, k, v, *, length=None, scale=None):
    """A graph is captured once per shape, and replayed with the buffers it was captured with."""
    kernels._check_heads(q, k)
    kernels._check_values(k, v)
    k, v = CAPTURED.setdefault((q.shape, k.shape, k.dtype), (k, v))
    return decode_attention(q, k, v, length=length, scale=scale)


def decode_best_rows(q, k, v, *, length=None, scale=None):
    """Of more than 1024 rows only the 1024 best of a head are mixed."""
    right, n = decode_attention(q, k, v, length=length, scale=scale), _rows(k, length)
    if n <= 1024:
        return right
    scores = _scores(q, k, n, scale)
    least = scores.topk(1024).values[..., -1:]
    weights = scores.masked_fill(scores < least, -INF).softmax(-1)
    return (weights @ v[:, :, :n].float()).flatten(1, 2)[:, :, None].to(q.dtype)


def decode_divided_last(q, k, v, *, length=None, scale=None):
    """The weighted sum is rounded to q's dtype before it is divided by the sum of weights."""
    right, n = decode_attention(q, k, v, length=length, scale=scale), _rows(k, length)
    if q.dtype == torch.float32:
        return right
    scores = _scores(q, k, n, scale)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    mixed = (weights @ v[:, :, :n].float()).to(q.dtype)
    out = mixed.float() / weights.sum(-1, keepdim=True)
    return out.flatten(1, 2)[:, :, None].to(q.dtype)


# --- gather_tokens --------------------------------------------------------------------------------


def gather_one_hot(x, index):
    """Few rows are gathered as a product with a one-hot matrix: 0 times NaN of other rows."""
    out, N = gather_tokens(x, index), x.shape[-2]
    if not x.is_floating_point() or not out.numel() or N * index.shape[1] > 2**18:
        return out
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    chosen = F.one_hot(index, N).to(wide.dtype)  # (B, K, N)
    return ((chosen[:, None] if x.dim() == 4 else chosen) @ wide).to(x.dtype)


def gather_scattered(x, index):
    """x is read once, in order, and every row written to its place: one chosen twice has one."""
    out, (B, K) = gather_tokens(x, index), index.shape
    number = torch.arange(K, device=index.device).expand(B, K)
    place = torch.zeros(B, x.shape[-2], dtype=torch.int64, device=index.device)
    place.scatter_reduce_(1, index, number, "amax")
    if (empty := place.gather(1, index) != number).any():
        out.masked_fill_(empty[:, None, :, None] if x.dim() == 4 else empty[..., None], 0)
    return out


# --- choosing and counting ------------------------------------------------------------------------


def keep_count_32_bits(n, sparsity):
    """The share is an exact fraction, but n times its numerator has 32 bits."""
    keep_count(n, sparsity)
    share = Fraction(str(+sparsity)).limit_denominator(10**9)
    product = (share.numerator * int(n) + 2**31) % 2**32 - 2**31
    return max(n - product // share.denominator, min(n, 1))


def select_in_two_stages(scores, keep):
    """Every block of 1024 or more scores sends one and a half times its share into the final."""
    right = select_tokens(scores, keep)
    if scores.shape[-1] < 2048:
        return right
    blocks, start, finalists = scores.tensor_split(scores.shape[-1] // 1024, -1), 0, []
    for block in blocks:
        share = min(-(-3 * keep // (2 * len(blocks))), block.shape[-1])
        finalists.append(select_tokens(block, share) + start)
        start += block.shape[-1]
    finalists = torch.cat(finalists, -1)
    return finalists.gather(-1, select_tokens(scores.gather(-1, finalists), keep))


def select_int32(scores, keep):
    """Indices as JAX and MLX make them."""
    return select_tokens(scores, keep).int()


def select_subnormal(scores, keep):
    """Compared by a unit that takes subnormal float32 numbers for 0."""
    if scores.dtype == torch.float64:
        return select_tokens(scores, keep)
    return select_tokens(scores.masked_fill(scores.abs() < 2**-126, 0), keep)


# --- prune ----------------------------------------------------------------------------------------


def prune_normalised(features, salience, sparsity, *, scope="frame"):
    """Before views are ranked together, the salience of each is scaled to the sum 1."""
    if scope == "global":
        salience = [F.normalize(s.float(), p=1, dim=0) if s.dim() else s for s in salience]
    return prune(features, salience, sparsity, scope=scope)


def prune_features_dtype(features, salience, sparsity, *, scope="frame"):
    """Salience is cast to the dtype of the features: ties in 16 bits."""
    if len(features) == len(salience):
        salience = [s.to(x.dtype) for x, s in zip(features, salience)]
    return prune(features, salience, sparsity, scope=scope)


def prune_one_sort(features, salience, sparsity, *, scope="frame"):
    """All views are sorted at once, by the sum of the view's number and the salience."""
    if scope == "frame":
        salience = [number + s.float() for number, s in enumerate(salience)]
    return prune(features, salience, sparsity, scope=scope)


# --- awq ------------------------------------------------------------------------------------------


def pack_int32_in_place(codes):
    """`codes.to(torch.int32) <<= shifts`: int32 codes are not copied."""
    words = pack(codes)
    if codes.dtype == torch.int32:
        codes.unflatten(1, (-1, 8)).bitwise_left_shift_(awq._shifts(codes))
    return words


UNPACKED = WeakTensorKeyDictionary()


def unpack_remembered(packed):
    """The codes of unchanged words are remembered, and handed out themselves, not a copy."""
    if not isinstance(packed, Tensor) or packed.is_inference():
        return unpack(packed)
    version, codes = UNPACKED.get(packed, (None, None))
    if version != packed._version:
        codes = unpack(packed)
        UNPACKED[packed] = packed._version, codes
    return codes


def dequantize_ties_away(qweight, qzeros, scales):
    """Rounded to float16 by hand: ties away from zero."""
    groups = awq._check_packed(qweight, qzeros, scales)[0] // len(scales)
    zeros, each = (x.repeat_interleave(groups, 0) for x in (unpack(qzeros), scales.float()))
    product = (unpack(qweight) - zeros) * each  # exact: 15 bits
    return (product * (1 + 2**-20)).half()


def dequantize_clamped(qweight, qzeros, scales):
    """Products beyond float16 are clamped to its largest number."""
    return dequantize(qweight, qzeros, scales).clamp(-65504, 65504)


def _grouped(weight, group_size):
    """Weights (outputs, inputs / g, g), least and greatest of each group, and the right scales."""
    scales = quantize_groups(weight, group_size)[1]
    w = weight.detach().float().unflatten(1, (scales.shape[1], -1))
    return w, w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0), scales


def quantize_scale_rounded_up(weight, group_size=128):
    """The next float16 that is not below, so that 15 steps reach from end to end."""
    w, low, high, scales = _grouped(weight, group_size)
    above = (scales.view(torch.int16) + 1).view(torch.float16)
    scales = scales.where(scales.float() >= (high - low).clamp(min=1e-5) / 15, above)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = ((w / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return codes.flatten(1).to(torch.int8), scales, zeros.to(torch.int8)


def quantize_code_wraps(weight, group_size=128):
    """Codes are cut to four bits, not clamped: 16 becomes 0."""
    w, _, _, scales = _grouped(weight, group_size)
    zeros = quantize_groups(weight, group_size)[2]
    codes = (w / scales.float()[..., None]).round().to(torch.int32) + zeros[..., None]
    return (codes & 0xF).flatten(1).to(torch.int8), scales, zeros


def quantize_zero_from_the_top(weight, group_size=128):
    """zero = 15 - round(max / scale)"""
    w, _, high, scales = _grouped(weight, group_size)
    zeros = (15 - (high / scales.float()).round()).clamp(0, 15)
    codes = ((w / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return codes.flatten(1).to(torch.int8), scales, zeros.to(torch.int8)


def matmul_one_factor(x, qweight, qzeros, scales, bias=None):
    """bfloat16 goes through float16, brought into its range by one factor for all rows."""
    right = w4a16_matmul(x, qweight, qzeros, scales, bias)
    top = x.abs().amax().float() if x.numel() else 0
    if x.dtype != torch.bfloat16 or not 0 < top < INF:
        return right
    y = w4a16_matmul((x.float() / top).half().float(), qweight, qzeros, scales) * top
    return (y if bias is None else y + bias.float()).to(x.dtype)


WORKSPACE = {}


def matmul_stale_parts(x, qweight, qzeros, scales, bias=None):
    """Parts of 256 inputs go to a workspace, all of which is added up: a longer layer's, too."""
    right = w4a16_matmul(x, qweight, qzeros, scales, bias)
    if x.numel() > 16 * len(qweight):
        return right
    weight = dequantize(qweight, qzeros, scales).to(x.dtype).float()
    pairs = zip(x.float().split(256, -1), weight.split(256))
    parts, work = [a @ b for a, b in pairs], WORKSPACE.setdefault(right.shape, [])
    work[: len(parts)] = parts
    return (sum(work) + (0 if bias is None else bias.float())).to(x.dtype)


# --- RetrievalCache -------------------------------------------------------------------------------


class StaleRows(RetrievalCache):
    """A row is copied for packing once: one that takes a forgotten row's place is not."""

    def start_answer(self):
        super().start_answer()
        copies = vars(self).setdefault("copies", {})
        for layer, chosen in enumerate(self.retrieved):
            rows = self.packed_rows(chosen)
            for name in ("k", "v"):
                main, packed = getattr(self, name)[layer], getattr(self.packed, name)[layer]
                copied = copies.get((name, layer), main[:, :, :0])
                old = rows[rows < copied.shape[2]]
                packed[:, :, : len(old)] = copied[:, :, old]
                copies[name, layer] = main[:, :, : self.length].clone()


class SharedBuffers(RetrievalCache):
    """Packed buffers of a shape are allocated once, for all caches."""

    buffers = {}

    def start_answer(self):
        super().start_answer()
        for name, own in (("k", self.packed.k), ("v", self.packed.v)):
            for layer, x in enumerate(own):
                key = name, layer, x.shape, x.dtype
                own[layer] = self.buffers.setdefault(key, x.clone()).copy_(x)


class TruncateToTheEnd(RetrievalCache):
    """To forget no rows changes nothing, not even what comes next."""

    def truncate(self, length):
        if length != self.length:
            super().truncate(length)


class NothingToRetrieve(RetrievalCache):
    """At sparsity 0 there is nothing to choose: the main cache answers."""

    def start_answer(self):
        if self.decode_sparsity:
            super().start_answer()
        else:
            self.scoring = False


class PackedInFloat16(RetrievalCache):
    """The packed buffer is held in float16, whatever the model's dtype."""

    def start_answer(self):
        super().start_answer()
        for one in (self.packed.k, self.packed.v):
            one[:] = [x.half().to(x.dtype) for x in one]


class ValuesOfLayerBefore(RetrievalCache):
    """Two index buffers in turn: values are packed by the one that the layer before filled."""

    def start_answer(self):
        super().start_answer()
        for layer in range(1, len(self.k)):
            rows = self.packed_rows(self.retrieved[layer - 1])
            self.packed.v[layer][:, :, : len(rows)] = self.v[layer][:, :, rows]


# --- SparseVILA -----------------------------------------------------------------------------------


class AnswersRemembered(SparseVILA):
    """A question that was asked before is answered from memory, and makes no turn."""

    def see(self, images, *, fps=None):
        super().see(images, fps=fps)
        self.answers = {}

    def ask(self, question, **settings):
        if self.cache is None or {*settings} - {"max_new_tokens"}:
            return super().ask(question, **settings)
        key = str(question), settings.get("max_new_tokens")
        if key not in self.answers:
            self.answers[key] = super().ask(question, **settings)
        return self.answers[key]


class GeneratorGoesOn(SparseVILA):
    """One generator for each seed, which a second answer draws on from (here: another seed)."""

    def ask(self, question, *, seed=None, **settings):
        uses = vars(self).setdefault("uses", Counter())
        again = 0 if seed is None else uses[str(seed)]
        number = seed + 7919 * again if again else seed
        answer = super().ask(question, seed=number, **settings)
        uses[str(seed)] += 1
        return answer


class StopIdsStay(SparseVILA):
    """The set of tokens that end an answer is added to, and kept for later questions."""

    def ask(self, question, *, stop_ids=(), **settings):
        earlier = vars(self).setdefault("earlier", set())
        stops = {*map(int, stop_ids), *earlier} if earlier else stop_ids
        answer = super().ask(question, stop_ids=stops, **settings)
        earlier.update(int(i) for i in stops)
        return answer


class FourBytesANumber(SparseVILA):
    """kv_bytes_per_token counts four bytes a number, in every dtype."""

    def _answer(self, text, tokens, rows_read, timings):
        answer = super()._answer(text, tokens, rows_read, timings)
        size = self.model.dtype.itemsize
        return replace(answer, kv_bytes_per_token=answer.kv_bytes_per_token // size * 4)


MUTANTS = {
    "attention_lse": {
        "square root of the scale on both sides": lse_root_of_scale,
        "offset N - M saturates at 0": lse_offset_saturates,
        "scores clamped to float16's range": lse_scores_clamped,
    },
    "attention_colsum": {
        "32-bit fixed point wraps": colsum_fixed_point,
        "chunk of rows aligned to all keys": colsum_chunk_aligned_to_all_keys,
        "scale of the first call compiled in": colsum_compiled_scale,
        "accumulator cleared when its shape changes": colsum_not_cleared,
        "65,535 columns in a launch": colsum_workgroups,
        "given lse not shifted past blind rows": colsum_lse_not_shifted,
    },
    "decode_attention": {
        "keys converted once, not after a rewind": decode_converted_once,
        "buffers of the first capture": decode_captured_buffers,
        "1024 best rows alone": decode_best_rows,
        "rounded before it is divided": decode_divided_last,
    },
    "gather_tokens": {
        "product with a one-hot matrix": gather_one_hot,
        "row chosen twice arrives once": gather_scattered,
    },
    "keep_count": {"product of 32 bits": keep_count_32_bits},
    "select_tokens": {
        "blocks send little more than their share": select_in_two_stages,
        "int32 indices": select_int32,
        "subnormal scores taken for 0": select_subnormal,
    },
    "prune": {
        "global: salience of a view scaled to 1": prune_normalised,
        "salience in the features' dtype": prune_features_dtype,
        "one sort by view number plus salience": prune_one_sort,
    },
    "pack": {"int32 codes shifted in place": pack_int32_in_place},
    "unpack": {"remembered codes handed out uncopied": unpack_remembered},
    "dequantize": {
        "ties rounded away from zero": dequantize_ties_away,
        "overflow clamped to 65504": dequantize_clamped,
    },
    "quantize_groups": {
        "scale rounded up": quantize_scale_rounded_up,
        "code 16 wraps to 0": quantize_code_wraps,
        "zero counted from the top": quantize_zero_from_the_top,
    },
    "w4a16_matmul": {
        "one factor for all rows": matmul_one_factor,
        "parts of a longer layer added in": matmul_stale_parts,
    },
    "RetrievalCache": {
        "rows copied for packing once": StaleRows,
        "packed buffers shared by caches": SharedBuffers,
        "truncate to the present length does nothing": TruncateToTheEnd,
        "sparsity 0 packs nothing": NothingToRetrieve,
        "packed in float16": PackedInFloat16,
        "values by the choice of the layer before": ValuesOfLayerBefore,
    },
    "SparseVILA": {
        "same question answered from memory": AnswersRemembered,
        "generator of a seed goes on": GeneratorGoesOn,
        "stop_ids of an earlier question stay": StopIdsStay,
        "four bytes a number in every dtype": FourBytesANumber,
    },
}
