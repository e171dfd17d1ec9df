"""The Triton kernels against float64: compiled where there is a GPU; `test_interpreter.py` runs
this file under the interpreter of Triton, in a process of its own."""

import math

import pytest
import torch
from conftest import DTYPES, ON, check_rows_that_see_nothing, few, needs_triton, softmax64
from hypothesis import given
from hypothesis import strategies as st

import kernels

pytestmark = needs_triton

shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "G": st.integers(1, 3),
        "group": st.integers(1, 8),
        "M": st.integers(1, 40),
        "N": st.integers(1, 150),
        "D": st.sampled_from([1, 3, 16, 48, 72, 80, 96, 128, 256]),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(["heads first", "tokens first", "transposed"]),
        "seed": st.integers(0, 2**31),
    }
)


@pytest.fixture(autouse=True)
def only_triton(monkeypatch):
    """The kernels must do the work: the PyTorch paths are not to be reached."""
    for name in ("attention_lse", "attention_colsum", "gather_tokens", "decode_attention"):
        monkeypatch.setattr(kernels, f"{name}_reference", None)


def tensor(B, heads, rows, D, dtype, layout):
    """Random numbers (B, heads, rows, D) on the device, laid out in memory in different ways."""
    x = torch.randn(B, heads, rows, D).to(dtype).to(ON)
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.mT.contiguous().mT if layout == "transposed" else x


def draw(B, G, group, M, N, D, dtype, layout, seed):
    torch.manual_seed(seed)
    return tensor(B, G * group, M, D, dtype, layout), tensor(B, G, N, D, dtype, layout)


def assert_close(actual, expected, relative):
    """Every element within a relative error; what should be below 1e-30 must be so too."""
    large = expected > 1e-30
    error = (actual.double() - expected).abs() / expected.clamp(min=1e-30)
    assert float(error[large].max() if large.any() else 0) < relative
    assert float(actual[~large].abs().max() if (~large).any() else 0) < 2e-30


@few
@given(shapes, st.booleans())
def test_lse_and_colsum_match_float64(shape, causal):
    q, k = draw(**shape)
    scores, softmax = softmax64(q, k, causal)
    lse = kernels.attention_lse(q, k, causal=causal)
    assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    for given_lse in (None, lse):
        colsum = kernels.attention_colsum(q, k, causal=causal, lse=given_lse)
        assert colsum.dtype == torch.float32 and colsum.shape == (*q.shape[:2], k.shape[2])
        assert_close(colsum, softmax.sum(-2), 3e-5)


@few
@given(shapes, st.booleans(), st.integers(1, 9))
def test_blocks_and_parts_change_nothing_but_rounding(shape, causal, parts):
    q, k = draw(**shape)
    options = {"causal": causal, "scale": None}
    whole = kernels._attention_lse_triton(q, k, parts=1, **options)
    parts = kernels._attention_lse_triton(q, k, parts=parts, **options)
    assert torch.allclose(whole, parts, rtol=1e-6, atol=1e-6)
    expected = kernels.attention_colsum(q, k, causal=causal).double()
    real = kernels._blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_blocks", lambda *a: real(*a) | {"BLOCK_N": 16})
        assert_close(kernels.attention_colsum(q, k, causal=causal), expected, 3e-5)


@few
@given(shapes, st.booleans())
def test_the_same_input_gives_the_same_bits(shape, causal):
    q, k = draw(**shape)
    a, b = (kernels.attention_colsum(q, k, causal=causal) for _ in range(2))
    assert torch.equal(a, b)
    q, v = q[:, :, :1], k.flip(-1)
    assert torch.equal(kernels.decode_attention(q, k, v), kernels.decode_attention(q, k, v))


def test_large_scores_neither_overflow_nor_lose_the_winner():
    """Scores up to 1e4: each row is decided by one key, or by two with equal scores."""
    q = torch.full((1, 2, 20, 16), 50.0, device=ON)
    k = torch.full((1, 1, 100, 16), -50.0, device=ON)
    k[:, :, 77] = 50.0
    expected = torch.zeros(1, 2, 100, device=ON)
    expected[..., 77] = 20.0
    lse = torch.full((1, 2, 20), 1e4, device=ON)
    assert torch.allclose(kernels.attention_lse(q, k), lse, rtol=2**-22, atol=0)
    assert_close(kernels.attention_colsum(q, k), expected.double(), 2e-3)  # ulp(1e4) = 1e-3
    k[:, :, 3] = 50.0
    expected[..., 77] = expected[..., 3] = 10.0
    assert_close(kernels.attention_colsum(q, k), expected.double(), 2e-3)


def test_rows_that_see_no_key_contribute_nothing():
    q, k = draw(1, 2, 3, 40, 7, 16, torch.float32, "heads first", 0)  # M > N
    colsum = kernels.attention_colsum(q, k, causal=True)
    assert_close(colsum, softmax64(q, k, True)[1].sum(-2), 1e-5)
    assert bool((kernels.attention_lse(q, k, causal=True)[:, :, :33] == -math.inf).all())


@pytest.mark.parametrize("M, N", [(1, 1), (1, 300), (300, 1), (130, 130)])
def test_one_row_and_one_column(M, N):
    q, k = draw(1, 1, 2, M, N, 20, torch.float16, "heads first", 1)
    for causal in (False, True):
        colsum = kernels.attention_colsum(q, k, causal=causal)
        assert_close(colsum, softmax64(q, k, causal)[1].sum(-2), 1e-5)


@few
@given(
    shapes,
    st.integers(0, 90),
    st.sampled_from([*DTYPES, torch.int64, torch.uint8, torch.bool]),
    st.booleans(),
)
def test_gathering_copies_rows_bit_for_bit(shape, K, dtype, features):
    k = draw(**shape)[1].mul(50).to(dtype)
    v = draw(**shape | {"seed": shape["seed"] + 1})[1].mul(50).to(dtype)
    index = torch.randint(0, k.shape[2], (len(k), K), device=ON)
    expected = [torch.stack([x[b][:, index[b]] for b in range(len(x))]) for x in (k, v)]
    assert all(map(torch.equal, kernels.gather_keys_values(k, v, index), expected))
    assert torch.equal(kernels.gather_tokens(k, index), expected[0])
    if features:
        assert torch.equal(kernels.gather_tokens(k[:, 0], index), expected[0][:, 0])


@few
@given(shapes, st.integers(0, 5), st.booleans(), st.sampled_from([None, 1, 2, 7]))
def test_decode_attention_matches_float64_and_reads_no_further(shape, unused, on_device, parts):
    q, k = draw(**shape | {"M": 1})
    v = draw(**shape | {"seed": shape["seed"] + 1})[1]
    softmax = softmax64(q, k, False)[1]
    N, H, G = k.shape[2], q.shape[1], k.shape[1]
    expected = softmax @ torch.stack([v[:, h * G // H] for h in range(H)], 1).double()
    poison = torch.full((*k.shape[:2], unused, k.shape[3]), math.nan, device=ON).to(k.dtype)
    k, v = torch.cat([k, poison], 2), torch.cat([v, poison], 2)
    length = torch.tensor(N, device=ON) if on_device else N
    if parts is None:
        out = kernels.decode_attention(q, k, v, length=length)
    else:
        out = kernels._decode_attention_triton(q, k, v, length=length, scale=None, parts=parts)
    assert out.shape == q.shape and out.dtype == q.dtype
    close = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[q.dtype]
    assert torch.allclose(out.double(), expected, rtol=close, atol=close)


@few
@given(shapes, st.integers(0, 300))
def test_the_bits_of_decoding_do_not_depend_on_the_capacity(shape, unused):
    """A packed buffer at full budget gives the bits of the main cache."""
    q, k = draw(**shape | {"M": 1})
    N, v = k.shape[2], k.flip(-1)
    more = [torch.cat([x, x.new_zeros(*x.shape[:2], unused, x.shape[3])], 2) for x in (k, v)]
    a, b = kernels.decode_attention(q, k, v), kernels.decode_attention(q, *more, length=N)
    assert torch.equal(a, b)


def test_offsets_go_beyond_two_to_the_31():
    """The second batch entry starts 2^31 elements after the first; most pages are never touched."""
    far, D = 2**31, 16
    memory = torch.empty(far + 3 * 40 * D, dtype=torch.float16, device=ON)
    k = memory.as_strided((2, 1, 40, D), (far, 40 * D, D, 1))
    v = memory[40 * D :].as_strided((2, 1, 40, D), (far, 40 * D, D, 1))
    for x in (k, v):
        x.copy_(torch.randn(2, 1, 40, D))
    q = torch.randn(2, 2, 3, D, device=ON).half()
    index = torch.tensor([[0, 39], [7, 5]], device=ON)
    near = k.clone(), v.clone()
    assert torch.equal(kernels.attention_colsum(q, k), kernels.attention_colsum(q, near[0]))
    assert torch.equal(kernels.gather_tokens(k, index), kernels.gather_tokens(near[0], index))
    q = q[:, :, :1]
    assert torch.equal(kernels.decode_attention(q, k, v), kernels.decode_attention(q, *near))


if not kernels.INTERPRETED:

    def test_a_cuda_graph_replays_a_step_while_the_length_grows():
        """Recorded once; every replay reads the length that the device holds by then."""
        q, k = draw(1, 4, 7, 1, 300, 128, torch.float16, "heads first", 5)
        v, length = k.flip(-1), torch.tensor(1, device=ON)
        kernels.decode_attention(q, k, v, length=length)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernels.decode_attention(q, k, v, length=length)
        for n in (1, 2, 64, 65, 300):
            length.fill_(n)
            graph.replay()
            assert torch.equal(out, kernels.decode_attention(q, k, v, length=n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_that_sees_only_minus_infinity_sees_nothing(dtype, causal):
    check_rows_that_see_nothing(dtype, causal, ON)
