"""`python -m bench awq`: four-bit products beside those of a plain layer, and their bound."""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from awq import triton, w4a16_matmul
from kernels import linear

from . import machine

SHAPES = [  # (model, inputs, outputs): queries and outputs, keys and values, MLP
    ("Qwen2.5-VL-7B", 3584, 3584),
    ("Qwen2.5-VL-7B", 3584, 512),
    ("Qwen2.5-VL-7B", 3584, 18944),
    ("Qwen2.5-VL-7B", 18944, 3584),
    ("Llama-2-7B", 4096, 4096),
    ("Llama-2-7B", 4096, 11008),
    ("Llama-2-7B", 11008, 4096),
]
ROWS = (1, 2, 4, 8, 16, 64, 256, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    benchmark()


@torch.no_grad()
def benchmark() -> None:
    """Time `w4a16_matmul` beside `kernels.linear`, what a layer that is not quantised calls, and
    the bound: the bytes of packed weights, x and y over the measured copy bandwidth. In float16 on
    a GPU, where weights change from call to call, so that no cache holds them; in bfloat16 and
    float32 on a CPU. The last line of the output is one JSON object."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    big = torch.empty(2**29 if gpu else 2**26, device=device, dtype=torch.float16)
    bandwidth = 2 * big.nbytes / _time([partial(big.clone().copy_, big)] * 3, gpu)  # bytes per ms
    del big
    print(f"{machine(device)}, copy {bandwidth / 1e6:.0f} GB/s")
    print(f"{'times in ms':57}{'ours':>9}{'plain':>9}{'speedup':>9}{'bound':>9}{'reached':>9}")
    results = []
    dtypes = [torch.float16] if gpu else [torch.bfloat16, torch.float32]
    for dtype, (what, inputs, outputs) in product(dtypes, SHAPES):
        new, kind = {"device": device, "dtype": dtype}, str(dtype).removeprefix("torch.")
        count = max(1, 2**28 // (inputs * outputs // 2)) if gpu else 1
        plain = [torch.randn(outputs, inputs, **new) for _ in range(count)]
        packed = [random_weights(inputs, outputs, device) for _ in range(count)]
        for rows in ROWS if gpu else (1, 16, 64, 256, 1024):
            x, calls = torch.randn(rows, inputs, **new), 1 if gpu else 3
            ours = _time([partial(w4a16_matmul, x, *p) for p in packed] * calls, gpu)
            theirs = _time([partial(linear, x, w) for w in plain] * calls, gpu)
            size = sum(t.nbytes for t in packed[0]) + x.element_size() * rows * (inputs + outputs)
            bound = size / bandwidth
            label = f"{what}: {rows} x {inputs} to {outputs}, {kind}"
            cells = f"{ours:9.4f}{theirs:9.4f}{theirs / ours:8.2f}x{bound:9.4f}{bound / ours:9.0%}"
            print(f"{label:57}{cells}", flush=True)
            results.append({"row": label, "ours": ours, "plain": theirs, "bound": bound})
    if not gpu:
        print("the Triton kernels and the other row counts need a GPU: not measured")
    print(json.dumps({"device": machine(device), "bandwidth": bandwidth, "rows": results}))


def random_weights(inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, ...]:
    """qweight, qzeros and scales of a Linear, in groups of 128 inputs."""
    new = {"device": device}
    codes, zeros = (
        torch.randint(-(2**31), 2**31 - 1, (n, outputs // 8), **new).int()
        for n in (inputs, inputs // 128)
    )
    return codes, zeros, torch.rand(inputs // 128, outputs, **new).half()


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
