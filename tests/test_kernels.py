"""The array operations against float64 definitions written out here, element by element
relative."""

import math
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
from conftest import DTYPES, ROOT, check_rows_that_see_nothing, softmax64
from hypothesis import given
from hypothesis import strategies as st

import kernels

shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "G": st.integers(1, 3),
        "group": st.integers(1, 4),
        "M": st.integers(1, 9),
        "more": st.integers(0, 12),  # N - M
        "D": st.sampled_from([1, 3, 8, 20]),
        "causal": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


def draw(B, G, group, M, more, D, causal, seed, spread=1.0):
    torch.manual_seed(seed)
    q = torch.randn(B, G * group, M, D) * spread
    k = torch.randn(B, G, M + more, D) * spread
    return q, k, causal


def relative(actual, expected):
    return float(((actual.double() - expected).abs() / expected.abs().clamp(min=1e-30)).max())


@given(shapes, st.sampled_from([None, 0.3]))
def test_colsum_and_lse_match_float64(shape, scale):
    q, k, causal = draw(**shape)
    scores, softmax = softmax64(q, k, causal, scale)
    lse = kernels.attention_lse(q, k, causal=causal, scale=scale)
    assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    expected = softmax.sum(-2)
    seen = expected > 1e-30
    for given_lse in (None, lse):
        colsum = kernels.attention_colsum(q, k, causal=causal, scale=scale, lse=given_lse)
        assert colsum.dtype == torch.float32
        assert relative(colsum[seen], expected[seen]) < 2e-5
        assert bool((colsum[~seen] <= 1e-30).all())


@given(shapes)
def test_colsum_of_every_head_adds_up_to_the_rows(shape):
    q, k, causal = draw(**shape)
    sums = kernels.attention_colsum(q, k, causal=causal).double().sum(-1)
    assert relative(sums, torch.full_like(sums, shape["M"])) < 1e-5


@given(shapes)
def test_colsum_follows_its_keys_when_they_are_permuted(shape):
    q, k, _ = draw(**shape)
    order = torch.randperm(k.shape[2])
    colsum = kernels.attention_colsum(q, k)
    assert relative(kernels.attention_colsum(q, k[:, :, order]), colsum[..., order].double()) < 1e-5


@given(shapes)
def test_colsum_ignores_a_shift_of_all_scores_of_a_row(shape):
    q, k, causal = draw(**shape)
    shifted = k + torch.randn(
        k.shape[0], k.shape[1], 1, k.shape[3]
    )  # adds q . shift to every score
    colsum = kernels.attention_colsum(q, k, causal=causal)
    seen = colsum > 1e-20
    other = kernels.attention_colsum(q, shifted, causal=causal)
    assert relative(other[seen], colsum[seen].double()) < 1e-4


@given(shapes)
def test_chunking_the_rows_changes_nothing_but_rounding(shape):
    q, k, causal = draw(**shape)
    whole = kernels.attention_colsum(q, k, causal=causal)
    chunk = kernels.CHUNK_BYTES
    try:
        kernels.CHUNK_BYTES = 1  # one row at a time
        rows = kernels.attention_colsum(q, k, causal=causal)
    finally:
        kernels.CHUNK_BYTES = chunk
    seen = whole > 0
    assert relative(rows[seen], whole[seen].double()) < 1e-5
    assert same_zeros(rows, whole)


def same_zeros(a, b):
    return torch.equal(a == 0, b == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_scored_in_float32(dtype):
    q, k, _ = draw(1, 2, 2, 5, 30, 16, True, seed=3)
    q, k = q.to(dtype), k.to(dtype)
    expected = softmax64(q, k, True)[1].sum(-2)  # the float64 of the rounded inputs
    colsum = kernels.attention_colsum(q, k, causal=True)
    assert colsum.dtype == torch.float32
    assert relative(colsum, expected) < 1e-5


def test_huge_scores_neither_overflow_nor_lose_the_winner():
    q = torch.full((1, 1, 2, 4), 100.0)
    k = torch.tensor([[-100.0] * 4, [100.0] * 4, [99.0] * 4])[None, None]
    assert kernels.attention_colsum(q, k).tolist() == [[[0.0, 2.0, 0.0]]]
    assert kernels.attention_lse(q, k).tolist() == [[[20000.0, 20000.0]]]


def test_rows_that_see_no_key_contribute_nothing():
    q, k = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 2, 4)  # M > N: the first three rows see none
    colsum = kernels.attention_colsum(q, k, causal=True)
    assert torch.allclose(colsum, kernels.attention_colsum(q[:, :, 3:], k, causal=True))
    assert kernels.attention_lse(q, k, causal=True)[0, 0, :3].tolist() == [-math.inf] * 3


@given(
    st.integers(1, 3), st.integers(0, 3), st.integers(1, 9), st.integers(0, 12), st.integers(0, 99)
)
def test_gather_tokens_takes_rows(B, G, N, K, seed):
    torch.manual_seed(seed)
    x = torch.randn(B, G, N, 5) if G else torch.randn(B, N, 5)
    index = torch.randint(0, N, (B, K))
    out = kernels.gather_tokens(x, index)
    assert out.shape == (*x.shape[:-2], K, 5) and out.is_contiguous()
    for b in range(B):
        for i in range(K):
            assert torch.equal(out[b, ..., i, :], x[b, ..., index[b, i], :])


def test_gather_tokens_reads_a_part_of_a_buffer():
    buffer = torch.randn(1, 2, 10, 4)
    index = torch.tensor([[0, 3, 5]])
    assert torch.equal(kernels.gather_tokens(buffer[:, :, :6], index), buffer[:, :, [0, 3, 5]])


@given(shapes, st.integers(0, 5), st.booleans())
def test_decode_attention_matches_float64_and_reads_no_further(shape, unused, on_device):
    q, k, _ = draw(**shape | {"M": 1})
    N, H, G = k.shape[2], q.shape[1], k.shape[1]
    v = torch.randn_like(k)
    scores, softmax = softmax64(q, k, causal=False)
    values = torch.stack([v[:, h * G // H] for h in range(H)], 1).double()
    expected = softmax @ values
    poison = torch.full((*k.shape[:2], unused, k.shape[3]), math.nan)
    length = torch.tensor(N) if on_device else N
    k, v = torch.cat([k, poison], 2), torch.cat([v, poison], 2)
    out = kernels.decode_attention(q, k, v, length=length)
    assert out.shape == q.shape
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)


q0, k0 = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)


@pytest.mark.parametrize(
    "q, k, message",
    [
        (q0[0], k0, "must be"),
        (q0, k0[..., :4], "equal B and D"),
        (q0.expand(2, -1, -1, -1), k0, "equal B and D"),
        (q0[:, :3], k0, "G must divide H, got H = 3 and G = 2"),
        (q0.half(), k0, "float16 and torch.float32"),
        (q0.int(), k0.int(), "int32"),
        (q0[:, :, :0], k0, "empty"),
        (q0, k0.to("meta"), "cpu and meta"),
        (q0.tolist(), k0, "arguments must be tensors, got list, Tensor"),
    ],
)
def test_attention_refuses_what_does_not_fit(q, k, message):
    for call in (kernels.attention_lse, kernels.attention_colsum):
        with pytest.raises(ValueError, match=message):
            call(q, k)
    with pytest.raises(ValueError):
        kernels.decode_attention(q, k, k)


def test_the_other_operations_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"lse must be float32 of shape \(1, 4, 3\)"):
        kernels.attention_colsum(q0, k0, lse=torch.zeros(1, 4, 2))
    for length in (0, 6, -1, math.inf, 1.9, "2"):
        with pytest.raises(ValueError, match=r"length must be an integer in \[1, 5\], got"):
            kernels.decode_attention(q0[:, :, :1], k0, k0, length=length)
    with pytest.raises(ValueError, match=r"v like it"):
        kernels.decode_attention(q0[:, :, :1], k0, k0[:, :, :4])
    with pytest.raises(ValueError, match="must be tensors, got list"):
        kernels.attention_colsum(q0, k0, lse=[1.0])
    x = torch.randn(2, 5, 3)
    for index, message in [
        (torch.tensor([[0, 5], [0, 1]]), r"\[0, 5\), got 0 .. 5"),
        (torch.tensor([[-1], [0]]), r"\[0, 5\), got -1"),
        (torch.tensor([[0]]), r"\(2, 5, 3\) and \(1, 1\)"),
        (torch.tensor([[0], [0]], dtype=torch.int32), "int64"),
        ([[0], [0]], "must be tensors, got Tensor, list"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernels.gather_tokens(x, index)


def test_colsum_of_a_long_sequence_stays_within_its_memory():
    """At M = N = 4096, H = 8 the matrix would take 512 MB; a chunk takes 16 MB, and is gone before
    the next one is made. Several pictures make no smaller chunks."""
    q, before, chunks = torch.randn(2, 8, 4096, 16), None, 0
    for _, _, scores in kernels._score_chunks(q, q, False, None):
        assert scores.nbytes <= kernels.CHUNK_BYTES
        assert before is None or before() is None
        before, chunks = weakref.ref(scores), chunks + 1
        del scores
    assert chunks == 2 * 32


@pytest.mark.parametrize("given", [False, True])
def test_gradients_flow_through_the_column_sums(given):
    """Of the PyTorch path, for those who train a tower's salience; beside float64's."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 4, 5, 8).requires_grad_(), torch.randn(2, 2, 7, 8).requires_grad_())
    lse = kernels.attention_lse_reference(q, k, causal=True) if given else None
    kernels.attention_colsum_reference(q, k, causal=True, lse=lse).square().sum().backward()
    got, q.grad, k.grad = (q.grad, k.grad), None, None
    softmax64(q, k, True)[1].sum(-2).square().sum().backward()
    for a, b in zip(got, (q.grad, k.grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("found", ["nothing", "an older one"])
def test_without_triton_every_operation_takes_the_pytorch_path(found):
    """As on macOS and Windows, where `import triton` fails, and with Triton 3.3, which has no
    `knobs`."""
    program = """
import sys, types
older, language = types.ModuleType("triton"), types.ModuleType("triton.language")
older.language, older.jit = language, lambda kernel: kernel
if sys.argv[1] == "nothing":
    sys.modules["triton"] = None
else:
    sys.modules |= {"triton": older, "triton.language": language}
import torch
import awq, kernels
assert kernels.triton is None and awq.triton is None
linear = torch.nn.Linear(64, 16)
assert awq.W4A16Linear.from_linear(linear, 32)(torch.randn(3, 64)).shape == (3, 16)
q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)
assert kernels.attention_lse(q, k).shape == (1, 4, 1)
assert kernels.attention_colsum(q, k).shape == (1, 4, 5)
assert kernels.gather_keys_values(k, k, torch.tensor([[3, 1]]))[1].shape == (1, 2, 2, 8)
assert kernels.decode_attention(q, k, k).shape == q.shape
"""
    command = [sys.executable, "-c", program, found]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# CUDA's limits for the three axes of a launch grid (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability").
MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)


@pytest.mark.skipif(kernels.triton is None, reason="no Triton")
@pytest.mark.parametrize("B, G", [(65_536, 1), (1, 65_536), (3, 30_000)])
@pytest.mark.parametrize("rows", [1, 70_000])
def test_no_launch_has_more_programs_than_cuda_allows(monkeypatch, B, G, rows):
    """However large batch and heads or rows are. Nothing is launched: the grids are recorded, and
    the tensors have no memory behind them."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    for name in (
        "_lse_kernel",
        "_colsum_kernel",
        "_gather_kernel",
        "_decode_kernel",
        "_combine_kernel",
    ):
        monkeypatch.setattr(kernels, name, Recorder())
    monkeypatch.setattr(kernels, "_programs", lambda device: 500)
    monkeypatch.setattr(kernels.torch.cuda, "device_of", lambda _: nullcontext())
    q = torch.empty(B, 2 * G, rows, 16, device="meta")
    k = torch.empty(B, G, rows, 16, device="meta")
    index = torch.empty(B, rows, dtype=torch.int64, device="meta")
    kernels._attention_colsum_triton(q, k, causal=True, scale=None, lse=None)
    kernels._gather_triton([k, k], index)
    kernels._decode_attention_triton(q[:, :, :1], k, k, length=rows, scale=None)
    assert len(grids) == 5
    for grid in grids:
        assert all(size <= most for size, most in zip(grid, MOST_PROGRAMS)), grid
    assert max(map(max, grids)) > 65_535


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_that_sees_only_minus_infinity_sees_nothing(dtype, causal):
    check_rows_that_see_nothing(dtype, causal, "cpu")
