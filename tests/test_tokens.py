"""Choosing tokens: keep_count, select_tokens, prune."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsevila import keep_count, prune, select_tokens

sparsities = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 300_000), st.data())
def test_keep_count_of_a_ratio_is_free_of_float_error(n, data):
    dropped = data.draw(st.integers(0, n - 1))
    assert keep_count(n, dropped / n) == n - dropped


@given(st.integers(0, 999), st.integers(1, 300_000))
def test_keep_count_means_the_decimal_that_was_written(thousandths, n):
    assert keep_count(n, thousandths / 1000) == n - math.floor(Fraction(thousandths, 1000) * n)


@given(st.integers(1, 300_000), sparsities, sparsities)
def test_keep_count_is_monotone_and_at_least_one(n, a, b):
    low, high = sorted((a, b))
    assert n >= keep_count(n, low) >= keep_count(n, high) >= 1


def test_keep_count_examples():
    assert [keep_count(100, s) for s in (0, 0.29, 0.75, 0.9, 0.999)] == [100, 71, 25, 10, 1]
    assert keep_count(10, 1 - 0.9) == 9  # 0.09999999999999998
    assert keep_count(1, 0.99) == 1 and keep_count(0, 0.5) == 0


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numpys_numbers_mean_what_they_print(kind):
    assert keep_count(np.int64(100), kind(0.9)) == 10 and keep_count(100, kind(0.29)) == 71
    scores = torch.tensor([1.0, 3, 2])
    assert select_tokens(scores, np.int32(2)).tolist() == [1, 2]
    assert prune([scores[:, None]], [scores], kind(0.4))[1][0].tolist() == [1, 2]


@pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, math.nan, math.inf, "0.5", None])
def test_keep_count_refuses(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got"):
        keep_count(10, sparsity)


@pytest.mark.parametrize("n", [-1, 2.0, None])
def test_keep_count_refuses_other_counts(n):
    with pytest.raises(ValueError, match="n must be an integer of at least 0"):
        keep_count(n, 0.5)


# Few different values, so that there are many ties.
scores = st.lists(st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 2.0, math.inf]), min_size=1)


@given(scores, st.data())
def test_select_tokens_matches_a_plain_sort(values, data):
    keep = data.draw(st.integers(0, len(values)))
    index = select_tokens(torch.tensor(values), keep)
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]
    assert index.tolist() == sorted(best) and index.dtype == torch.int64


@given(scores, st.data())
def test_select_tokens_is_nested(values, data):
    few, many = sorted(data.draw(st.tuples(*[st.integers(0, len(values))] * 2)))
    small, large = (select_tokens(torch.tensor(values), keep).tolist() for keep in (few, many))
    assert set(small) <= set(large)


def test_select_tokens_works_on_every_row():
    assert select_tokens(torch.tensor([[1.0, 3, 2], [5, 5, 5]]), 2).tolist() == [[1, 2], [0, 1]]


def test_select_tokens_refuses():
    with pytest.raises(ValueError, match="NaN"):
        select_tokens(torch.tensor([0.0, math.nan]), 1)
    for keep in (-1, 3, 1.5, None):
        with pytest.raises(ValueError, match=rf"keep must be an integer in \[0, 2\], got {keep}"):
            select_tokens(torch.zeros(2), keep)
    with pytest.raises(ValueError, match=r"scores must be \(..., n\), got 0.5"):
        select_tokens(torch.tensor(0.5), 1)


@given(st.integers(1, 4), st.integers(1, 12), sparsities, st.integers(0, 99))
def test_prune_keeps_the_most_salient_of_every_frame(images, n, sparsity, seed):
    torch.manual_seed(seed)
    features, salience = torch.randn(images, n, 3), torch.rand(images, n)
    kept, index = prune(features, salience, sparsity)
    K = keep_count(n, sparsity)
    assert [x.shape for x in kept] == [(K, 3)] * images
    assert [i.shape for i in index] == [(K,)] * images
    for picture in range(images):
        assert torch.equal(kept[picture], features[picture, index[picture]])
        others = [j for j in range(n) if j not in index[picture].tolist()]
        if others:
            assert salience[picture, index[picture]].min() >= salience[picture, others].max()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), sparsities, st.integers(0, 99))
def test_views_may_differ_in_their_number_of_tokens(sizes, sparsity, seed):
    """Against plain Python: every view by itself, or all tokens in one list."""
    torch.manual_seed(seed)
    features = [torch.randn(n, 2) for n in sizes]
    salience = [torch.randint(0, 4, (n,)).float() for n in sizes]  # with ties
    tokens = [(view, i) for view, n in enumerate(sizes) for i in range(n)]

    def best(candidates):
        order = sorted(candidates, key=lambda t: (-float(salience[t[0]][t[1]]), t))
        return order[: keep_count(len(candidates), sparsity)]

    frames = [t for view in range(len(sizes)) for t in best([t for t in tokens if t[0] == view])]
    for scope, chosen in (("frame", frames), ("global", best(tokens))):
        kept, index = prune(features, salience, sparsity, scope=scope)
        assert len(kept) == len(index) == len(sizes)
        assert [(v, i) for v, part in enumerate(index) for i in part.tolist()] == sorted(chosen)
        assert all(torch.equal(kept[v], features[v][index[v]]) for v in range(len(sizes)))


def test_prune_globally_may_empty_a_frame():
    features = torch.arange(12.0).view(2, 3, 2)
    salience = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]])
    kept, index = prune(features, salience, 0.5, scope="global")
    assert [i.tolist() for i in index] == [[], [0, 1, 2]]
    assert kept[0].shape == (0, 2) and torch.equal(kept[1], features[1])


@given(st.integers(0, 99), sparsities, sparsities)
def test_pruning_more_keeps_a_subset(seed, a, b):
    torch.manual_seed(seed)
    features, salience = torch.randn(2, 10, 1), torch.randint(0, 4, (2, 10)).float()
    low, high = sorted((a, b))
    for scope in ("frame", "global"):
        more, fewer = (prune(features, salience, s, scope=scope)[1] for s in (low, high))
        for wide, narrow in zip(more, fewer, strict=True):
            assert set(narrow.tolist()) <= set(wide.tolist())


def test_prune_refuses():
    features, salience = torch.randn(2, 5, 3), torch.rand(2, 5)
    with pytest.raises(ValueError, match=r"got \[\(5, 3\), \(5, 3\)\] and \[\(4,\), \(4,\)\]"):
        prune(features, salience[:, :4], 0.5)
    with pytest.raises(ValueError, match="scope must be 'frame' or 'global', got 'video'"):
        prune(features, salience, 0.5, scope="video")
    with pytest.raises(ValueError, match="NaN"):
        prune(features, salience / 0 * 0, 0.5)
    with pytest.raises(ValueError, match="sparsity"):
        prune(features, salience, 1.0)
    for scope in ("frame", "global"):
        with pytest.raises(ValueError, match=r"got \[\] and \[\]"):
            prune([], [], 0.5, scope=scope)
