"""AWQ and SmoothQuant: four-bit weights for the decoder, eight-bit arithmetic for the vision tower.

    quantize_groups, pack, unpack, dequantize    the numbers and the file format (AutoAWQ's "gemm")
    w4a16_matmul                                 16-bit activations times 4-bit weights
    search_scale, search_clip, quantize          the algorithm: AWQ, block by block
    smooth, quantize_tower                       SmoothQuant, for towers of LayerNorm blocks
    W4A16Linear, W8A8Linear                      what a Linear becomes

    python awq.py SOURCE TARGET        quantise a checkpoint
    python awq.py --bench              time the products beside the library's

A weight is rounded to one of 16 values, (code - zero) * scale, with a scale and a zero for every
group of `group_size` inputs. AWQ (Lin et al., arXiv 2306.00978) makes rounding hurt less: an input
channel with large activations is multiplied by s > 1 in the weight matrix, where it is rounded
relatively finer, and divided by s in whatever produces the activation (a *fold*). Every s comes
from a search that compares the layer's output before and after rounding.

Axes: M rows of activations, K inputs and N outputs of a Linear, g group size, T rows of a
calibration turn, S splits of K, E decoder width, V visual tokens. A Linear's weight is (N, K), as
in PyTorch; the packed tensors are (K, N), as in the files.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

try:
    import triton
    import triton.language as tl

    jit, INTERPRETED = triton.jit, bool(triton.knobs.runtime.interpret)
except ImportError:  # macOS, Windows: every operation takes the PyTorch path
    triton, jit, INTERPRETED = None, lambda kernel: kernel, False

# On a GPU, with more rows: dequantise once, then the library's matmul. The smallest of the public
# thresholds (128 to 1024); not measured yet.
DEQUANTIZE_ROWS = 128
CPU_INT4_ROWS = 64  # on a CPU, with at most so many bfloat16 rows: PyTorch's own int4 kernel

# --- numbers and file format ----------------------------------------------------------------------


def quantize_groups(weight: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Round every group of weights to 16 evenly spaced values.

        scale = max(max(w, 0) - min(w, 0), 1e-5) / 15, rounded to float16
        zero  = round(-min(w, 0) / scale), at most 15
        code  = clamp(round(w / scale) + zero, 0, 15)

    so that (code - zero) * scale is the nearest of 16 values to w, and 0 stays 0.

    Args:
        weight: (N, K), any floating dtype; the arithmetic is float32.
        group_size: consecutive inputs that share scale and zero; divides K; -1 means K.

    Returns: codes (N, K) int8 in [0, 15], scales (N, K / g) float16, zeros (N, K / g) int8 in
    [0, 15].
    Raises: ValueError for other shapes and group sizes, NaN or infinite weights, and scales beyond
    float16. Source: AWQ's pseudo-quantiser; the range always includes 0, else a group of one sign
    would collapse.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            f"weight must be floating point (N, K), got {weight.dtype} {tuple(weight.shape)}"
        )
    w = weight.detach().float().unflatten(1, (-1, _group_size(group_size, weight.shape[1])))
    if not w.isfinite().all():
        raise ValueError("weights must be finite, got NaN or infinity")
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)  # (N, K / g)
    scales = ((high - low).clamp(min=1e-5) / 15).half()
    if scales.isinf().any():
        raise ValueError(f"weights up to {float(w.abs().max()):.3g} need scales beyond float16")
    scale = scales.float()[..., None]
    zeros = (-low[..., None] / scale).round().clamp(0, 15)
    codes = ((w / scale).round() + zeros).clamp(0, 15)
    return codes.flatten(1).to(torch.int8), scales, zeros[..., 0].to(torch.int8)


def rounded(weight: Tensor, group_size: int = 128) -> Tensor:
    """What is left of weight (N, K) after `quantize_groups`, in float32."""
    codes, scales, zeros = quantize_groups(weight, group_size)
    codes = codes.unflatten(1, (scales.shape[1], -1))
    return ((codes - zeros[..., None]) * scales.float()[..., None]).flatten(1)


def pack(codes: Tensor) -> Tensor:
    """Codes (rows, N) in [0, 15] to int32 words (rows, N / 8); column c of eight goes to bit
    0, 16, 4, 20, 8, 24, 12 or 28.

    Codes 0 .. 7 give 0x75316420. Raises: ValueError for other codes and if 8 does not divide N.
    Source: AutoAWQ's "gemm" format.
    """
    if codes.dim() != 2 or codes.is_floating_point() or codes.shape[1] % 8:
        raise ValueError(
            f"codes must be integers (rows, multiple of 8), got {codes.dtype} {tuple(codes.shape)}"
        )
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= 15:
        raise ValueError(f"codes must be in [0, 15], got {int(codes.min())} .. {int(codes.max())}")
    nibbles = codes.to(torch.int32).unflatten(1, (-1, 8)) << _shifts(codes)
    return nibbles.sum(-1, dtype=torch.int32)  # the nibbles do not overlap


def unpack(packed: Tensor) -> Tensor:
    """packed, int32 words (rows, N / 8) -> codes (rows, N) int8: the inverse of `pack`. Raises:
    ValueError for anything else."""
    if packed.dim() != 2 or packed.dtype != torch.int32:
        raise ValueError(f"packed must be int32 (rows, N / 8), got {packed.dtype} {packed.dim()}-d")
    nibbles = packed[..., None] >> _shifts(packed) & 0xF  # the mask removes the sign's bits
    return nibbles.to(torch.int8).flatten(1)


def _shifts(like: Tensor) -> Tensor:
    """Where column c of eight lies in its 32-bit word: bits 0, 16, 4, 20, 8, 24, 12, 28."""
    column = torch.arange(8, dtype=torch.int32, device=like.device)
    return column % 2 * 16 + column // 2 * 4


def dequantize_reference(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """`dequantize` in plain PyTorch."""
    zeros = unpack(qzeros)[:, None]  # (K / g, 1, N)
    codes = unpack(qweight).view(len(scales), -1, zeros.shape[2])  # (K / g, g, N)
    return ((codes - zeros) * scales[:, None]).flatten(0, 1)


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """The weights of a packed Linear: W[k, n] = (code[k, n] - zero[k // g, n]) * scale[k // g, n].

    Args:
        qweight: (K, N / 8) int32 packed codes.
        qzeros: (K / g, N / 8) int32 packed zeros.
        scales: (K / g, N) float16; their number of rows tells the group size.

    Returns: (K, N) float16. The difference is exact and the product is rounded once, so that any
    two correct implementations agree bit for bit.
    Raises: ValueError for other dtypes and shapes, naming another layout where it is recognised.
    Source: AutoAWQ's "gemm" format.
    """
    K, _, group = _check_packed(qweight, qzeros, scales)
    if _on_triton(qweight) and _block_k(K, group):
        return _dequantize_triton(qweight, qzeros, scales)
    return dequantize_reference(qweight, qzeros, scales)


# --- the product: PyTorch -------------------------------------------------------------------------


def w4a16_matmul_reference(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`w4a16_matmul` in plain PyTorch: weights rounded to x's dtype, arithmetic in float32."""
    weight = dequantize_reference(qweight, qzeros, scales).to(x.dtype)
    y = x.float() @ weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


_CPU_PACKED = WeakTensorKeyDictionary()  # qweight -> (what it was packed from, the packing)


def _cpu_int4_matmul(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """x (M, K) bfloat16 times the weights by PyTorch's int4 kernel. It wants a packing of its own
    (once more the memory of the codes) of w = (code - 8) * scale + offset, with scale and offset in
    bfloat16; the packing is kept until one of the tensors is changed or replaced."""
    source = [(id(t), t.data_ptr(), t._version) for t in (qweight, qzeros, scales)]
    packed_from, packed, *_ = _CPU_PACKED.get(qweight, (None, None))
    if packed_from != source:
        codes = unpack(qweight).T.int().contiguous()
        offsets = (8 - unpack(qzeros).float()) * scales.float()
        packed = (
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2),
            torch.stack([scales.float(), offsets], -1).bfloat16(),  # (K / g, N, 2)
        )
        _CPU_PACKED[qweight] = source, packed, qzeros, scales  # held, so that no id is used again
    group = qweight.shape[0] // scales.shape[0]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[0], group, packed[1])


# --- the product: Triton --------------------------------------------------------------------------


@jit
def _unpack_tile(words, COLUMNS: tl.constexpr):
    """Words (rows, COLUMNS / 8) to codes (rows, COLUMNS): every word is loaded once, and repeated
    eight times in registers."""
    words = tl.interleave(words, words)
    words = tl.interleave(words, words)
    words = tl.interleave(words, words)
    column = tl.arange(0, COLUMNS) % 8
    return (words >> (column % 2 * 16 + column // 2 * 4)) & 0xF  # as in `_shifts`


@jit
def _weight_tile(
    qweight, qzeros, scales, k0, n0, K, N,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W[k0 : k0 + BLOCK_K, n0 : n0 + BLOCK_N] in float16. A tile lies within one group, so it needs
    one row of scales and zeros."""
    k, n = k0 + tl.arange(0, BLOCK_K), n0 + tl.arange(0, BLOCK_N)
    word = n0 // 8 + tl.arange(0, BLOCK_N // 8)  # the words that hold these columns
    row_size, group = N // 8, k0 // GROUP
    codes = tl.load(
        qweight + (k.to(tl.int64) * row_size)[:, None] + word,
        mask=(k < K)[:, None] & (word < row_size),
        other=0,
    )
    zeros = tl.load(qzeros + group * row_size + word, mask=word < row_size, other=0)
    scale = tl.load(scales + group * N + n, mask=n < N, other=0.0)
    codes = _unpack_tile(codes, BLOCK_N) - _unpack_tile(zeros[None, :], BLOCK_N)
    return codes.to(tl.float16) * scale


@jit
def _dequantize_kernel(
    qweight, qzeros, scales, out, K, N,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[k, n] = W[k, n]."""
    k0, n0 = tl.program_id(0) * BLOCK_K, tl.program_id(1) * BLOCK_N
    tile = _weight_tile(qweight, qzeros, scales, k0, n0, K, N, GROUP, BLOCK_K, BLOCK_N)
    k, n = k0 + tl.arange(0, BLOCK_K), n0 + tl.arange(0, BLOCK_N)
    here = (k < K)[:, None] & (n < N)
    tl.store(out + (k.to(tl.int64) * N)[:, None] + n, tile, mask=here)


@jit
def _gemv_kernel(
    x, qweight, qzeros, scales, sums, x_k, N, K, chunk,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums[s, n] = sum over the k of chunk s of x[k] W[k, n]."""
    # 1. Which columns, and which part of the inputs.
    n0, start = tl.program_id(0) * BLOCK_N, tl.program_id(1) * chunk
    n = n0 + tl.arange(0, BLOCK_N)

    # 2. Walk the inputs; the sum over the rows of a tile waits until the end.
    total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for k0 in range(start, tl.minimum(start + chunk, K), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        value = tl.load(x + k.to(tl.int64) * x_k, mask=k < K, other=0.0)
        tile = _weight_tile(qweight, qzeros, scales, k0, n0, K, N, GROUP, BLOCK_K, BLOCK_N)
        tile = tile.to(value.dtype).to(tl.float32)
        total += value.to(tl.float32)[:, None] * tile

    # 3. Store.
    tl.store(sums + tl.program_id(1) * N + n, tl.sum(total, 0), mask=n < N)


@jit
def _gemm_kernel(
    x, qweight, qzeros, scales, sums, x_m, x_k, M, N, K, chunk,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """sums[s, m, n] = sum over the k of chunk s of x[m, k] W[k, n]."""
    # 1. Which rows and columns, and which part of the inputs.
    m0, n0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    start = tl.program_id(2) * chunk
    m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    rows = x + (m.to(tl.int64) * x_m)[:, None]

    # 2. Walk the inputs, a tile of weights at a time.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(start, tl.minimum(start + chunk, K), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_tile = tl.load(rows + k.to(tl.int64) * x_k, mask=(m < M)[:, None] & (k < K), other=0.0)
        tile = _weight_tile(qweight, qzeros, scales, k0, n0, K, N, GROUP, BLOCK_K, BLOCK_N)
        tile = tile.to(x_tile.dtype)
        if UPCAST:  # Triton's interpreter multiplies bfloat16 wrongly, without an error
            x_tile, tile = x_tile.to(tl.float32), tile.to(tl.float32)
        total += tl.dot(x_tile, tile)

    # 3. Store.
    out = sums + ((tl.program_id(2) * M + m).to(tl.int64) * N)[:, None] + n
    tl.store(out, total, mask=(m < M)[:, None] & (n < N))


@jit
def _sum_kernel(sums, bias, out, size, N, S, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out[m, n] = sum_s sums[s, m, n] + bias[n], added in the order of s."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total, part = tl.zeros((BLOCK,), tl.float32), sums + i
    for _ in range(S):
        total += tl.load(part, mask=i < size, other=0.0)
        part += size
    if BIAS:
        total += tl.load(bias + i % N, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)


def _w4a16_matmul_triton(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    splits: int | None = None,
) -> Tensor:
    """Launch `_gemv_kernel` (one row) or `_gemm_kernel` on x (M, K), then `_sum_kernel`."""
    (M, K), N, group = x.shape, scales.shape[1], len(qweight) // len(scales)
    block_m, block_n = min(64, max(16, triton.next_power_of_2(M))), 64
    block_k = _block_k(K, group)
    programs = triton.cdiv(N, block_n) * (1 if M == 1 else triton.cdiv(M, block_m))
    splits = splits or max(1, min(16, _programs(x.device) // programs))
    chunk = triton.cdiv(triton.cdiv(K, splits), block_k) * block_k
    splits = triton.cdiv(K, chunk)
    sums = x.new_empty(splits, M, N, dtype=torch.float32)
    out = x.new_empty(M, N)
    packed = qweight.contiguous(), qzeros.contiguous(), scales.contiguous()
    blocks = {"GROUP": group, "BLOCK_N": block_n, "BLOCK_K": block_k}
    with torch.cuda.device_of(x):
        if M == 1:
            grid = triton.cdiv(N, block_n), splits
            _gemv_kernel[grid](x, *packed, sums, x.stride(1), N, K, chunk, **blocks)
        else:
            grid = triton.cdiv(M, block_m), triton.cdiv(N, block_n), splits
            _gemm_kernel[grid](
                x, *packed, sums, *x.stride(), M, N, K, chunk, **blocks,
                BLOCK_M=block_m, UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            )  # fmt: skip
        _sum_kernel[(triton.cdiv(M * N, 1024),)](
            sums, out if bias is None else bias.contiguous(), out, M * N, N, splits,
            BIAS=bias is not None, BLOCK=1024,
        )  # fmt: skip
    return out


def _dequantize_triton(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """Launch `_dequantize_kernel`."""
    K, N, group = len(qweight), scales.shape[1], len(qweight) // len(scales)
    block_k, out = _block_k(K, group), torch.empty(K, N, dtype=scales.dtype, device=scales.device)
    with torch.cuda.device_of(scales):
        _dequantize_kernel[(triton.cdiv(K, block_k), triton.cdiv(N, 128))](
            qweight.contiguous(), qzeros.contiguous(), scales.contiguous(), out, K, N,
            GROUP=group, BLOCK_K=block_k, BLOCK_N=128,
        )  # fmt: skip
    return out


# --- the product: the public function -------------------------------------------------------------


def w4a16_matmul(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x @ W + bias, W the weights that `dequantize` returns, rounded to x's dtype.

    Args:
        x: (..., K), float16, bfloat16 or float32; any strides.
        qweight, qzeros, scales: as for `dequantize`, on x's device.
        bias: (N,) of x's dtype, or None.

    Returns: (..., N) of x's dtype, added up in float32 by our kernels. No gradients flow through
    them.
    Raises: ValueError for dtypes, shapes or devices that do not fit.
    Cost: M rows need 2 M K N FLOPs; the weights are K N / 2 bytes and 2.5 K N / g more for scales
    and zeros, a quarter of float16. So few rows are bound by memory and up to four times as fast:
    the bound on an H200 (4.8 TB/s), K = 3584, N = 18944, g = 128, is 7.4 us for one row, 28 us in
    float16. Not measured yet.

    On a GPU one row takes a GEMV kernel, up to DEQUANTIZE_ROWS rows a GEMM kernel, both split over
    K where there are few columns; more rows, or float32, are dequantised once for the library's
    matmul.
    On a CPU few bfloat16 rows take PyTorch's int4 kernel, which rounds the scales to bfloat16 and
    not the weights; everything else is dequantised.
    """
    K, N, g = _check_packed(qweight, qzeros, scales)
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.shape[-1:] != (K,):
        raise ValueError(
            f"x must be float16, bfloat16 or float32 of shape (..., {K}), "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        raise ValueError(
            f"bias must be {x.dtype} ({N},), got {bias.dtype} of shape {tuple(bias.shape)}"
        )
    for tensor in (qweight, qzeros, scales, x if bias is None else bias):
        if tensor.device != x.device:
            raise ValueError(f"tensors must be on x's device {x.device}, got {tensor.device}")
    rows = x.reshape(-1, K)
    few = 0 < len(rows) <= DEQUANTIZE_ROWS
    if _on_triton(x) and few and x.dtype != torch.float32 and _block_k(K, g):
        y = _w4a16_matmul_triton(rows, qweight, qzeros, scales, bias)
    elif _fits_cpu_int4(rows, N, g) and not qweight.is_inference():  # these count no versions
        y = _cpu_int4_matmul(rows, qweight, qzeros, scales)
        y = y if bias is None else y + bias
    else:
        weight = dequantize(qweight, qzeros, scales).to(x.dtype)
        y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return y.view(*x.shape[:-1], N)


def _on_triton(x: Tensor) -> bool:
    """The one place that decides between the kernels and PyTorch."""
    return triton is not None and (x.is_cuda or INTERPRETED)


def _block_k(K: int, group: int) -> int:
    """Inputs in a tile, which must not cross groups; 0 if the kernels cannot take these groups."""
    block = 64 if group == K else math.gcd(64, group)
    return block if block >= 16 else 0


def _fits_cpu_int4(rows: Tensor, N: int, group: int) -> bool:
    return (
        rows.device.type == "cpu"
        and rows.dtype == torch.bfloat16
        and 0 < len(rows) <= CPU_INT4_ROWS
        and N % 16 == 0
        and group in (32, 64, 128, 256)
    )


def _programs(device: torch.device) -> int:
    """How many programs keep the chip busy: four per multiprocessor."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


# --- argument checks ------------------------------------------------------------------------------


def _group_size(group_size: int, K: int) -> int:
    """The group size in use: -1 means one group of all K inputs."""
    size = K if group_size == -1 else group_size
    if type(size) is not int or size < 1 or K % size:
        raise ValueError(f"group_size must divide the {K} inputs or be -1, got {group_size!r}")
    return size


def _check_packed(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[int, int, int]:
    """Refuse what is not a Linear in the "gemm" layout; its K, N and group size."""
    found = ", ".join(
        f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales))
    )
    if qweight.dtype == torch.int16:
        raise ValueError(f"the gemv_fast layout is not supported, accepted: gemm; got {found}")
    if (qweight.dtype, qzeros.dtype, scales.dtype) != (torch.int32, torch.int32, torch.float16):
        raise ValueError(f"packed codes must stay int32 and scales float16, got {found}")
    if qweight.dim() == qzeros.dim() == scales.dim() == 2:
        (K, words), (groups, N) = qweight.shape, scales.shape
        if words * 8 == N and qzeros.shape == (groups, words) and groups and K % groups == 0:
            return K, N, K // groups
        if K == groups and words * 8 != N:  # gemv packs along K: rows of codes are outputs
            raise ValueError(f"the gemv (llm-awq) layout is not supported, accepted: gemm; {found}")
    raise ValueError(
        f"qweight must be (K, N / 8), qzeros (K / g, N / 8) and scales (K / g, N), got {found}"
    )


# --- layers ---------------------------------------------------------------------------------------


class _Packed(nn.Module):
    """A layer whose buffers keep their dtypes: they move to another device as in any module, but a
    cast to another dtype leaves them alone."""

    def _apply(self, fn: Callable, recurse: bool = True) -> _Packed:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            if now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments) -> None:
        """As in any module, but codes of another dtype are refused, not cast."""
        for name, buffer in self.named_buffers(recurse=False):
            stored = state_dict.get(prefix + name, buffer)
            if stored.dtype != buffer.dtype:
                raise ValueError(f"{prefix}{name} must be {buffer.dtype}, got {stored.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _set_bias(self, bias: Tensor | None) -> None:
        """A copy of its own, so that casting one layer does not cast another."""
        bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)


class W4A16Linear(_Packed):
    """A Linear with packed four-bit weights. x (..., K) -> (..., N).

    Buffers: qweight, qzeros and scales as for `dequantize`. Whatever dtype the module is cast to,
    they stay int32 and float16; only the bias is cast. Raises: ValueError unless 8 divides N and
    the group size K.
    """

    def __init__(self, K: int, N: int, group_size: int = 128, bias: bool = False, device=None):
        super().__init__()
        if N % 8:
            raise ValueError(f"the number of outputs must be a multiple of 8, got {N}")
        groups, new = K // _group_size(group_size, K), {"device": device}
        self.register_buffer("qweight", torch.zeros(K, N // 8, dtype=torch.int32, **new))
        self.register_buffer("qzeros", torch.zeros(groups, N // 8, dtype=torch.int32, **new))
        self.register_buffer("scales", torch.zeros(groups, N, dtype=torch.float16, **new))
        self._set_bias(torch.zeros(N, **new) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 128) -> W4A16Linear:
        """Round a Linear's weights to the nearest codes."""
        N, K = linear.weight.shape
        layer = cls(K, N, group_size, device="meta")  # every tensor is set below
        codes, scales, zeros = quantize_groups(linear.weight, group_size)
        layer.qweight, layer.qzeros = pack(codes.T), pack(zeros.T)
        layer.scales = scales.T.contiguous()
        layer._set_bias(linear.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return w4a16_matmul(x, self.qweight, self.qzeros, self.scales, self.bias)

    def extra_repr(self) -> str:
        K, (groups, N) = len(self.qweight), self.scales.shape
        return f"{K}, {N}, group_size={K // groups}, bias={self.bias is not None}"


class W8A8Linear(_Packed):
    """A Linear with eight-bit weights and eight-bit arithmetic. x (..., K) -> (..., N).

        x_scale[m] = max_k |x[m, k]| / 127,    weight_scale[n] = max_k |W[n, k]| / 127
        y[m, n] = x_scale[m] * weight_scale[n] * sum_k round(x / x_scale) * weight + bias[n]

    with maxima of at least 1e-5. The sum is exact, in int32. Buffers: weight = round(W /
    weight_scale) (N, K) int8, and weight_scale (N,) float32. Raises: ValueError unless 8 divides K
    and N. Source: SmoothQuant (arXiv 2211.10438), weights per channel, activations per token.
    """

    def __init__(self, K: int, N: int, bias: bool = False, device=None):
        super().__init__()
        if K % 8 or N % 8:
            raise ValueError(f"inputs and outputs must be multiples of 8, got {K} and {N}")
        self.register_buffer("weight", torch.zeros(N, K, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(N, device=device))
        self._set_bias(torch.zeros(N, device=device) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> W8A8Linear:
        """Round a Linear's weights to int8. Raises: ValueError for NaN or infinite weights, and for
        sizes that the class refuses."""
        N, K = linear.weight.shape
        if not linear.weight.isfinite().all():
            raise ValueError("weights must be finite, got NaN or infinity")
        layer = cls(K, N, device="meta")  # every tensor is set below
        layer.weight, layer.weight_scale = _to_int8(linear.weight.detach())
        layer._set_bias(linear.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) of x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = _to_int8(rows)
        missing = max(0, 32 - len(rows))  # on a GPU `_int_mm` wants 17 rows at least
        codes = nn.functional.pad(codes.contiguous(), (0, 0, 0, missing))
        total = torch._int_mm(codes, self.weight.T)
        y = total[: len(rows)] * (scale[:, None] * self.weight_scale)
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], len(self.weight))

    def extra_repr(self) -> str:
        N, K = self.weight.shape
        return f"{K}, {N}, bias={self.bias is not None}"


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x (M, K) to codes int8 in [-127, 127] and scales (M,) float32."""
    x = x.float()
    scale = x.abs().amax(-1).clamp(min=1e-5) / 127
    return (x / scale[:, None]).round().to(torch.int8), scale


# --- AWQ ------------------------------------------------------------------------------------------

Inputs = list[tuple]  # the arguments of every call of a module; the first of them is x


@torch.no_grad()
def search_scale(
    module: nn.Module,
    linears: list[nn.Linear],
    inputs: Inputs,
    *,
    group_size: int = 128,
    grid: int = 20,
    heads: tuple[int, int] = (1, 1),
) -> Tensor:
    """The factors s (K,) on the input channels of some Linears that rounding hurts least.

        a = max((mean |x|)^alpha, 1e-4),    alpha in 0, 1 / grid, ..., 1 - 1 / grid
        s = a / sqrt(max a * min a)
        loss(alpha) = mean (module(x) - module(x) with weights rounded(W * s) / s)^2

    The smallest loss wins, alpha = 0 (s = 1, round to nearest) comes first, and only a smaller loss
    replaces it: on the calibration rows the result is never worse than rounding to nearest.

    Args:
        module: whose output is compared; it is called with the recorded arguments.
        linears: the Linears in it that read the same input x, (N, K) each.
        inputs: the arguments of its calls; the first is x, (..., K).
        group_size: as in `quantize_groups`.
        grid: how many alphas are tried.
        heads: (query heads per key head, head size) if x comes from key/value heads, each of which
            feeds several query heads: they must share their factors.

    Returns: s (K,) float32; the weights are left as they were.
    Raises: ValueError for NaN in the inputs or the outputs.
    Source: AWQ, section 3.2, without weight statistics ("duo scaling" off).
    """
    rows = sum(args[0].shape[:-1].numel() for args in inputs)
    mean = sum(args[0].flatten(0, -2).abs().double().sum(0) for args in inputs) / rows
    if not mean.isfinite().all():
        raise ValueError("calibration activations must be finite, got NaN or infinity")
    shared = mean.view(-1, *heads).mean(1, keepdim=True)  # (key heads, 1, head size)
    mean = shared.expand(-1, *heads).flatten().float()  # (K,)
    wanted = [module(*args) for args in inputs]
    weights = [linear.weight.data for linear in linears]
    best, best_loss = None, math.inf
    try:
        for step in range(grid):
            s = mean.pow(step / grid).clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
            s = torch.where(s.isfinite(), s, 1.0)
            for linear, weight in zip(linears, weights):
                linear.weight.data = (rounded(weight.float() * s, group_size) / s).to(weight.dtype)
            loss = sum(
                float((module(*args).float() - y.float()).square().sum())
                for args, y in zip(inputs, wanted)
            )
            if loss < best_loss:
                best, best_loss = s, loss
    finally:
        for linear, weight in zip(linears, weights):
            linear.weight.data = weight
    if best is None:
        raise ValueError("outputs of the calibration must be finite, got NaN or infinity")
    return best


@torch.no_grad()
def search_clip(weight: Tensor, inputs: list[Tensor], *, group_size: int = 128) -> Tensor:
    """The limit on |w| in every group that rounding hurts least, (N, K / g) in weight's dtype.

    Tried are 1.00, 0.95, ..., 0.55 times the largest |w|; the loss is the group's own part of the
    output error, sum over rows of (x . d)^2 = d gram d with d = w - rounded(clamped w) and gram =
    x^T x, so that the rows are needed for gram only. A strictly smaller loss wins. What the groups
    of one output gain apart they can lose together, for clipping errs towards zero everywhere: an
    output whose whole error does not fall keeps its largest |w|.

    weight (N, K); inputs: parts of x, (..., K) each. Raises: ValueError for NaN in the inputs.
    Source: AWQ's public code, which uses some 512 rows (all rows cost no more this way) and does
    not look at whole outputs (our choice: clipping never hurts on the calibration rows).
    """
    g = _group_size(group_size, weight.shape[1])
    gram = 0
    for x in inputs:
        x = x.flatten(0, -2).float().unflatten(1, (-1, g)).transpose(0, 1)  # (K / g, T, g)
        gram = gram + x.mT @ x  # (K / g, g, g)
    if not gram.isfinite().all():
        raise ValueError("calibration activations must be finite, got NaN or infinity")
    w = weight.detach().float().unflatten(1, (-1, g))
    largest = w.abs().amax(-1)  # (N, K / g)
    best, best_loss = largest.clone(), torch.full_like(largest, math.inf)
    for step in range(10):
        limit = largest * (1 - step / 20)
        clamped = w.clamp(-limit[..., None], limit[..., None])
        d = (w - rounded(clamped.flatten(1), g).view_as(w)).transpose(0, 1)  # (K / g, N, g)
        loss = ((d @ gram) * d).sum(-1).T  # (N, K / g)
        better = loss < best_loss
        best = torch.where(better, limit, best)
        best_loss = torch.where(better, loss, best_loss)

    def error(limit: Tensor) -> Tensor:  # of whole outputs, (N,)
        clamped = w.clamp(-limit[..., None], limit[..., None]).flatten(1)
        d = w.flatten(1) - rounded(clamped, g)
        return sum((x.flatten(0, -2).float() @ d.T).square().sum(0) for x in inputs)

    helps = error(best) < error(largest)
    return torch.where(helps[:, None], best, largest).to(weight.dtype)


@torch.no_grad()
def fold(
    producer: nn.Module, consumers: list[nn.Linear], s: Tensor, heads: tuple[int, int] = (1, 1)
) -> None:
    """Divide the outputs of a norm or Linear by s and multiply what reads them, (N, K) each, by s
    (K,); together they compute what they did. With `heads` (see `search_scale`) s repeats for the
    query heads of a key head; the producer makes key heads and takes the first of each. Raises:
    ValueError for a norm without weights."""
    if producer.weight is None:
        raise ValueError(f"a norm must have weights to be divided, got {producer}")
    own = s.view(-1, *heads)[:, 0].flatten()  # one factor for each output of the producer
    for parameter in (producer.weight, getattr(producer, "bias", None)):
        if parameter is not None:
            shape = (-1, *[1] * (parameter.dim() - 1))
            parameter.copy_(parameter / own.view(shape).to(parameter.dtype))
    for linear in consumers:
        linear.weight.mul_(s.to(linear.weight.dtype))


@torch.no_grad()
def quantize(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    group_size: int = 128,
    grid: int = 20,
    clip: bool = True,
    on_block: Callable[[int, int], None] | None = None,
) -> None:
    """Turn every Linear of the decoder's blocks into a `W4A16Linear`, in place.

    Block by block: run the calibration rows through the block as it is and record what its parts
    read; search the factors of all its four folds; apply them; clip all weights but those of
    queries and keys; round. The next block is calibrated on what the unrounded blocks computed.
    Held in memory are the rows before one block and inside it.

    Args:
        model: a `model.VLM`, or any module with `decoder.layers` of Llama blocks, called with
            (x, layer, ...) and named as there.
        batches: calibration rows, what `model(...)` takes: embeddings (1, T, E) as `VLM.embed`
            makes them, visual rows among them.
        group_size: as in `quantize_groups`; divides the inputs of every Linear.
        grid, clip: how many alphas `search_scale` tries; whether `search_clip` runs. With 1 and
            False every weight is rounded to nearest.
        on_block: called with (blocks done, blocks).

    Raises: ValueError for no batches, NaN in weights or activations, sizes that do not fit. The
    model is then quantised in part.
    """
    blocks = list(model.decoder.layers)
    check_sizes(model, group_size)
    calls = _first_calls(model, blocks[0], batches)
    for number, block in enumerate(blocks):
        attention, mlp = block.self_attn, block.mlp
        watched = [attention, attention.o_proj, mlp, mlp.down_proj]
        inputs, outputs = _record(block, watched, calls)
        _quantize_block(block, inputs, group_size, grid, clip)
        # The next block's arguments: its own input and number, everything else stays.
        calls = [(x, number + 1, *rest) for x, (_, _, *rest) in zip(outputs, calls)]
        if on_block:
            on_block(number + 1, len(blocks))


def check_sizes(model: nn.Module, group_size: int) -> None:
    """Raise ValueError if a Linear of the decoder's blocks cannot be quantised in such groups."""
    for name, linear in model.decoder.layers.named_modules():
        if isinstance(linear, W4A16Linear):
            raise ValueError(f"the model is quantised already, got {name} {linear}")
        if isinstance(linear, nn.Linear):
            _group_size(group_size, linear.in_features)
            if linear.out_features % 8:
                raise ValueError(f"{name} must have a multiple of 8 outputs, got {linear}")


def _quantize_block(
    block: nn.Module, inputs: dict[nn.Module, Inputs], group_size: int, grid: int, clip: bool
) -> None:
    """AWQ on one block, given what its parts read: search, fold, clip, round."""
    folds = folds_of(block)
    found = [
        search_scale(
            module, linears, inputs[module], group_size=group_size, grid=grid, heads=shared
        )
        for _, linears, module, shared in folds
    ]
    for (producer, linears, _, shared), s in zip(folds, found):
        fold(producer, linears, s, shared)
    for (_, linears, module, _), s in zip(folds, found) if clip else ():
        # The inputs were recorded before the folds, which divide them by s.
        x = [args[0] / s.to(args[0].dtype) for args in inputs[module]]
        for linear in linears:
            if linear not in (block.self_attn.q_proj, block.self_attn.k_proj):
                limit = search_clip(linear.weight, x, group_size=group_size)[..., None]
                groups = linear.weight.data.unflatten(1, (limit.shape[1], -1))
                linear.weight.data = groups.clamp(-limit, limit).flatten(1)
    replace_linears(block, lambda linear: W4A16Linear.from_linear(linear, group_size))


def folds_of(block: nn.Module) -> list[tuple[nn.Module, list[nn.Linear], nn.Module, tuple]]:
    """The four folds of a Llama block: what produces an input, which Linears read it, the module
    whose output tells how well they do, and `heads` as in `search_scale`."""
    attention, mlp = block.self_attn, block.mlp
    q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    heads = o.in_features // v.out_features, attention.head_dim
    return [
        (block.input_layernorm, [q, k, v], attention, (1, 1)),
        (v, [o], o, heads),
        (block.post_attention_layernorm, [gate, up], mlp, (1, 1)),
        (up, [down], down, (1, 1)),
    ]


def replace_linears(block: nn.Module, quantised: Callable[[nn.Linear], nn.Module]) -> None:
    """Put what `quantised` makes of a Linear in its place, for all of a block's."""
    for parent in (block.self_attn, block.mlp):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(parent, name, quantised(linear))


@contextmanager
def _hooked(*hooks) -> Iterator[None]:
    """Remove hooks afterwards, whatever happens."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Stop(Exception):
    """Ends a forward pass when its arguments have been seen."""


def _first_calls(model: nn.Module, block: nn.Module, batches: Iterable[Tensor]) -> Inputs:
    """The arguments with which every batch reaches the first block."""
    calls: Inputs = []

    def record(_, args: tuple) -> None:
        calls.append(args)
        raise _Stop

    with _hooked(block.register_forward_pre_hook(record)):
        for batch in batches:
            with suppress(_Stop):
                model(batch)
    if not calls:
        raise ValueError("batches must hold at least one batch, got none")
    return calls


def _record(
    block: nn.Module, modules: list[nn.Module], calls: Inputs
) -> tuple[dict[nn.Module, Inputs], list[Tensor]]:
    """Run a block on all calls: the arguments of every call of the modules, and its outputs."""
    inputs: dict[nn.Module, Inputs] = {module: [] for module in modules}

    def record(module: nn.Module, args: tuple) -> None:
        inputs[module].append(args)

    with _hooked(*(module.register_forward_pre_hook(record) for module in modules)):
        outputs = [block(*args) for args in calls]
    return inputs, outputs


# --- SmoothQuant ----------------------------------------------------------------------------------


@torch.no_grad()
def smooth(
    norm: nn.Module, linears: list[nn.Linear], largest: Tensor, *, alpha: float = 0.3
) -> Tensor:
    """Move the outliers of activations into the weights, where they cost less, and fold:

        s_j = largest_j^alpha / (max over the Linears of |W[:, j]|)^(1 - alpha)    (both >= 1e-5)

    norm: the LayerNorm that produces the activations; linears: all that read them; largest (K,):
    the largest |x_j| seen in calibration. Returns s (K,). Raises: ValueError for NaN.
    Source: SmoothQuant; alpha 0.3 from the public NVILA recipe, 0.5 in the paper.
    """
    if not largest.isfinite().all():
        raise ValueError("calibration activations must be finite, got NaN or infinity")
    weights = torch.stack([linear.weight.detach().abs().amax(0).float() for linear in linears])
    s = largest.float().clamp(min=1e-5).pow(alpha) / weights.amax(0).clamp(min=1e-5).pow(1 - alpha)
    s = s.clamp(min=1e-5)
    fold(norm, linears, s)
    return s


@torch.no_grad()
def quantize_tower(
    tower: nn.Module, batches: Iterable[Tensor], *, alpha: float | None = 0.3
) -> None:
    """Turn every Linear of a vision tower's blocks into a `W8A8Linear`, in place.

    tower: `layers` of pre-norm blocks named as `model.VisionBlock`; batches: pixels as it takes
    them. Smoothed are the inputs of queries, keys and values and of the first MLP layer; alpha None
    does not smooth. The patch embedding, positions and norms stay as they are.
    Raises: ValueError for no batches, for NaN, and for sizes that 8 does not divide. The tower is
    then quantised in part.
    """
    largest: dict[nn.Module, Tensor] = {}  # by norm: the largest |output| of each channel

    def record(norm: nn.Module, _, out: Tensor) -> None:
        now = out.flatten(0, -2).abs().amax(0).float()
        largest[norm] = torch.maximum(largest[norm], now) if norm in largest else now

    norms = [n for block in tower.layers for n in (block.layer_norm1, block.layer_norm2)]
    with _hooked(*(norm.register_forward_hook(record) for norm in norms)):
        for pixels in batches:
            tower(pixels)
    if not largest:
        raise ValueError("batches must hold at least one batch, got none")
    for block in tower.layers:
        attention = block.self_attn
        readers = {
            block.layer_norm1: [attention.q_proj, attention.k_proj, attention.v_proj],
            block.layer_norm2: [block.mlp.fc1],
        }
        for norm, linears in readers.items():
            if alpha is not None and norm in largest:  # parts of the last block may never run
                smooth(norm, linears, largest[norm], alpha=alpha)
        replace_linears(block, W8A8Linear.from_linear)


# --- checkpoints ----------------------------------------------------------------------------------


def group_size_of(settings: dict) -> int:
    """The group size that a checkpoint's `quantization_config` names (or the older
    quant_config.json, with its own spellings).

    Raises: ValueError for anything but AWQ with 4 bits, zero points and the "gemm" layout.
    """
    for key, found, accepted in (
        ("quant_method", settings.get("quant_method", "awq"), "awq"),
        ("bits", settings.get("bits", settings.get("w_bit")), 4),
        ("zero_point", settings.get("zero_point", True), True),
        ("version", str(settings.get("version", "gemm")).lower(), "gemm"),
    ):
        if found != accepted:
            raise ValueError(f"quantization {key} must be {accepted!r}, got {found!r}")
    group_size = settings.get("group_size", settings.get("q_group_size"))
    if type(group_size) is not int or not (group_size == -1 or group_size >= 1):
        raise ValueError(f"quantization group_size must be -1 or at least 1, got {group_size!r}")
    return group_size


def save(model: nn.Module, source: Path, target: Path, group_size: int) -> None:
    """Write a quantised model as a checkpoint folder like its source's: same file names, same
    tensor names, with qweight, qzeros and scales (AWQ) or weight and weight_scale (W8A8) in place
    of a quantised weight. The folder appears when it is complete, or not at all. An eight-bit tower
    is marked `vision_w8a8` in the settings: only `model.load` reads it.

    Raises: ValueError if the target exists; OSError if it cannot be written.
    """
    from model import PARTS

    check_target(target)
    folder = Path(tempfile.mkdtemp(prefix=".awq.", dir=target.parent))
    try:
        folder.chmod(0o755)
        for part in [source, *(source / name for name in PARTS if (source / name).is_dir())]:
            copy = folder / part.relative_to(source)
            copy.mkdir(exist_ok=True)
            for file in part.iterdir():
                kept = file.suffix in (".json", ".txt", ".model", ".jinja") and file.is_file()
                if kept and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, copy / file.name)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [
                *("vision_tower", "vision_model", "multi_modal_projector", "connector"),
                *("mm_projector", "lm_head"),
            ],
            "vision_w8a8": any(isinstance(module, W8A8Linear) for module in model.modules()),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        _save_weights(model, source, folder)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save_weights(model: nn.Module, source: Path, folder: Path) -> None:
    """Write the safetensors files, one for each of the source's, and their index."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    from model import weight_files

    written: dict[Path, dict[str, int]] = {}  # bytes of every tensor, by folder
    for file, prefix in weight_files(source).items():
        with safe_open(file, framework="pt") as content:
            tensors = {
                new: tensor.cpu().contiguous()
                for name in content.keys()
                for new, tensor in _replacements(model, prefix, name, content.get_tensor)
            }
        target = folder / file.relative_to(source)
        try:
            save_file(tensors, target, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise OSError(f"{target} cannot be written: {error}") from None
        shutil.copymode(file, target)
        sizes = {(name, file.name): tensor.nbytes for name, tensor in tensors.items()}
        written[target.parent] = written.get(target.parent, {}) | sizes
    for part, sizes in written.items():
        if {file for _, file in sizes} != {"model.safetensors"}:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": dict(sizes.keys()),
            }
            (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _replacements(
    model: nn.Module, prefix: str, name: str, stored: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors to write in place of one tensor of the source."""
    from model import not_needed, our_name

    ours = our_name(prefix + name)
    if not_needed(ours, model):  # but others may need it
        yield name, stored(name)
        return
    parent, _, leaf = ours.rpartition(".")
    module = model.get_submodule(parent)
    if leaf == "weight" and isinstance(module, _Packed):
        for buffer, tensor in module.named_buffers():
            yield name.removesuffix("weight") + buffer, tensor
    else:
        yield name, getattr(module, leaf).data


def check_target(target: Path) -> None:
    """Raise ValueError or OSError for a folder that cannot be made."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists already")
    if not target.parent.is_dir():
        raise ValueError(f"no folder to make {target} in")
    Path(tempfile.mkdtemp(prefix=".awq.", dir=target.parent)).rmdir()


def calibration(
    model: nn.Module, processor: Any, pictures: list, prompts: list[str], samples: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Pixels, and embeddings (1, T, E) of whole turns: picture, prompt and the model's own answer.
    Pictures and prompts are taken in turn, as often as needed. Of the visual tokens the most
    salient quarter is read, as SparseVILA's decoder does; with all of them the search would serve
    the background of the pictures more than the text."""
    pixels, batches = [], []
    for number in range(samples):
        picture = pictures[number % len(pictures)]
        views = processor.views([picture])
        pixels.append(processor.pixels(views))
        features, salience = model.encode(pixels[-1])
        keep = math.ceil(salience.shape[1] / 4)
        index = salience.topk(keep).indices.sort().values[..., None]  # (views, keep, 1)
        features = features.gather(1, index.expand(-1, -1, features.shape[2]))
        visual = model.project(features).flatten(0, 1)  # (V, E)
        ids = processor.context([keep] * len(views), views)
        ids += processor.question(prompts[number % len(prompts)], first=True, views=views)
        asked = model.embed(ids, visual)
        answer = model.generate(asked, max_new_tokens=32)
        batches.append(torch.cat([asked, model.embed(answer)], 1))
    return pixels, batches


def calibration_set(
    images: str | None, prompts: str | None, samples: int
) -> tuple[list, list[str], str]:
    """Pictures, prompts, and a sentence that says what they are. Raises: ValueError for folders and
    files that hold none."""
    from model import open_picture

    texts = None
    if prompts is not None:
        try:
            lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{prompts} is not UTF-8 text: {error}") from None
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise ValueError(f"{prompts} holds no prompts")
    if images is not None:
        files = sorted(p for p in Path(images).iterdir() if p.is_file() and p.name[0] != ".")
        if not files:
            raise ValueError(f"the folder {images} holds no pictures")
        pictures = [open_picture(file) for file in files[:samples]]
        return pictures, texts or ["Describe the picture."], f"{len(pictures)} pictures of {images}"
    import random

    from tiny.scenes import KINDS, make_scene, question_and_answer, render, to_images

    pictures, questions = [], []
    for number in range(samples):
        rng = random.Random(f"calibrate {number}")
        scene = make_scene(rng, 1)
        pictures += to_images(render(scene, rng))
        kind = KINDS[number % 4]  # all but the last, which asks about clips
        questions.append(question_and_answer(kind, scene, rng)[0])
    what = (
        f"{samples} pictures of tiny/scenes.py. They suit the tiny model. Other checkpoints see "
        "little of their usual input in them: give --images and --prompts"
    )
    return pictures, texts or questions, what


# --- benchmark: python awq.py --bench -------------------------------------------------------------

SHAPES = [  # (model, K, N): queries and outputs, keys and values, MLP
    ("Qwen2.5-VL-7B", 3584, 3584),
    ("Qwen2.5-VL-7B", 3584, 512),
    ("Qwen2.5-VL-7B", 3584, 18944),
    ("Qwen2.5-VL-7B", 18944, 3584),
    ("Llama-2-7B", 4096, 4096),
    ("Llama-2-7B", 4096, 11008),
    ("Llama-2-7B", 11008, 4096),
]
ROWS = (1, 2, 4, 8, 16, 64, 256, 1024)


def _time(calls: list[Callable], gpu: bool) -> float:
    """Milliseconds of one call; on a GPU all calls are recorded in one CUDA graph, so that the
    launches cost nothing."""
    calls[0]()
    if not gpu:
        times = []
        for call in calls:
            began = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - began))
        return sorted(times)[len(times) // 2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = triton.testing.do_bench(graph.replay, return_mode="median")
    return times / len(calls)


def benchmark() -> None:
    """Time `w4a16_matmul` beside the library's half-precision matmul, and the bound: the bytes of
    the packed weights, x and y over the measured copy bandwidth. On a GPU weights change from call
    to call, so that no cache holds them. The last line of the output is one JSON object."""
    gpu = torch.cuda.is_available()
    new = {"device": "cuda" if gpu else "cpu", "dtype": torch.float16 if gpu else torch.bfloat16}
    big = torch.empty(2**29 if gpu else 2**26, **new)
    copies = [partial(big.clone().copy_, big)] * 3
    bandwidth = 2 * big.nbytes / _time(copies, gpu)  # bytes per millisecond
    del big, copies
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {new['dtype']}, torch {torch.__version__}, copy {bandwidth / 1e6:.0f} GB/s")
    print(f"{'times in ms':44}{'ours':>9}{'library':>9}{'speedup':>9}{'bound':>9}{'reached':>9}")
    rows = []
    for what, K, N in SHAPES:
        copies = max(1, 2**28 // (K * N // 2)) if gpu else 3
        half = [torch.randn(K, N, **new) for _ in range(copies if gpu else 1)]
        packed = [
            (
                torch.randint(-(2**31), 2**31 - 1, (K, N // 8), device=new["device"]).int(),
                torch.randint(-(2**31), 2**31 - 1, (K // 128, N // 8), device=new["device"]).int(),
                torch.rand(K // 128, N, device=new["device"]).half(),
            )
            for _ in range(copies if gpu else 1)
        ]
        half, packed = (half * copies)[:copies], (packed * copies)[:copies]
        for M in ROWS if gpu else (1, 16, 256):
            x = torch.randn(M, K, **new)
            ours = _time([partial(w4a16_matmul, x, *p) for p in packed], gpu)
            library = _time([partial(torch.matmul, x, w) for w in half], gpu)
            size = sum(t.nbytes for t in packed[0]) + 2 * M * (K + N)
            bound = size / bandwidth
            label = f"{what}: M {M} K {K} N {N}"
            print(
                f"{label:44}{ours:9.4f}{library:9.4f}{library / ours:8.2f}x{bound:9.4f}"
                f"{bound / ours:9.0%}",
                flush=True,
            )
            rows.append({"row": label, "ours": ours, "library": library, "bound": bound})
    if not gpu:
        print("the Triton kernels and the other row counts need a GPU: not measured")
    print(json.dumps({"device": name, "bandwidth": bandwidth, "rows": rows}))


# --- the command line -----------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command line; `python awq.py --help` lists them."""
    parser = argparse.ArgumentParser(
        description="Quantise a checkpoint: 4-bit weights (AWQ) in the decoder, with --vision-w8a8 "
        "8-bit weights and activations (SmoothQuant) in the vision tower."
    )
    parser.add_argument("source", nargs="?", help="checkpoint folder or hub repository")
    parser.add_argument("target", nargs="?", help="folder to make")
    parser.add_argument("--group-size", type=int, default=128, metavar="G")
    parser.add_argument("--vision-w8a8", action="store_true")
    parser.add_argument("--images", metavar="DIR", help="pictures to calibrate on")
    parser.add_argument("--prompts", metavar="FILE", help="questions to calibrate on, one a line")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="calibration turns")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--bench", action="store_true", help="time the products instead")
    arguments = parser.parse_args(argv)
    given = [path for path in (arguments.source, arguments.target) if path is not None]
    if len(given) != (0 if arguments.bench else 2):
        parser.error("either SOURCE and TARGET are needed, or --bench alone")
    if arguments.samples < 1:
        parser.error(f"--samples must be at least 1, got {arguments.samples}")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Quantise as the command line asks. Raises: ValueError or OSError for bad input."""
    from model import fetch, load

    target = Path(arguments.target)
    check_target(target)
    pictures, prompts, what = calibration_set(
        arguments.images, arguments.prompts, arguments.samples
    )
    source = fetch(arguments.source)
    model, processor = load(source, device=arguments.device)
    check_sizes(model, arguments.group_size)
    print(f"calibrating on {what}.")
    before = model.weight_bytes
    pixels, batches = calibration(model, processor, pictures, prompts, arguments.samples)
    quantize(model, batches, group_size=arguments.group_size, on_block=_show_progress)
    if arguments.vision_w8a8:
        pixels = [p.to(model.device, model.dtype) for p in pixels]
        quantize_tower(model.vision_tower, pixels)
    save(model, source, target, arguments.group_size)
    print(f"wrote {target}: {model.weight_bytes:,} bytes of weights, {before:,} before")


def _show_progress(done: int, total: int) -> None:
    bar = "#" * (30 * done // total)
    end = "\n" if done == total else ""
    print(f"\r[{bar:30}] block {done} of {total}", end=end, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """The command line. Bad input ends it with one line on standard error and exit status 2."""
    arguments = parse_arguments(argv)
    try:
        benchmark() if arguments.bench else run(arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, RuntimeError) as error:  # out of memory is a RuntimeError
        print(f"awq.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    import awq  # as model.py does, so that there is one W4A16Linear and not two

    awq.main()
