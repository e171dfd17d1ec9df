"""The Triton kernels of awq.py against float64: compiled where there is a GPU; else
`test_interpreter.py` runs this file under the interpreter of Triton, in a process of its own."""

import pytest
import torch
from conftest import DTYPES, ON, few, needs_triton
from hypothesis import given
from hypothesis import strategies as st
from test_awq import packed

import awq

pytestmark = needs_triton

shapes = st.fixed_dictionaries(
    {
        "K_g": st.sampled_from(
            [(32, 32), (96, 32), (256, 64), (256, 128), (80, 80), (192, 192), (48, 16)]
        ),
        "N": st.sampled_from([8, 16, 40, 64, 72, 136]),
        "seed": st.integers(0, 2**31),
    }
)


@pytest.fixture(autouse=True)
def only_triton(monkeypatch):
    """The kernels must do the work: the PyTorch paths are not to be reached."""
    for name in ("dequantize_reference", "w4a16_matmul_reference", "_cpu_int4_matmul"):
        monkeypatch.setattr(awq, name, None)


def draw(K_g, N, seed):
    """Packed weights, every other time as views whose rows lie apart in memory."""
    *tensors, exact = packed(K_g[0], N, K_g[1], seed)
    if seed % 2:
        tensors = [torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]] for tensor in tensors]
    return [tensor.to(ON) for tensor in tensors], exact.to(ON)


@few
@given(shapes)
def test_dequantising_has_the_bits_of_the_definition(shape):
    tensors, exact = draw(**shape)
    assert torch.equal(awq.dequantize(*tensors), exact.half())


@few
@given(
    shapes,
    st.sampled_from(DTYPES),
    st.sampled_from([1, 2, 15, 16, 17, 33, 65, 140]),
    st.booleans(),
    st.booleans(),
)
def test_matmul_matches_float64(shape, dtype, M, with_bias, strided):
    tensors, exact = draw(**shape)
    K, N = exact.shape
    torch.manual_seed(shape["seed"])
    x = torch.randn(M, K, 2).to(dtype).to(ON)
    x = x[..., 0] if strided else x[..., 0].contiguous()
    bias = torch.randn(N).to(dtype).to(ON) if with_bias else None
    added = bias.double() if with_bias else 0
    expected = x.double() @ exact + added
    size = x.double().abs() @ exact.abs() + abs(added)  # what rounding is relative to
    y = awq.w4a16_matmul(x, *tensors, bias)
    # Triton's interpreter cuts float32 off where it should round to bfloat16.
    cut = 2**-6 if awq.INTERPRETED else 2**-7
    close = {torch.float32: 2**-11, torch.float16: 2**-10, torch.bfloat16: cut}[dtype]
    assert y.dtype == dtype and y.shape == (M, N)
    assert bool(((y.double() - expected).abs() <= close * size).all())


@few
@given(shapes, st.sampled_from([1, 5, 20]), st.integers(1, 9))
def test_parts_change_nothing_but_rounding_and_bits_are_the_same_twice(shape, M, parts):
    tensors, exact = draw(**shape)
    x = torch.randn(M, len(exact), generator=torch.Generator().manual_seed(0)).half().to(ON)
    one = awq._w4a16_matmul_triton(x, *tensors, None, parts=1)
    many, again = (awq._w4a16_matmul_triton(x, *tensors, None, parts=parts) for _ in range(2))
    assert torch.equal(many, again)
    size = x.double().abs() @ exact.abs()
    assert bool(((one - many).double().abs() <= 2**-10 * size).all())


def test_one_wrong_nibble_shows():
    """The tolerance is tight enough to see a single code that is off by one."""
    tensors, exact = draw((64, 64), 16, 0)
    x = torch.ones(1, 64, device=ON).half()
    before = awq.w4a16_matmul(x, *tensors)
    tensors[0][5, 1] ^= 1 << 16  # column 9, row 5
    changed = (awq.w4a16_matmul(x, *tensors) - before)[0]
    assert changed.nonzero().flatten().tolist() == [9]


@few
@given(
    st.sampled_from([1, 7, 130]),
    st.sampled_from([8, 72, 136, 1152]),
    st.sampled_from([8, 40, 136]),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_eight_bit_products_match_float64(M, K, N, dtype, bias):
    """Of the codes that were stored, and of x's; where a code of x is a tie, either will do."""
    torch.manual_seed(M + K)
    layer = awq.W8A8Linear.from_linear(torch.nn.Linear(K, N, bias=bias)).to(ON, dtype)
    x = (torch.randn(M, 2, K) * 10 ** torch.randn(M, 1, 1)).to(dtype).to(ON)[:, 0]
    x[0] = 0
    scale = x.double().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    codes = x.double() / scale
    ties = ((codes - codes.floor() - 0.5).abs() < 1e-4).sum(-1, keepdim=True)
    weight = layer.weight.double() * layer.weight_scale.double()[:, None]
    expected = codes.round() @ weight.T * scale + (layer.bias.double() if bias else 0)
    unit = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    largest = codes.round().abs() @ weight.abs().T * scale  # sums are exact, but not their scaling
    allowed = unit * expected.abs() + 1e-6 * largest + ties * scale * weight.abs().amax(-1)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (M, N)
    assert ((y.double() - expected).abs() <= allowed + 1e-7).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so_and_alone(value):
    layer = awq.W8A8Linear.from_linear(torch.nn.Linear(16, 8)).to(ON)
    x = torch.ones(3, 16, device=ON)
    x[1, 3] = value
    assert layer(x).isfinite().all(-1).tolist() == [True, False, True]
