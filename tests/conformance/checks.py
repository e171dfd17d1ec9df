"""What every implementation must do, one function for each property.

A check takes a `Lab`, which holds the operations of the implementation under test, and raises
AssertionError with words that say what is wrong. CHECKS lists them by operation.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import oracle
from .check import expectations, fault, place_of
from .oracle import ROUNDOFF, U16, Attention, gamma
from .run import session


@dataclass
class Lab:
    """The implementation under test, and where and on what it is tested."""

    operations: dict[str, Any]
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    notes: list[str] = field(default_factory=list)  # what is not wrong, but worth knowing

    def __getattr__(self, name: str) -> Any:
        try:
            return self.operations[name]
        except KeyError:
            raise AttributeError(name) from None

    def normal(self, seed: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Of the first dtype under test if none is named."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator)
        return x.to(self.dtypes[0] if dtype is None else dtype).to(self.device)


def in_every_dtype(check: Callable[[Lab], None], lab: Lab) -> list[str]:
    """Run a check in each dtype apart, so that one that is refused hides nothing in the others.
    Returns what the implementation said of those it refused."""
    refused = []
    for dtype in lab.dtypes:
        try:
            check(replace(lab, dtypes=(dtype,)))
        except NotImplementedError as error:
            assert "not implemented for '" not in str(error), f"{dtype}: {error}"  # torch's own
            refused.append(f"{dtype}: {error}")
    return refused


CHECKS: dict[str, list[Callable[[Lab], None]]] = {}


def checks(operation: str) -> Callable:
    """Register a check of an operation."""

    def register(check: Callable[[Lab], None]) -> Callable[[Lab], None]:
        CHECKS.setdefault(operation, []).append(check)
        return check

    return register


def near(got: Tensor, expected: Tensor, allowed: Tensor, what: str) -> None:
    """Equal shapes, and every value within its allowed error; infinities where expected."""
    assert isinstance(got, Tensor), f"{what}: must be a tensor, got {type(got).__name__}"
    assert got.shape == expected.shape, (
        f"{what}: shape must be {tuple(expected.shape)}, got {tuple(got.shape)}"
    )
    assert not got.isnan().any(), f"{what}: {int(got.isnan().sum())} NaN"
    got, infinite = got.double().to(expected.device), expected.isinf()
    assert torch.equal(got[infinite], expected[infinite]), f"{what}: infinities differ"
    excess = ((got - expected).abs() - allowed).masked_fill(infinite, -1)
    if excess.numel():
        worst = int(excess.argmax())
        assert excess.flatten()[worst] <= 0, (
            f"{what}: {got.flatten()[worst]:.9g} in place of {expected.flatten()[worst]:.9g} at "
            f"{place_of(worst, got)}, allowed are "
            f"{allowed.expand_as(expected).flatten()[worst]:.3g}"
        )


def same(got: Any, expected: Any, what: str) -> None:
    got = got.tolist() if isinstance(got, Tensor) else got
    assert got == expected, f"{what}: must be {_short(expected)}, got {_short(got)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 200 else text[:200] + " ..."


# --- attention ------------------------------------------------------------------------------------

SHAPES = [  # B, H, G, M, N, D, causal
    (1, 1, 1, 1, 1, 8, False),
    (2, 4, 2, 5, 7, 16, True),
    (1, 6, 2, 3, 40, 24, True),  # fewer rows than keys: the mask is right-aligned
    (1, 6, 3, 70, 70, 32, True),
    (2, 3, 1, 33, 129, 64, False),
    (1, 4, 1, 9, 300, 80, True),
    (1, 2, 2, 200, 31, 16, False),
    (1, 2, 1, 6, 2500, 72, False),
    (2, 4, 2, 300, 310, 16, True),
    (1, 2, 1, 20, 300, 128, True),
    (1, 1, 1, 2, 5000, 16, False),
    (2, 4, 2, 9, 5, 16, True),  # more rows than keys: the first four see none
]


def attentions(lab: Lab, spread: float = 3.0):
    """Queries and keys of all shapes and dtypes, scores of about this size, with the oracle."""
    for number, (B, H, G, M, N, D, causal) in enumerate(SHAPES):
        for dtype in lab.dtypes:
            q = lab.normal(2 * number, B, H, M, D, dtype=torch.float32) * spread**0.5
            k = lab.normal(2 * number + 1, B, G, N, D, dtype=torch.float32) * spread**0.5
            q, k = q.to(dtype), k.to(dtype)
            what = f"B {B}, H {H}, G {G}, M {M}, N {N}, D {D}, causal {causal}, {dtype}"
            yield q, k, causal, Attention(q.cpu(), k.cpu(), causal), what


def scaled(lab: Lab, scales: tuple[float, ...]):
    """Queries and keys with scales and masks, and the oracle."""
    q, k = lab.normal(0, 1, 2, 4, 16), lab.normal(1, 1, 1, 9, 16)
    for scale in scales:
        for causal in (False, True):
            options = {"causal": causal, "scale": scale}
            yield q, k, options, Attention(q.cpu(), k.cpu(), **options)


@checks("attention_lse")
def the_log_sum_exp_of_every_row(lab: Lab) -> None:
    for q, k, causal, truth, what in attentions(lab):
        got = lab.attention_lse(q, k, causal=causal)
        assert got.dtype == torch.float32, f"{what}: must be float32, got {got.dtype}"
        near(got, truth.lse, truth.lse_error, what)


@checks("attention_lse")
def lse_of_a_given_scale_and_of_large_scores(lab: Lab) -> None:
    for q, k, options, truth in scaled(lab, (0.01, 1.0, 100.0)):
        near(lab.attention_lse(q, k, **options), truth.lse, truth.lse_error, str(options))


@checks("attention_lse")
def rows_that_see_no_key_have_minus_infinity(lab: Lab) -> None:
    q, k = lab.normal(0, 1, 1, 5, 8), lab.normal(1, 1, 1, 3, 8)
    got = lab.attention_lse(q, k, causal=True)[0, 0].tolist()
    assert got[:2] == [-math.inf] * 2 and math.isfinite(got[2]), f"M 5, N 3, causal: got {got}"


@checks("attention_colsum")
def the_attention_that_every_key_receives(lab: Lab) -> None:
    for q, k, causal, truth, what in attentions(lab):
        got = lab.attention_colsum(q, k, causal=causal)
        assert got.dtype == torch.float32, f"{what}: must be float32, got {got.dtype}"
        near(got, *truth.colsum(), what)


@checks("attention_colsum")
def column_sums_of_a_given_scale(lab: Lab) -> None:
    for q, k, options, truth in scaled(lab, (0.01, 1.0, 30.0)):
        near(lab.attention_colsum(q, k, **options), *truth.colsum(), str(options))


@checks("attention_colsum")
def column_sums_with_the_rows_lse_given(lab: Lab) -> None:
    """It is natural: twice the lse's exponential halves the sums. Whoever does not use it gets the
    sums right as well, for an lse that is; that is noted."""
    q, k = lab.normal(0, 2, 4, 6, 16), lab.normal(1, 2, 2, 20, 16)
    for options in ({"causal": True}, {"scale": 0.5}):
        truth = Attention(q.cpu(), k.cpu(), **options)
        expected, allowed = truth.colsum()
        lse = truth.lse.float().to(lab.device)
        got = lab.attention_colsum(q, k, lse=lse, **options)
        near(got, expected, 2 * allowed, f"lse given, {options}")
        half = lab.attention_colsum(q, k, lse=lse + math.log(2), **options)
        if torch.equal(half, lab.attention_colsum(q, k, **options)):
            lab.notes.append("attention_colsum does not use lse=: right, but it saves no pass")
            return
        near(half, expected / 2, 2 * allowed, f"lse + ln 2, {options}")


@checks("attention_colsum")
def column_sums_are_the_same_bits_twice(lab: Lab) -> None:
    q, k = lab.normal(0, 1, 4, 600, 16), lab.normal(1, 1, 2, 600, 16)
    first, second = (lab.attention_colsum(q, k, causal=True) for _ in range(2))
    assert torch.equal(first, second), "two calls with the same input differ"


@checks("attention_colsum")
def tensors_of_any_strides(lab: Lab) -> None:
    """As a transposed projection gives them."""
    q = lab.normal(0, 2, 7, 4, 16).transpose(1, 2)
    k = lab.normal(1, 2, 30, 2, 16).transpose(1, 2)
    truth = Attention(q.cpu(), k.cpu(), True)
    near(lab.attention_colsum(q, k, causal=True), *truth.colsum(), "transposed")


@checks("decode_attention")
def one_query_against_a_cache(lab: Lab) -> None:
    """The first `length` rows only: what lies beyond is poison."""
    for number, (H, G, D, capacity, length) in enumerate(
        [(1, 1, 8, 4, 1), (4, 2, 16, 64, 63), (6, 2, 64, 300, 257), (7, 1, 80, 2000, 2000)]
    ):
        for dtype in lab.dtypes:
            q = lab.normal(3 * number, 1, H, 1, D, dtype=dtype)
            k = lab.normal(3 * number + 1, 1, G, capacity, D, dtype=dtype)
            v = lab.normal(3 * number + 2, 1, G, capacity, D, dtype=dtype)
            truth = Attention(q.cpu(), k[:, :, :length].cpu())
            expected = truth.output(v[:, :, :length].cpu(), dtype)
            what = f"H {H}, G {G}, D {D}, length {length} of {capacity}, {dtype}"
            for poison in (1000.0, math.nan):
                k[:, :, length:], v[:, :, length:] = poison, poison
                got = lab.decode_attention(q, k, v, length=length)
                assert got.dtype == dtype, f"{what}: must be {dtype}, got {got.dtype}"
                near(got, *expected, what)
            on_device = torch.tensor(length, device=lab.device)
            near(lab.decode_attention(q, k, v, length=on_device), *expected, what)


@checks("decode_attention")
def decoding_with_the_whole_buffer_and_a_scale(lab: Lab) -> None:
    q, k, v = lab.normal(0, 2, 4, 1, 16), lab.normal(1, 2, 2, 33, 16), lab.normal(2, 2, 2, 33, 16)
    near(lab.decode_attention(q, k, v), *Attention(q.cpu(), k.cpu()).output(v.cpu(), q.dtype), "")
    for scale in (2.0, 100.0):  # scores of up to 1000
        truth = Attention(q.cpu(), k[:, :, :30].cpu(), scale=scale)
        got = lab.decode_attention(q, k, v, length=30, scale=scale)
        near(got, *truth.output(v[:, :, :30].cpu(), q.dtype), f"scale {scale}, length 30")
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    truth = Attention(q.cpu(), k.cpu())
    near(lab.decode_attention(q, k, v), *truth.output(v.cpu(), q.dtype), "other strides")


# --- choosing and copying -------------------------------------------------------------------------


@checks("gather_tokens")
def rows_are_copied_bit_by_bit(lab: Lab) -> None:
    for dtype in (*lab.dtypes, torch.int64):
        for shape in ((2, 9, 5), (2, 3, 9, 5)):
            x = (lab.normal(0, *shape) * 100).to(dtype)
            x = x if dtype == torch.int64 else x.masked_fill(x > 150, math.nan)
            index = torch.tensor([[0, 2, 8, 3], [1, 4, 4, 7]], device=lab.device)
            got = lab.gather_tokens(x, index)
            expected = torch.stack([x[b, ..., index[b].tolist(), :] for b in range(2)])
            assert got.shape == expected.shape and got.dtype == dtype, f"{dtype} {shape}"
            equal = (got == expected) | (got != got) & (expected != expected)
            assert equal.all(), f"{dtype} {shape}: rows differ"


@checks("gather_tokens")
def rows_far_from_the_start_and_no_rows(lab: Lab) -> None:
    x = torch.arange(70_000, device=lab.device)[None, :, None].float()
    index = torch.tensor([[3, 200, 40_000, 69_999]], device=lab.device)
    same(lab.gather_tokens(x, index), [[[3.0], [200.0], [40000.0], [69999.0]]], "far rows")
    assert lab.gather_tokens(x, index[:, :0]).shape == (1, 0, 1), "no rows"
    x = (2**53 + torch.arange(6, device=lab.device)).view(1, 2, 3).mT  # 64 bits, other strides
    same(lab.gather_tokens(x, index[:, :1] - 1), x[:, 2:3].tolist(), "64-bit integers")


@checks("keep_count")
def counts_are_exact(lab: Lab) -> None:
    cases = [(100, 0.29), (100, 0.1), (1000, 0.7), (10, 0.3), (576, 0.75), (7, 0.999), (0, 0.5)]
    cases += [(n, s) for n in (1, 2, 3, 10, 81, 121) for s in (0.0, 1 / 3, 0.5, 0.9)]
    cases += [(n, k / n) for n in (7, 49, 93, 196) for k in range(n)]
    cases += [(100_000, 0.12345), (10_000, 0.29999999), (1000, 0.699999)]
    for n, sparsity in cases:
        assert type(lab.keep_count(n, sparsity)) is int, "must be an int"
        same(lab.keep_count(n, sparsity), oracle.keep_count(n, sparsity), f"{n} at {sparsity}")


@checks("select_tokens")
def scores_that_differ_in_the_last_bit(lab: Lab) -> None:
    bits = list(range(3000))
    random.Random(1).shuffle(bits)
    scores = (1 + torch.tensor(bits) * 2.0**-23).to(lab.device)
    got = lab.select_tokens(scores, 500)
    assert got.dtype == torch.int64, f"must be int64, got {got.dtype}"
    same(got, oracle.select_tokens([float(b) for b in bits], 500), "500 of 3000")


@checks("select_tokens")
def the_highest_scores_in_order_ties_to_the_lower_index(lab: Lab) -> None:
    rng = random.Random(0)
    for n in (1, 2, 5, 40, 1000):
        for levels in (1, 2, 5, 10**6):  # few levels: many ties
            scores = [rng.randrange(levels) / levels - 0.5 for _ in range(n)]
            for keep in {0, 1, n // 3, n - 1, n}:
                got = lab.select_tokens(torch.tensor(scores, device=lab.device), keep)
                exact = torch.tensor(scores).tolist()  # as float32
                same(got, oracle.select_tokens(exact, keep), f"{keep} of {n}, {levels} levels")


@checks("select_tokens")
def infinite_scores_and_several_rows(lab: Lab) -> None:
    scores = torch.tensor([[0, -math.inf, math.inf, 0], [1e-38, 0, -0.0, -1]], device=lab.device)
    same(lab.select_tokens(scores, 2), [[0, 2], [0, 1]], "two rows")


@checks("prune")
def the_most_salient_tokens_of_every_picture(lab: Lab) -> None:
    features, salience = (
        lab.normal(0, 3, 20, 4),
        lab.normal(1, 3, 20, dtype=torch.float32).softmax(-1),
    )
    salience[1] *= 100  # frames are not compared with each other
    for sparsity in (0.0, 0.3, 0.75, 0.99):
        keep = oracle.keep_count(20, sparsity)
        kept, index = lab.prune(features, salience, sparsity)
        expected = [oracle.select_tokens(row, keep) for row in salience.tolist()]
        per_view(kept, index, features, expected, f"sparsity {sparsity}")


def per_view(kept: Any, index: Any, features: Any, expected: list[list[int]], what: str) -> None:
    """What `prune` returned: for each view the rows of the index that is expected."""
    same([part.tolist() for part in index], expected, f"{what}: index")
    assert len(kept) == len(expected), f"{what}: {len(kept)} views in place of {len(expected)}"
    for view, chosen in enumerate(expected):
        rows = features[view][chosen]
        assert torch.equal(kept[view], rows), f"{what}: features are not those of the index"


@checks("prune")
def pruning_over_all_pictures_together(lab: Lab) -> None:
    features, salience = (
        lab.normal(0, 3, 20, 4),
        lab.normal(1, 3, 20, dtype=torch.float32).softmax(-1),
    )
    for sparsity, keep in ((0.5, 30), (0.33, 41)):
        kept, index = lab.prune(features, salience, sparsity, scope="global")
        every = oracle.select_tokens(salience.flatten().tolist(), keep)
        expected = [[i % 20 for i in every if i // 20 == view] for view in range(3)]
        per_view(kept, index, features, expected, f"global, sparsity {sparsity}")


@checks("prune")
def views_with_different_numbers_of_tokens(lab: Lab) -> None:
    sizes = (9, 1, 24, 6)
    features = [lab.normal(view, n, 4) for view, n in enumerate(sizes)]
    salience = [lab.normal(9 + i, n, dtype=torch.float32) for i, n in enumerate(sizes)]
    kept, index = lab.prune(features, salience, 0.6)
    expected = [oracle.select_tokens(s.tolist(), oracle.keep_count(len(s), 0.6)) for s in salience]
    per_view(kept, index, features, expected, "views of 9, 1, 24 and 6 tokens")


@checks("prune")
def equal_salience_keeps_the_first_tokens(lab: Lab) -> None:
    _, index = lab.prune(lab.normal(0, 1, 10, 2), torch.ones(1, 10, device=lab.device), 0.6)
    same([part.tolist() for part in index], [[0, 1, 2, 3]], "index")


# --- four-bit weights -----------------------------------------------------------------------------


def codes(lab: Lab, seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.int8)
    return values.to(lab.device)


@checks("pack")
def eight_codes_in_an_integer(lab: Lab) -> None:
    got = lab.pack(torch.arange(8, dtype=torch.int8, device=lab.device)[None])
    assert got.dtype == torch.int32, f"must be int32, got {got.dtype}"
    same(got, [[0x75316420]], "codes 0 to 7")
    values = codes(lab, 0, 5, 48)
    same(lab.pack(values), oracle.pack(values.tolist()), "random codes")
    same(lab.pack(torch.full((1, 8), 15, dtype=torch.int8, device=lab.device)), [[-1]], "all 15")


@checks("unpack")
def every_nibble_comes_back(lab: Lab) -> None:
    words = oracle.pack(codes(lab, 1, 5, 48).tolist()) + [[-1, 0, 1, -(2**31), 2**31 - 1, 7]]
    got = lab.unpack(torch.tensor(words, dtype=torch.int32, device=lab.device))
    assert got.dtype == torch.int8, f"must be int8, got {got.dtype}"
    same(got, oracle.unpack(words), "codes")


def packed_weights(lab: Lab, seed: int, K: int, N: int, group: int) -> tuple[Tensor, ...]:
    words = (oracle.pack(codes(lab, seed + i, n, N).tolist()) for i, n in ((0, K), (1, K // group)))
    qweight, qzeros = (torch.tensor(w, dtype=torch.int32, device=lab.device) for w in words)
    scales = lab.normal(seed + 2, K // group, N, dtype=torch.float32)
    scales = (scales.abs() + 0.1).mul(0.01).half()
    return qweight, qzeros, scales


GROUPS = [(32, 8, 32), (160, 24, 32), (128, 16, 128), (96, 40, 96), (256, 8, 64)]  # K, N, group


@checks("dequantize")
def weights_are_code_minus_zero_times_scale(lab: Lab) -> None:
    for K, N, group in GROUPS:
        packed = packed_weights(lab, K, K, N, group)
        got = lab.dequantize(*packed)
        expected = oracle.dequantize(*(t.cpu() for t in packed))
        near(got, expected, torch.zeros(()), f"K {K}, N {N}, group {group}")


@checks("quantize_groups")
def weights_are_rounded_to_the_nearest_code(lab: Lab) -> None:
    for K, group in ((64, 32), (128, 128), (96, 32)):
        for kind in ("normal", "positive", "negative", "outlier"):
            w = lab.normal(K, 9, K, dtype=torch.float32)
            w = {"positive": w.abs() + 1, "negative": -w.abs() - 1}.get(kind, w)
            if kind == "outlier":
                w[:, 3] = 40.0
            got, scales, zeros = (t.double().cpu() for t in lab.quantize_groups(w, group))
            what = f"K {K}, group {group}, {kind}"
            assert got.shape == (9, K) and scales.shape == zeros.shape == (9, K // group), what
            for t in (got, zeros):
                assert ((t >= 0) & (t <= 15) & (t == t.round())).all(), f"{what}: codes 0 to 15"
            groups = w.double().cpu().view(9, -1, group)
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            near(scales, (high - low) / 15, (high - low) / 15 * 2 * U16, f"{what}: scales")
            back = (got.view(9, -1, group) - zeros[..., None]) * scales[..., None]
            reach = (-zeros * scales)[..., None], ((15 - zeros) * scales)[..., None]
            error = (back - groups.clamp(*reach)).abs() / scales[..., None]
            assert error.max() <= 0.5 + 1e-4, f"{what}: off by {error.max():.4g} scales"
            beyond = torch.maximum(reach[0] - groups, groups - reach[1]).amax() / scales.amax()
            assert beyond <= 0.51, f"{what}: the range leaves out {beyond:.3g} scales"


def product(lab: Lab, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None = None):
    """Expected x @ W + bias, and the allowed error."""
    w, x = oracle.dequantize(*(t.cpu() for t in packed)), x.double().cpu()
    expected, size = x @ w, x.abs() @ w.abs()
    if bias is not None:
        expected, size = expected + bias.double().cpu(), size + bias.double().cpu().abs()
    return expected, size


def product_error(K: int, dtype: torch.dtype, rounded: bool = True) -> float:
    """Allowed relative to the sum of absolute products. rounded: whether a weight in float32 may
    differ from the same in float16."""
    sixteen_bits = 0.0 if dtype == torch.float32 else 2 * ROUNDOFF[dtype]
    return gamma(K + 1) + sixteen_bits + (U16 if rounded else 0.0)


@checks("quantize_groups")
def codes_and_zeros_are_int8_scales_float16_groups_of_128(lab: Lab) -> None:
    got = lab.quantize_groups(lab.normal(0, 3, 256, dtype=torch.float32))
    same([t.dtype for t in got], [torch.int8, torch.float16, torch.int8], "dtypes")
    same([list(t.shape) for t in got], [[3, 256], [3, 2], [3, 2]], "shapes")


@checks("w4a16_matmul")
def products_with_packed_weights(lab: Lab) -> None:
    for K, N, group in GROUPS:
        packed = packed_weights(lab, K + 7, K, N, group)
        for rows in (1, 3, 17, 300):
            for dtype in lab.dtypes:
                x = lab.normal(rows, rows, K, dtype=dtype)
                expected, size = product(lab, x, packed)
                allowed = product_error(K, dtype) * size
                got = lab.w4a16_matmul(x, *packed)
                what = f"rows {rows}, K {K}, N {N}, group {group}, {dtype}"
                assert got.dtype == dtype, f"{what}: must be {dtype}, got {got.dtype}"
                near(got, expected, allowed, what)


@checks("w4a16_matmul")
def a_bias_is_added(lab: Lab) -> None:
    packed = packed_weights(lab, 0, 64, 24, 32)
    x, bias = lab.normal(0, 2, 64), 100 * lab.normal(1, 24)
    expected, size = product(lab, x, packed, bias)
    got = lab.w4a16_matmul(x, *packed, bias=bias)
    near(got, expected, product_error(64, x.dtype) * size, "with a bias")


@checks("w4a16_matmul")
def products_with_weights_that_need_no_rounding(lab: Lab) -> None:
    """Scales are powers of two: in float32 only the sums are rounded, so TF32 shows."""
    qweight, qzeros, scales = packed_weights(lab, 5, 160, 24, 32)
    packed = qweight, qzeros, (2.0 ** scales.float().log2().round()).half()
    x = lab.normal(3, 2, 9, 160)
    expected, size = product(lab, x, packed)
    near(lab.w4a16_matmul(x, *packed), expected, product_error(160, x.dtype, False) * size, "x @ W")


@checks("w4a16_matmul")
def products_with_weights_near_zero(lab: Lab) -> None:
    """Codes at most one from zero, or all zero, and large activations of one sign: a scale and an
    offset that are rounded apart add as much to every weight of a group, and that adds up. Left for
    it are 2^-15 steps of quantisation a weight where sums are rounded to bfloat16 (a step is a
    scale, and was rounded by half of it to begin with)."""
    for K, N, group in ((256, 32, 128), (128, 16, 32)):
        generator = torch.Generator().manual_seed(K)
        zeros = torch.randint(0, 16, (K // group, N), generator=generator, dtype=torch.int32)
        scales = (0.001 + 0.01 * torch.rand(K // group, N, generator=generator)).half()
        for off in (0, 1):
            codes = zeros.repeat_interleave(group, 0)
            codes = codes + torch.randint(-off, off + 1, (K, N), generator=generator)
            codes = codes.clamp(0, 15).int()
            words = (torch.tensor(oracle.pack(t.tolist())).int() for t in (codes, zeros))
            packed = tuple(t.to(lab.device) for t in (*words, scales))
            for rows in (1, 5, 100):
                for dtype in lab.dtypes:
                    x = (1000 * lab.normal(rows, rows, K, dtype=torch.float32).abs()).to(dtype)
                    expected, size = product(lab, x, packed)
                    steps = x.double().cpu().abs() @ scales.double().repeat_interleave(group, 0)
                    left = 2.0**-15 * steps if dtype == torch.bfloat16 else 0 * steps
                    allowed = product_error(K, dtype) * size + left
                    what = f"codes {off} from zero, rows {rows}, K {K}, group {group}, {dtype}"
                    near(lab.w4a16_matmul(x, *packed), expected, allowed, what)


# --- the retrieval cache --------------------------------------------------------------------------


class Session:
    """A RetrievalCache beside float64 books of everything it was told."""

    def __init__(
        self, lab: Lab, sparsity: float, seed: int = 0, layers: int = 2,
        heads: tuple[int, int] = (4, 2), head_dim: int = 16,
    ):  # fmt: skip
        self.lab, self.sparsity, self.layers = lab, sparsity, layers
        (self.H, self.G), self.D = heads, head_dim
        self.visual = [2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16]  # row 10 is text between
        rows = torch.tensor(self.visual, device=lab.device)
        self.cache = lab.RetrievalCache(layers, sparsity, visual=rows)
        self.seed = seed
        empty = torch.zeros(1, self.G, 0, self.D, dtype=lab.dtypes[0])
        self.k, self.v = [empty] * layers, [empty] * layers

    def rows(self, M: int) -> tuple[Tensor, Tensor, Tensor]:
        self.seed += 3
        shapes = ((self.H, 2.0), (self.G, 2.0), (self.G, 1.0))
        return tuple(
            size * self.lab.normal(self.seed + i, 1, heads, M, self.D)
            for i, (heads, size) in enumerate(shapes)
        )

    def attend(self, M: int, hidden: list[list[int]] | None = None, what: str = "") -> list[Tensor]:
        """M rows through all layers, compared with attention over all rows so far but the hidden
        ones; the queries of each layer."""
        queries = []
        for layer in range(self.layers):
            q, k, v = self.rows(M)
            self.k[layer] = torch.cat([self.k[layer], k.cpu()], 2)
            self.v[layer] = torch.cat([self.v[layer], v.cpu()], 2)
            got = self.cache.attend(layer, q.clone(), k.clone(), v.clone())
            N = self.k[layer].shape[2]
            seen = [n for n in range(N) if not hidden or n not in hidden[layer]]
            truth = Attention(q.cpu(), self.k[layer][:, :, seen], causal=True)
            expected = truth.output(self.v[layer][:, :, seen], q.dtype)
            assert got.dtype == q.dtype, f"{what}: must be {q.dtype}, got {got.dtype}"
            near(got, *expected, f"{what}, layer {layer}")
            queries.append(q)
        return queries

    def question(self, M: int, what: str) -> list[list[int]]:
        """Read a question, check relevance and choice; the visual rows hidden from the answer."""
        self.cache.start_question()
        queries = self.attend(M, what=f"{what}: the question")
        truths = [Attention(q.cpu(), k, causal=True) for q, k in zip(queries, self.k)]
        self.cache.start_answer()
        keep = oracle.keep_count(len(self.visual), self.sparsity)
        hidden = []
        for layer, truth in enumerate(truths):
            expected, allowed = truth.colsum()
            expected = expected.sum((0, 1))[self.visual] / (self.H * M)
            allowed = allowed.sum((0, 1))[self.visual] / (self.H * M)
            allowed = allowed + gamma(self.H * M + 1) * expected
            near(self.cache.relevance[layer], expected, allowed, f"{what}: relevance of {layer}")
            chosen = oracle.select_tokens(expected.tolist(), keep)
            same(self.cache.retrieved[layer], chosen, f"{what}: retrieved in layer {layer}")
            gone = set(range(len(self.visual))) - set(chosen)
            hidden.append([self.visual[i] for i in gone])
        return hidden


@checks("RetrievalCache")
def a_conversation_of_three_turns(lab: Lab) -> None:
    """Context, then questions of several rows and answers: dense questions, packed answers, and
    everything still there for the next question."""
    for sparsity in (0.0, 0.5, 0.9):
        session = Session(lab, sparsity)
        session.attend(18, what="context")
        for turn, (question, answer) in enumerate([(3, 4), (1, 2), (5, 3)]):
            what = f"sparsity {sparsity}, turn {turn}"
            hidden = session.question(question, what)
            for step in range(answer):
                session.attend(1, hidden, f"{what}: answer row {step}")
        same(session.cache.length, session.k[0].shape[2], "length")


@checks("RetrievalCache")
def a_turn_that_is_truncated_leaves_no_trace(lab: Lab) -> None:
    session = Session(lab, 0.7)
    session.attend(18, what="context")
    k, v = list(session.k), list(session.v)
    hidden = session.question(4, "first turn")
    session.attend(1, hidden, "its answer")
    session.cache.truncate(18)
    same(session.cache.length, 18, "length after truncate")
    session.k, session.v = k, v
    session.attend(1, what="a row of text after truncate")
    hidden = session.question(2, "after truncate")
    for step in range(3):
        session.attend(1, hidden, f"after truncate: answer row {step}")


@checks("RetrievalCache")
def a_long_context_and_the_last_of_two_turns_forgotten(lab: Lab) -> None:
    session = Session(lab, 0.7)
    session.attend(600, what="context")
    session.attend(1, session.question(4, "first turn"), "first answer")
    length, k, v = session.k[0].shape[2], list(session.k), list(session.v)
    session.attend(1, session.question(3, "second turn"), "second answer")
    session.cache.truncate(length)
    session.k, session.v = k, v
    hidden = session.question(2, "third turn")
    for step in range(2):
        session.attend(1, hidden, f"third answer, row {step}")


@checks("RetrievalCache")
def layers_choose_for_themselves(lab: Lab) -> None:
    """With many visual rows the layers' choices differ."""
    session = Session(lab, 0.5, seed=100, layers=4)
    session.attend(18, what="context")
    hidden = session.question(2, "question")
    for step in range(12):
        session.attend(1, hidden, f"answer row {step}")
    choices = {tuple(chosen.tolist()) for chosen in session.cache.retrieved}
    assert len(choices) > 1, "all layers retrieve the same rows"


@checks("RetrievalCache")
def other_numbers_and_sizes_of_heads(lab: Lab) -> None:
    for heads, head_dim in (((6, 2), 40), ((3, 3), 64), ((4, 1), 8)):
        session = Session(lab, 0.5, seed=200, heads=heads, head_dim=head_dim)
        session.attend(18, what="context")
        what = f"{heads[0]} heads over {heads[1]} of {head_dim}"
        session.attend(1, session.question(3, what), f"{what}: answer")


# --- the whole session ----------------------------------------------------------------------------


@checks("SparseVILA")
def conversations_with_the_tiny_model(lab: Lab) -> None:
    """Salience, kept, relevance, retrieved, packed rows, logits and tokens of every turn, as
    recorded in float64. The model is in float32."""
    if torch.float32 not in lab.dtypes:
        raise NotImplementedError("the tiny model is in float32")
    manifest, vectors = expectations()
    for case in (case for case in manifest if case["operation"] == "SparseVILA"):
        got = session(lab.SparseVILA, **case["parameters"], device=lab.device)
        for name, place in case["outputs"].items():
            words = fault(got[name].cpu(), place, vectors)
            assert words is None, f"{len(case['parameters']['pictures'])} pictures, {name}: {words}"
