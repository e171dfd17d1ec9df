"""The four array operations SparseVILA is made of, each as the few lines of PyTorch that define it.

    attention_lse      log of the softmax denominator, one number per query row
    attention_colsum   how much attention every key receives: the column sums of the softmax matrix
    gather_tokens      copy chosen rows together: used by pruning and by packing
    decode_attention   one query against the first rows of a cache buffer

`attention_colsum` is the operation the method rests on: pruning reads it off the vision tower,
retrieval off every decoder layer. The softmax matrix A (M x N) is never stored. A first pass over
the scores leaves each row's log-sum-exp, a second pass adds exp(score - lse) into the columns; both
walk the rows in chunks, so that beside a float32 copy of k only two blocks of scores are held, each
of `CHUNK_BYTES` (or one query row per head, if that is more).

For every operation `<name>` there is a `<name>_reference`, the plain PyTorch definition. `<name>`
checks its arguments, then dispatches: to a fused kernel where this file has one for the device, to
the reference everywhere else. (The fused Triton kernels are not here yet; every device runs the
reference.)

Axes: B batch, H query heads, G key/value heads (G divides H: query head h reads key head h // (H /
G)), M query rows, N key columns, D head size, E hidden size, K gathered rows. The method and the
streaming scheme: SparseVILA (arXiv 2510.17777), Algorithm 2.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # a block of float32 scores; a pass holds two


# --- attention_lse and attention_colsum -----------------------------------------------------------


def _score_chunks(
    q: Tensor, k: Tensor, causal: bool, scale: float | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, scores), scores (B, G, H/G, m, n) float32 of m query rows against the first n
    keys.

    Causal is right-aligned: row i sees keys 0 .. N - M + i. Keys that a whole chunk cannot see are
    left out (n < N); within the chunk they are -inf.
    """
    B, H, M, D = q.shape
    G, N = k.shape[1], k.shape[2]
    q = q.unflatten(1, (G, H // G))  # (B, G, H/G, M, D): the heads of a group side by side
    keys = k.float().mT  # (B, G, D, N): one copy per group, not one per query head
    step = max(1, CHUNK_BYTES // (4 * B * H * N))
    for start in range(0, M, step):
        stop = min(start + step, M)
        n = max(1, N - M + stop) if causal else N
        rows = q[..., start:stop, :].float().flatten(2, 3)  # (B, G, H/G * m, D)
        scores = (rows @ keys[..., :n]).unflatten(2, (H // G, stop - start))
        scores *= D**-0.5 if scale is None else scale
        if causal:
            last = torch.arange(start, stop, device=q.device)[:, None] + (N - M)
            scores.masked_fill_(torch.arange(n, device=q.device) > last, float("-inf"))
        yield slice(start, stop), scores


def attention_lse_reference(
    q: Tensor, k: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """`attention_lse` in plain PyTorch: float32 arithmetic, query rows in chunks."""
    B, H, M, _ = q.shape
    lse = q.new_empty(B, H, M, dtype=torch.float32)
    for rows, scores in _score_chunks(q, k, causal, scale):
        lse[:, :, rows] = scores.logsumexp(-1).flatten(1, 2)
    return lse


def attention_colsum_reference(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """`attention_colsum` in plain PyTorch: float32 arithmetic, query rows in chunks."""
    B, H, _, _ = q.shape
    G, N = k.shape[1], k.shape[2]
    if lse is None:
        lse = attention_lse_reference(q, k, causal=causal, scale=scale)
    # A row that sees no key has lse = -inf and only -inf scores; the clamp makes its weights 0, not
    # NaN.
    lse = lse.unflatten(1, (G, H // G)).unsqueeze(-1).clamp(min=torch.finfo(torch.float32).min)
    colsum = q.new_zeros(B, G, H // G, N, dtype=torch.float32)
    for rows, scores in _score_chunks(q, k, causal, scale):
        weights = scores.sub_(lse[..., rows, :]).exp_()  # (B, G, H/G, m, n): rows of the softmax
        colsum[..., : weights.shape[-1]] += weights.sum(-2)
    return colsum.flatten(1, 2)


def attention_lse(
    q: Tensor, k: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Log-sum-exp of every row of attention scores: lse[b,h,i] = ln sum_j exp(scale * q_i . k_j).

    Args:
        q: queries (B, H, M, D), float32, float16 or bfloat16; any strides.
        k: keys (B, G, N, D), same dtype and device; G divides H.
        causal: right-aligned mask, row i sees keys j <= N - M + i. A row that sees none has -inf.
        scale: factor on the scores; D**-0.5 if None.

    Returns: (B, H, M) float32, natural logarithm.
    Raises: ValueError for shapes, dtypes or devices that do not fit together.
    Cost: 2 B H M N D FLOPs, one read of q and k. Source: first pass of the paper's Algorithm 2
    kernel.
    """
    _check_heads(q, k)
    return attention_lse_reference(q, k, causal=causal, scale=scale)


def attention_colsum(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Column sums of the softmax matrix: colsum[b,h,j] = sum_i exp(scale * q_i . k_j - lse[b,h,i]).

    Every row that sees a key adds up to 1, so the N sums of a head add up to M.

    Args:
        q, k, causal, scale: as for `attention_lse`.
        lse: (B, H, M) float32 from `attention_lse` of the same arguments; saves the first pass.

    Returns: (B, H, N) float32. Divide by M for the mean attention that a key receives.
    Raises: ValueError for shapes, dtypes or devices that do not fit together.
    Cost: 4 B H M N D FLOPs and two reads of q and k (half of both if `lse` is given).
    Source: SparseVILA, Algorithm 2.
    """
    _check_heads(q, k)
    wanted = (q.shape[:3], torch.float32, q.device)
    if lse is not None and (lse.shape, lse.dtype, lse.device) != wanted:
        raise ValueError(
            f"lse must be float32 of shape {tuple(q.shape[:3])} on {q.device}, "
            f"got {lse.dtype} of shape {tuple(lse.shape)} on {lse.device}"
        )
    return attention_colsum_reference(q, k, causal=causal, scale=scale, lse=lse)


# --- gather_tokens --------------------------------------------------------------------------------


def gather_tokens_reference(x: Tensor, index: Tensor) -> Tensor:
    """`gather_tokens` in plain PyTorch."""
    B, K = index.shape
    index = index.view(B, *[1] * (x.dim() - 3), K, 1)
    return x.gather(-2, index.expand(*x.shape[:-2], K, x.shape[-1]))


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x along its token axis: out[b, ..., i, :] = x[b, ..., index[b, i], :].

    Args:
        x: (B, N, E) features or (B, G, N, D) keys or values, any dtype and strides.
        index: (B, K) int64 on the same device, each in [0, N); the heads of a batch entry share it.

    Returns: (B, K, E) or (B, G, K, D), contiguous.
    Raises: ValueError for other ranks, dtypes or devices, and for an index outside [0, N).
    Cost: K rows read and written. Source: the compaction step of Algorithms 2 and 3.
    """
    if x.dim() not in (3, 4) or index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(
            "x must be (B, N, E) or (B, G, N, D) and index (B, K), "
            f"got {tuple(x.shape)} and {tuple(index.shape)}"
        )
    if index.dtype != torch.int64 or index.device != x.device:
        raise ValueError(f"index must be int64 on {x.device}, got {index.dtype} on {index.device}")
    N = x.shape[-2]
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < N:
        raise ValueError(
            f"index must lie in [0, {N}), got {int(index.min())} .. {int(index.max())}"
        )
    return gather_tokens_reference(x, index)


# --- decode_attention -----------------------------------------------------------------------------


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    length: int | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`decode_attention` in plain PyTorch: the H/G heads of a group become H/G query rows of one
    head, so that keys and values are read once per group and never expanded."""
    B, H, _, D = q.shape
    G = k.shape[1]
    length = k.shape[2] if length is None else int(length)
    rows = q.reshape(B, G, H // G, D)
    out = F.scaled_dot_product_attention(rows, k[:, :, :length], v[:, :, :length], scale=scale)
    return out.reshape(B, H, 1, D)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    length: int | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one query row over the first `length` rows of a cache buffer.

    out[b,h] = sum_{j < length} softmax_j(scale * q . k_j) v_j

    Args:
        q: (B, H, 1, D), float32, float16 or bfloat16.
        k, v: buffers (B, G, capacity, D), same dtype and device; G divides H. Rows from `length` on
            are never read.
        length: int, or a 0-d integer tensor on the same device; the whole buffer if None.
        scale: factor on the scores; D**-0.5 if None.

    Returns: (B, H, 1, D) of q's dtype.
    Raises: ValueError for shapes, dtypes or devices that do not fit, or length outside [1,
    capacity].
    Cost: reads 2 B G length D elements, 4 B H length D FLOPs: bound by memory bandwidth.
    Source: our own choice (the paper decodes with its serving engine's kernel).
    """
    _check_heads(q, k)
    if q.shape[2] != 1 or v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            "q must be (B, H, 1, D) and v like k, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} {v.dtype} on {v.device}"
        )
    if length is not None and not 1 <= int(length) <= k.shape[2]:
        raise ValueError(f"length must be in [1, {k.shape[2]}], got {int(length)}")
    return decode_attention_reference(q, k, v, length=length, scale=scale)


# --- argument checks ------------------------------------------------------------------------------


def _check_heads(q: Tensor, k: Tensor) -> None:
    """Refuse query and key tensors that no attention is defined for."""
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q must be (B, H, M, D) and k (B, G, N, D) with equal B and D, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"no axis may be empty, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"G must divide H, got H = {q.shape[1]} and G = {k.shape[1]}")
    if q.dtype != k.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"q and k must share float32, float16 or bfloat16, got {q.dtype} and {k.dtype}"
        )
    if q.device != k.device:
        raise ValueError(f"tensors must be on one device, got {q.device} and {k.device}")
