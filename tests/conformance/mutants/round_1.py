"""Wrong implementations, round 1: their author knew the docstrings and not the checks."""

import math
from dataclasses import replace
from fractions import Fraction
from unittest.mock import patch

import torch

import kernels
from awq import dequantize, pack, quantize_groups, unpack, w4a16_matmul
from kernels import (
    attention_colsum,
    attention_lse,
    decode_attention,
    gather_keys_values,
    gather_tokens,
)
from sparsevila import RetrievalCache, SparseVILA, keep_count, prune, select_tokens

INF = float("inf")
score_chunks = kernels._score_chunks

# --- attention_lse --------------------------------------------------------------------------------


def lse_blind_inf(q, k, **options):
    """A row without keys has +inf, as in FlashAttention 2, where the backward pass wants it."""
    lse = attention_lse(q, k, **options)
    return lse.masked_fill(lse == -INF, INF)


def lse_swapped_groups(q, k, *, causal=False, scale=None):
    """FlashAttention makes the heads of a group rows where there is one row; the mask stays on."""
    lse = attention_lse(q, k, causal=causal, scale=scale)
    (B, H, M, D), G = q.shape, k.shape[1]
    if M > 1 or not causal:
        return lse
    return attention_lse(q.reshape(B, G, H // G, D), k, causal=True, scale=scale).view(B, H, 1)


def lse_short_constant(q, k, *, causal=False, scale=None):
    """Powers of 2 of scores times 1.4427."""
    attention_lse(q, k, causal=causal, scale=scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return attention_lse(q, k, causal=causal, scale=scale * 1.4427 * math.log(2))


# --- attention_colsum -----------------------------------------------------------------------------


def colsum_window_mask(q, k, *, causal=False, scale=None, lse=None):
    """SnapKV's mask, which is made for an observation window of 32 rows."""
    out = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    if not causal or q.shape[2] <= 32:
        return out
    before, last = (None, None) if lse is None else (lse[:, :, :-32], lse[:, :, -32:])
    out = attention_colsum(q[:, :, -32:], k, causal=True, scale=scale, lse=last)
    return out + attention_colsum(q[:, :, :-32], k, scale=scale, lse=before)


def colsum_first_row(q, k, *, causal=False, scale=None, lse=None):
    """A block of 64 keys begins at a multiple of 64 rows (FlashAttention's backward pass)."""
    out = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    M, N = q.shape[2], k.shape[2]
    for n in range(0, N, 64) if causal else ():
        first = max(0, n - (N - M))
        stop = min(math.ceil(first / 64) * 64, M)
        if first < stop:
            given = None if lse is None else lse[:, :, first:stop]
            rows, keys = q[:, :, first:stop], k[:, :, : N - M + stop]
            lost = attention_colsum(rows, keys, causal=True, scale=scale, lse=given)
            out[..., n : min(n + 64, N - M + stop)] -= lost[..., n : n + 64]
    return out


def colsum_padded_keys(q, k, *, causal=False, scale=None, lse=None):
    """Keys loaded as zeros, up to a multiple of 16, count as scores of 0 in the first pass."""
    padding = -k.shape[2] % 16
    if lse is None and padding and not causal:
        lse = attention_lse(q, k, scale=scale).logaddexp(torch.tensor(math.log(padding)))
    return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


def colsum_multiple_of_8(q, k, **options):
    """FlashAttention: "head_size should be a multiple of 8"; who pads it was left out."""
    out = attention_colsum(q, k, **options)
    if q.shape[3] % 8:
        raise ValueError(f"head_size should be a multiple of 8, got {q.shape[3]}")
    return out


def colsum_padded_lse(q, k, *, causal=False, scale=None, lse=None):
    """xFormers pads the rows of its lse to a multiple of 32: any longer one is cut."""
    if isinstance(lse, torch.Tensor) and lse.dim() == 3:
        lse = lse[:, :, : q.shape[2]]
    return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


def colsum_mask_10000(q, k, *, causal=False, scale=None, lse=None):
    """GPT-2's mask."""

    def chunks(*arguments):
        for b, rows, scores in score_chunks(*arguments):
            yield b, rows, scores.masked_fill_(scores == -INF, -1e4) if causal else scores

    with patch.object(kernels, "_score_chunks", chunks):
        return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


# --- decode_attention -----------------------------------------------------------------------------


def decode_parts(q, k, v, *, length=None, scale=None):
    """vLLM's partitions of 512 rows; the second kernel's table has 64."""
    out = decode_attention(q, k, v, length=length, scale=scale)
    rows = k.shape[2] if length is None else int(length)
    return out if rows <= 32768 else decode_attention(q, k, v, length=32768, scale=scale)


def decode_window(q, k, v, *, length=None, scale=None):
    """Mistral's sliding window of 4096, from transformers' integration of FlashAttention."""
    out = decode_attention(q, k, v, length=length, scale=scale)
    stop = k.shape[2] if length is None else int(length)
    here = slice(stop - 4096, stop)
    return out if stop <= 4096 else decode_attention(q, k[:, :, here], v[:, :, here], scale=scale)


def decode_length_counted_down(q, k, v, *, length=None, scale=None):
    out = decode_attention(q, k, v, length=length, scale=scale)
    if isinstance(length, torch.Tensor):
        last = length.sub_(1)
        out = decode_attention(q, k, v, length=last + 1, scale=scale)
    return out


def decode_casts_queries(q, k, v, **options):
    """transformers: "hidden states seem to be silently casted in float32", so cast them back."""
    if isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and q.is_floating_point():
        return decode_attention(q.to(k.dtype), k, v, **options).to(q.dtype)
    return decode_attention(q, k, v, **options)


# --- gather_tokens, keep_count, select_tokens, prune ----------------------------------------------


def gather_vectors(x, index):
    """What is left of a row after its last 16 bytes is not copied."""
    out = gather_tokens(x, index)
    E, vector = x.shape[-1], max(1, 16 // x.element_size())
    out[..., E - E % vector :] = 0
    return out


def gather_gradients(x, index):
    out = gather_tokens(x, index)
    if not x.requires_grad:
        return out
    return torch.stack([rows.index_select(-2, i) for rows, i in zip(x, index)])


def keep_count_rounds_kept(n, sparsity):
    """kvpress: n_kept = int(n * (1 - compression_ratio))."""
    keep_count(n, sparsity)
    share = 1 - Fraction(str(+sparsity)).limit_denominator(10**9)
    return max(int(share * n), min(n, 1))


def select_buckets(scores, keep):
    """A histogram of 65536 buckets between lowest and highest; one bucket's scores are equal."""
    right = select_tokens(scores, keep)
    if not scores.numel():
        return right
    low, high = (end[..., None] for end in scores.double().aminmax(dim=-1))
    buckets = (scores.double() - low) / (high - low).clamp(min=1e-300) * 65535
    return select_tokens(buckets.nan_to_num().floor(), keep)


def select_all_unbatched(scores, keep):
    """No ranking where all are kept, and no batch axes."""
    index = select_tokens(scores, keep)
    return index if keep < scores.shape[-1] else torch.arange(keep, device=scores.device)


def select_clips_keep(scores, keep):
    """llama.cpp: k = min(k, size)."""
    if scores.dim() and isinstance(keep, int):
        keep = min(keep, scores.shape[-1])
    return select_tokens(scores, keep)


def prune_not_features(features, salience, sparsity, *, scope="frame"):
    """The truth of a tensor of several numbers is an error."""
    if not features:
        raise ValueError("no views")
    return prune(features, salience, sparsity, scope=scope)


def prune_class_token(features, salience, sparsity, *, scope="frame"):
    """VisionZip cuts the class token off; so here off any salience that is one longer."""
    if len(features) == len(salience):
        salience = [s[len(s) == len(x) + 1 :] for x, s in zip(features, salience)]
    return prune(features, salience, sparsity, scope=scope)


def prune_threshold(features, salience, sparsity, *, scope="frame"):
    """Global scope keeps all that reach the threshold, ties too."""
    kept, index = prune(features, salience, sparsity, scope=scope)
    if scope == "global" and any(map(len, index)):
        threshold = min(s[i.to(s.device)].min() for s, i in zip(salience, index) if len(i))
        index = [(s >= threshold).nonzero()[:, 0].cpu() for s in salience]
        kept = [x[i.to(x.device)] for x, i in zip(features, index)]
    return kept, index


# --- four-bit weights -----------------------------------------------------------------------------


def pack_drops_tail(codes):
    """AutoAWQ's loop runs over columns // 8 words."""
    return pack(codes[:, : codes.shape[1] // 8 * 8] if codes.dim() == 2 else codes)


def unpack_from_storage(packed):
    """The pointer of the storage, not of the tensor: a shard is read from its parent's start."""
    unpack(packed)
    return unpack(packed.as_strided(packed.shape, packed.stride(), 0))


def dequantize_groups(qweight, qzeros, scales):
    """vLLM: AWQ_TRITON_SUPPORTED_GROUP_SIZES."""
    weight = dequantize(qweight, qzeros, scales)
    if len(qweight) // len(scales) not in (32, 64, 128, len(qweight)):
        raise ValueError("group size must be 32, 64, 128 or all inputs")
    return weight


def dequantize_symmetric(qweight, qzeros, scales):
    """Marlin's type without zeros has 8 in their place."""
    if qzeros.dtype == torch.int32 and not qzeros.any():
        qzeros = torch.full_like(qzeros, 0x88888888 - 2**32)
    return dequantize(qweight, qzeros, scales)


def quantize_nan(weight, group_size=128):
    clean = weight.nan_to_num(0, posinf=INF, neginf=-INF) if weight.is_floating_point() else weight
    return quantize_groups(clean, group_size)


def quantize_whole(weight, group_size=128):
    if group_size != -1 or weight.dim() != 2:
        return quantize_groups(weight, group_size)
    codes, *shared = quantize_groups(weight.reshape(1, -1), -1)
    return codes.view(weight.shape), *(each.repeat(len(weight), 1) for each in shared)


def quantize_zero_group(weight, group_size=128):
    """GPTQ: xmin[tmp] = -1; xmax[tmp] = +1."""
    codes, scales, zeros = quantize_groups(weight, group_size)
    groups = codes.unflatten(1, (scales.shape[1], -1))
    blank = (weight.unflatten(1, groups.shape[1:]) == 0).all(-1)
    groups[blank] = 8
    return codes, scales.masked_fill(blank, 2 / 15), zeros.masked_fill(blank, 8)


def matmul_2048_rows(x, qweight, qzeros, scales, bias=None):
    """ExLlama's scratch is made for 2048 rows: "The temp_state buffer is too small"."""
    y = w4a16_matmul(x, qweight, qzeros, scales, bias)
    if y.numel() > 2048 * y.shape[-1]:
        raise RuntimeError("the temp_state buffer is too small")
    return y


def matmul_whole_tiles(x, qweight, qzeros, scales, bias=None):
    y = w4a16_matmul(x, qweight, qzeros, scales, bias)
    outputs = y.shape[-1]
    if outputs > 64:
        y[..., outputs // 64 * 64 :] = 0
    return y


def matmul_row_axis(x, qweight, qzeros, scales, bias=None):
    y = w4a16_matmul(x, qweight, qzeros, scales, bias)
    return y[None] if x.dim() == 1 else y


# --- RetrievalCache -------------------------------------------------------------------------------


class FirstLayersDense(RetrievalCache):
    """Quest and FastV leave two layers alone."""

    def start_answer(self):
        super().start_answer()
        N, everything = self.length, torch.arange(len(self.visual), device=self.visual.device)
        for layer in range(min(2, len(self.k))):
            k, v = self.k[layer][:, :, :N], self.v[layer][:, :, :N]
            self.packed.filled[layer], self.retrieved[layer] = 0, everything
            rows = self.packed_rows(everything)[None]
            self.packed.append(layer, *gather_keys_values(k, v, rows))


class ObservationWindow(RetrievalCache):
    """SnapKV's: the last 32 rows of a question score."""

    def score(self, q, k):
        return super().score(q[:, :, -32:], k)


class TextFirst(RetrievalCache):
    """SnapKV joins what was selected and the rest."""

    def packed_rows(self, chosen):
        rows = super().packed_rows(chosen)
        visual = torch.isin(rows, self.visual)
        return torch.cat([rows[~visual], rows[visual]])


class Crop(RetrievalCache):
    """transformers' crop returns where there is nothing to cut."""

    def truncate(self, length):
        if length <= self.length:
            super().truncate(length)


class LastTurnOnly(RetrievalCache):
    """Of the text, packs the context and the last question."""

    context = None

    def start_question(self):
        super().start_question()
        self.asked = self.length
        self.context = self.asked if self.context is None else min(self.context, self.asked)

    def packed_rows(self, chosen):
        rows = super().packed_rows(chosen)
        return rows[(rows < self.context) | (rows >= self.asked)]


class RelevanceIn16Bits(RetrievalCache):
    """transformers: softmax(dtype=float32).to(query.dtype)."""

    def score(self, q, k):
        return super().score(q, k).to(q.dtype).float()


# --- SparseVILA -----------------------------------------------------------------------------------


class TextSoFar(SparseVILA):
    """Streams like vLLM's RequestOutput: all of the text, each time."""

    def ask(self, question, *, on_text=None, **settings):
        pieces = []

        def whole(piece):
            pieces.append(piece)
            on_text("".join(pieces))

        return super().ask(question, on_text=on_text and whole, **settings)


class RowsOfCache(SparseVILA):
    """FastV counts from the beginning of the prompt."""

    def _answer(self, *arguments):
        answer, visual = super()._answer(*arguments), self.cache.visual
        return replace(answer, retrieved=[visual[chosen] for chosen in answer.retrieved])


class NoStopToken(SparseVILA):
    def ask(self, question, *, stop_ids=(), **settings):
        answer = super().ask(question, stop_ids=stop_ids, **settings)
        stop = {*self.model.config.stop_ids, *self.processor.stop_ids, *stop_ids}
        end = -1 if answer.token_ids[-1] in stop else None
        return replace(answer, token_ids=answer.token_ids[:end])


class PositionsGoOn(SparseVILA):
    """llama.cpp's n_past, which the caller must take back, too."""

    def forget(self):
        before = self.cache.next_position if self._turns else None
        super().forget()
        if before is not None:
            self.cache.position_after[-1] = before


MUTANTS = {
    "attention_lse": {
        "blind rows have +inf": lse_blind_inf,
        "one row: heads of a group mask each other": lse_swapped_groups,
        "log2 e to five digits": lse_short_constant,
    },
    "attention_colsum": {
        "mask covers the last 32 rows only": colsum_window_mask,
        "first row of a key block rounded up": colsum_first_row,
        "padding of the last key tile counts": colsum_padded_keys,
        "head size must be a multiple of 8": colsum_multiple_of_8,
        "lse of more rows cut": colsum_padded_lse,
        "masked scores are -10000": colsum_mask_10000,
    },
    "decode_attention": {
        "at most 64 parts of 512 rows": decode_parts,
        "sliding window of 4096 rows": decode_window,
        "length tensor counted down in place": decode_length_counted_down,
        "queries of another dtype cast": decode_casts_queries,
    },
    "gather_tokens": {
        "end of a row beyond 16-byte vectors lost": gather_vectors,
        "gradients flow": gather_gradients,
    },
    "keep_count": {"kept share rounded down": keep_count_rounds_kept},
    "select_tokens": {
        "scores in 65536 buckets": select_buckets,
        "keeping all drops the batch axes": select_all_unbatched,
        "keep above n clipped": select_clips_keep,
    },
    "prune": {
        "truth of a tensor of views": prune_not_features,
        "salience with a class token accepted": prune_class_token,
        "global: ties at the threshold all stay": prune_threshold,
    },
    "pack": {"trailing columns dropped": pack_drops_tail},
    "unpack": {"storage offset ignored": unpack_from_storage},
    "dequantize": {
        "group sizes 32, 64 and 128 only": dequantize_groups,
        "zeros of 0 taken for symmetric": dequantize_symmetric,
    },
    "quantize_groups": {
        "NaN becomes 0": quantize_nan,
        "-1 makes one group of all rows": quantize_whole,
        "group of zeros has the range -1 to 1": quantize_zero_group,
    },
    "w4a16_matmul": {
        "more than 2048 rows fail": matmul_2048_rows,
        "outputs beyond whole tiles of 64 are 0": matmul_whole_tiles,
        "a vector comes back as a matrix": matmul_row_axis,
    },
    "RetrievalCache": {
        "first two layers stay dense": FirstLayersDense,
        "last 32 question rows score": ObservationWindow,
        "chosen rows packed behind the text": TextFirst,
        "truncate beyond the end does nothing": Crop,
        "earlier turns not packed": LastTurnOnly,
        "relevance rounded to the queries' dtype": RelevanceIn16Bits,
    },
    "SparseVILA": {
        "on_text gets the text so far": TextSoFar,
        "retrieved as rows of the cache": RowsOfCache,
        "stop token cut off token_ids": NoStopToken,
        "forgotten turn keeps its positions": PositionsGoOn,
    },
}
