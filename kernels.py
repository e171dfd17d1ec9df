"""The four array operations SparseVILA is made of: as Triton kernels, and as the few lines of
PyTorch that define them; and the one product on a CPU that PyTorch does not do well.

    attention_lse      log of the softmax denominator, one number per query row
    attention_colsum   how much attention every key receives: the column sums of the softmax matrix
    gather_tokens      copy chosen rows together: used by pruning and by packing
    decode_attention   one query against the first rows of a cache buffer
    linear             x W^T + b, on a CPU by the library that is fastest there

`attention_colsum` is the operation the method rests on: pruning reads it off the vision tower,
retrieval off every decoder layer. The softmax matrix A (M x N) is never stored. A first pass over
the scores leaves each row's log-sum-exp, a second pass adds exp(score - lse) into the columns.

Each of the first four stands here as the public function `<name>`, which checks its arguments and
dispatches; `<name>_reference`, its definition in plain PyTorch; its Triton kernel; and the kernel's
launcher. Tensors on a CUDA device go to the kernel (heads of up to MAX_HEAD_DIM), all others to the
reference (also where triton is missing), in which torch.autocast casts as everywhere. With
TRITON_INTERPRET=1 in the environment the kernels run on the CPU, one program after the other.

The kernels use no atomics: every output element is written by one program, which adds in a fixed
order, so that the same input gives the same bits every time. Tensors may have any strides, results
are new and contiguous.

Axes: B batch, H query heads, G key/value heads (G divides H: query head h reads key head h // (H /
G)), M query rows, N key columns, D head size, E hidden size, K chosen rows, P parts that the keys
are split into. Sources: the method and the streaming scheme are SparseVILA's (arXiv 2510.17777),
Algorithm 2; the running maximum is FlashAttention's (arXiv 2205.14135); the split of a decoding
step over the keys is Flash-Decoding's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit, INTERPRETED = triton.jit, bool(triton.knobs.runtime.interpret)
except (ImportError, AttributeError):  # none, or one before 3.4: PyTorch everywhere
    triton, jit, INTERPRETED = None, lambda kernel: kernel, False

CHUNK_BYTES = 16 * 2**20  # PyTorch path: a block of float32 scores; attention_lse holds two
LOG2_E = math.log2(math.e)  # in the kernels' scale, so that they raise 2, not e: one step less
MAX_HEAD_DIM = 256  # of the Triton path; larger heads take the PyTorch path


# --- attention_lse --------------------------------------------------------------------------------


def attention_lse(
    q: Tensor, k: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Log-sum-exp of every row of attention scores: lse[b,h,i] = ln sum_j exp(scale * q_i . k_j).

    Args:
        q: queries (B, H, M, D), float32, float16 or bfloat16; any strides.
        k: keys (B, G, N, D), same dtype and device, any strides; G divides H.
        causal: right-aligned mask, row i sees keys j <= N - M + i. A row that sees none, or only
            scores of -inf, has -inf, adds nothing to column sums, and its attention is 0.
        scale: factor on the scores; D**-0.5 if None.

    Returns: (B, H, M) float32, natural logarithm.
    Raises: ValueError for shapes, dtypes or devices that do not fit together.
    Cost: 2 B H M N D FLOPs (half if causal and M = N); reads q once, and k once per block of rows,
    for all H/G heads of a group.
    Source: first pass of the paper's Algorithm 2 kernel.
    """
    _check_heads(q, k)
    if _on_triton(q) and q.shape[3] <= MAX_HEAD_DIM:
        return _attention_lse_triton(q, k, causal=causal, scale=scale)
    return attention_lse_reference(q, k, causal=causal, scale=scale)


def attention_lse_reference(
    q: Tensor, k: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """`attention_lse` in plain PyTorch: float32 arithmetic, query rows in chunks."""
    B, H, M, _ = q.shape
    lse = q.new_full((B, H, M), float("-inf"), dtype=torch.float32)
    for b, rows, scores in _score_chunks(q, k, causal, scale):
        lse[b, :, rows] = scores.logsumexp(-1).flatten(0, 1)
    return lse


@jit
def _place(blocks, G: tl.constexpr):
    """Block, batch entry, key head and batch size of a program. All three stand on the first axis
    of the launch, for CUDA allows 65,535 programs on the others."""
    head, heads = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    batch, g = (head // G).to(tl.int64), (head % G).to(tl.int64)
    return tl.program_id(0) % blocks, batch, g, heads // G


@jit
def _lse_kernel(
    q, k, lse,
    q_b, q_h, q_m, q_d,  # strides
    k_b, k_g, k_n, k_d,
    M, N, chunk, scale,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """lse[p, b, h, i] = ln sum_j 2^(scale * q[b, h, i] . k[b, g, j]) over the j of part p."""
    # 1. Load a block of the group's GROUP * M query rows: row by row, in each the heads side by
    #    side, so that all heads share every key tile and a block spans few rows of the mask.
    block, batch, g, B = _place(tl.cdiv(M * GROUP, BLOCK_R), G)
    r = block.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    h, i = g * GROUP + r % GROUP, r // GROUP
    d = tl.arange(0, BLOCK_D)
    rows = q + batch * q_b + h * q_h + i * q_m
    q_tile = tl.load(rows[:, None] + d * q_d, mask=(i < M)[:, None] & (d < D), other=0.0)

    # 2. Walk the keys of the chunk that any row sees, with a running maximum and sum.
    last = i + (N - M) if CAUSAL else i * 0 + (N - 1)  # the last key that a row sees
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, N)
    whole = stop  # below it, every row sees every key
    if CAUSAL:
        stop = tl.minimum(stop, (block * BLOCK_R + BLOCK_R - 1) // GROUP + N - M + 1)
        whole = tl.minimum(stop, block * BLOCK_R // GROUP + N - M + 1)
    keys = k + batch * k_b + g * k_g + start.to(tl.int64) * k_n
    tile = tl.arange(0, BLOCK_N) * k_n + d[:, None] * k_d  # 32-bit offsets from a 64-bit base
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        here = (n < stop) & (d < D)[:, None]
        k_tile = tl.load(keys + tile, mask=here, other=0.0)
        keys += BLOCK_N * k_n
        scores = _dot(q_tile, k_tile, UPCAST) * scale
        if n0 + BLOCK_N > whole:
            scores = tl.where((n < stop) & (n <= last[:, None]), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen yet: not inf - inf
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        top = new_top

    # 3. Store; a row that sees no key of the chunk has -inf.
    out = lse + ((tl.program_id(1).to(tl.int64) * B + batch) * G * GROUP + h) * M + i
    tl.store(out, (top + tl.log2(total)) * 0.6931471805599453, mask=i < M)


@jit
def _join_kernel(parts, lse, size, PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """lse[i] = ln sum_p exp(parts[p, i])."""
    at, p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_P)
    here = (p < PARTS)[:, None] & (at < size)
    each = tl.load(parts + p[:, None] * size + at, mask=here, other=float("-inf"))
    top = tl.max(each, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(each - shift), 0)
    tl.store(lse + at, shift + tl.log(total), mask=at < size)


def _attention_lse_triton(
    q: Tensor, k: Tensor, *, causal: bool, scale: float | None, parts: int | None = None
) -> Tensor:
    """Launch `_lse_kernel`. With few rows the keys are split, so that all of the chip works."""
    q, k = _near(q), _near(k)
    B, H, M, D = q.shape
    G, N = k.shape[1], k.shape[2]
    blocks = _blocks(D, q.element_size())
    blocks["BLOCK_R"] = _at_most(2 * blocks["BLOCK_N"], M * H // G)
    row_blocks = triton.cdiv(M * H // G, blocks["BLOCK_R"])
    chunk = _chunk(N, row_blocks * B * G, blocks["BLOCK_N"], q.device, parts)
    each = q.new_empty(triton.cdiv(N, chunk), B, H, M, dtype=torch.float32)
    parts, lse = len(each), each[0]
    with torch.cuda.device_of(q):
        _lse_kernel[(row_blocks * B * G, parts)](
            q, k, each, *q.stride(), *k.stride(), M, N, chunk,
            LOG2_E * (D**-0.5 if scale is None else scale),
            G=G, GROUP=H // G, D=D, CAUSAL=causal, **blocks, **_upcast(q),
        )  # fmt: skip
        if parts > 1:
            lse = torch.empty_like(lse)
            _join_kernel[(triton.cdiv(lse.numel(), 32),)](
                each, lse, lse.numel(),
                PARTS=parts, BLOCK_P=triton.next_power_of_2(parts), BLOCK=32,
            )  # fmt: skip
    return lse


# --- attention_colsum -----------------------------------------------------------------------------


def attention_colsum(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Column sums of the softmax matrix: colsum[b,h,j] = sum_i exp(scale * q_i . k_j - lse[b,h,i]).

    The weights of a row add up to 1, so the N sums of a head add up to the number of rows that see
    a key: M unless causal and M > N.

    Args:
        q, k, causal, scale: as for `attention_lse`.
        lse: (B, H, M) float32 from `attention_lse` of the same arguments; saves the first pass.

    Returns: (B, H, N) float32. Divide by M for the mean attention that a key receives.
    Raises: ValueError for shapes, dtypes or devices that do not fit together.
    Cost: 4 B H M N D FLOPs and two reads of q and k (half of both if `lse` is given, and in the
    PyTorch path); the second pass reads k once and q once per block of keys.
    Source: SparseVILA, Algorithm 2.
    """
    _check_heads(q, k)
    if lse is not None:
        _check_tensors(lse)
        if (lse.shape, lse.dtype, lse.device) != (q.shape[:3], torch.float32, q.device):
            raise ValueError(
                f"lse must be float32 of shape {tuple(q.shape[:3])} on {q.device}, "
                f"got {lse.dtype} of shape {tuple(lse.shape)} on {lse.device}"
            )
    if _on_triton(q) and q.shape[3] <= MAX_HEAD_DIM:
        return _attention_colsum_triton(q, k, causal=causal, scale=scale, lse=lse)
    return attention_colsum_reference(q, k, causal=causal, scale=scale, lse=lse)


def attention_colsum_reference(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """`attention_colsum` in plain PyTorch: float32 arithmetic, query rows in chunks. A chunk holds
    whole rows, so that one pass is enough."""
    B, H, _, _ = q.shape
    G, N = k.shape[1], k.shape[2]
    colsum = q.new_zeros(B, G, H // G, N, dtype=torch.float32)
    for b, rows, scores in _score_chunks(q, k, causal, scale):
        if lse is None:
            in_place, highest = None if scores.requires_grad else scores, scores.amax(-1)
            weights = torch.softmax(scores, -1, out=in_place)  # (G, H/G, m, n)
            if (blind := highest == -torch.inf).any():
                weights = weights.masked_fill(blind[..., None], 0)
        else:
            shift = lse[b, :, rows].unflatten(0, (G, H // G))[..., None]
            weights = scores.sub_(shift.masked_fill(shift == -torch.inf, 0)).exp_()
        colsum[b, ..., : weights.shape[-1]] += weights.sum(-2)
        del scores, weights  # one block, given back before the next chunk is made
    return colsum.flatten(1, 2)


@jit
def _colsum_kernel(
    q, k, lse, colsum,
    q_b, q_h, q_m, q_d,  # strides
    k_b, k_g, k_n, k_d,
    M, N, scale,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """colsum[b, h, j] = sum_i 2^(scale * q[b, h, i] . k[b, g, j] - lse[b, h, i] / ln 2)."""
    # 1. Load a block of keys, once for all heads of the group.
    block, batch, g, _ = _place(tl.cdiv(N, BLOCK_N), G)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    columns = k + batch * k_b + g * k_g + n.to(tl.int64) * k_n
    k_tile = tl.load(columns[:, None] + d * k_d, mask=(n < N)[:, None] & (d < D), other=0.0)

    # 2. For every head, walk the rows that see any of these keys.
    first = tl.maximum(block * BLOCK_N - (N - M), 0) if CAUSAL else block * 0
    tile = tl.arange(0, BLOCK_M) * q_m + d[:, None] * q_d  # 32-bit offsets from a 64-bit base
    for h in range(g * GROUP, g * GROUP + GROUP):
        received = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        rows = q + batch * q_b + h * q_h + first.to(tl.int64) * q_m
        for i0 in range(first, M, BLOCK_M):
            i = i0 + tl.arange(0, BLOCK_M)
            q_tile = tl.load(rows + tile, mask=(i < M) & (d < D)[:, None], other=0.0)
            rows += BLOCK_M * q_m
            row_lse = tl.load(lse + (batch * G * GROUP + h) * M + i, mask=i < M, other=0.0)
            row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)  # the row sees nothing
            scores = _dot(k_tile, q_tile, UPCAST) * scale
            weights = tl.exp2(scores - row_lse * 1.4426950408889634)
            if i0 + BLOCK_M > M or (CAUSAL and block * BLOCK_N + BLOCK_N > i0 + 1 + (N - M)):
                seen = i < M
                if CAUSAL:
                    seen = seen & (n[:, None] <= i + (N - M))
                weights = tl.where(seen, weights, 0.0)
            received += weights

        # 3. Add up the rows and store one head's columns.
        out = colsum + (batch * G * GROUP + h) * N + n
        tl.store(out, tl.sum(received, 1), mask=n < N)


def _attention_colsum_triton(
    q: Tensor, k: Tensor, *, causal: bool, scale: float | None, lse: Tensor | None
) -> Tensor:
    """Launch `_colsum_kernel`, one program per block of keys and key head."""
    q, k = _near(q), _near(k)
    B, H, M, D = q.shape
    G, N = k.shape[1], k.shape[2]
    if lse is None:
        lse = _attention_lse_triton(q, k, causal=causal, scale=scale)
    blocks = _blocks(D, q.element_size())
    blocks["BLOCK_M"] = _at_most(blocks["BLOCK_N"], M)
    blocks["BLOCK_N"] *= 2
    colsum = q.new_empty(B, H, N, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _colsum_kernel[(triton.cdiv(N, blocks["BLOCK_N"]) * B * G,)](
            q, k, lse.contiguous(), colsum, *q.stride(), *k.stride(), M, N,
            LOG2_E * (D**-0.5 if scale is None else scale),
            G=G, GROUP=H // G, D=D, CAUSAL=causal, **blocks, **_upcast(q),
        )  # fmt: skip
    return colsum


# --- what the two share ---------------------------------------------------------------------------


def _score_chunks(
    q: Tensor, k: Tensor, causal: bool, scale: float | None
) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield (b, rows, scores), scores (G, H/G, m, n) float32 of m query rows of batch entry b
    against its first n keys.

    Causal is right-aligned: row i sees keys 0 .. N - M + i, and the others are -inf. Left out are
    keys that no row of the chunk sees (n < N) and, if M > N, the first rows, which see none. One
    entry at a time, because models leave the heads of a token side by side in memory: the keys of
    one entry can be multiplied as they lie, those of several would be copied for every chunk.
    """
    B, H, M, D = q.shape
    G, N = k.shape[1], k.shape[2]
    step = max(1, CHUNK_BYTES // (4 * H * N))
    for b in range(B):
        queries = q[b].unflatten(0, (G, H // G))  # (G, H/G, M, D): the heads of a group together
        keys = k[b].float().mT  # (G, D, N): one copy per group, not one per query head
        for start in range(max(0, M - N) if causal else 0, M, step):
            stop = min(start + step, M)
            n = N - M + stop if causal else N
            rows = queries[..., start:stop, :].float().flatten(1, 2)  # (G, H/G * m, D)
            scores = (rows @ keys[..., :n]).unflatten(1, (H // G, stop - start))
            scores *= D**-0.5 if scale is None else scale
            if causal:
                last = torch.arange(start, stop, device=q.device)[:, None] + (N - M)
                scores.masked_fill_(torch.arange(n, device=q.device) > last, float("-inf"))
            yield b, slice(start, stop), scores
            del scores  # before the next chunk is made


@jit
def _dot(a, b, UPCAST: tl.constexpr):
    """a @ b in float32. The interpreter multiplies bfloat16 wrongly, without an error: UPCAST."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")  # float32 is not rounded to tf32


# --- gather_tokens and gather_keys_values ---------------------------------------------------------


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x along its token axis: out[b, ..., i, :] = x[b, ..., index[b, i], :].

    Args:
        x: (B, N, E) features or (B, G, N, D) keys or values, any dtype and strides.
        index: (B, K) int64 on the same device, each in [0, N); the heads of a batch entry share it.

    Returns: (B, K, E) or (B, G, K, D), contiguous; no gradients flow through it.
    Raises: ValueError for shapes, dtypes or devices that do not fit, and for an index outside [0,
    N) (to find one, a GPU must be waited for).
    Cost: K rows read and written.
    Source: the compaction step of Algorithms 2 and 3.
    """
    _check_index(x, index)
    return _gather([x], index)[0]


def gather_keys_values(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """`gather_tokens` of k and v (B, G, N, D) with one index (B, K), in one launch: two tensors
    (B, G, K, D). Raises: ValueError like `gather_tokens`, and for values unlike the keys."""
    _check_values(k, v)
    _check_index(k, index)
    k, v = _gather([k, v], index)
    return k, v


def gather_tokens_reference(x: Tensor, index: Tensor) -> Tensor:
    """`gather_tokens` in plain PyTorch."""
    out = x.new_empty(*x.shape[:-2], index.shape[1], x.shape[-1])
    for b, chosen in enumerate(index):
        torch.index_select(x[b].detach(), -2, chosen, out=out[b])
    return out


def _gather(sources: list[Tensor], index: Tensor) -> list[Tensor]:
    """The chosen rows of one or two tensors, by whichever path takes them."""
    if _on_triton(sources[0]) and sources[0].element_size() <= 8:
        return _gather_triton(sources, index)
    return [gather_tokens_reference(source, index) for source in sources]


@jit
def _gather_kernel(
    x, y, index, x_out, y_out,
    x_b, x_g, x_n, x_e,  # strides, in units of VECTOR elements (x_e in elements)
    y_b, y_g, y_n, y_e,
    index_b, index_k, K,
    G: tl.constexpr, E: tl.constexpr, PAIR: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """x_out[b, g, i] = x[b, g, index[b, i]], and with PAIR the same for y."""
    # 1. Read which rows a block of output rows comes from.
    block, batch, g, _ = _place(tl.cdiv(K, BLOCK_K), G)
    i = block.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = tl.load(index + batch * index_b + i * index_k, mask=i < K, other=0)
    here = (i < K)[:, None] & (e < E)

    # 2. Copy them. Multiplying by VECTOR tells the compiler that rows start at 16-byte boundaries.
    target = (((batch * G + g) * K + i) * E)[:, None] + e
    source = x + ((batch * x_b + g * x_g + row * x_n) * VECTOR)[:, None] + e * x_e
    tl.store(x_out + target, tl.load(source, mask=here), mask=here)
    if PAIR:
        source = y + ((batch * y_b + g * y_g + row * y_n) * VECTOR)[:, None] + e * y_e
        tl.store(y_out + target, tl.load(source, mask=here), mask=here)


def _gather_triton(sources: list[Tensor], index: Tensor) -> list[Tensor]:
    """Launch `_gather_kernel` on one or two tensors of the same shape and dtype."""
    x, K = sources[0], index.shape[1]
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    outs = [x.new_empty(*x.shape[:-2], K, x.shape[-1], dtype=bits) for _ in sources]
    sources = [t.view(bits).unsqueeze(1) if t.dim() == 3 else t.view(bits) for t in sources]
    B, G, _, E = sources[0].shape
    vector = 16 // x.element_size()
    aligned = all(s % vector == 0 for t in sources for s in t.stride()[:3])
    vector = vector if aligned and E % vector == 0 else 1
    strides = [[*(s // vector for s in t.stride()[:3]), t.stride(3)] for t in sources]
    block_e = min(triton.next_power_of_2(E), 1024)
    block_k = max(1, 4096 // block_e)
    if K and E:
        with torch.cuda.device_of(x):
            _gather_kernel[(triton.cdiv(K, block_k) * B * G, triton.cdiv(E, block_e))](
                sources[0], sources[-1], index, outs[0], outs[-1],
                *strides[0], *strides[-1], *index.stride(), K,
                G=G, E=E, PAIR=len(sources) == 2, VECTOR=vector, BLOCK_K=block_k, BLOCK_E=block_e,
            )  # fmt: skip
    return [out.view(x.dtype) for out in outs]


# --- decode_attention -----------------------------------------------------------------------------


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
        q: (B, H, 1, D), float32, float16 or bfloat16; any strides.
        k, v: buffers (B, G, capacity, D), same dtype and device; G divides H. Rows from `length` on
            are never read.
        length: int, or a 0-d integer tensor on the same device; the whole buffer if None. On a GPU
            the tensor's value is not checked (that would mean to wait for it), so that a CUDA graph
            can replay the step while it grows.
        scale: factor on the scores; D**-0.5 if None.

    Returns: (B, H, 1, D) of q's dtype; 0 where all scores are -inf.
    Raises: ValueError for shapes, dtypes or devices that do not fit, or length outside [1,
    capacity].
    Cost: reads 2 B G length D elements, once for all heads of a group; 4 B H length D FLOPs: bound
    by memory bandwidth.
    Source: our own choice (the paper decodes with its serving engine's).
    """
    _check_heads(q, k)
    _check_values(k, v)
    if q.shape[2] != 1:
        raise ValueError(f"q must be (B, H, 1, D), got {tuple(q.shape)}")
    length = _check_length(length, k)
    if _on_triton(q) and q.shape[3] <= MAX_HEAD_DIM:
        return _decode_attention_triton(q, k, v, length=length, scale=scale)
    return decode_attention_reference(q, k, v, length=length, scale=scale)


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


@jit
def _decode_kernel(
    q, k, v, partial, lse, length,
    q_b, q_h, q_d,  # strides
    k_b, k_g, k_n, k_d,
    v_b, v_g, v_n, v_d,
    scale,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ON_DEVICE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial[p, b, h] = attention of q[b, h] over part p of the rows, lse[p, b, h] its weight."""
    # 1. The part's rows depend on the length and the number of parts only, not on the buffer.
    if ON_DEVICE:
        length = tl.load(length).to(tl.int32)
    parts = tl.num_programs(1)
    chunk = tl.cdiv(tl.cdiv(length, parts), BLOCK_N) * BLOCK_N
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, length)

    # 2. Load the query row of every head of the group.
    _, batch, g, B = _place(1, G)
    head = tl.arange(0, BLOCK_H)
    h, d = g * GROUP + head, tl.arange(0, BLOCK_D)
    mine = (head < GROUP)[:, None] & (d < D)
    q_tile = tl.load(q + batch * q_b + (h * q_h)[:, None] + d * q_d, mask=mine, other=0.0)

    # 3. Walk the rows once, with a running maximum, sum of weights and weighted sum of values.
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    mixed = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    keys = k + batch * k_b + g * k_g + start.to(tl.int64) * k_n
    values = v + batch * v_b + g * v_g + start.to(tl.int64) * v_n
    k_tile_at = tl.arange(0, BLOCK_N) * k_n + d[:, None] * k_d  # 32-bit offsets from 64-bit bases
    v_tile_at = tl.arange(0, BLOCK_N)[:, None] * v_n + d * v_d
    for n0 in range(start, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        here = (n < stop) & (d < D)[:, None]
        k_tile = tl.load(keys + k_tile_at, mask=here, other=0.0)
        keys += BLOCK_N * k_n
        scores = tl.where(n < stop, _dot(q_tile, k_tile, UPCAST) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        here = (n < stop)[:, None] & (d < D)
        v_tile = tl.load(values + v_tile_at, mask=here, other=0.0)
        values += BLOCK_N * v_n
        mixed = mixed * shrink[:, None] + _dot(weights.to(v_tile.dtype), v_tile, UPCAST)
        top = new_top

    # 4. Store; an empty part has weight 0 (lse = -inf).
    out = (tl.program_id(1).to(tl.int64) * B + batch) * G * GROUP + h
    tl.store(lse + out, top + tl.log(total), mask=head < GROUP)
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(partial + out[:, None] * D + d, mixed, mask=mine)


@jit
def _combine_kernel(
    partial, lse, out, heads,
    PARTS: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, h] = sum_p softmax_p(lse[p, b, h]) partial[p, b, h]."""
    head = tl.program_id(0).to(tl.int64)
    p, d = tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    weights = tl.load(lse + p * heads + head, mask=p < PARTS, other=float("-inf"))
    top = tl.max(weights, 0)
    weights = tl.exp(weights - tl.where(top == float("-inf"), 0.0, top))
    rows = partial + (p * heads + head)[:, None] * D + d
    parts = tl.load(rows, mask=(p < PARTS)[:, None] & (d < D), other=0.0)
    total = tl.sum(weights, 0)
    mixed = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + head * D + d, mixed.to(out.dtype.element_ty), mask=d < D)


def _decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    length: int | Tensor,
    scale: float | None,
    parts: int | None = None,
) -> Tensor:
    """Launch `_decode_kernel` on every part of every key head, then `_combine_kernel`."""
    k, v = _near(k), _near(v)
    B, H, _, D = q.shape
    G = k.shape[1]
    blocks = _blocks(D, k.element_size())
    parts = parts or min(64, _programs(q.device) // (B * G)) or 1
    partial = q.new_empty(parts, B, H, D, dtype=torch.float32)
    lse = q.new_empty(parts, B, H, dtype=torch.float32)
    out = q.new_empty(B, H, 1, D)
    with torch.cuda.device_of(q):
        _decode_kernel[(B * G, parts)](
            q, k, v, partial, lse, length, q.stride(0), q.stride(1), q.stride(3),
            *k.stride(), *v.stride(), D**-0.5 if scale is None else scale,
            G=G, GROUP=H // G, D=D, ON_DEVICE=isinstance(length, Tensor),
            BLOCK_H=max(16, triton.next_power_of_2(H // G)), **blocks, **_upcast(q),
        )  # fmt: skip
        _combine_kernel[(B * H, triton.cdiv(D, 64))](
            partial, lse, out, B * H,
            PARTS=parts, D=D, BLOCK_P=triton.next_power_of_2(parts), BLOCK_D=64,
        )  # fmt: skip
    return out


# --- linear ---------------------------------------------------------------------------------------

# oneDNN's product, as torch.compile uses it; not in every build.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
MKL = torch.backends.mkl.is_available()
FLOAT32_BLOCK = 2**22  # weights made float32 at a time: 16 MB; from 32 on, glibc maps them anew


@cache
def _multiplied(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN multiplies matrices of a dtype. What it does not, PyTorch
    does in loops of its own, five times as slowly as in float32, or much more."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)
    return name is None or supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b: x (..., inputs), weight W (outputs, inputs), bias (outputs,) -> y (...,
    outputs).

    torch.nn.functional.linear, but on a CPU without gradients by what is faster there:

    * One row in float32: reading W takes all the time, and MKL does it on one core. Its batched
      product, W cut into blocks of outputs, uses all.
    * Many rows in float32: MKL is slow on AMD's processors; oneDNN is not.
    * Many rows in a dtype that oneDNN does not multiply here: in float32, a part of W after the
      other.
    * Weights below 2^17 numbers do not earn back the 10 us that the first two cost more.

    F.linear and this function, milliseconds on 2 cores of an AMD EPYC 7003, without products in
    bfloat16 (`python -m bench kernels`, 2026-11-27; it copies 40 GB/s):

                            float32                         bfloat16
        inputs x outputs    1 row          256 rows         1 row    256 rows
         512 x  1408         0.24   0.22     3.2    3.1      0.13     22    3.0
         576 x 49280         9.9    6.0    159    143        4.0     829  110
        2048 x  5632         2.3    2.0     48     39        1.4     283   49
        4096 x  4096         3.1    2.5     65     67        1.7     398   70

    Source: our choice.
    """
    outputs, inputs = weight.shape
    if not weight.is_cpu or weight.dtype != x.dtype or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if x.numel() > inputs and not _multiplied(x.dtype):
        wide, y = x.float(), x.new_empty(*x.shape[:-1], outputs)
        step = max(1, FLOAT32_BLOCK // inputs)
        for start in range(0, outputs, step):
            here = slice(start, start + step)
            added = None if bias is None else bias[here].float()
            y[..., here] = linear(wide, weight[here].float(), added)
        return y
    if x.dtype != torch.float32 or weight.numel() < 2**17:
        return F.linear(x, weight, bias)
    if MKL and x.numel() == inputs:
        n = math.gcd(outputs, 16)
        row = x.reshape(1, 1, inputs).expand(n, 1, inputs)
        y = torch.bmm(row, weight.view(n, -1, inputs).mT)  # (n, 1, outputs / n)
        y = y.view(*x.shape[:-1], outputs)
        return y if bias is None else y + bias
    if ONEDNN_LINEAR:
        return ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


# --- launch parameters ----------------------------------------------------------------------------


def _on_triton(x: Tensor) -> bool:
    """The one place that decides between the kernels and PyTorch."""
    return triton is not None and (x.is_cuda or INTERPRETED)


def _blocks(D: int, itemsize: int) -> dict[str, int]:
    """Keys in a tile, fewer where wide heads would fill the registers, and a head's size."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    keys = max(16, min(64, (16384 if itemsize < 4 else 4096) // (BLOCK_D * itemsize)))
    return {"BLOCK_N": keys, "BLOCK_D": BLOCK_D, "num_warps": 4}


def _at_most(side: int, rows: int) -> int:
    """Rows in a tile: not many more than there are."""
    return min(side, max(16, triton.next_power_of_2(rows)))


def _programs(device: torch.device) -> int:
    """How many programs keep the chip busy: four per multiprocessor."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _chunk(N: int, programs: int, block: int, device: torch.device, parts: int | None) -> int:
    """Keys per part, a multiple of the block: enough parts to keep the chip busy."""
    parts = parts or max(1, _programs(device) // programs)
    return triton.cdiv(triton.cdiv(N, parts), block) * block


def _near(x: Tensor) -> Tensor:
    """x, copied where a tile's 32-bit offsets would overflow, because its rows are far from each
    other in memory."""
    return x if 256 * max(x.stride()[2:]) < 2**31 else x.contiguous()


def _upcast(q: Tensor) -> dict[str, bool]:
    return {"UPCAST": INTERPRETED and q.dtype == torch.bfloat16}


# --- argument checks ------------------------------------------------------------------------------


def _check_tensors(*arguments: Tensor) -> None:
    if not all(isinstance(argument, Tensor) for argument in arguments):
        kinds = ", ".join(type(argument).__name__ for argument in arguments)
        raise ValueError(f"arguments must be tensors, got {kinds}")


def _check_heads(q: Tensor, k: Tensor) -> None:
    """Refuse query and key tensors that no attention is defined for."""
    _check_tensors(q, k)
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


def _check_values(k: Tensor, v: Tensor) -> None:
    """Refuse values that do not belong to the keys."""
    _check_tensors(k, v)
    if k.dim() != 4 or (v.shape, v.dtype, v.device) != (k.shape, k.dtype, k.device):
        raise ValueError(
            f"k must be (B, G, N, D) and v like it, got {tuple(k.shape)} {k.dtype} on {k.device} "
            f"and {tuple(v.shape)} {v.dtype} on {v.device}"
        )


def _check_index(x: Tensor, index: Tensor) -> None:
    """Refuse an index that does not choose rows of x."""
    _check_tensors(x, index)
    if x.dim() not in (3, 4) or index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(
            "x must be (B, N, E) or (B, G, N, D) and index (B, K), "
            f"got {tuple(x.shape)} and {tuple(index.shape)}"
        )
    if index.dtype != torch.int64 or index.device != x.device:
        raise ValueError(f"index must be int64 on {x.device}, got {index.dtype} on {index.device}")
    if index.numel():
        N, (low, high) = x.shape[-2], torch.stack(index.aminmax()).tolist()
        if not 0 <= low <= high < N:
            raise ValueError(f"index must lie in [0, {N}), got {low} .. {high}")


def _check_length(length: int | Tensor | None, k: Tensor) -> int | Tensor:
    """The length of a buffer, checked where that needs no waiting for a GPU."""
    capacity = k.shape[2]
    if length is None:
        return capacity
    if isinstance(length, Tensor):
        if length.dim() or length.is_floating_point() or length.device != k.device:
            raise ValueError(
                f"length must be an int or a 0-d integer tensor on {k.device}, got "
                f"{length.dtype} of shape {tuple(length.shape)} on {length.device}"
            )
        if length.is_cuda:
            return length
        length = int(length)
    if not isinstance(length, Integral) or not 1 <= length <= capacity:
        raise ValueError(f"length must be an integer in [1, {capacity}], got {length!r}")
    return int(length)
