"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for three chips."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import awq
import kernels

pytestmark = pytest.mark.skipif(not kernels.triton, reason="Triton is not made for this system")
HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("file", ["test_triton.py", "test_awq_triton.py"])
def test_the_kernels_pass_their_tests_in_the_interpreter(file):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", HERE / file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout and "skipped" not in result.stdout


def test_the_conformance_suite_knows_how_the_interpreter_rounds():
    """Decoding, whose output is rounded to bfloat16; without that knowledge ours fails there."""
    suite = ["-m", "pytest", "-n0", HERE / "conformance", "--quick", "--impl-dtypes", "bfloat16"]
    result = subprocess.run(
        [sys.executable, *suite, "-k", "decode_attention and memory"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout
    assert "cuts bfloat16 off" in result.stdout


POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}


def compile_for(chip: int, kernel, pointers: dict[str, str], constants: dict) -> dict:
    """Compile a kernel for a chip: its "ptx", its "cubin". Arguments that are not named are 32-bit
    integers, sizes and strides of real models, which 16 divides."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    options = {"num_warps": constants.get("num_warps", 4)}
    constants = {name: value for name, value in constants.items() if name in names}
    types = {"scale": "fp32"} | pointers | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    aligned = [name for name, kind in signature.items() if kind not in ("fp32", "constexpr")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if name in aligned},
    )
    target = GPUTarget("cuda", chip, 32)
    return kernels.triton.compile(source, target=target, options=options).asm


def spilled(cubin: bytes, tmp_path: Path) -> int:
    """Bytes of memory that a thread keeps registers in, by a tool that Triton brings along."""
    from triton.backends import nvidia

    file, tool = tmp_path / "kernel.cubin", Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    file.write_bytes(cubin)
    report = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True).stdout
    (stack,) = re.findall(r"STACK:(\d+) ", report)
    return int(stack)


def launches(dtype: torch.dtype, D: int):
    """(kernel, pointers, constants) of every kind of launch with this dtype and head size."""
    p, f = POINTERS[dtype], "*fp32"
    heads = {"G": 4, "GROUP": 7, "D": D, "UPCAST": False, "q_d": 1, "k_d": 1}
    for rows in (1, 1024):
        blocks = kernels._blocks(D, dtype.itemsize)
        side = blocks["BLOCK_N"]
        for causal in (False, True):
            constants = heads | {"CAUSAL": causal} | blocks
            sides = {"BLOCK_R": kernels._at_most(2 * side, rows)}
            yield kernels._lse_kernel, {"q": p, "k": p, "lse": f}, constants | sides
            pointers = {"q": p, "k": p, "lse": f, "colsum": f}
            sides = {"BLOCK_M": kernels._at_most(side, rows), "BLOCK_N": 2 * side}
            yield kernels._colsum_kernel, pointers, constants | sides
    yield kernels._join_kernel, {"parts": f, "lse": f}, {"PARTS": 99, "BLOCK_P": 128, "BLOCK": 32}
    for on_device in (False, True):
        pointers = {"q": p, "k": p, "v": p, "partial": f, "lse": f}
        pointers |= {"length": "*i64"} if on_device else {}
        constants = heads | blocks | {"BLOCK_H": 16, "v_d": 1, "ON_DEVICE": on_device}
        yield kernels._decode_kernel, pointers, constants
    constants = {"PARTS": 64, "D": D, "BLOCK_P": 64, "BLOCK_D": 64}
    yield kernels._combine_kernel, {"partial": f, "lse": f, "out": p}, constants


@pytest.mark.parametrize("chip", [80, 86, 90])
@pytest.mark.parametrize("dtype", POINTERS, ids=str)
def test_every_launch_compiles_without_spilling_registers(chip, dtype, tmp_path):
    for kernel, pointers, constants in launches(dtype, 128):
        compiled = compile_for(chip, kernel, pointers, constants)
        assert spilled(compiled["cubin"], tmp_path) == 0, (kernel, constants)


def awq_launches(dtype: torch.dtype):
    """(kernel, pointers, constants) of every kind of launch of awq.py with this dtype."""
    p = POINTERS[dtype]
    pointers = {"x": p, "qweight": "*i32", "qzeros": "*i32", "scales": "*fp16", "sums": "*fp32"}
    packed = {name: pointers[name] for name in ("qweight", "qzeros", "scales")}
    for group in (16, 32, 64, 128, 4096):
        block_in = awq._block_in(group)
        constants = {"GROUP": group, "BLOCK_IN": block_in, "BLOCK_OUT": 64, "x_in": 1}
        yield awq._gemv_kernel, pointers, constants | {"num_warps": 1}
        for rows, warps in ((16, 2), (32, 2), (64, 4), (128, 4)):
            sizes = {"BLOCK_ROWS": rows, "UPCAST": False, "num_warps": warps}
            yield awq._gemm_kernel, pointers, constants | sizes
        sizes = {"GROUP": group, "BLOCK_IN": block_in, "BLOCK_OUT": 128}
        yield awq._dequantize_kernel, packed | {"out": "*fp16"}, sizes
    for bias in (False, True):
        pointers = {"sums": "*fp32", "bias": p, "out": p}
        yield awq._sum_kernel, pointers, {"BIAS": bias, "BLOCK_P": 32, "BLOCK": 64}
        sizes = {"BLOCK_ROWS": 128, "BLOCK_OUT": 128, "BLOCK_IN": 128, "num_warps": 8, "BIAS": bias}
        pointers = {"codes": "*i8", "scales": "*fp32", "weight": "*i8", "weight_scale": "*fp32"}
        yield awq._w8a8_kernel, pointers | {"bias": p, "out": p}, sizes
    pointers = {"x": p, "codes": "*i8", "scales": "*fp32"}
    yield awq._to_int8_kernel, pointers, {"BLOCK": 8192, "x_in": 1}


@pytest.mark.parametrize("chip", [80, 86, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_launch_of_awq_compiles_without_spilling_registers(chip, dtype, tmp_path):
    for kernel, pointers, constants in awq_launches(dtype):
        compiled = compile_for(chip, kernel, pointers, constants)
        assert spilled(compiled["cubin"], tmp_path) == 0, (kernel, constants)


@pytest.mark.parametrize("chip", [80, 86, 90])
@pytest.mark.parametrize("pair", [False, True])
def test_gathering_moves_sixteen_bytes_at_a_time(chip, pair, tmp_path):
    integers = "*i16"  # bfloat16 rows are copied as 16-bit integers
    pointers = dict.fromkeys(("x", "y", "x_out", "y_out"), integers) | {"index": "*i64"}
    for E in (72, 128):
        constants = {"G": 4, "E": E, "PAIR": pair, "VECTOR": 8, "x_e": 1, "y_e": 1, "index_k": 1}
        constants |= {"BLOCK_K": 32, "BLOCK_E": 128}
        compiled = compile_for(chip, kernels._gather_kernel, pointers, constants)
        assert spilled(compiled["cubin"], tmp_path) == 0
        ptx = compiled["ptx"]
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 1 + pair
        assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) >= 1 + pair
        assert not re.findall(r"ld\.global\S*\.b16", ptx)
