"""Wrong implementations, round 6: their author knew the docstrings and not the checks."""

from fractions import Fraction
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from awq import _check_packed, dequantize, pack, quantize_groups, unpack, w4a16_matmul
from kernels import (
    LOG2_E,
    _check_heads,
    _check_index,
    _check_length,
    _score_chunks,
    attention_colsum,
    attention_lse,
    decode_attention,
    gather_tokens,
)
from sparsevila import RetrievalCache, SparseVILA, keep_count, prune, select_tokens

# --- attention_lse --------------------------------------------------------------------------------


def lse_offset_of_padded_rows(q, k, *, causal=False, scale=None):
    """The mask is aligned by the rows as tiles have them, rounded up to 16."""
    _check_heads(q, k)
    M = q.shape[2]
    rows = F.pad(q, (0, 0, 0, -M % 16)) if causal else q
    return attention_lse(rows, k, causal=causal, scale=scale)[:, :, :M].contiguous()


def lse_parts_joined_in_another_base(q, k, *, causal=False, scale=None):
    """Parts of 2048 keys have logarithms of base 2, which are joined by powers of e."""
    _check_heads(q, k)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    for b, rows, scores in _score_chunks(q, k, causal, scale):
        parts = torch.stack([part.logsumexp(-1) for part in scores.split(2048, -1)]) * LOG2_E
        lse[b, :, rows] = parts.logsumexp(0).flatten(0, 1) / LOG2_E
    return lse


def lse_zero_keys_are_padding(q, k, *, causal=False, scale=None):
    """Keys of zeros are taken for padding and hidden."""
    _check_heads(q, k)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    padding = (k == 0).all(-1)[:, :, None, None]
    for b, rows, scores in _score_chunks(q, k, causal, scale):
        scores.masked_fill_(padding[b, ..., : scores.shape[-1]], -torch.inf)
        lse[b, :, rows] = scores.logsumexp(-1).flatten(0, 1)
    return lse


# --- attention_colsum -----------------------------------------------------------------------------


def colsum_not_cleared_between_heads(q, k, *, causal=False, scale=None, lse=None):
    """The loop over a group's heads starts with the sums of the head before."""
    sums = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    return sums.unflatten(1, (k.shape[1], -1)).cumsum(2).flatten(1, 2)


def colsum_lse_from_row_0(q, k, *, causal=False, scale=None, lse=None):
    """A block of 64 keys walks the rows that see it, but reads lse from the first row on."""
    sums = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    M, N = q.shape[2], k.shape[2]
    lse = attention_lse(q, k, causal=causal, scale=scale) if lse is None else lse
    for n in range(0, N if causal else 0, 64):
        if (first := n - (N - M)) > 0:
            rows, keys, read = q[:, :, first:], k[:, :, n:], lse[:, :, : M - first]
            part = attention_colsum(rows, keys, causal=True, scale=scale, lse=read)
            sums[..., n : n + 64] = part[..., :64]
    return sums


def colsum_by_rows_that_see(q, k, *, causal=False, scale=None, lse=None):
    """Late keys are made up for the rows that do not see them."""
    sums = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    M, N = q.shape[2], k.shape[2]
    seen = M - (torch.arange(N, device=q.device) - (N - M)).clamp(min=0)
    return sums * (M / seen) if causal else sums


def colsum_past_and_rows_apart(q, k, *, causal=False, scale=None, lse=None):
    """The keys before the rows and the rows' own keys get a softmax each."""
    _check_heads(q, k)
    past = k.shape[2] - q.shape[2]
    if not causal or lse is not None or past <= 0:
        return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    before = attention_colsum(q, k[:, :, :past], scale=scale)
    return torch.cat([before, attention_colsum(q, k[:, :, past:], causal=True, scale=scale)], 2)


def colsum_mean_of_group(q, k, *, causal=False, scale=None, lse=None):
    """All heads of a group get the group's mean."""
    sums = attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    groups = sums.unflatten(1, (k.shape[1], -1))
    return groups.mean(2, keepdim=True).expand_as(groups).flatten(1, 2)


def colsum_blind_in_one_head(q, k, *, causal=False, scale=None, lse=None):
    """A row that has only scores of -inf in one head adds nothing in the others either."""
    attention_colsum(q, k, causal=causal, scale=scale, lse=lse)
    lse = attention_lse(q, k, causal=causal, scale=scale) if lse is None else lse
    blind = (lse == -torch.inf).any(1, keepdim=True)
    lse = lse.masked_fill(blind, torch.inf)
    return attention_colsum(q, k, causal=causal, scale=scale, lse=lse)


# --- decode_attention -----------------------------------------------------------------------------


def decode_rest_of_parts_unread(q, k, v, *, length=None, scale=None):
    """From 1024 rows on, eight parts of length // 8 rows."""
    _check_heads(q, k)
    length = _check_length(length, k)
    rows = length if length < 1024 else length // 8 * 8
    return decode_attention(q, k, v, length=rows, scale=scale)


def decode_full_ring_is_empty(q, k, v, *, length=None, scale=None):
    """Rows in use = length modulo capacity, as in a ring buffer."""
    right = decode_attention(q, k, v, length=length, scale=scale)
    full = length is not None and int(length) % k.shape[2] == 0
    return torch.zeros_like(right) if full else right


def decode_length_rounded_in_its_dtype(q, k, v, *, length=None, scale=None):
    """Blocks of 16 rows, (length + 15) // 16, wrap in a tensor of 8 or 16 bits."""
    _check_heads(q, k)
    rows = _check_length(length, k)
    if isinstance(length, Tensor):
        rows = max(1, min(rows, int((length + 15) // 16) * 16))
    return decode_attention(q, k, v, length=rows, scale=scale)


def decode_parts_weighted_by_last_entry(q, k, v, *, length=None, scale=None):
    """The weights of parts of 1024 rows have no room for a batch: the last entry's are left."""
    right = decode_attention(q, k, v, length=length, scale=scale)
    n = _check_length(length, k)
    if n <= 1024:
        return right
    query, at = q.float(), [slice(a, min(a + 1024, n)) for a in range(0, n, 1024)]
    k, v = k.float(), v.float()
    parts = torch.stack([decode_attention(query, k[:, :, p], v[:, :, p], scale=scale) for p in at])
    lse = torch.stack([attention_lse(query, k[:, :, p], scale=scale) for p in at])
    return (parts * lse.softmax(0)[:, -1:, ..., None]).sum(0).to(q.dtype)


# --- gather_tokens --------------------------------------------------------------------------------


def gather_index_taken_for_contiguous(x, index):
    """The strides of the index are ignored."""
    _check_index(x, index)
    return gather_tokens(x, index.as_strided(index.shape, (index.shape[1], 1)))


def gather_index_moved_in_place(x, index):
    """One list of all entries' rows; the index is made to count through it, in place."""
    _check_index(x, index)
    B, N = x.shape[0], x.shape[-2]
    rows = index.add_(N * torch.arange(B, device=x.device)[:, None])
    return x.detach().movedim(-2, 1).flatten(0, 1)[rows].movedim(1, -2).contiguous()


# --- keep_count, select_tokens, prune -------------------------------------------------------------


def keep_nearest(n, sparsity):
    """The number of dropped tokens is rounded to the nearest."""
    keep_count(n, sparsity)
    dropped = round(Fraction(str(+sparsity)).limit_denominator(10**9) * n)
    return max(n - dropped, min(n, 1))


def select_infinity_is_largest_number(scores, keep):
    return select_tokens(scores.nan_to_num(nan=torch.nan), keep)


def select_second_axis(scores, keep):
    """A mask's nonzero()[:, 1] is the token, where scores have two axes."""
    index = select_tokens(scores, keep)
    if scores.dim() == 1:
        return index
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)
    return mask.nonzero()[:, 1].reshape(index.shape)


def select_ties_counted_in_dtype(scores, keep):
    """Which of the equal scores stay is counted in the scores' dtype."""
    index = select_tokens(scores, keep)
    if index.numel() == 0:
        return index
    least = scores.gather(-1, index).amin(-1, keepdim=True)
    above, ties = scores > least, scores == least
    missing = keep - above.sum(-1, keepdim=True)
    stays = above | ties & (ties.to(scores.dtype).cumsum(-1) <= missing)
    return stays.nonzero()[:, -1].view(index.shape)


def prune_fractions_carried_over(features, salience, sparsity, *, scope="frame"):
    """What a view's count was rounded by goes to the next view, so that the total fits."""
    kept, index = prune(features, salience, sparsity, scope=scope)
    if scope == "frame":
        ends = [keep_count(end, sparsity) for end in accumulate(map(len, features))]
        counts = [stop - start for start, stop in pairwise([0, *ends])]
        index = [select_tokens(s.cpu(), count) for s, count in zip(salience, counts)]
        kept = [x[i.to(x.device)] for x, i in zip(features, index)]
    return kept, index


def prune_views_of_the_first_size(features, salience, sparsity, *, scope="frame"):
    """Global: view and token are quotient and remainder by the first view's size."""
    kept, index = prune(features, salience, sparsity, scope=scope)
    if scope == "global":
        n, every = len(features[0]), torch.cat(list(salience)).cpu()
        flat = select_tokens(every, keep_count(len(every), sparsity))
        index = [flat[flat // n == view] % n for view in range(len(features))]
        kept = [x[i.to(x.device)] for x, i in zip(features, index)]
    return kept, index


def prune_views_by_name(features, salience, sparsity, *, scope="frame"):
    """Views are collected under their names, and 10 comes before 2."""
    kept, index = prune(features, salience, sparsity, scope=scope)
    order = sorted(range(len(kept)), key=str)
    return [kept[view] for view in order], [index[view] for view in order]


# --- awq ------------------------------------------------------------------------------------------

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's; its inverse is [0, 4, 1, 5, 2, 6, 3, 7]


def pack_two_words_at_a_time(codes):
    """The last of an odd number of words (from three on) is left 0."""
    words = pack(codes)
    if words.shape[1] > 1:
        words[:, words.shape[1] // 2 * 2 :] = 0
    return words


def unpack_by_the_order_itself(packed):
    """Where the inverse of the order is needed."""
    unpack(packed)
    nibbles = packed[..., None] >> 4 * torch.arange(8, dtype=torch.int32) & 0xF
    return nibbles[..., ORDER].to(torch.int8).flatten(1)


def dequantize_groups_anew_every_4096(qweight, qzeros, scales):
    """Blocks of 4096 inputs, each of which begins with the first group."""
    right, inputs = dequantize(qweight, qzeros, scales), len(qweight)
    if inputs <= 4096:
        return right
    group = torch.arange(inputs) % 4096 // (inputs // len(scales))
    return (unpack(qweight) - unpack(qzeros)[group]) * scales[group]


def dequantize_zeros_of_first_tile(qweight, qzeros, scales):
    """Every tile of 64 columns reads the zeros of the first."""
    _check_packed(qweight, qzeros, scales)
    return dequantize(qweight, qzeros[:, torch.arange(qzeros.shape[1]) % 8], scales)


def codes_of(weight, scales, zeros):
    """quantize_groups' last line."""
    w = weight.detach().float().unflatten(1, (scales.shape[1], -1))
    codes = (w / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, 15).flatten(1).to(torch.int8)


def quantize_strided_groups(weight, group_size=128):
    """A group's inputs lie inputs / g apart."""
    g = weight.shape[1] // quantize_groups(weight, group_size)[1].shape[1]
    codes, scales, zeros = quantize_groups(weight.unflatten(1, (g, -1)).mT.flatten(1), g)
    return codes.unflatten(1, (-1, g)).mT.flatten(1), scales, zeros


def quantize_range_in_float16(weight, group_size=128):
    """The range is rounded to float16, then divided by 15."""
    _, scales, _ = quantize_groups(weight, group_size)
    w = weight.detach().float().unflatten(1, (scales.shape[1], -1))
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scales = ((high - low).half().float().clamp(min=1e-5) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15).to(torch.int8)
    return codes_of(weight, scales, zeros), scales, zeros


def quantize_zero_at_least_1(weight, group_size=128):
    """As GPTQ's files need it, which store zero - 1."""
    _, scales, zeros = quantize_groups(weight, group_size)
    zeros = zeros.clamp(min=1)
    return codes_of(weight, scales, zeros), scales, zeros


def matmul_sums_of_first_row(x, qweight, qzeros, scales, bias=None):
    """x @ (codes - 8) is corrected by the sums of x, of which only the first row's are made."""
    y = w4a16_matmul(x, qweight, qzeros, scales, bias)
    sums = x.float().reshape(-1, len(scales), len(qweight) // len(scales)).sum(-1)
    offsets = (8 - unpack(qzeros).float()) * scales.float()
    return y + ((sums[:1] - sums) @ offsets).view(y.shape).to(y.dtype)


def matmul_one_row_stride(x, qweight, qzeros, scales, bias=None):
    """The rows of all leading axes are taken to lie as far apart as those of the last."""
    y = w4a16_matmul(x, qweight, qzeros, scales, bias)
    if x.dim() < 3:
        return y
    rows = x.as_strided((x.shape[:-1].numel(), x.shape[-1]), x.stride()[-2:])
    return w4a16_matmul(rows, qweight, qzeros, scales, bias).view(y.shape)


def matmul_next_scale_every_32(x, qweight, qzeros, scales, bias=None):
    """Scales and zeros move on with every tile of 32 inputs, not with the group."""
    inputs, _, group = _check_packed(qweight, qzeros, scales)
    if group > 32 and inputs % 32 == 0:
        at = torch.arange(inputs // 32).clamp(max=len(scales) - 1)
        qzeros, scales = qzeros[at], scales[at]
    return w4a16_matmul(x, qweight, qzeros, scales, bias)


# --- RetrievalCache -------------------------------------------------------------------------------


class LaterQuestionReadsPacked(RetrievalCache):
    """A later question attends to the rows that the last answer was decoded from."""

    before = None

    def start_question(self):
        self.before = self.packed
        super().start_question()

    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        return self.before.attend(layer, q, k, v) if self.before and self.scoring else out

    def truncate(self, length):
        super().truncate(length)
        self.before = None


class AnswerRowUnseenByItself(RetrievalCache):
    """The packed buffer is read first, then the row is appended."""

    def attend(self, layer, q, k, v):
        packed = self.packed
        if packed is None or q.shape[2] > 1:
            return super().attend(layer, q, k, v)
        rows = packed.filled[layer]
        out = decode_attention(q, packed.k[layer], packed.v[layer], length=rows)
        self.append(layer, k, v)
        packed.append(layer, k, v)
        return out


class LastRetrievedStay(RetrievalCache):
    """What the last question retrieved is packed with what this one retrieves."""

    def start_answer(self):
        self.earlier = iter(self.retrieved or [self.visual[:0]] * len(self.k))
        super().start_answer()

    def packed_rows(self, chosen):
        earlier = next(self.earlier)
        earlier = earlier[earlier < len(self.visual)]
        return super().packed_rows(torch.cat([chosen, earlier]).unique())


class ScoredBeforeAppended(RetrievalCache):
    """The softmax of the relevance lacks the question's own rows."""

    def score(self, q, k):
        _, H, M, _ = q.shape
        if k.shape[2] == M:
            return super().score(q, k)
        return attention_colsum(q, k[:, :, :-M])[0].sum(0)[self.visual] / (H * M)


class NeighboursPooled(RetrievalCache):
    """SnapKV's pooling over five neighbours comes before the choice."""

    def start_answer(self):
        relevance = self.relevance
        try:
            self.relevance = [F.max_pool1d(r[None], 5, 1, 2)[0] if len(r) else r for r in relevance]
            super().start_answer()
        finally:
            self.relevance = relevance


class RelevanceTimesValue(RetrievalCache):
    """Relevance is multiplied by the size of the values, which "also matter"."""

    def attend(self, layer, q, k, v):
        out = super().attend(layer, q, k, v)
        if self.scoring:
            values = self.v[layer][0][:, self.visual].float()
            self.relevance[-1] = self.relevance[-1] * values.norm(dim=-1).mean(0)
        return out


# --- SparseVILA -----------------------------------------------------------------------------------


class ForgetsAllTurns(SparseVILA):
    def forget(self):
        self._check_idle()
        self._turns = self._turns[:1]
        super().forget()


class EvictsAtNextQuestion(SparseVILA):
    """Evaluation: a turn stays until the next question."""

    def ask(self, question, **options):
        if (protocol := self.protocol) == "evaluation":
            self.forget()
        try:
            self.protocol = "conversation"
            return super().ask(question, **options)
        finally:
            self.protocol = protocol


class LastPieceHeldBack(SparseVILA):
    """A piece of text is handed over when the next comes."""

    def ask(self, question, *, on_text=None, **options):
        held = []

        def later(piece):
            if held:
                on_text(held.pop())
            held.append(piece)

        return super().ask(question, on_text=on_text and later, **options)


class PictureShrunkInPlace(SparseVILA):
    """Pictures above 1024 pixels are made thumbnails, which PIL does in place."""

    def see(self, images, *, fps=None):
        self._check_idle()
        for image in images if isinstance(images, (list, tuple)) else [images]:
            if isinstance(image, Image.Image):
                image.thumbnail((1024, 1024))
        super().see(images, fps=fps)


MUTANTS = {
    "attention_lse": {
        "mask's offset counts padded rows": lse_offset_of_padded_rows,
        "base-2 parts joined by powers of e": lse_parts_joined_in_another_base,
        "keys of zeros taken for padding": lse_zero_keys_are_padding,
    },
    "attention_colsum": {
        "accumulator goes on from head to head": colsum_not_cleared_between_heads,
        "lse from row 0 in later key blocks": colsum_lse_from_row_0,
        "late keys made up for rows that miss them": colsum_by_rows_that_see,
        "past and own keys normalised apart": colsum_past_and_rows_apart,
        "heads get their group's mean": colsum_mean_of_group,
        "blind in one head, blind in all": colsum_blind_in_one_head,
    },
    "decode_attention": {
        "rest that eight parts leave unread": decode_rest_of_parts_unread,
        "full ring buffer taken for empty": decode_full_ring_is_empty,
        "length rounded up in its own dtype": decode_length_rounded_in_its_dtype,
        "parts weighted by the last entry's lse": decode_parts_weighted_by_last_entry,
    },
    "gather_tokens": {
        "strides of the index ignored": gather_index_taken_for_contiguous,
        "index of a batch moved in place": gather_index_moved_in_place,
    },
    "keep_count": {"dropped rounded to the nearest": keep_nearest},
    "select_tokens": {
        "infinity as the largest number": select_infinity_is_largest_number,
        "second axis taken for the last": select_second_axis,
        "ties counted in the scores' dtype": select_ties_counted_in_dtype,
    },
    "prune": {
        "fractions carried from view to view": prune_fractions_carried_over,
        "global: all views of the first's size": prune_views_of_the_first_size,
        "view 10 before view 2": prune_views_by_name,
    },
    "pack": {"two words at a time": pack_two_words_at_a_time},
    "unpack": {"order in place of its inverse": unpack_by_the_order_itself},
    "dequantize": {
        "groups begin anew every 4096 inputs": dequantize_groups_anew_every_4096,
        "zeros of the first 64 columns for all": dequantize_zeros_of_first_tile,
    },
    "quantize_groups": {
        "inputs of a group lie apart": quantize_strided_groups,
        "range rounded to float16 first": quantize_range_in_float16,
        "zero at least 1": quantize_zero_at_least_1,
    },
    "w4a16_matmul": {
        "zeros corrected by the first row's sums": matmul_sums_of_first_row,
        "one row stride for all leading axes": matmul_one_row_stride,
        "next scale after every 32 inputs": matmul_next_scale_every_32,
    },
    "RetrievalCache": {
        "later question reads the packed buffer": LaterQuestionReadsPacked,
        "answer row does not see itself": AnswerRowUnseenByItself,
        "rows of the last answer stay packed": LastRetrievedStay,
        "scored before the question is appended": ScoredBeforeAppended,
        "relevance pooled over neighbours": NeighboursPooled,
        "relevance times the values' norm": RelevanceTimesValue,
    },
    "SparseVILA": {
        "forget evicts all turns": ForgetsAllTurns,
        "evicted only at the next question": EvictsAtNextQuestion,
        "last piece of text not handed over": LastPieceHeldBack,
        "caller's picture shrunk in place": PictureShrunkInPlace,
    },
}


def packed(inputs, outputs, groups, seed=0):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (inputs, outputs), generator=draw)
    zeros = torch.randint(16, (groups, outputs), generator=draw)
    scales = (torch.rand(groups, outputs, generator=draw) + 0.5).half()
    at = torch.arange(inputs) // (inputs // groups)
    return (pack(codes), pack(zeros), scales), (codes - zeros[at]).double() * scales[at].double()
