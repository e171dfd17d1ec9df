"""`python -m bench kernels`: every operation beside naive PyTorch, flash-colreduce and its bound.

The bound is the larger of the bytes that must be moved over the measured copy bandwidth and the
FLOPs that must be done over the measured matmul rate. Axes as in kernels.py.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import chain, product

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    attention_colsum,
    attention_lse,
    decode_attention,
    gather_keys_values,
    linear,
    triton,
)

from . import machine, median_and_range

# (what it is, B, H, G, M, N, D, causal). First the rows of flash-colreduce's public log
# (benchmarks/results/rtx-pro-6000-blackwell.log), then shapes of real models: a vision tower's last
# layer, and a question of 64 tokens against what 75 % pruning leaves.
SHAPES = (
    [("log", B, 32, 32, 1024, 1024, 128, False) for B in (1, 4, 16, 64, 256)]
    + [("log", 1, 32, 32, N, N, 128, False) for N in (1024, 2048, 4096, 8192, 16384)]
    + [("log", B, 32, 32, 64, 16384, 128, True) for B in (1, 4, 16, 64, 256)]
    + [("log", 1, 32, 32, 512, N, 128, True) for N in (16384, 32768, 65536, 131072, 262144)]
    + [
        ("SigLIP 448, 256 frames, vision", 256, 16, 16, 1024, 1024, 72, False),
        ("Qwen2-7B, 256 frames, question", 1, 28, 4, 64, 16384, 128, True),
        ("Qwen2.5-VL-7B, 1960 x 1064, vision", 1, 16, 16, 10640, 10640, 80, False),
        ("Qwen2.5-VL-7B, 1960 x 1064, question", 1, 28, 4, 64, 665, 128, True),
        ("SmolVLM-256M, 17 tiles, vision", 17, 12, 12, 1024, 1024, 64, False),
        ("SmolVLM-256M, 17 tiles, question", 1, 9, 3, 64, 272, 64, True),
    ]
)
LINEARS = ((512, 1408), (576, 49280), (2048, 5632), (4096, 4096))
LENGTHS = (1024, 4096, 32768, 131072, 262144)  # of a cache with 28 query and 4 key heads, D = 128


# A row of the table: its label, the bytes and FLOPs of the bound, milliseconds by method.
Row = tuple[str, int, int, dict[str, float | None]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    benchmark()


@torch.no_grad()
def benchmark() -> None:
    """Time all operations and print a table; the last line is one JSON object."""
    gpu = torch.cuda.is_available()
    new = {"device": "cuda", "dtype": torch.float16} if gpu else {"dtype": torch.float32}
    bandwidth, rate = _peaks(new, gpu)
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine(torch.device(new.get('device', 'cpu')))}, {new['dtype']}, {name}")
    print(
        f"measured: copy {bandwidth / 1e6:.0f} GB/s, matmul {rate / 1e9:.2f} TFLOP/s; times in ms"
    )
    print(f"{'':72}{'ours':>9}{'naive':>9}{'flash':>9}{'bound':>9}{'reached':>9}")
    shapes = [shape for shape in SHAPES if gpu or _scores_flops(*shape[1:]) <= 4e10]
    passes = 2 if gpu else 1  # over the scores; a CPU's chunk of whole rows needs one
    rows = []
    timed = chain(_time_colsum(shapes, new, passes), _time_cache(new, gpu))
    if not gpu:
        timed = chain(timed, _time_linear())
    for label, size, flops, times in timed:
        times["bound"] = max(size / bandwidth, flops / rate)
        times["reached"] = times["bound"] / times["ours"] if times["ours"] else None
        cells = [times.get(key) for key in ("ours", "naive", "flash", "bound")]
        text = "".join(f"{'-' if cell is None else f'{cell:.3f}':>9}" for cell in cells)
        text += f"{times['reached']:9.0%}" if times["reached"] else f"{'-':>9}"
        print(f"{label:72}{text}", flush=True)
        rows.append({"row": label, **times})
    if not gpu:
        skipped = len(SHAPES) - len(shapes)
        print(f"{skipped} larger shapes and the Triton kernels need a GPU: not measured")
    print(json.dumps({"device": name, "bandwidth": bandwidth, "matmul": rate, "rows": rows}))


def _time_colsum(shapes: list[tuple], new: dict, passes: int) -> Iterator[Row]:
    """`attention_colsum` on some of SHAPES, with one or two passes over the scores."""
    try:
        from flash_colreduce import flash_colreduce
    except ImportError:
        flash_colreduce = None
    for what, B, H, G, M, N, D, causal in shapes:
        flops = passes * _scores_flops(B, H, G, M, N, D, causal)
        q, k = torch.randn(B, H, M, D, **new), torch.randn(B, G, N, D, **new)
        lse = attention_lse(q, k, causal=causal)
        times = {"ours": _time(attention_colsum, q, k, causal=causal)}
        times["naive"] = _time(naive_colsum, q, k, causal)
        if flash_colreduce and q.is_cuda and H == G:
            times["flash"] = _time(flash_colreduce, q, k, is_causal=causal, reduction="sum")
        size = passes * (q.nbytes + k.nbytes) + 4 * B * H * (2 * M + N)
        label = f"{what}: B {B} H {H} G {G} M {M} N {N} D {D}{' causal' if causal else ''}"
        yield label, size, flops, times
        given = _time(attention_colsum, q, k, causal=causal, lse=lse)
        yield "  with lse given", size // passes, flops // passes, {"ours": given}


def _scores_flops(B: int, H: int, G: int, M: int, N: int, D: int, causal: bool) -> int:
    """FLOPs of one pass over the scores."""
    return 2 * B * H * M * N * D // (2 if causal and M == N else 1)


def _time_cache(new: dict, gpu: bool) -> Iterator[Row]:
    """`decode_attention` and `gather_keys_values` on caches of growing length."""
    for N in LENGTHS if gpu else LENGTHS[:3]:
        q, (k, v) = torch.randn(1, 28, 1, 128, **new), torch.randn(2, 1, 4, N, 128, **new)
        index = torch.arange(0, N, 2, device=k.device)[None]
        times = {"ours": _time(decode_attention, q, k, v)}
        times["naive"] = _time(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
        yield f"decode_attention: H 28 G 4 N {N} D 128", 2 * k.nbytes, 4 * 28 * N * 128, times
        times = {
            "ours": _time(gather_keys_values, k, v, index),
            "naive": _time(naive_gather, k, v, index),
        }
        yield f"gather_keys_values: G 4 N {N} K {N // 2} D 128", 2 * k.nbytes, 0, times


def _time_linear() -> Iterator[Row]:
    """`linear` on weights of these inputs and outputs, for one row and for many, in every dtype."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, (inputs, outputs) in product(dtypes, LINEARS):
        new = {"dtype": dtype}
        count = max(1, 2**28 // (dtype.itemsize * inputs * outputs))  # more than any cache holds
        weights = [torch.randn(outputs, inputs, **new) for _ in range(count)]
        for rows in (1, 16, 256):
            x = torch.randn(rows, inputs, **new)
            times = {}
            for name, function in (("ours", linear), ("naive", F.linear)):
                began, calls = time.perf_counter(), []
                while len(calls) < 2 or len(calls) < 25 and time.perf_counter() - began < 2:
                    calls.append(_time_once(function, x, weights[len(calls) % count]))
                times[name] = median_and_range(calls[1:])[0]
            size = weights[0].nbytes + x.nbytes + rows * outputs * x.element_size()
            label = f"linear: {rows} x {inputs} to {outputs}, {str(dtype).removeprefix('torch.')}"
            yield label, size, 2 * rows * inputs * outputs, times


def naive_colsum(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """What everybody writes first: heads expanded, the whole M x N matrix in q's dtype."""
    M, N = q.shape[2], k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * q.shape[3] ** -0.5
    if causal:
        hidden = torch.ones(M, N, dtype=torch.bool, device=q.device).triu(N - M + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1).sum(-2)


def naive_gather(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """What everybody writes first: advanced indexing, of keys and of values."""
    return k[:, :, index[0]], v[:, :, index[0]]


def _time(call: Callable, *args, **kwargs) -> float | None:
    """Median milliseconds of a call; None if it runs out of memory."""
    try:
        if args[0].is_cuda:
            return triton.testing.do_bench(lambda: call(*args, **kwargs), return_mode="median")
        times = [_time_once(call, *args, **kwargs) for _ in range(4)]
        return median_and_range(times[1:])[0]  # the first warms up
    except torch.OutOfMemoryError:
        return None


def _time_once(call: Callable, *args, **kwargs) -> float:
    """Milliseconds of one call on a CPU."""
    began = time.perf_counter()
    call(*args, **kwargs)
    return 1000 * (time.perf_counter() - began)


def _peaks(new: dict, gpu: bool) -> tuple[float, float]:
    """What this machine reaches: bytes per millisecond of a copy, FLOPs per millisecond of a
    matmul."""
    big = torch.empty(2**29 if gpu else 2**25, **new)
    copy = big.clone()
    bandwidth = 2 * big.nbytes / min(_time(copy.copy_, big) for _ in range(3))
    del big, copy
    square = torch.randn(8192 if gpu else 1024, 1, **new)
    square = square @ square.mT
    milliseconds = min(_time(torch.matmul, square, square) for _ in range(3))
    return bandwidth, 2 * len(square) ** 3 / milliseconds
