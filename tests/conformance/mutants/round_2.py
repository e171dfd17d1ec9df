"""Wrong implementations, round 2: their author knew the docstrings and not the checks."""

import math
from fractions import Fraction
from itertools import accumulate

import torch
import torch.nn.functional as F

from awq import dequantize, pack, quantize_groups, unpack, w4a16_matmul
from kernels import (
    _check_heads,
    _score_chunks,
    attention_colsum,
    attention_lse,
    decode_attention,
    gather_tokens,
)
from sparsevila import RetrievalCache, SparseVILA, _Turn, keep_count, prune, select_tokens

# --- attention_lse --------------------------------------------------------------------------------


def lse_blind_rows_see_key_0(q, k, *, causal=False, scale=None):
    """The last key that a row sees is clamped to 0 for safety."""
    lse = attention_lse(q, k, causal=causal, scale=scale)
    if causal and (blind := q.shape[2] - k.shape[2]) > 0:
        lse[:, :, :blind] = attention_lse(q[:, :, :blind], k[:, :, :1], scale=scale)
    return lse


def lse_128_features(q, k, *, causal=False, scale=None):
    """A tile has 128 features, the most of common models; the others are not read."""
    _check_heads(q, k)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return attention_lse(q[..., :128], k[..., :128], causal=causal, scale=scale)


def lse_short_constants(q, k, *, causal=False, scale=None):
    """By powers of 2, with log2(e) = 1.4427 and ln(2) = 0.6931."""
    _check_heads(q, k)
    ln2, scale = math.log(2), q.shape[-1] ** -0.5 if scale is None else scale
    lse = attention_lse(q, k, causal=causal, scale=scale * 1.4427 * ln2)
    return lse * (0.6931 / ln2)


# --- attention_colsum -----------------------------------------------------------------------------


def colsum_rows_twice(q, k, *, causal=False, scale=None, lse=None):
    """The last block of 128 rows is moved up to be whole; its rows are counted twice."""
    sums, M = attention_colsum(q, k, causal=causal, scale=scale, lse=lse), q.shape[2]
    n = k.shape[2] - M % 128 if causal else k.shape[2]
    if M > 128 and M % 128 and n > 0:
        rows = slice(M - 128, M - M % 128)
        given = None if lse is None else lse[:, :, rows]
        q, k = q[:, :, rows], k[:, :, :n]
        sums[..., :n] += attention_colsum(q, k, causal=causal, scale=scale, lse=given)
    return sums


def colsum_shift(q, k, *, causal=False, scale=None, lse=None):
    """The key head of query head h is h >> bits, as for groups of 2, 4 or 8 heads."""
    _check_heads(q, k)
    H, G = q.shape[1], k.shape[1]
    if H % G == 0 and (H // G) & (H // G - 1):
        k = k[:, torch.arange(H, device=k.device) >> (H // G).bit_length()]
    return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


def colsum_last_rows_blind(q, k, *, causal=False, scale=None, lse=None):
    """With more rows than keys, the rows beyond N are left out, not the first M - N."""
    _check_heads(q, k)
    if causal and q.shape[2] > k.shape[2]:
        q, lse = q[:, :, : k.shape[2]], None if lse is None else lse[:, :, : k.shape[2]]
    return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


def colsum_minus_10000(q, k, *, causal=False, scale=None, lse=None):
    """The mask adds -10,000, as in BERT."""
    if lse is not None or not causal:
        return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    _check_heads(q, k)
    M, N = q.shape[2], k.shape[2]
    sums = q.new_zeros(*q.shape[:2], N, dtype=torch.float32)
    for b, rows, scores in _score_chunks(q, k, False, scale):
        last = torch.arange(M, device=q.device)[rows, None] + N - M
        hidden = torch.arange(N, device=q.device) > last
        sums[b] += ((scores - 1e4 * hidden).softmax(-1) * (last >= 0)).sum(-2).flatten(0, 1)
    return sums


def colsum_any_lse(q, k, *, causal=False, scale=None, lse=None):
    lse = None if lse is None else lse.float()
    return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


def colsum_no_offset(q, k, *, causal=False, scale=None, lse=None):
    """For the 64 keys from n0 on, rows are walked from n0 on, not from n0 - (N - M)."""
    _check_heads(q, k)
    M, N = q.shape[2], k.shape[2]
    if not causal or M >= N:
        return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    lse, sums = attention_lse(q, k, causal=True, scale=scale) if lse is None else lse, 0
    for start in range(0, M, 64):
        rows, n = slice(start, start + 64), N - M + min(start + 64, M)
        q_rows, keys = q[:, :, rows], k[:, :, :n]
        part = attention_colsum(q_rows, keys, causal=True, scale=scale, lse=lse[:, :, rows])
        sums = sums + F.pad(part[..., : start + 64], (0, N - min(n, start + 64)))
    return sums


# --- decode_attention -----------------------------------------------------------------------------


def decode_float32(q, k, v, *, length=None, scale=None):
    return decode_attention(q, k, v, length=length, scale=scale).float()


def decode_many_rows(q, k, v, *, length=None, scale=None):
    _check_heads(q, k)
    rows = (decode_attention(row, k, v, length=length, scale=scale) for row in q.split(1, 2))
    return torch.cat(list(rows), 2)


def decode_int64_only(q, k, v, *, length=None, scale=None):
    if isinstance(length, torch.Tensor) and length.dtype != torch.int64:
        raise ValueError(f"length must be int64, got {length.dtype}")
    return decode_attention(q, k, v, length=length, scale=scale)


def decode_fraction(q, k, v, *, length=None, scale=None):
    length = int(length) if isinstance(length, float) else length
    return decode_attention(q, k, v, length=length, scale=scale)


# --- gather_tokens --------------------------------------------------------------------------------


def gather_gradients(x, index):
    out = gather_tokens(x, index)
    if x.requires_grad:
        out = torch.stack([each.index_select(-2, chosen) for each, chosen in zip(x, index)])
    return out


def gather_index_error(x, index):
    """What is out of range is left to PyTorch, which raises an IndexError."""
    try:
        return gather_tokens(x, index)
    except ValueError as error:
        raise (IndexError if "must lie in" in str(error) else ValueError)(str(error)) from None


# --- keep_count, select_tokens, prune -------------------------------------------------------------


def keep_thousandths(n, sparsity):
    """The decimal is made a fraction with a denominator of up to 1000."""
    keep_count(n, sparsity)
    share = Fraction(str(+sparsity)).limit_denominator(1000)
    return max(n - int(share * n), min(n, 1))


def select_again(scores, keep):
    """argmax in a loop, what was taken is set to -inf; then index 0 is the first maximum."""
    index = select_tokens(scores, keep)
    return index.masked_fill(scores.gather(-1, index) == -torch.inf, 0).sort(-1).values


def select_all_unchecked(scores, keep):
    """If all are kept, the scores are not looked at."""
    if scores.dim() and type(keep) is int and keep == scores.shape[-1]:
        return torch.arange(keep, device=scores.device).expand(scores.shape).clone()
    return select_tokens(scores, keep)


def select_by_numpy(scores, keep):
    """numpy sorts; it knows no bfloat16, and takes no tensor with gradients."""
    return select_tokens(torch.from_numpy(scores.numpy()), keep)


def prune_flat_index(features, salience, sparsity, *, scope="frame"):
    kept, index = prune(features, salience, sparsity, scope=scope)
    if scope == "global":
        starts = accumulate(map(len, salience), initial=0)
        index = [i + start for i, start in zip(index, starts)]
    return kept, index


def prune_list_only(features, salience, sparsity, *, scope="frame"):
    """`not features` is ambiguous for a tensor."""
    if not features:
        raise ValueError("there must be views")
    return prune(features, salience, sparsity, scope=scope)


def prune_long_salience(features, salience, sparsity, *, scope="frame"):
    """As when a class token was left in: what is beyond the features is cut off."""
    if len(features) == len(salience):
        salience = [s[: len(x)] for x, s in zip(features, salience)]
    return prune(features, salience, sparsity, scope=scope)


# --- pack, unpack, dequantize, quantize_groups, w4a16_matmul --------------------------------------


def pack_padded(codes):
    return pack(F.pad(codes, (0, -codes.shape[-1] % 8)))


def unpack_any_integer(packed):
    return unpack(packed if packed.is_floating_point() else packed.int())


def dequantize_truncated(qweight, qzeros, scales):
    """The product is cut to float16, towards 0."""
    W, group = dequantize(qweight, qzeros, scales), len(qweight) // len(scales)
    each = (t.repeat_interleave(group, 0).float() for t in (unpack(qzeros), scales))
    exact = unpack(qweight).float().sub(next(each)).mul(next(each))
    return (W.view(torch.int16) - (W.abs() > exact.abs()).short()).view(torch.float16)


def dequantize_short_group(qweight, qzeros, scales):
    """The last group may have fewer inputs than the others."""
    missing = -len(qweight) % max(1, len(scales)) if qweight.dim() == 2 else 0
    rows = F.pad(qweight, (0, 0, 0, missing)) if missing else qweight
    return dequantize(rows, qzeros, scales)[: len(qweight)]


def quantize_whole_matrix(weight, group_size=128):
    if group_size != -1 or weight.dim() != 2:
        return quantize_groups(weight, group_size)
    codes, scales, zeros = quantize_groups(weight.reshape(1, -1), -1)
    return codes.view(weight.shape), *(t.repeat(len(weight), 1) for t in (scales, zeros))


def quantize_empty_range(weight, group_size=128):
    """GPTQ gives a group of zeros the range -1 .. 1."""
    codes, scales, zeros = quantize_groups(weight, group_size)
    groups = codes.unflatten(1, (scales.shape[1], -1))
    empty = (weight.unflatten(1, (scales.shape[1], -1)) == 0).all(-1)
    groups[empty], scales[empty], zeros[empty] = 8, 2 / 15, 8
    return codes, scales, zeros


def quantize_narrow(weight, group_size=128):
    """As many inputs as there are, if they are fewer than group_size."""
    return quantize_groups(weight, min(group_size, weight.shape[-1]))


def matmul_one_axis(x, qweight, qzeros, scales, bias=None):
    return w4a16_matmul(x[None] if x.dim() == 1 else x, qweight, qzeros, scales, bias)


def matmul_no_rest(x, qweight, qzeros, scales, bias=None):
    """Inputs are walked in whole tiles of 128."""
    if len(qweight) > 128 and len(qweight) % 128 and x.shape[-1:] == qweight.shape[:1]:
        x = F.pad(x[..., : -(len(qweight) % 128)], (0, len(qweight) % 128))
    return w4a16_matmul(x, qweight, qzeros, scales, bias)


def matmul_any_bias(x, qweight, qzeros, scales, bias=None):
    return w4a16_matmul(x, qweight, qzeros, scales, None if bias is None else bias.to(x.dtype))


# --- RetrievalCache -------------------------------------------------------------------------------


class RetrievedRows(RetrievalCache):
    """`retrieved` has rows of the cache, not which of the V tokens."""

    def start_answer(self):
        super().start_answer()
        self.retrieved = [self.visual[chosen] for chosen in self.retrieved]


class NarrowRelevance(RetrievalCache):
    def score(self, q, k):
        return super().score(q, k).to(k.dtype)


class TextFirst(RetrievalCache):
    def packed_rows(self, chosen):
        rows = super().packed_rows(chosen)
        visual = torch.isin(rows, self.visual)
        return torch.cat([rows[~visual], rows[visual]])


class TruncateBeforeCheck(RetrievalCache):
    """A refused `truncate` has ended the answer already."""

    def truncate(self, length):
        self.packed, self.scoring = None, False
        super().truncate(length)


class RelevanceFreed(RetrievalCache):
    """What was selected by is given back."""

    def start_answer(self):
        super().start_answer()
        self.relevance = []


# --- SparseVILA -----------------------------------------------------------------------------------


class PiecesStripped(SparseVILA):
    """Every piece is decoded by itself and loses its leading white space."""

    def ask(self, question, *, on_text=None, **rest):
        def piece(text):
            if text.lstrip():
                on_text(text.lstrip())

        return super().ask(question, on_text=on_text and piece, **rest)


class AnswerInBytes(SparseVILA):
    """kv_bytes_per_token is read off the buffer when the answer has been generated."""

    def _answer(self, text, tokens, rows_read, timings):
        return super()._answer(text, tokens, rows_read + len(tokens) - 1, timings)


class NeverFirstAgain(SparseVILA):
    """Once a question was asked, all others get the prompt of a later turn."""

    def forget(self):
        turns = self._turns
        super().forget()
        if turns and not self._turns:
            self._turns = [_Turn(turns[0].start, [])]


class AnswerCut(SparseVILA):
    """max_new_tokens is lowered to what the context has room for."""

    def ask(self, question, *, max_new_tokens=128, **rest):
        whole = isinstance(question, str) and isinstance(max_new_tokens, int)
        if self.cache is not None and whole:
            first, text = not self._turns, question.strip()
            taken = len(self.processor.question(text, first=first, views=self.views)) - 1
            taken += self.cache.next_position + (0 if first else len(self._turns[-1].unread))
            room = max(1, self.model.config.text.max_positions - taken)
            max_new_tokens = min(max_new_tokens, room)
        return super().ask(question, max_new_tokens=max_new_tokens, **rest)


MUTANTS = {
    "attention_lse": {
        "blind rows see the first key": lse_blind_rows_see_key_0,
        "features beyond 128 not read": lse_128_features,
        "log2(e) and ln(2) of four digits": lse_short_constants,
    },
    "attention_colsum": {
        "last block moved up, rows twice": colsum_rows_twice,
        "key head by a bit shift": colsum_shift,
        "last rows blind in place of the first": colsum_last_rows_blind,
        "mask adds -10000": colsum_minus_10000,
        "lse of another dtype accepted": colsum_any_lse,
        "row loop starts without the offset N - M": colsum_no_offset,
    },
    "decode_attention": {
        "result left in float32": decode_float32,
        "several query rows accepted": decode_many_rows,
        "length tensor of int32 refused": decode_int64_only,
        "fraction of the length cut off": decode_fraction,
    },
    "gather_tokens": {
        "gradients flow": gather_gradients,
        "IndexError in place of ValueError": gather_index_error,
    },
    "keep_count": {"denominators up to 1000": keep_thousandths},
    "select_tokens": {
        "-inf marks the taken, index 0 again": select_again,
        "NaN unnoticed when all are kept": select_all_unchecked,
        "sorted by numpy, no bfloat16": select_by_numpy,
    },
    "prune": {
        "global index counts through all views": prune_flat_index,
        "tensor of features refused": prune_list_only,
        "salience that is too long cut": prune_long_salience,
    },
    "pack": {"columns padded to eight": pack_padded},
    "unpack": {"words of any integer dtype": unpack_any_integer},
    "dequantize": {
        "product truncated": dequantize_truncated,
        "incomplete last group accepted": dequantize_short_group,
    },
    "quantize_groups": {
        "-1 is the whole matrix": quantize_whole_matrix,
        "group of zeros gets the range -1 .. 1": quantize_empty_range,
        "group larger than the inputs accepted": quantize_narrow,
    },
    "w4a16_matmul": {
        "x of one axis comes back with two": matmul_one_axis,
        "inputs beyond whole tiles left out": matmul_no_rest,
        "bias of another dtype cast": matmul_any_bias,
    },
    "RetrievalCache": {
        "retrieved are rows of the cache": RetrievedRows,
        "relevance in the keys' dtype": NarrowRelevance,
        "text packed before the visual rows": TextFirst,
        "refused truncate ends the answer": TruncateBeforeCheck,
        "relevance gone after packing": RelevanceFreed,
    },
    "SparseVILA": {
        "pieces lose their leading space": PiecesStripped,
        "generated tokens in kv_bytes_per_token": AnswerInBytes,
        "after forget the prompt of a later turn": NeverFirstAgain,
        "answer cut where it does not fit": AnswerCut,
    },
}
