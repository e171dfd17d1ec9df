"""The model and its cache: shapes, sampling, salience, causal attention, and refusals."""

import math
import re

import pytest
import torch
from conftest import random_model, random_pictures, same_bits
from hypothesis import given
from hypothesis import strategies as st

import kernels
import model
from model import KVCache, causal_attention, rotary_table, rotate, sample
from sparsevila import SparseVILA, patch_salience


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 6), st.integers(0, 99)
)
def test_causal_attention_is_right_aligned(G, group, M, more, seed):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, h, n, 4) for h, n in ((G * group, M), (G, M + more), (G, M + more)))
    out = causal_attention(q, k, v)
    for h in range(G * group):
        for i in range(M):
            keys, values = (x[0, h // group, : more + i + 1].double() for x in (k, v))
            weights = (keys @ q[0, h, i].double() / 2).softmax(0)
            assert torch.allclose(out[0, h, i].double(), weights @ values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("summary", [0, 1, 3])
def test_salience_is_the_mean_attention_of_the_summary_rows(summary):
    torch.manual_seed(summary)
    q, k = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    attention = (q.double() @ k.double().mT / math.sqrt(8)).softmax(-1)
    rows = attention[:, :, : summary or 9]
    expected = rows.mean((1, 2))[:, summary:]
    salience = patch_salience(q, k, summary)
    assert salience.dtype == torch.float32
    assert torch.allclose(salience.double(), expected, rtol=1e-5)


def test_rotary_angles_turn_halves_against_each_other():
    config = random_model(0, head_dim=6)[0].config.text
    cos, sin = rotary_table(torch.tensor([0, 3]), config)
    x = torch.tensor([1.0, 2, 3, 4, 5, 6]).expand(1, 1, 2, 6)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[0, 0, 0], x[0, 0, 0])  # position 0
    for i in range(3):  # element i is paired with element i + D/2
        angle = 3 * config.rope_theta ** (-2 * i / 6)
        pair = complex(i + 1, i + 4) * complex(math.cos(angle), math.sin(angle))
        assert math.isclose(turned[0, 0, 1, i], pair.real, rel_tol=1e-5)
        assert math.isclose(turned[0, 0, 1, i + 3], pair.imag, rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_public_shapes_are_as_documented(dtype):
    vlm, processor = random_model(1, dtype=dtype, grid=3, layers=2)
    pixels = processor.pixels(random_pictures(0, 2))
    assert pixels.shape == (2, 3, 12, 12) and pixels.dtype == torch.float32
    features, salience = SparseVILA(vlm, processor).encode(pixels)
    assert [x.shape for x in features] == [(9, 24)] * 2 and features[0].dtype == dtype
    assert [s.shape for s in salience] == [(9,)] * 2 and salience[0].dtype == torch.float32
    assert all(same_bits(x, y) for x, y in zip(features, vlm.encode(pixels), strict=True))
    visual = vlm.project(torch.stack(features))
    assert visual.shape == (2, 9, 32)
    embeddings = vlm.embed(processor.context([9, 9]), visual.flatten(0, 1))
    T = len(processor.context([9, 9]))
    assert embeddings.shape == (1, T, 32)
    assert vlm(embeddings).shape == (1, T, vlm.config.text.vocab)
    cache = KVCache(2)
    assert vlm(embeddings, cache).shape == (1, T, vlm.config.text.vocab)
    assert cache.length == cache.next_position == T


def test_encoding_many_pictures_in_parts_gives_the_same_features():
    vlm, processor = random_model(2)
    pixels = processor.pixels(random_pictures(0, 5))
    session = SparseVILA(vlm, processor)
    whole = session.encode(pixels)
    vlm.ENCODE_BATCH = 2
    for parts, all_at_once in zip(session.encode(pixels), whole):
        for a, b in zip(parts, all_at_once, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature_layer", [0, 1, 2, 3, -1, -2, -3, -4])
def test_features_come_from_the_layer_that_was_asked_for(feature_layer):
    """Against the definition: run all blocks and index the list of states."""
    vlm, processor = random_model(3, vision_layers=3, feature_layer=feature_layer)
    tower, pixels = vlm.vision_tower, processor.pixels(random_pictures(0, 1))
    states = [tower.embed(pixels)]
    for block in tower.layers:
        states.append(block(states[-1]))
    features, salience = SparseVILA(vlm, processor).encode(pixels)
    assert torch.equal(torch.stack(features), states[feature_layer][:, 1:])
    q, k = tower.layers[-1].self_attn.query_key(tower.layers[-1].layer_norm1(states[-2]))
    assert torch.equal(torch.stack(salience), patch_salience(q, k, 1))
    for layer, block in enumerate(tower.layers):  # and any other layer's, or none
        got, q, k = tower(pixels, layer)
        wanted = block.self_attn.query_key(block.layer_norm1(states[layer]))
        assert torch.equal(got, states[feature_layer])
        assert torch.equal(q, wanted[0]) and torch.equal(k, wanted[1])
    assert tower(pixels)[1:] == (None, None)


def test_embed_puts_visual_rows_at_the_placeholders_in_order():
    vlm, processor = random_model(4)
    image = processor.image_token_id
    visual = torch.randn(3, 32)
    embeddings = vlm.embed([7, image, image, 8, image], visual)[0]
    table = vlm.decoder.embed_tokens.weight
    assert torch.equal(embeddings[[1, 2, 4]], visual)
    assert torch.equal(embeddings[[0, 3]], table[[7, 8]])
    with pytest.raises(ValueError, match="2 image placeholders for 3 visual tokens"):
        vlm.embed([image, image], visual)
    vocab = len(table)
    with pytest.raises(ValueError, match=rf"must be in \[0, {vocab}\), got 5 .. {vocab}"):
        vlm.embed([5, vocab])


def test_embed_never_looks_up_a_placeholder_beyond_the_table():
    vlm, _ = random_model(4)
    object.__setattr__(vlm.config, "image_token_id", 10**9)
    assert torch.equal(vlm.embed([10**9], torch.ones(1, 32))[0], torch.ones(1, 32))
    assert vlm.generate(vlm.embed([1, 2]), max_new_tokens=2)


def test_generate_never_answers_with_a_placeholder():
    vlm, processor = random_model(5)
    vlm.lm_head.weight.zero_()
    vlm.lm_head.weight[processor.image_token_id] = vlm.read(vlm.embed([5, 6]))[
        0, -1
    ]  # its favourite
    assert processor.image_token_id not in vlm.generate(vlm.embed([5, 6]), max_new_tokens=1)


def test_generate_continues_a_cache_and_stops_at_stop_tokens():
    vlm, _ = random_model(6)
    prompt = [5, 6, 7, 8]
    free = vlm.generate(vlm.embed(prompt), max_new_tokens=6, stop_ids=[])
    assert len(free) == 6
    cache = KVCache(2)
    vlm.read(vlm.embed(prompt[:3]), cache)
    assert vlm.generate(vlm.embed(prompt[3:]), cache=cache, max_new_tokens=6, stop_ids=[]) == free
    assert cache.length == 4 + 5  # nothing follows the last token, so it is not read
    stop = free[2]
    stopped = vlm.generate(vlm.embed(prompt), max_new_tokens=6, stop_ids=[stop])
    assert stopped == free[: free.index(stop) + 1]
    # The same tokens from full passes without a cache.
    ids = list(prompt)
    for token in free:
        assert int(vlm(vlm.embed(ids))[0, -1].argmax()) == token
        ids.append(token)


def test_sampling_follows_the_seed_and_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = [sample(logits, 1.0, 1.0, generator) for _ in range(4000)]
    for token, p in enumerate([0.5, 0.3, 0.15, 0.05]):
        assert abs(draws.count(token) / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)
    assert {sample(logits, 1.0, 0.79, generator) for _ in range(200)} == {0, 1}
    assert {sample(logits, 1.0, 0.81, generator) for _ in range(200)} == {0, 1, 2}
    for cold in (0.01, 1e-40, 5e-324):
        assert {sample(logits, cold, 1.0, generator) for _ in range(50)} == {0}
    vlm, _ = random_model(7)
    kwargs = {"max_new_tokens": 8, "temperature": 2.0}
    first, again, other = (vlm.generate(vlm.embed([5]), seed=s, **kwargs) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "logits, word",
    [((1, math.nan), "nan"), ((1, math.inf), "inf"), ((-math.inf, -math.inf), "-inf")],
)
def test_logits_without_a_largest_are_refused(logits, word):
    logits = torch.tensor(logits, dtype=torch.float16)
    for temperature in (0.0, 1.0):
        message = f"the largest logit is {word}: .* an overflow in float16"
        with pytest.raises(ValueError, match=message):
            sample(logits, temperature, 1.0, torch.Generator())


def test_tokens_that_are_ruled_out_are_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert sample(logits, 0.0, 1.0, torch.Generator()) == 1
    assert {sample(logits, 1.0, 1.0, torch.Generator()) for _ in range(20)} == {1}


def test_generating_leaves_the_global_random_numbers_alone():
    vlm, _ = random_model(7)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    vlm.generate(vlm.embed([5]), max_new_tokens=4, temperature=1.0)
    assert torch.equal(torch.rand(4), expected)


def test_encode_refuses_pictures_of_another_size():
    vlm, _ = random_model(7)
    side = vlm.config.vision.image_size
    message = rf"pixels must be \(views, 3, {side}, {side}\), got \(1, 3, {side + 1}, {side}\)"
    with pytest.raises(ValueError, match=message):
        vlm.encode(torch.zeros(1, 3, side + 1, side))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "got 2.5"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": math.nan}, "got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*63\), got -1"),
        ({"max_new_tokens": 2048}, "the model has 2048 positions: 3 are taken"),
    ],
)
def test_generate_refuses_before_anything_is_written(changes, message):
    vlm, _ = random_model(8)
    cache = KVCache(2)
    vlm.read(vlm.embed([5, 6, 7]), cache)
    with pytest.raises(ValueError, match=message):
        vlm.generate(vlm.embed([8]), cache=cache, **{"max_new_tokens": 4} | changes)
    assert cache.length == 3


@pytest.mark.parametrize("shape", [(2, 3, 32), (1, 0, 32), (1, 3, 31), (3, 32), (1, 1, 3, 32)])
def test_generate_answers_one_prompt(shape):
    vlm, _ = random_model(8)
    cache, message = KVCache(2), f"embeddings must be (1, T, 32) with T at least 1, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        vlm.generate(torch.zeros(shape), cache=cache, max_new_tokens=2)
    assert cache.length == 0


def test_the_last_position_of_the_context_can_be_used():
    vlm, _ = random_model(8)
    assert len(vlm.generate(vlm.embed([5] * 2040), max_new_tokens=9, stop_ids=[])) == 9
    with pytest.raises(ValueError, match="answer up to 9"):
        vlm.generate(vlm.embed([5] * 2040), max_new_tokens=10)


def test_the_cache_grows_and_is_cut():
    cache = KVCache(1, capacity=1)
    k = torch.randn(1, 2, 200, 4)
    for row in range(200):
        cache.attend(0, k[:, :, row : row + 1], k[:, :, row : row + 1], 2 * k[:, :, row : row + 1])
        cache.advance(torch.tensor([row + 7]))
    assert torch.equal(cache.k[0][:, :, :200], k) and torch.equal(cache.v[0][:, :, :200], 2 * k)
    assert cache.length == 200 and cache.next_position == 207
    assert cache.k[0].shape[2] < 400
    cache.truncate(50)
    assert cache.length == 50 and cache.next_position == 57
    cache.truncate(0)
    assert cache.length == 0 and cache.next_position == 0
    for length in (-1, 1):
        with pytest.raises(ValueError, match=rf"length must be in \[0, 0\], got {length}"):
            cache.truncate(length)


def test_a_cache_of_another_depth_is_refused(tiny):
    vlm, _ = tiny
    layers = vlm.config.text.layers
    with pytest.raises(ValueError, match=f"for this model has {layers} layers, got {layers + 1}"):
        vlm.read(vlm.embed([1]), KVCache(layers + 1))


@pytest.mark.parametrize("positions", [[5], [[1, 2, 3]], [[1, 2, 3]] * 2, []])
def test_read_refuses_positions_that_are_not_one_for_each_row(positions):
    vlm, _ = random_model(0)
    cache = KVCache(2)
    with pytest.raises(ValueError, match=r"positions must be \(3,\) or \(3, 3\), got"):
        vlm.read(vlm.embed([1, 5, 6]), cache, positions=torch.tensor(positions))
    assert cache.length == 0


def test_a_failed_growth_leaves_the_cache_as_it_was(monkeypatch):
    cache = KVCache(1, capacity=64)
    rows = torch.randn(1, 2, 64, 4)
    cache.append(0, rows, -rows)
    grown, calls = model._grown, []

    def out_of_memory_for_values(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return grown(*arguments)

    monkeypatch.setattr(model, "_grown", out_of_memory_for_values)
    with pytest.raises(MemoryError):
        cache.append(0, rows, -rows)
    cache.append(0, 2 * rows, -2 * rows)
    assert torch.equal(cache.k[0][:, :, :128], torch.cat([rows, 2 * rows], 2))
    assert torch.equal(cache.v[0], -cache.k[0])


def test_a_failed_read_leaves_the_cache_as_it_was():
    vlm, _ = random_model(9)
    cache = KVCache(2)
    vlm.read(vlm.embed([5, 6]), cache)
    broken = vlm.decoder.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vlm.read(vlm.embed([7, 8, 9]), cache)
    broken.remove()
    assert cache.filled == [2, 2] and cache.next_position == 2


def test_salience_of_all_rows_needs_no_class_token():
    """SigLIP-style towers score by the column means; the sums over all tokens are 1."""
    q = torch.randn(1, 2, 6, 4)
    assert torch.allclose(patch_salience(q, q, 0).sum(), torch.tensor(1.0))


def test_gradients_flow_where_there_is_no_cache():
    vlm, _ = random_model(10)
    embeddings = vlm.embed([5, 6, 7]).clone().requires_grad_()
    vlm(embeddings).sum().backward()
    assert embeddings.grad.abs().sum() > 0
    assert not vlm(embeddings, KVCache(2)).requires_grad


@pytest.mark.parametrize("rows", [(), (0,), (1,), (1, 1), (3,), (2, 40)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("multiplied", [False, True])
def test_linear_is_the_same_product_by_any_library(rows, bias, dtype, multiplied, monkeypatch):
    """In inference oneDNN's for large weights, MKL's in blocks for one row, blocks in float32 for
    what is not multiplied; the plain one where gradients flow; against float64."""
    monkeypatch.setattr(kernels, "_multiplied", lambda d: multiplied or d == torch.float32)
    monkeypatch.setattr(kernels, "FLOAT32_BLOCK", 2**13)
    torch.manual_seed(0)
    for inputs, outputs in ((512, 256), (256, 512), (300, 500), (8, 8)):
        linear = model.Linear(inputs, outputs, bias=bias).to(dtype)
        x = torch.randn(*rows, 2 * inputs).to(dtype)[..., ::2]  # strided
        expected = x.double() @ linear.weight.double().T
        expected = expected + linear.bias.double() if bias else expected
        with torch.no_grad():
            got = linear(x)
        assert got.shape == (*rows, outputs) and got.dtype == dtype
        bound = 600 * 2**-24 * (x.double().abs() @ linear.weight.double().abs().T + 1)
        if dtype != torch.float32:  # F.linear may round the product, and then the sum
            rounded = expected.abs() + (linear.bias.double().abs() if bias else 0)
            bound += torch.finfo(dtype).eps * rounded
        assert ((got - expected).abs() <= bound).all()
        assert ((linear(x) - expected).abs() <= bound).all() and linear(x).requires_grad
