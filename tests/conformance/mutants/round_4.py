"""Wrong implementations, round 4: their author knew the docstrings and not the checks."""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import awq
import kernels
import sparsevila
from sparsevila import RetrievalCache, SparseVILA

# --- attention_lse --------------------------------------------------------------------------------


def lse_hidden_maximum(q, k, *, causal=False, scale=None):
    """The maximum is taken before the mask: it may be that of a key which the row does not see."""
    lse = kernels.attention_lse(q, k, causal=causal, scale=scale)
    top = torch.empty_like(lse)
    for b, rows, scores in kernels._score_chunks(q, k, False, scale):
        top[b, :, rows] = scores.amax(-1).flatten(0, 1)
    top = top.clamp(min=-1e30)
    return top + (lse - top).exp().log()


def lse_norm_bound(q, k, *, causal=False, scale=None):
    """Subtracts the bound |q| max |k| (as FlashDecoding++ a fixed number), not the maximum."""
    lse = kernels.attention_lse(q, k, causal=causal, scale=scale)
    scale = q.shape[3] ** -0.5 if scale is None else abs(scale)
    longest = k.float().norm(dim=-1).amax(-1).repeat_interleave(q.shape[1] // k.shape[1], 1)
    bound = scale * q.float().norm(dim=-1) * longest[..., None]
    return bound + (lse - bound).exp().log()


def lse_broadcast_batch(q, k, *, causal=False, scale=None):
    """Keys of batch size 1 are expanded to the queries' batch."""
    if isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == k.dim() == 4 and len(k) == 1:
        k = k.expand(len(q), -1, -1, -1)
    return kernels.attention_lse(q, k, causal=causal, scale=scale)


# --- attention_colsum -----------------------------------------------------------------------------


def colsum_transposed_layout(q, k, *, causal=False, scale=None, lse=None):
    """Keys that are not contiguous are read as a transposed (B, N, G, D), whatever they are."""
    kernels._check_heads(q, k)
    B, G, N, D = k.shape
    if not k.is_contiguous():
        k = k.as_strided((B, G, N, D), (N * G * D, D, G * D, 1))
    return kernels.attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


def colsum_no_rows(q, k, *, causal=False, scale=None, lse=None):
    """Rows come in blocks of 2**20 scores: none, where one row has more."""
    kernels._check_heads(q, k)
    q = torch.cat(q.split(2**20 // (q.shape[1] * k.shape[2]), 2), 2)
    return kernels.attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


def colsum_centred_keys(q, k, *, causal=False, scale=None, lse=None):
    """Takes the mean key off all keys (as SageAttention), which a given lse knows nothing of."""
    kernels._check_heads(q, k)
    mean = k.float().mean(2, keepdim=True).nan_to_num(0, 0, 0)
    q, k = q.float(), k.float() - mean
    return kernels.attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


def colsum_cubic(q, k, *, causal=False, scale=None, lse=None):
    """2**x by FlashAttention-4's polynomial of degree 3, which is made for 16-bit weights."""
    colsum = torch.zeros_like(kernels.attention_colsum(q, k, causal=causal, scale=scale, lse=lse))
    lse = kernels.attention_lse(q, k, causal=causal, scale=scale) if lse is None else lse
    for b, rows, scores in kernels._score_chunks(q, k, causal, scale):
        shift = lse[b, :, rows, None]
        shift = shift.masked_fill(shift == -torch.inf, 0)
        x = (scores.flatten(0, 1) - shift) * math.log2(math.e)
        whole = x.clamp(min=-126).floor()
        f = x.clamp(min=-126) - whole
        power = torch.ldexp(1 + f * (0.695146143 + f * (0.227564394 + f * 0.07711909)), whole)
        colsum[b, :, : x.shape[-1]] += (power * (x > -126)).sum(-2)
    return colsum


SCALES = {}


def colsum_scale_of_shape(q, k, *, causal=False, scale=None, lse=None):
    """A kernel is compiled once per shape, with the scale of that call built in."""
    kernels._check_heads(q, k)
    scale = SCALES.setdefault((q.shape, k.shape, q.dtype, causal), scale)
    return kernels.attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


def colsum_first_mask(q, k, *, causal=False, scale=None, lse=None):
    """The mask made for the first block of 256 rows serves all blocks."""
    colsum = kernels.attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    M, N = q.shape[2], k.shape[2]
    if not causal or M <= 256:
        return colsum
    lse = kernels.attention_lse(q, k, causal=True, scale=scale) if lse is None else lse
    colsum.zero_()
    for rows, part in zip(q.split(256, 2), lse.split(256, 2)):
        if (n := N - M + rows.shape[2]) > 0:
            keys, options = k[:, :, :n], {"scale": scale, "lse": part}
            colsum[..., :n] += kernels.attention_colsum(rows, keys, causal=True, **options)
    return colsum


# --- decode_attention -----------------------------------------------------------------------------


def decode_packed_heads(q, k, v, *, length=None, scale=None):
    """A head's rows are taken to begin `length` rows after those of the head before."""
    kernels.decode_attention(q, k, v, length=length, scale=scale)
    B, G, capacity, D = k.shape
    n = capacity if length is None else int(length)
    k, v = (x.reshape(-1)[: B * G * n * D].view(B, G, n, D) for x in (k, v))
    return kernels.decode_attention(q, k, v, scale=scale)


WIDE = WeakTensorKeyDictionary()


def decode_converted_once(q, k, v, *, length=None, scale=None):
    """16-bit rows are converted to float32 when they are new, and not when they are rewritten."""
    right = kernels.decode_attention(q, k, v, length=length, scale=scale)
    if q.dtype == torch.float32:
        return right
    n = k.shape[2] if length is None else int(length)
    for x in (k, v):
        old = WIDE.get(x, x[:, :, :0].float())
        WIDE[x] = torch.cat([old, x[:, :, old.shape[2] : n].float()], 2)
    k, v = WIDE[k][:, :, :n], WIDE[v][:, :, :n]
    return kernels.decode_attention(q.float(), k, v, scale=scale).to(q.dtype)


def decode_length_per_entry(q, k, v, *, length=None, scale=None):
    """Accepts a length for every batch entry, like FlashAttention's cache_seqlens."""
    if isinstance(length, Tensor) and length.dim() == 1 and len(length) == len(q):
        entries = zip(q.split(1), k.split(1), v.split(1), length)
        return torch.cat([kernels.decode_attention(*e, length=n, scale=scale) for *e, n in entries])
    return kernels.decode_attention(q, k, v, length=length, scale=scale)


def decode_divided_late(q, k, v, *, length=None, scale=None):
    """The weighted sum of values is handed on in float16 before it is divided by the weights."""
    right = kernels.decode_attention(q, k, v, length=length, scale=scale)
    if q.dtype != torch.float16:
        return right
    (B, H, _, D), G = q.shape, k.shape[1]
    n = k.shape[2] if length is None else int(length)
    rows, k, v = q.float().reshape(B, G, H // G, D), k[:, :, :n].float(), v[:, :, :n].float()
    scores = rows @ k.mT * (D**-0.5 if scale is None else scale)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    mixed = (weights @ v).half()
    return (mixed / weights.sum(-1, keepdim=True)).half().view(B, H, 1, D)


# --- gather_tokens --------------------------------------------------------------------------------


def gather_one_hot(x, index):
    """Few rows are chosen by a product with a one-hot matrix, so that NaN and inf spread."""
    right = kernels.gather_tokens(x, index)
    few = index.numel() * x.shape[-2] <= 2**18
    if not few or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return right
    chosen = F.one_hot(index, x.shape[-2]).to(x.dtype)
    return (chosen if x.dim() == 3 else chosen[:, None]) @ x.detach()


def gather_empty(x, index):
    """The index is checked by its extremes, which an empty one has not."""
    kernels._check_index(x, index)
    index.aminmax()
    return kernels.gather_tokens(x, index)


# --- keep_count, select_tokens, prune -------------------------------------------------------------


def keep_epsilon(n, sparsity):
    """1e-6 is added before rounding down, against products a little below a whole number."""
    sparsevila.keep_count(n, sparsity)
    return n - int(float(sparsity) * n + 1e-6)


def select_scalar(scores, keep):
    """A scalar is taken for the score of one token."""
    return sparsevila.select_tokens(torch.atleast_1d(scores), keep)


def select_float32(scores, keep):
    """Scores of float64 are compared in float32."""
    return sparsevila.select_tokens(scores.float(), keep)


def select_none_fails(scores, keep):
    """The threshold is the last of the highest scores, also of none."""
    chosen = sparsevila.select_tokens(scores, keep)
    assert (scores.topk(int(keep)).values[..., -1] <= scores.gather(-1, chosen).amin(-1)).all()
    return chosen


def prune_zip(features, salience, sparsity, *, scope="frame"):
    """Views and salience are zipped: what one has more is left out."""
    views = min(len(features), len(salience))
    return sparsevila.prune(features[:views], salience[:views], sparsity, scope=scope)


def prune_scope_else(features, salience, sparsity, *, scope="frame"):
    """Every other word than "frame" means "global"."""
    scope = "frame" if scope == "frame" else "global"
    return sparsevila.prune(features, salience, sparsity, scope=scope)


def prune_normalised(features, salience, sparsity, *, scope="frame"):
    """The salience of every view is made to add up to 1 before views are ranked together."""
    if scope == "global":
        salience = [F.normalize(s, p=1, dim=0) for s in salience]
    return sparsevila.prune(features, salience, sparsity, scope=scope)


# --- awq.py ---------------------------------------------------------------------------------------


def pack_floats(codes):
    """Codes of a floating dtype are rounded."""
    return awq.pack(codes.round().int() if codes.is_floating_point() else codes)


def unpack_experts(packed):
    """Accepts words of three axes, as of the experts of one layer."""
    if packed.dim() == 3:
        return torch.stack([awq.unpack(words) for words in packed])
    return awq.unpack(packed)


def dequantize_one_zero(qweight, qzeros, scales):
    """One row of zeros is accepted for all groups."""
    if qzeros.dim() == scales.dim() == 2 and len(qzeros) == 1:
        qzeros = qzeros.expand(len(scales), -1)
    return awq.dequantize(qweight, qzeros, scales)


def dequantize_saturated(qweight, qzeros, scales):
    """Weights beyond float16 become its largest number (as transformers clamps), not infinite."""
    return awq.dequantize(qweight, qzeros, scales).clamp(-65504, 65504)


def quantize_unclamped(weight, group_size=128):
    """Codes are not clamped: both ends of a range may be rounded up."""
    _, scales, zeros = awq.quantize_groups(weight, group_size)
    w = weight.detach().float().unflatten(1, (scales.shape[1], -1))
    codes = (w / scales.float()[..., None]).round() + zeros[..., None]
    return codes.flatten(1).to(torch.int8), scales, zeros


def quantize_huge(weight, group_size=128):
    """Scales beyond float16 become its largest number."""
    try:
        return awq.quantize_groups(weight, group_size)
    except ValueError as error:
        if "beyond float16" not in str(error):
            raise
    w = weight.detach().float().unflatten(1, (-1, awq._group_size(group_size, weight.shape[1])))
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scales = ((high - low).clamp(min=1e-5) / 15).clamp(max=65504).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = ((w / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return codes.flatten(1).to(torch.int8), scales, zeros.to(torch.int8)


def quantize_any_negative(weight, group_size=128):
    """Every group size below 1 means all inputs, as in llm-awq."""
    below = isinstance(group_size, int) and group_size < 1
    return awq.quantize_groups(weight, -1 if below else group_size)


def matmul_half_sums(x, qweight, qzeros, scales, bias=None):
    """x @ codes - sums of x @ zeros, the sums in float16, where they may overflow (llama.cpp)."""
    y = awq.w4a16_matmul(x, qweight, qzeros, scales, bias)
    if x.dtype != torch.float16:
        return y
    sums = x.float().unflatten(-1, (len(scales), -1)).sum(-1)
    return (y.float() - (sums.half() - sums) @ (awq.unpack(qzeros) * scales.float())).half()


def matmul_one_bias(x, qweight, qzeros, scales, bias=None):
    """A bias of one number is added to all outputs."""
    if bias is not None and bias.shape == (1,):
        bias = bias.expand(scales.shape[-1])
    return awq.w4a16_matmul(x, qweight, qzeros, scales, bias)


def matmul_row_contiguous(x, qweight, qzeros, scales, bias=None):
    """A single row takes a path that reads neighbours in memory, whatever x's strides."""
    if x.dim() and x.numel() == x.shape[-1]:
        x = x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())
    return awq.w4a16_matmul(x, qweight, qzeros, scales, bias)


# --- RetrievalCache -------------------------------------------------------------------------------


class SharedScores(RetrievalCache):
    """The list of relevance belongs to the class: two caches share it."""

    scores = []

    def start_question(self):
        super().start_question()
        self.scores.clear()
        self.relevance = self.scores


class ShortCut(RetrievalCache):
    """Where nothing is left out, nothing is packed, and nothing is noted as retrieved."""

    def start_answer(self):
        V = len(self.visual)
        everything = sparsevila.keep_count(V, self.decode_sparsity) == V
        if not everything or len(self.relevance) != len(self.k):
            return super().start_answer()
        self.scoring = False


class CountOnce(RetrievalCache):
    """How many to retrieve is counted when the cache is made, not when fewer rows are left."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.keep = sparsevila.keep_count(len(self.visual), self.decode_sparsity)

    def start_answer(self):
        V, given = len(self.visual), self.decode_sparsity
        self.decode_sparsity = Fraction(V - self.keep, V) if V else given
        try:
            super().start_answer()
        finally:
            self.decode_sparsity = given


class TruncateNothing(RetrievalCache):
    """To truncate to the present length does nothing (as transformers' crop)."""

    def truncate(self, length):
        if length != self.length:
            super().truncate(length)


class TruncateFromEnd(RetrievalCache):
    """A negative length is so many rows less (as transformers' crop)."""

    def truncate(self, length):
        super().truncate(length + self.length if -self.length <= length < 0 else length)


class ByLength(RetrievalCache):
    """The choice is remembered by the number of rows, which another question may have as well."""

    def start_answer(self):
        asked = self.relevance
        if len(asked) == len(self.k):
            choices = self.__dict__.setdefault("choices", {})
            self.relevance = choices.setdefault((self.length, len(self.visual)), asked)
        super().start_answer()
        self.relevance = asked


# --- SparseVILA -----------------------------------------------------------------------------------


class UnreadOfForgotten(SparseVILA):
    """A token that is still to be read outlives the turn that is forgotten."""

    def forget(self):
        last = self._turns[-1:]
        super().forget()
        if last and self._turns:
            self._turns[-1] = self._turns[-1]._replace(unread=last[0].unread)


class SettingsOnModel(SparseVILA):
    """The sparsities are kept on the model (as FastV does): its last session's hold for all."""

    def __init__(self, model, processor, **settings):
        super().__init__(model, processor, **settings)
        model.sparsities = self.prefill_sparsity, self.decode_sparsity

    def see(self, images, *, fps=None):
        self.prefill_sparsity, self.decode_sparsity = self.model.sparsities
        super().see(images, fps=fps)


class HighestPlusOne(SparseVILA):
    """With "original" positions a question follows the last kept token, not the last token."""

    class cache_type(RetrievalCache):
        def advance(self, positions, next_position=None):
            super().advance(positions)


class ForgetFails(SparseVILA):
    """To forget takes the last turn off the list, also when there is none."""

    def forget(self):
        self._check_idle()
        *self._turns, last = self._turns
        self.cache.truncate(last.start)


MUTANTS = {
    "attention_lse": {
        "maximum of hidden keys": lse_hidden_maximum,
        "norms bound the maximum": lse_norm_bound,
        "keys of one entry for a batch": lse_broadcast_batch,
    },
    "attention_colsum": {
        "strided keys taken for transposed": colsum_transposed_layout,
        "blocks of no rows": colsum_no_rows,
        "keys centred, given lse not": colsum_centred_keys,
        "2**x by a cubic": colsum_cubic,
        "scale built in by shape": colsum_scale_of_shape,
        "first mask for all blocks": colsum_first_mask,
    },
    "decode_attention": {
        "heads length rows apart": decode_packed_heads,
        "rewritten rows not converted": decode_converted_once,
        "a length per entry accepted": decode_length_per_entry,
        "float16 before the division": decode_divided_late,
    },
    "gather_tokens": {"one-hot product": gather_one_hot, "empty index fails": gather_empty},
    "keep_count": {"1e-6 added": keep_epsilon},
    "select_tokens": {
        "scalar accepted": select_scalar,
        "float64 compared in float32": select_float32,
        "keep 0 fails": select_none_fails,
    },
    "prune": {
        "more views than salience": prune_zip,
        "unknown scope is global": prune_scope_else,
        "global: salience normalised by view": prune_normalised,
    },
    "pack": {"float codes rounded": pack_floats},
    "unpack": {"words of three axes accepted": unpack_experts},
    "dequantize": {
        "one row of zeros for all groups": dequantize_one_zero,
        "beyond float16 saturated": dequantize_saturated,
    },
    "quantize_groups": {
        "codes of 16": quantize_unclamped,
        "scales beyond float16 saturated": quantize_huge,
        "0 and -2 are all inputs": quantize_any_negative,
    },
    "w4a16_matmul": {
        "sums of x in float16 overflow": matmul_half_sums,
        "bias of one number accepted": matmul_one_bias,
        "single row read as contiguous": matmul_row_contiguous,
    },
    "RetrievalCache": {
        "relevance shared by all caches": SharedScores,
        "sparsity 0 packs nothing": ShortCut,
        "retrieved counted once": CountOnce,
        "truncate to the present length ignored": TruncateNothing,
        "negative truncate from the end": TruncateFromEnd,
        "choice remembered by length": ByLength,
    },
    "SparseVILA": {
        "unread token of a forgotten turn": UnreadOfForgotten,
        "sparsities of the model's last session": SettingsOnModel,
        "original: question follows the last kept": HighestPlusOne,
        "forget without a turn fails": ForgetFails,
    },
}
