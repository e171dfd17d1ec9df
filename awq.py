"""AWQ and SmoothQuant: four-bit weights for the decoder, eight-bit arithmetic for the vision tower.

    quantize_groups, pack, unpack, dequantize    the numbers and the file format (AutoAWQ's "gemm")
    w4a16_matmul                                 16-bit activations times 4-bit weights
    W4A16Linear, W8A8Linear                      what a Linear becomes
    search_scale, search_clip, quantize          the algorithm: AWQ, block by block
    smooth, quantize_tower                       SmoothQuant, for towers of LayerNorm blocks

    python awq.py SOURCE TARGET                  quantise a checkpoint (tools/quantise.py)

A weight is rounded to one of 16 values, (code - zero) * scale, with a scale and a zero for every
group of `group_size` inputs. AWQ (Lin et al., arXiv 2306.00978) makes rounding hurt less: an input
channel with large activations is multiplied by s > 1 in the weight matrix, where it is rounded
relatively finer, and divided by s in the layer that produces the activation (a *fold*). Every s
comes from a search that compares the layer's output before and after rounding.

Axes: rows of activations; inputs and outputs of a Linear; g group size; T rows of a calibration
turn, E decoder width. A Linear's weight is (outputs, inputs), as in PyTorch; the packed tensors are
(inputs, outputs), as in the files; any strides. Results are new, contiguous tensors.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl

    jit, INTERPRETED = triton.jit, bool(triton.knobs.runtime.interpret)
except (ImportError, AttributeError):  # none, or one before 3.4: PyTorch everywhere
    triton, jit, INTERPRETED = None, lambda kernel: kernel, False

# On a GPU, with more rows: dequantise once, then the library's matmul. At 256 rows of an H100 both
# take as long, whatever the tiles.
DEQUANTIZE_ROWS = 128
CPU_INT4_ROWS = 32  # on a CPU, with at most that many bfloat16 rows: PyTorch's own int4 kernel
CPU_PLAIN = 2**21  # on a CPU, a matrix of at most that many weights is kept dequantised
INT8_ROWS = 1024  # without our kernels, at a time: to ask for larger tensors takes longer


# --- numbers and file format ----------------------------------------------------------------------


def quantize_groups(weight: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Round every group of weights to 16 evenly spaced values.

        scale = max(max(w, 0) - min(w, 0), 1e-5) / 15, rounded to float16
        zero  = round(-min(w, 0) / scale), at most 15
        code  = clamp(round(w / scale) + zero, 0, 15)

    so that (code - zero) * scale is the nearest of 16 values to w, and 0 stays 0.

    Args:
        weight: (outputs, inputs), any floating dtype; the arithmetic is float32.
        group_size: consecutive inputs that share scale and zero, g; divides their number; -1 means
            all of them.

    Returns: codes (outputs, inputs) int8 in [0, 15], scales (outputs, inputs / g) float16, zeros
    (outputs, inputs / g) int8 in [0, 15].
    Raises: ValueError for other shapes and group sizes, NaN or infinite weights, and scales beyond
    float16. Source: `pseudo_quantize_tensor` of llm-awq's quantizer.py, with zero point; that the
    range always includes 0, else a group of one sign would collapse, is our choice.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        found = f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"weight must be floating point (outputs, inputs), got {found}")
    w = weight.detach().float().contiguous()
    w = w.unflatten(1, (-1, _group_size(group_size, weight.shape[1])))
    if not w.isfinite().all():
        raise ValueError("weights must be finite, got NaN or infinity")
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)  # (outputs, inputs / g)
    scales = ((high - low).clamp(min=1e-5) / 15).half()
    if scales.isinf().any():
        raise ValueError(f"weights up to {float(w.abs().max()):.3g} need scales beyond float16")
    scale = scales.float()[..., None]
    zeros = (-low[..., None] / scale).round().clamp(0, 15)
    codes = ((w / scale).round() + zeros).clamp(0, 15)
    return codes.flatten(1).to(torch.int8), scales, zeros[..., 0].to(torch.int8)


def rounded(weight: Tensor, group_size: int = 128) -> Tensor:
    """What is left of weight (outputs, inputs) after `quantize_groups`, in float32."""
    codes, scales, zeros = quantize_groups(weight, group_size)
    codes = codes.unflatten(1, (scales.shape[1], -1))
    return ((codes - zeros[..., None]) * scales.float()[..., None]).flatten(1)


def pack(codes: Tensor) -> Tensor:
    """Codes (rows, outputs) in [0, 15] to int32 words (rows, outputs / 8); of eight columns the
    c-th goes to bit 0, 16, 4, 20, 8, 24, 12 or 28, so that codes 0 .. 7 give 0x75316420.

    Raises: ValueError for other codes and if 8 does not divide the outputs. Source: AutoAWQ's
    "gemm" format.
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
    """packed, int32 words (rows, outputs / 8) -> codes (rows, outputs) int8: the inverse of `pack`.
    Raises: ValueError for anything else."""
    if packed.dim() != 2 or packed.dtype != torch.int32:
        found = f"{packed.dtype} {packed.dim()}-d"
        raise ValueError(f"packed must be int32 (rows, outputs / 8), got {found}")
    nibbles = packed[..., None] >> _shifts(packed) & 0xF  # the mask removes the sign's bits
    return nibbles.to(torch.int8).flatten(1)


def _shifts(like: Tensor) -> Tensor:
    """Where column c of eight lies in its 32-bit word: bits 0, 16, 4, 20, 8, 24, 12, 28."""
    column = torch.arange(8, dtype=torch.int32, device=like.device)
    return column % 2 * 16 + column // 2 * 4


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """The weights of a packed Linear: W[k, n] = (code[k, n] - zero[k // g, n]) * scale[k // g, n].

    Args:
        qweight: (inputs, outputs / 8) int32 packed codes.
        qzeros: (inputs / g, outputs / 8) int32 packed zeros.
        scales: (inputs / g, outputs) float16; their number of rows tells the group size.

    Returns: (inputs, outputs) float16. The difference is exact and the product is rounded once, so
    that any two correct implementations agree bit for bit.
    Raises: ValueError for other dtypes and shapes, naming another layout where it is recognised.
    Source: AutoAWQ's "gemm" format.
    """
    inputs, _, group = _check_packed(qweight, qzeros, scales)
    if _on_triton(qweight) and _block_in(group):
        return _dequantize_triton(qweight, qzeros, scales)
    return dequantize_reference(qweight, qzeros, scales)


def dequantize_reference(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """`dequantize` in plain PyTorch."""
    zeros = unpack(qzeros)[:, None]  # (inputs / g, 1, outputs)
    codes = unpack(qweight).view(len(scales), -1, zeros.shape[2])  # (inputs / g, g, outputs)
    return ((codes - zeros) * scales[:, None]).flatten(0, 1)


# --- the product ----------------------------------------------------------------------------------


def w4a16_matmul(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x @ W + bias, W the weights that `dequantize` returns, rounded to x's dtype.

    Args:
        x: (..., inputs), float16, bfloat16 or float32; any strides.
        qweight, qzeros, scales: as for `dequantize`, on x's device.
        bias: (outputs,) of x's dtype, or None.

    Returns: (..., outputs) of x's dtype, added up in float32 by our kernels. No gradients flow
    through them.
    Raises: ValueError for dtypes, shapes or devices that do not fit.
    Cost: rows need 2 inputs * outputs FLOPs each; the weights are inputs * outputs / 2 bytes and
    5 / g as much again for scales and zeros, a quarter of float16. So few rows are bound by memory
    and up to four times as fast.

    On a GPU one row takes a GEMV kernel, up to DEQUANTIZE_ROWS rows a GEMM kernel; more rows, or
    float32, are dequantised once for the library's matmul.

    On a CPU small matrices are dequantised at the first call, and kept: to start a product takes
    longer than to read them. Of others, few bfloat16 rows take PyTorch's int4 kernel, which rounds
    scales, weights and sums to bfloat16 one after the other: errors of up to 2^-7 of a weight and
    2^-15 scales on top. Everything else is dequantised, block by block of inputs, and multiplied
    while the processor's cache holds it; in float32 where there are no products in x's dtype, and
    then W is not rounded to that. For bfloat16 rows it is not rounded to float16 either.
    """
    inputs, outputs, group = _check_packed(qweight, qzeros, scales)
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.shape[-1:] != (inputs,):
        raise ValueError(
            f"x must be float16, bfloat16 or float32 of shape (..., {inputs}), "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    if bias is not None and (bias.shape != (outputs,) or bias.dtype != x.dtype):
        raise ValueError(
            f"bias must be {x.dtype} ({outputs},), got {bias.dtype} of shape {tuple(bias.shape)}"
        )
    for tensor in (qweight, qzeros, scales, x if bias is None else bias):
        if tensor.device != x.device:
            raise ValueError(f"tensors must be on x's device {x.device}, got {tensor.device}")
    few = 0 < x.numel() <= DEQUANTIZE_ROWS * inputs
    if _on_triton(x) and few and x.dtype != torch.float32 and _block_in(group):
        y = _w4a16_matmul_triton(x.reshape(-1, inputs), qweight, qzeros, scales, bias)
        return y.view(*x.shape[:-1], outputs)
    if x.is_cpu and x.numel():
        compiling = torch.compiler.is_compiling()
        product = torch.ops.sparsevila.cpu_w4a16_matmul if compiling else _cpu_matmul
        return product(x, bias, qweight, qzeros, scales)
    weight = dequantize(qweight, qzeros, scales).to(x.dtype)
    return nn.functional.linear(x, weight.T, bias)


def w4a16_matmul_reference(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`w4a16_matmul` in plain PyTorch: weights rounded to x's dtype, arithmetic in float32."""
    weight = dequantize_reference(qweight, qzeros, scales).to(x.dtype)
    y = x.float() @ weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


# --- the product: on a CPU ------------------------------------------------------------------------

CPU_BLOCK = 2**20  # weights that are dequantised at a time: 4 MB in float32
CPU_WORDS = 512  # of a row at a time, 4096 outputs: sums for more of them leave the cache


def _cpu_matmul(x: Tensor, bias: Tensor | None, *packed: Tensor) -> Tensor:
    """x (..., inputs) times the weights (qweight, qzeros, scales) + bias, see `w4a16_matmul`."""
    (inputs, words), plain = packed[0].shape, None
    keep = not any(map(Tensor.is_inference, packed))  # such tensors count no versions
    if keep and 8 * inputs * words <= CPU_PLAIN:
        plain = _kept(_plain_weight, x.dtype, *packed)
        if x.numel() == inputs and x.dtype != torch.float32:  # PyTorch's own loops
            return nn.functional.linear(x, plain, bias)
    rows = x.reshape(-1, inputs)
    few = x.dtype == torch.bfloat16 and len(rows) <= CPU_INT4_ROWS
    if plain is not None:
        y = _cpu_plain_matmul(rows, plain)
    elif keep and few and words % 2 == 0 and inputs // len(packed[2]) in (32, 64, 128, 256):
        y = _cpu_int4_matmul(rows, *packed)
    else:
        widths = CPU_WORDS, CPU_WORDS, 8 * CPU_WORDS
        parts = zip(*(tensor.split(width, 1) for tensor, width in zip(packed, widths)))
        y = torch.cat([_cpu_blocks_matmul(rows, *part) for part in parts], 1)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], 8 * words)


# torch.compile takes the product as one operation. Else it makes constants of what `_kept` checks,
# and compiles every layer anew. The first copy of this file in a process defines it for all.
if not hasattr(torch.ops.sparsevila, "cpu_w4a16_matmul"):
    torch.library.define(
        "sparsevila::cpu_w4a16_matmul",
        "(Tensor x, Tensor? bias, Tensor qweight, Tensor qzeros, Tensor scales) -> Tensor",
    )
    torch.library.impl("sparsevila::cpu_w4a16_matmul", "CPU", _cpu_matmul)

    @torch.library.register_fake("sparsevila::cpu_w4a16_matmul")
    def _(x, bias, qweight, qzeros, scales):
        return x.new_empty(*x.shape[:-1], scales.shape[1])


def _plain_weight(dtype: torch.dtype, *packed: Tensor) -> Tensor:
    return dequantize(*packed).to(dtype).T.contiguous()  # (outputs, inputs)


def _cpu_plain_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, inputs) times weight (outputs, inputs), in four parts, which MKL spreads over the
    cores even if rows are few."""
    wide = x if _multiplied(x.dtype) else x.float()
    parts = weight.to(wide.dtype).view(4, -1, x.shape[1])
    y = wide.expand(4, -1, -1) @ parts.mT
    return y.transpose(0, 1).flatten(1).to(x.dtype)


def _cpu_blocks_matmul(x: Tensor, *packed: Tensor) -> Tensor:
    """x (rows, inputs) times the weights, dequantised a block after the other."""
    inputs, words = packed[0].shape
    wide = x if _multiplied(x.dtype) else x.float()
    blocks = _blocks(*packed, rounded=x.dtype != torch.bfloat16)
    if wide.dtype == torch.float32:
        y = wide.new_zeros(4, len(x), 2 * words)
        for here, block in blocks:
            y.baddbmm_(wide[:, here].expand(4, -1, -1), block)
    else:  # products of blocks would be rounded to 16 bits before they are added up
        weight = wide.new_empty(4, inputs, 2 * words)
        for here, block in blocks:
            weight[:, here] = block
        y = wide @ weight
    return y.unflatten(2, (words, 2)).permute(1, 2, 0, 3).flatten(1).to(x.dtype)


def _blocks(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, rounded: bool
) -> Iterator[tuple[slice, Tensor]]:
    """The weights of some groups after the other, in the same memory: of which inputs, and (4, n,
    outputs / 4) float32, where [t] are columns 2 t and 2 t + 1 of every eight, rounded as in
    `dequantize` or not at all.

    Four bits in the last place of the float16 1024 make 1024 + code. Two such numbers are made at a
    time, of bits 4 t to 4 t + 3 of a word and of those 16 above. A weight is number * scale - (1024
    + zero) * scale: in float32 both products and the difference are exact."""
    (inputs, words), groups = qweight.shape, len(scales)
    group = inputs // groups
    step = group * max(1, CPU_BLOCK // max(1, 8 * words * group))
    shifts = _shifts(qweight)[::2, None, None]  # of columns 0, 2, 4 and 6

    def numbers(packed: Tensor, out: Tensor | None = None) -> Tensor:  # (4, n, outputs / 4) float16
        out = torch.bitwise_right_shift(packed, shifts, out=out)
        return out.bitwise_and_(0x000F000F).bitwise_or_(0x64006400).view(torch.float16)

    scale = scales.unflatten(1, (words, 4, 2)).permute(2, 0, 1, 3).flatten(2).float()
    offset = -scale * numbers(qzeros)  # (4, groups, outputs / 4)
    halves = qweight.new_empty(4, min(step, inputs), words)
    floats = scale.new_empty(4, min(step, inputs), 2 * words)
    for start in range(0, inputs, step):
        here = slice(start, min(start + step, inputs))
        n, of = here.stop - start, slice(start // group, here.stop // group)
        half = numbers(qweight[here], halves[:, :n])
        block = floats[:, :n].copy_(half)
        groupwise = block.unflatten(1, (-1, group))
        torch.addcmul(offset[:, of, None], groupwise, scale[:, of, None], out=groupwise)
        yield here, block.copy_(half.copy_(block)) if rounded else block


_KEPT: dict[int, tuple] = {}  # id(qweight) -> (what it was made of and how, what was made)


def _kept(make: Callable, dtype: torch.dtype, *packed: Tensor):
    """make(dtype, *packed), kept until one of the tensors is replaced or changed (unless through
    `.data` or numpy, which PyTorch does not see)."""
    source = make, dtype, [(id(t), t.data_ptr(), t._version) for t in packed]
    made_of, made, *_ = _KEPT.get(id(packed[0]), (None, None))
    if made_of != source:
        with torch.inference_mode(False):  # it may be used where gradients are wanted
            made = make(dtype, *packed)
        if id(packed[0]) not in _KEPT:
            weakref.finalize(packed[0], _KEPT.pop, id(packed[0]), None)
        _KEPT[id(packed[0])] = source, made, *packed[1:]  # held, so that no id is used again
    return made


def _int4_packing(
    dtype: torch.dtype, qweight: Tensor, qzeros: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What PyTorch's int4 kernel wants (once more the memory of the codes): w = (code - 8) * scale
    + offset, with scale and offset in bfloat16; and by what the offset is off, in float32."""
    codes = unpack(qweight).T.int().contiguous()
    steps = scales.to(dtype).float()
    offsets = (8 - unpack(qzeros).float()) * steps
    both = torch.stack([steps, offsets], -1).to(dtype)  # (inputs / g, outputs, 2)
    converted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    return converted, both, both[..., 1].float() - offsets


def _cpu_int4_matmul(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """x (rows, inputs) bfloat16 times the weights by PyTorch's int4 kernel. By what the offset is
    off, a whole group is, weights of 0 too: that is taken back in float32."""
    codes, both, off = _kept(_int4_packing, x.dtype, qweight, qzeros, scales)
    group = len(qweight) // len(scales)
    x = x.contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, both)
    return y.sub_(x.view(len(x), -1, group).sum(-1, dtype=torch.float32) @ off)


@cache
def _multiplied(dtype: torch.dtype) -> bool:
    """As in kernels.py: whether this processor's oneDNN multiplies matrices of a dtype."""
    if dtype == torch.int8:
        return torch.cpu._is_vnni_supported()
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)
    return name is None or supported()


# --- the product: Triton --------------------------------------------------------------------------


@jit
def _unpack_tile(words):
    """Words (rows, n) to codes (rows, 8 n), as in `_shifts`, as float16 numbers 1024 + code: those
    are the bits 0x6400 + code, so that no integer is converted, and two halves of a word are masked
    at a time. The 1024 goes in the difference of code and zero, which stays exact."""
    words = tl.interleave(words, words >> 8)
    words = tl.interleave(words, words >> 4)
    halves = words & 0x000F000F | 0x64006400
    low, high = halves.to(tl.int16), (halves >> 16).to(tl.int16)
    return tl.interleave(low, high).to(tl.float16, bitcast=True)


@jit
def _weight_tile(
    qweight, qzeros, scales, i0, o0, outputs,
    GROUP: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """W[i0 : i0 + BLOCK_IN, o0 : o0 + BLOCK_OUT] in float16. A tile lies within one group, so it
    needs one row of scales and zeros, and no mask for its rows."""
    i, o = tl.arange(0, BLOCK_IN), o0 + tl.arange(0, BLOCK_OUT)
    word = o0 // 8 + tl.arange(0, BLOCK_OUT // 8)  # the words that hold these columns
    row_size, group = outputs // 8, i0 // GROUP
    codes = tl.load(
        qweight + i0 * row_size.to(tl.int64) + (i * row_size)[:, None] + word,
        mask=(word < row_size)[None, :],
        other=0,
    )
    zeros = tl.load(qzeros + group * row_size + word, mask=word < row_size, other=0)
    scale = tl.load(scales + group * outputs + o, mask=o < outputs, other=0.0)
    return (_unpack_tile(codes) - _unpack_tile(zeros[None, :])) * scale


@jit
def _dequantize_kernel(
    qweight, qzeros, scales, out, outputs,
    GROUP: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """out[i, o] = W[i, o]."""
    i0, o0 = tl.program_id(0) * BLOCK_IN, tl.program_id(1) * BLOCK_OUT
    tile = _weight_tile(qweight, qzeros, scales, i0, o0, outputs, GROUP, BLOCK_IN, BLOCK_OUT)
    i, o = i0 + tl.arange(0, BLOCK_IN), o0 + tl.arange(0, BLOCK_OUT)
    tl.store(out + (i.to(tl.int64) * outputs)[:, None] + o, tile, mask=(o < outputs)[None, :])


@jit
def _gemv_kernel(
    x, qweight, qzeros, scales, sums, x_in, outputs, inputs, chunk,
    GROUP: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """sums[p, o] = sum over the i of part p of x[i] W[i, o]."""
    # 1. Which columns, and which part of the inputs.
    o0, start = tl.program_id(0) * BLOCK_OUT, tl.program_id(1) * chunk
    o = o0 + tl.arange(0, BLOCK_OUT)

    # 2. Walk the inputs; the sum over the rows of a tile waits until the end.
    total = tl.zeros((BLOCK_IN, BLOCK_OUT), tl.float32)
    for i0 in tl.range(start, tl.minimum(start + chunk, inputs), BLOCK_IN, num_stages=4):
        i = i0 + tl.arange(0, BLOCK_IN)
        value = tl.load(x + i.to(tl.int64) * x_in)
        tile = _weight_tile(qweight, qzeros, scales, i0, o0, outputs, GROUP, BLOCK_IN, BLOCK_OUT)
        tile = tile.to(value.dtype).to(tl.float32)
        total += value.to(tl.float32)[:, None] * tile

    # 3. Store.
    tl.store(sums + tl.program_id(1) * outputs + o, tl.sum(total, 0), mask=o < outputs)


@jit
def _gemm_kernel(
    x, qweight, qzeros, scales, sums, x_row, x_in, rows, outputs, inputs, chunk,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """sums[p, r, o] = sum over the i of part p of x[r, i] W[i, o]."""
    # 1. Which rows and columns, and which part of the inputs.
    r0, o0 = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_OUT
    start = tl.program_id(2) * chunk
    r, o = r0 + tl.arange(0, BLOCK_ROWS), o0 + tl.arange(0, BLOCK_OUT)
    row = x + (r.to(tl.int64) * x_row)[:, None]

    # 2. Walk the inputs, a tile of weights at a time.
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for i0 in range(start, tl.minimum(start + chunk, inputs), BLOCK_IN):
        i = i0 + tl.arange(0, BLOCK_IN)
        x_tile = tl.load(row + i.to(tl.int64) * x_in, mask=(r < rows)[:, None], other=0.0)
        tile = _weight_tile(qweight, qzeros, scales, i0, o0, outputs, GROUP, BLOCK_IN, BLOCK_OUT)
        tile = tile.to(x_tile.dtype)
        if UPCAST:  # Triton's interpreter multiplies bfloat16 wrongly, without an error
            x_tile, tile = x_tile.to(tl.float32), tile.to(tl.float32)
        total += tl.dot(x_tile, tile)

    # 3. Store.
    out = sums + ((tl.program_id(2) * rows + r).to(tl.int64) * outputs)[:, None] + o
    tl.store(out, total, mask=(r < rows)[:, None] & (o < outputs))


@jit
def _sum_kernel(
    sums, bias, out, size, outputs, parts,
    BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[r, o] = sum_p sums[p, r, o] + bias[o]."""
    at, p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_P)
    here = (p < parts)[:, None] & (at < size)
    total = tl.sum(tl.load(sums + p.to(tl.int64)[:, None] * size + at, mask=here, other=0.0), 0)
    if BIAS:
        total += tl.load(bias + at % outputs, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@jit
def _to_int8_kernel(x, codes, scales, x_row, x_in, inputs, BLOCK: tl.constexpr):
    """scales[r] = max_i |x[r, i]| / 127, codes[r, i] = round(x[r, i] * (1 / scales[r])). (To divide
    takes three times as long, and gives another code only where two are as near.)"""
    r, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + r * x_row + i.to(tl.int64) * x_in, mask=i < inputs, other=0.0)
    value = value.to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(value), 0), 1e-5), 127.0)
    code = value * (1.0 / scale) + 12582912.0 - 12582912.0  # 1.5 * 2^23: rounds half to even
    tl.store(codes + r * inputs + i, code.to(tl.int8), mask=i < inputs)
    tl.store(scales + r, scale + tl.sum(value * 0.0, 0))  # NaN and infinity stay visible


@jit
def _w8a8_kernel(
    codes, scales, weight, weight_scale, bias, out, rows, outputs, inputs,
    BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """out[r, o] = scales[r] weight_scale[o] sum_i codes[r, i] weight[o, i] + bias[o]."""
    # 1. Which rows and columns.
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o, i = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    left = codes + (r.to(tl.int64) * inputs)[:, None] + i
    right = weight + o.to(tl.int64) * inputs + i[:, None]

    # 2. Add up in int32, which is exact.
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.int32)
    for i0 in range(0, inputs, BLOCK_IN):
        here = i < inputs - i0
        x_tile = tl.load(left, mask=(r < rows)[:, None] & here, other=0)
        w_tile = tl.load(right, mask=(o < outputs) & here[:, None], other=0)
        total = tl.dot(x_tile, w_tile, total, out_dtype=tl.int32)
        left, right = left + BLOCK_IN, right + BLOCK_IN

    # 3. Scale and store.
    row_scale = tl.load(scales + r, mask=r < rows, other=0.0)
    scale = tl.load(weight_scale + o, mask=o < outputs, other=0.0)
    y = total.to(tl.float32) * (row_scale[:, None] * scale)
    if BIAS:
        y += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)
    at = out + (r.to(tl.int64) * outputs)[:, None] + o
    tl.store(at, y.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (o < outputs))


def _w4a16_matmul_triton(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    parts: int | None = None,
) -> Tensor:
    """Launch `_gemv_kernel` (one row) or `_gemm_kernel` on x (rows, inputs), then `_sum_kernel`.
    With few outputs the inputs are split into parts, so that all of the chip works."""
    (rows, inputs), outputs, group = x.shape, scales.shape[1], len(qweight) // len(scales)
    block_rows, block_in = min(128, max(16, triton.next_power_of_2(rows))), _block_in(group)
    # By trial on an H100: outputs of a tile, warps, and programs that keep a multiprocessor busy.
    block_out = 64
    num_warps, busy = (1, 8) if rows == 1 else (2, 8) if rows <= 32 else (4, 4)
    programs = triton.cdiv(outputs, block_out) * triton.cdiv(rows, block_rows)
    parts = parts or max(1, min(32, busy * _multiprocessors(x.device) // programs))
    chunk = triton.cdiv(triton.cdiv(inputs, parts), block_in) * block_in
    parts = triton.cdiv(inputs, chunk)
    sums = x.new_empty(parts, rows, outputs, dtype=torch.float32)
    out = x.new_empty(rows, outputs)
    packed = qweight.contiguous(), qzeros.contiguous(), scales.contiguous()
    blocks = {"GROUP": group, "BLOCK_OUT": block_out, "BLOCK_IN": block_in, "num_warps": num_warps}
    with torch.cuda.device_of(x):
        if rows == 1:
            grid = triton.cdiv(outputs, block_out), parts
            _gemv_kernel[grid](x, *packed, sums, x.stride(1), outputs, inputs, chunk, **blocks)
        else:
            grid = triton.cdiv(rows, block_rows), triton.cdiv(outputs, block_out), parts
            _gemm_kernel[grid](
                x, *packed, sums, *x.stride(), rows, outputs, inputs, chunk, **blocks,
                BLOCK_ROWS=block_rows, UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            )  # fmt: skip
        block_p = triton.next_power_of_2(parts)
        block = 2048 // block_p
        _sum_kernel[(triton.cdiv(rows * outputs, block),)](
            sums, out if bias is None else bias.contiguous(), out, rows * outputs, outputs, parts,
            BIAS=bias is not None, BLOCK_P=block_p, BLOCK=block,
        )  # fmt: skip
    return out


def _dequantize_triton(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """Launch `_dequantize_kernel`."""
    inputs, outputs, group = len(qweight), scales.shape[1], len(qweight) // len(scales)
    out = torch.empty(inputs, outputs, dtype=scales.dtype, device=scales.device)
    block_in = _block_in(group)
    with torch.cuda.device_of(scales):
        _dequantize_kernel[(triton.cdiv(inputs, block_in), triton.cdiv(outputs, 128))](
            qweight.contiguous(), qzeros.contiguous(), scales.contiguous(), out, outputs,
            GROUP=group, BLOCK_IN=block_in, BLOCK_OUT=128,
        )  # fmt: skip
    return out


def _w8a8_matmul_triton(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Launch `_to_int8_kernel` and `_w8a8_kernel` on x (rows, inputs)."""
    (rows, inputs), outputs = x.shape, len(weight)
    codes = x.new_empty(rows, inputs, dtype=torch.int8)
    scales = x.new_empty(rows, dtype=torch.float32)
    out = x.new_empty(rows, outputs)
    with torch.cuda.device_of(x):
        _to_int8_kernel[(rows,)](
            x, codes, scales, *x.stride(), inputs, BLOCK=triton.next_power_of_2(inputs)
        )
        _w8a8_kernel[(triton.cdiv(rows, 128), triton.cdiv(outputs, 128))](
            codes, scales, weight.contiguous(), weight_scale.contiguous(),
            out if bias is None else bias.contiguous(), out, rows, outputs, inputs,
            BIAS=bias is not None, BLOCK_ROWS=128, BLOCK_OUT=128, BLOCK_IN=128, num_warps=8,
        )  # fmt: skip
    return out


def _on_triton(x: Tensor) -> bool:
    """The one place that decides between the kernels and PyTorch."""
    return triton is not None and (x.is_cuda or INTERPRETED)


def _block_in(group: int) -> int:
    """Inputs in a tile, which must not cross groups; 0 if the kernels cannot take these groups."""
    block = math.gcd(64, group)
    return block if block >= 16 else 0


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- argument checks ------------------------------------------------------------------------------


def _group_size(group_size: int, inputs: int) -> int:
    """The group size in use: -1 means one group of all inputs inputs."""
    size = inputs if group_size == -1 else group_size
    if size not in range(1, inputs + 1) or inputs % size:
        raise ValueError(f"group_size must divide the {inputs} inputs or be -1, got {group_size!r}")
    return int(size)


def _check_packed(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[int, int, int]:
    """Refuse what is not a Linear in the "gemm" layout; its inputs, outputs and group size."""
    right = (qweight.dtype, qzeros.dtype, scales.dtype) == (torch.int32, torch.int32, torch.float16)
    matrices = qweight.dim() == qzeros.dim() == scales.dim() == 2
    (inputs, words), (groups, outputs) = (qweight.shape, scales.shape) if matrices else [(0, 0)] * 2
    fits = groups and inputs % groups == 0 and qzeros.shape == (groups, words)
    if right and fits and words * 8 == outputs:
        return inputs, outputs, inputs // groups
    found = ", ".join(
        f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales))
    )
    if qweight.dtype == torch.int16:
        raise ValueError(f"the gemv_fast layout is not supported, accepted: gemm; got {found}")
    if not right:
        raise ValueError(f"packed codes must stay int32 and scales float16, got {found}")
    if matrices and inputs == groups and words * 8 != outputs:  # gemv packs along inputs
        raise ValueError(f"the gemv (llm-awq) layout is not supported, accepted: gemm; {found}")
    raise ValueError(
        "qweight must be (inputs, outputs / 8), qzeros (inputs / g, outputs / 8) and scales "
        f"(inputs / g, outputs), got {found}"
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
    """A Linear with packed four-bit weights. x (..., inputs) -> (..., outputs).

    Buffers: qweight, qzeros and scales as for `dequantize`. A cast of the module to another dtype
    leaves them int32 and float16; it changes the bias only. Raises: ValueError unless 8 divides the
    outputs and the group size the inputs.
    """

    precision = "W4A16"

    def __init__(
        self, inputs: int, outputs: int, group_size: int = 128, bias: bool = False, device=None
    ):
        super().__init__()
        if outputs % 8:
            raise ValueError(f"the number of outputs must be a multiple of 8, got {outputs}")
        groups, new = inputs // _group_size(group_size, inputs), {"device": device}
        self.register_buffer("qweight", torch.zeros(inputs, outputs // 8, dtype=torch.int32, **new))
        self.register_buffer("qzeros", torch.zeros(groups, outputs // 8, dtype=torch.int32, **new))
        self.register_buffer("scales", torch.zeros(groups, outputs, dtype=torch.float16, **new))
        self._set_bias(torch.zeros(outputs, **new) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 128) -> W4A16Linear:
        """Round a Linear's weights to the nearest codes."""
        outputs, inputs = linear.weight.shape
        layer = cls(inputs, outputs, group_size, device="meta")  # every tensor is set below
        codes, scales, zeros = quantize_groups(linear.weight, group_size)
        layer.qweight, layer.qzeros = pack(codes.T), pack(zeros.T)
        layer.scales = scales.T.contiguous()
        layer._set_bias(linear.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return w4a16_matmul(x, **self._buffers, **self._parameters)  # attributes take 2 us each

    def extra_repr(self) -> str:
        inputs, (groups, outputs) = len(self.qweight), self.scales.shape
        return f"{inputs}, {outputs}, group_size={inputs // groups}, bias={self.bias is not None}"


class W8A8Linear(_Packed):
    """A Linear with eight-bit weights and eight-bit arithmetic. x (..., inputs) -> (..., outputs).

        x_scale[r] = max_i |x[r, i]| / 127,    weight_scale[o] = max_i |W[o, i]| / 127
        y[r, o] = x_scale[r] * weight_scale[o] * sum_i round(x / x_scale) * weight + bias[o]

    with maxima of at least 1e-5. The sum is exact, in int32. Buffers: weight = round(W /
    weight_scale) (outputs, inputs) int8, and weight_scale (outputs,) float32. Raises: ValueError
    unless 8 divides inputs and outputs. Source: SmoothQuant (arXiv 2211.10438), with weights per
    channel and activations per token as in the public NVILA recipe.
    """

    precision = "W8A8"

    def __init__(self, inputs: int, outputs: int, bias: bool = False, device=None):
        super().__init__()
        if inputs % 8 or outputs % 8:
            raise ValueError(
                f"inputs and outputs must be multiples of 8, got {inputs} and {outputs}"
            )
        self.register_buffer(
            "weight", torch.zeros(outputs, inputs, dtype=torch.int8, device=device)
        )
        self.register_buffer("weight_scale", torch.ones(outputs, device=device))
        self._set_bias(torch.zeros(outputs, device=device) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> W8A8Linear:
        """Round a Linear's weights to int8. Raises: ValueError for NaN or infinite weights, and for
        sizes that the class refuses."""
        outputs, inputs = linear.weight.shape
        if not linear.weight.isfinite().all():
            raise ValueError("weights must be finite, got NaN or infinity")
        layer = cls(inputs, outputs, device="meta")  # every tensor is set below
        layer.weight, layer.weight_scale = _to_int8(linear.weight.detach())
        layer._set_bias(linear.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs) of x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        if _on_triton(x) and len(rows):
            y = _w8a8_matmul_triton(rows, self.weight, self.weight_scale, self.bias)
        else:
            y = rows.new_empty(len(rows), len(self.weight))
            for start in range(0, len(rows), INT8_ROWS):
                here = slice(start, start + INT8_ROWS)
                y[here] = self._product(rows[here])
        return y.view(*x.shape[:-1], len(self.weight))

    def _product(self, rows: Tensor) -> Tensor:
        codes, scale = _to_int8(rows)
        y = _int8_matmul(codes, self.weight).float()
        y.mul_(self.weight_scale).mul_(scale[:, None])
        return y if self.bias is None else y.add_(self.bias)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}, bias={self.bias is not None}"


def _int8_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """codes (rows, inputs) times weight (outputs, inputs), in [-127, 127], to int32 or float32,
    exact. On a CPU without instructions for it `_int_mm` takes 20 times as long as float32, in
    which sums of 1,024 products are exact: less than 2^24."""
    if codes.device.type == "cpu" and not _multiplied(torch.int8):
        pairs = zip(codes.split(1024, 1), weight.split(1024, 1))
        first, *others = (a.float() @ b.float().T for a, b in pairs)
        return sum((each.int() for each in others), first.int()) if others else first
    missing = max(0, 32 - len(codes))  # on a GPU `_int_mm` wants 17 rows at least
    padded = nn.functional.pad(codes.contiguous(), (0, 0, 0, missing))
    return torch._int_mm(padded, weight.T)[: len(codes)]


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x (rows, inputs) to codes int8 in [-127, 127] and scales (rows,) float32."""
    x = x.float()
    scale = x.abs().amax(-1).clamp(min=1e-5) / 127
    return (x / scale[:, None]).round_().to(torch.int8), scale


# --- AWQ: the search ------------------------------------------------------------------------------


Calls = list[tuple]  # the arguments of every recorded call of a module; the first of them is x


class SharedHeads(NamedTuple):
    """For inputs that come from key/value heads, each of which feeds `group` query heads: those
    share their factors. The inputs of other Linears are one head of size 1 each."""

    group: int = 1
    head_dim: int = 1


class Fold(NamedTuple):
    """A place where factors can go: out of what produces an activation, into all that reads it."""

    producer: nn.Module  # a norm or a Linear
    consumers: list[nn.Linear]
    inspected: nn.Module  # whose output tells how well the consumers do
    heads: SharedHeads = SharedHeads()


def folds_of(block: nn.Module) -> list[Fold]:
    """The four folds of a Llama block. Norms of queries and keys (Qwen3) and rotary positions stand
    behind these Linears and change nothing in them."""
    attention, mlp = block.self_attn, block.mlp
    q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    heads = SharedHeads(o.in_features // v.out_features, attention.head_dim)
    return [
        Fold(block.input_layernorm, [q, k, v], attention),
        Fold(v, [o], o, heads),
        Fold(block.post_attention_layernorm, [gate, up], mlp),
        Fold(up, [down], down),
    ]


@torch.no_grad()
def search_scale(
    module: nn.Module,
    linears: list[nn.Linear],
    calls: Calls,
    *,
    group_size: int = 128,
    grid: int = 20,
    heads: SharedHeads = SharedHeads(),  # noqa: B008 (a tuple cannot change)
) -> Tensor:
    """The factors s (inputs,) on the input channels of some Linears that rounding hurts least.

        a = max((mean |x|)^alpha, 1e-4),    alpha in 0, 1 / grid, ..., 1 - 1 / grid
        s = a / sqrt(max a * min a)
        loss(alpha) = sum (module(x) - module(x) with weights rounded(W * s) / s)^2

    The smallest loss wins, alpha = 0 (s = 1, round to nearest) comes first, and only a smaller loss
    replaces it: on the calibration rows the result is never worse than rounding to nearest.

    Args:
        module: whose output is compared; it is called with the recorded arguments.
        linears: the Linears in it that read the same input x, (outputs, inputs) each.
        calls: the arguments of its calls; the first is x, (..., inputs).
        group_size: as in `quantize_groups`.
        grid: how many alphas are tried.
        heads: which inputs must share their factors.

    Returns: s (inputs,) float32; the weights are left as they were.
    Raises: ValueError for NaN in the activations or the outputs.
    Source: AWQ, equations 4 (the loss) and 5 (s as a power of the mean magnitude); the grid, the
    clamp and the normalisation by sqrt(max * min) are `_search_module_scale`'s in llm-awq's
    auto_scale.py, without the weight statistics that AutoAWQ added ("duo scaling"). That
    query heads of one key head share factors, where the public code leaves such folds out, is our
    choice.
    """
    # 1. The mean magnitude of every input channel; one for all query heads of a key head.
    rows = sum(args[0].shape[:-1].numel() for args in calls)
    mean = sum(args[0].flatten(0, -2).abs().double().sum(0) for args in calls) / rows
    if not mean.isfinite().all():
        raise ValueError("calibration activations must be finite, got NaN or infinity")
    shared = mean.view(-1, *heads).mean(1, keepdim=True)  # (key heads, 1, head size)
    mean = shared.expand(-1, *heads).flatten().float()  # (inputs,)

    # 2. What the module computes with its own weights.
    wanted = [module(*args) for args in calls]
    weights = [linear.weight.data for linear in linears]

    # 3. Try every alpha: scale, round, unscale, and look at the module's output.
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
                for args, y in zip(calls, wanted)
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
def search_clip(weight: Tensor, activations: list[Tensor], *, group_size: int = 128) -> Tensor:
    """The limit on |w| in every group that rounding hurts least, (outputs, inputs / g) in weight's
    dtype.

    Tried are 1.00, 0.95, ..., 0.55 times the largest |w|; the loss is the group's own part of the
    output error, sum over rows of (x . d)^2 = d gram d with d = w - rounded(clamped w) and gram =
    x^T x, so that the rows are needed for gram only. A strictly smaller loss wins. What the groups
    of one output gain singly they can lose together, for clipping errs towards zero everywhere: an
    output whose whole error does not fall keeps its largest |w|.

    weight (outputs, inputs); activations: parts of x, (..., inputs) each. Raises: ValueError for
    NaN in the activations. Source: `auto_clip_layer` of llm-awq's auto_clip.py, which takes some
    512 rows; all rows (they cost no more this way) and the look at whole outputs (clipping never
    hurts on the calibration rows) are our choice.
    """
    # 1. All that the rows have to say: the products of the inputs of each group.
    g = _group_size(group_size, weight.shape[1])
    gram = 0
    for x in activations:
        x = x.flatten(0, -2).float().unflatten(1, (-1, g)).transpose(0, 1)  # (inputs / g, T, g)
        gram = gram + x.mT @ x  # (inputs / g, g, g)
    if not gram.isfinite().all():
        raise ValueError("calibration activations must be finite, got NaN or infinity")

    # 2. Of every group the limit with the smallest error.
    w = weight.detach().float().unflatten(1, (-1, g))
    largest = w.abs().amax(-1)  # (outputs, inputs / g)
    best, best_loss = largest.clone(), torch.full_like(largest, math.inf)
    for step in range(10):
        limit = largest * (1 - step / 20)
        clamped = w.clamp(-limit[..., None], limit[..., None]).flatten(1)
        d = (w - rounded(clamped, g).view_as(w)).transpose(0, 1)  # (inputs / g, outputs, g)
        loss = ((d @ gram) * d).sum(-1).T  # (outputs, inputs / g)
        better = loss < best_loss
        best = torch.where(better, limit, best)
        best_loss = torch.where(better, loss, best_loss)

    # 3. Only where it makes the whole output better.
    def error(limit: Tensor) -> Tensor:  # of whole outputs, (outputs,)
        clamped = w.clamp(-limit[..., None], limit[..., None]).flatten(1)
        d = w.flatten(1) - rounded(clamped, g)
        return sum((x.flatten(0, -2).float() @ d.T).square().sum(0) for x in activations)

    helps = error(best) < error(largest)
    return torch.where(helps[:, None], best, largest).to(weight.dtype)


@torch.no_grad()
def fold(
    producer: nn.Module,
    consumers: list[nn.Linear],
    s: Tensor,
    heads: SharedHeads = SharedHeads(),  # noqa: B008
) -> None:
    """Divide the outputs of a norm or Linear by s and multiply what reads them, (outputs, inputs)
    each, by s (inputs,); together they compute what they did. Where query heads share factors, s
    repeats for them; the producer makes key heads and takes the first of each. Raises: ValueError
    for a norm without weights."""
    if producer.weight is None:
        raise ValueError(f"a norm must have weights to be divided, got {producer}")
    own = s.view(-1, *heads)[:, 0].flatten()  # one factor for each output of the producer
    for parameter in (producer.weight, getattr(producer, "bias", None)):
        if parameter is not None:
            shape = (-1, *[1] * (parameter.dim() - 1))
            parameter.copy_(parameter / own.view(shape).to(parameter.dtype))
    for linear in consumers:
        linear.weight.mul_(s.to(linear.weight.dtype))


# --- AWQ: a model, block by block -----------------------------------------------------------------


@torch.no_grad()
def quantize(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
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
            (x, layer, ...) and named like those of model.py.
        batches: what `model(**batch)` takes, calibration rows: embeddings (1, T, E) as `VLM.embed`
            makes them, visual rows among them, and, for M-RoPE, their positions.
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
        inner, outputs = _record(block, watched, calls)
        _quantize_block(block, inner, group_size, grid, clip)
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
    block: nn.Module, calls: dict[nn.Module, Calls], group_size: int, grid: int, clip: bool
) -> None:
    """AWQ on one block, given the recorded calls of its parts."""
    # 1. Search the factors of all folds, on the block as it is; then apply them.
    folds, options = folds_of(block), {"group_size": group_size, "grid": grid}
    factors = [
        search_scale(f.inspected, f.consumers, calls[f.inspected], heads=f.heads, **options)
        for f in folds
    ]
    for f, s in zip(folds, factors):
        fold(f.producer, f.consumers, s, f.heads)

    # 2. Clip, but not what makes queries and keys.
    for f, s in zip(folds, factors) if clip else ():
        # The calls were recorded before the folds, which divide x by s.
        x = [args[0] / s.to(args[0].dtype) for args in calls[f.inspected]]
        for linear in f.consumers:
            if linear not in (block.self_attn.q_proj, block.self_attn.k_proj):
                limit = search_clip(linear.weight, x, group_size=group_size)[..., None]
                groups = linear.weight.data.unflatten(1, (limit.shape[1], -1))
                linear.weight.data = groups.clamp(-limit, limit).flatten(1)

    # 3. Round and pack.
    replace_linears(block, lambda linear: W4A16Linear.from_linear(linear, group_size))


def replace_linears(block: nn.Module, quantised: Callable[[nn.Linear], nn.Module]) -> None:
    """Put what `quantised` makes of a Linear in its place, for all of a block's."""
    for parent in list(block.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(parent, name, quantised(linear))


@contextmanager
def _hooked(*hooks) -> Iterator[None]:
    """Remove the hooks at the end, after an error too."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Stop(Exception):
    """Ends a forward pass when its arguments have been seen."""


def _first_calls(model: nn.Module, block: nn.Module, batches: Iterable[dict]) -> Calls:
    """The arguments with which every batch reaches the first block."""
    calls: Calls = []

    def record(_, args: tuple) -> None:
        calls.append(args)
        raise _Stop

    with _hooked(block.register_forward_pre_hook(record)):
        for batch in batches:
            with suppress(_Stop):
                model(**batch)
    if not calls:
        raise ValueError("batches must hold at least one batch, got none")
    return calls


def _record(
    block: nn.Module, modules: list[nn.Module], calls: Calls
) -> tuple[dict[nn.Module, Calls], list[Tensor]]:
    """Run a block on all calls: the calls of the modules within, and the block's outputs."""
    inner: dict[nn.Module, Calls] = {module: [] for module in modules}

    def record(module: nn.Module, args: tuple) -> None:
        inner[module].append(args)

    with _hooked(*(module.register_forward_pre_hook(record) for module in modules)):
        outputs = [block(*args) for args in calls]
    return inner, outputs


# --- SmoothQuant ----------------------------------------------------------------------------------


@torch.no_grad()
def smooth(
    norm: nn.Module, linears: list[nn.Linear], largest: Tensor, *, alpha: float = 0.3
) -> Tensor:
    """Move the outliers of activations into the weights, where they cost less, and fold:

        s_j = largest_j^alpha / (max over the Linears of |W[:, j]|)^(1 - alpha)    (both >= 1e-5)

    norm: the LayerNorm that produces the activations; linears: all that read them; largest
    (inputs,): the largest |x_j| seen in calibration. Returns s (inputs,). Raises: ValueError for
    NaN. Source: SmoothQuant, equation 4; alpha 0.3 from the public NVILA recipe, 0.5 in the paper.
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

    tower: `layers` of pre-norm blocks that name the `readers` of their norms, as
    `model.VisionBlock` does; batches: pixels as it takes them. Smoothed are the inputs of queries,
    keys and values and of the first MLP layer; alpha None does not smooth. The patch embedding,
    positions and norms stay as they are.
    Raises: ValueError for no batches, for NaN, and for sizes that 8 does not divide. The tower is
    then quantised in part.
    """
    largest: dict[nn.Module, Tensor] = {}  # by norm: the largest |output| of each channel

    def record(norm: nn.Module, _, out: Tensor) -> None:
        now = out.flatten(0, -2).abs().amax(0).float()
        largest[norm] = torch.maximum(largest[norm], now) if norm in largest else now

    norms = [norm for block in tower.layers for norm in block.readers()]
    with _hooked(*(norm.register_forward_hook(record) for norm in norms)):
        for pixels in batches:
            tower(pixels, -1)  # as far as the last attention
    if not largest:
        raise ValueError("batches must hold at least one batch, got none")
    for block in tower.layers:
        for norm, linears in block.readers().items():
            if alpha is not None and norm in largest:  # parts of the last block may never run
                smooth(norm, linears, largest[norm], alpha=alpha)
        replace_linears(block, W8A8Linear.from_linear)


if __name__ == "__main__":  # the command line is tools/quantise.py
    from tools.quantise import main

    main()
