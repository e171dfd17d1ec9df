"""AWQ and SmoothQuant: the numbers, the file format, the search, whole models and checkpoints."""

import json
import math
import shutil

import pytest
import torch
from conftest import TINY, Recorder, command_line, random_model, random_pictures, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import awq
from checkpoints import load, load_model, open_folder
from checkpoints.processor import open_picture
from checkpoints.values import group_size
from model import KVCache
from sparsevila import Dense, SparseVILA
from tools import ask, quantise

# --- numbers and file format ----------------------------------------------------------------------

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: nibble p of a word holds column ORDER[p]


def word(codes):
    """Eight codes as AutoAWQ packs them, in Python's integers, as a signed 32-bit number."""
    value = sum(codes[ORDER[p]] * 16**p for p in range(8))
    return value - 2**32 if value >= 2**31 else value


def test_codes_pack_to_the_word_of_the_public_format():
    assert awq.pack(torch.arange(8)[None]).tolist() == [[0x75316420]]
    assert word(range(8)) == 0x75316420


@given(st.lists(st.lists(st.integers(0, 15), min_size=16, max_size=16), min_size=1, max_size=5))
def test_packing_follows_the_bits_and_back(rows):
    packed = awq.pack(torch.tensor(rows))
    assert packed.dtype == torch.int32
    assert packed.tolist() == [[word(row[:8]), word(row[8:])] for row in rows]
    assert awq.unpack(packed).tolist() == rows


weights = st.builds(
    lambda seed, N, groups, g, spread, shift: (
        torch.randn(N, groups * g, generator=torch.Generator().manual_seed(seed)) * spread + shift,
        g,
    ),
    st.integers(0, 999),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([1, 3, 32, 64, 128]),
    st.sampled_from([1e-8, 1e-3, 1.0, 1e4]),
    st.sampled_from([0.0, 0.01, -3.0, 1e3]),
)


@given(weights)
def test_rounding_is_within_half_a_scale_of_every_weight_in_range(case):
    weight, g = case
    codes, scales, zeros = awq.quantize_groups(weight, g)
    assert codes.shape == weight.shape and codes.dtype == zeros.dtype == torch.int8
    assert scales.shape == zeros.shape == (len(weight), weight.shape[1] // g)
    assert 0 <= int(codes.min()) and int(codes.max()) <= 15 and bool((scales > 0).all())
    code, scale, zero = (
        t.double().repeat_interleave(n, 1) for t, n in ((codes, 1), (scales, g), (zeros, g))
    )
    low, high = (0 - zero) * scale, (15 - zero) * scale
    error = ((code - zero) * scale - weight.double().clamp(low, high)).abs()
    assert bool((error <= scale / 2 * (1 + 1e-6)).all())
    # The range covers the group but for the rounding of scale and zero.
    assert bool(((weight.double() - weight.double().clamp(low, high)).abs() <= 0.51 * scale).all())


def test_groups_of_every_kind():
    for values in ([0.0] * 32, [1.5] * 32, [-2.0] * 32, [1.0, 1.1] * 16, [1e-7] * 32, [6e4] * 32):
        weight = torch.tensor([values])
        error = (awq.rounded(weight, 32) - weight).abs().max()
        assert error <= max(abs(v) for v in values) / 15 / 2 * 1.01 + 1e-6
    assert bool((awq.rounded(torch.zeros(2, 32), 32) == 0).all())
    mixed = torch.tensor([[0.0] * 32 + [5.0, -5.0] * 16])
    assert bool((awq.rounded(mixed, 32)[:, :32] == 0).all())


@pytest.mark.parametrize(
    "weight, group_size, message",
    [
        (torch.randn(4, 100), 32, "group_size must divide the 100 inputs or be -1, got 32"),
        (torch.randn(4, 32), 0, "got 0"),
        (torch.randn(4, 32), 1.5, "got 1.5"),
        (torch.full((4, 32), math.nan), 32, "weights must be finite"),
        (torch.full((4, 32), math.inf), 32, "weights must be finite"),
        (torch.full((4, 32), 1e7), 32, "need scales beyond float16"),
        (torch.ones(4, 32, dtype=torch.int8), 32, "must be floating point"),
        (torch.ones(32), 32, "must be floating point"),
        (torch.ones(0, 32), 32, "must be floating point"),
    ],
)
def test_weights_that_cannot_be_quantised_are_refused(weight, group_size, message):
    with pytest.raises(ValueError, match=message):
        awq.quantize_groups(weight, group_size)


@pytest.mark.parametrize(
    "codes, message",
    [
        (torch.zeros(2, 9, dtype=torch.int32), "multiple of 8"),
        (torch.full((1, 8), 16), r"must be in \[0, 15\], got 16 .. 16"),
        (torch.full((1, 8), -1), "got -1"),
        (torch.zeros(1, 8), "must be integers"),
    ],
)
def test_codes_that_cannot_be_packed_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        awq.pack(codes)
    with pytest.raises(ValueError, match="packed must be int32"):
        awq.unpack(codes.float())


def packed(K, N, g, seed=0):
    """Random packed weights, and their exact values (K, N) in float64."""
    noise = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (K, N), generator=noise)
    zeros = torch.randint(0, 16, (K // g, N), generator=noise)
    scales = (torch.rand(K // g, N, generator=noise) + 0.01).half()
    exact = (codes - zeros.repeat_interleave(g, 0)).double()
    exact *= scales.double().repeat_interleave(g, 0)
    return awq.pack(codes), awq.pack(zeros), scales, exact


@pytest.mark.parametrize("g", [1, 32, 64, 128])
def test_dequantising_rounds_the_exact_value_once(g):
    *tensors, exact = packed(128, 24, g)
    assert torch.equal(awq.dequantize(*tensors), exact.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("g", [32, 128, 256, 40])
@pytest.mark.parametrize("rows", [(1,), (), (2, 3), (70,), (0,)])
def test_matmul_matches_float64(dtype, g, rows):
    K, N = (240, 48) if g == 40 else (256, 48)
    *tensors, exact = packed(K, N, g)
    torch.manual_seed(1)
    x, bias = torch.randn(*rows, K).to(dtype), torch.randn(N).to(dtype)
    expected = x.double() @ exact + bias.double()
    size = x.double().abs() @ exact.abs() + bias.double().abs()  # what rounding is relative to
    for matmul in (awq.w4a16_matmul, awq.w4a16_matmul_reference):
        y = matmul(x, *tensors, bias)
        assert y.dtype == dtype and y.shape == (*rows, N)
        # Of each product, the weight is rounded to float16 and x's dtype, and the sum to x's dtype.
        close = {torch.float32: 2**-11, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        assert bool(((y.double() - expected).abs() <= close * size).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x[:1].expand(3, -1),
        lambda x: x.view(2, 3, -1).transpose(0, 1),
    ],
    ids=["transposed", "every second", "one row", "three axes"],
)
def test_activations_of_any_strides(strided, dtype):
    *tensors, exact = packed(256, 48, 32)
    x = strided(torch.randn(6, 256).to(dtype))
    assert not x.is_contiguous()
    y, size = awq.w4a16_matmul(x, *tensors), x.double().abs() @ exact.abs()
    close = {torch.float32: 2**-11, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert bool(((y.double() - x.double() @ exact).abs() <= close * size).all())


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize(
    "K, N, g", [(64, 8, 32), (96, 200, 32), (72, 136, 72), (256, 72, 64), (384, 16, 384)]
)
def test_a_cpu_multiplies_blocks_with_the_bits_of_dequantize(K, N, g, multiplied, monkeypatch):
    """Blocks of 128 columns and a rest, and of some 64 inputs or a larger group; a row of the unit
    matrix takes one weight of each column. In bfloat16 they are not rounded to float16 before."""
    *tensors, exact = packed(K, N, g)
    monkeypatch.setattr(awq, "CPU_WORDS", 16)
    monkeypatch.setattr(awq, "CPU_BLOCK", 64 * min(N, 128))
    monkeypatch.setattr(awq, "CPU_INT4_ROWS", 0)
    monkeypatch.setattr(awq, "CPU_PLAIN", 0)
    monkeypatch.setattr(awq, "_multiplied", lambda dtype: multiplied)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        y = awq.w4a16_matmul(torch.eye(K).to(dtype), *tensors)
        weight = exact if dtype == torch.bfloat16 else exact.half()
        assert torch.equal(y, weight.to(dtype))


@pytest.mark.parametrize("multiplied", [False, True])
def test_a_cpu_keeps_small_matrices_with_the_bits_of_dequantize(multiplied, monkeypatch):
    *tensors, exact = packed(72, 136, 72)
    monkeypatch.setattr(awq, "CPU_PLAIN", exact.numel())
    monkeypatch.setattr(awq, "_cpu_blocks_matmul", None)
    monkeypatch.setattr(awq, "_multiplied", lambda dtype: multiplied)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, weight = torch.eye(72).to(dtype), exact.half().to(dtype)
        for rows in (x, x[5:6]):
            with torch.inference_mode():
                assert torch.equal(awq.w4a16_matmul(rows, *tensors), rows @ weight)
        x = x.requires_grad_()
        assert torch.equal(awq.w4a16_matmul(x, *tensors), weight)  # no inference tensor was kept
    monkeypatch.setattr(awq, "CPU_PLAIN", exact.numel() - 1)
    with pytest.raises(TypeError, match="not callable"):
        awq.w4a16_matmul(x, *tensors)


@pytest.mark.parametrize("kept", ["dequantised", "as PyTorch's int4 kernel wants them"])
def test_weights_that_a_cpu_keeps_are_made_anew_from_new_codes(kept, monkeypatch):
    qweight, qzeros, scales, exact = packed(64, 32, 32)
    x = torch.randn(3, 64).bfloat16()
    monkeypatch.setattr(awq, "_cpu_blocks_matmul", None)
    if kept != "dequantised":
        monkeypatch.setattr(awq, "CPU_PLAIN", 0)
        monkeypatch.setattr(awq, "dequantize", None)
    before = awq.w4a16_matmul(x, qweight, qzeros, scales)
    assert torch.equal(before, awq.w4a16_matmul(x, qweight, qzeros, scales))
    qweight.copy_(packed(64, 32, 32, seed=1)[0])
    expected = awq.w4a16_matmul_reference(x, qweight, qzeros, scales)
    after = awq.w4a16_matmul(x, qweight, qzeros, scales)
    assert not torch.equal(before, after)
    assert torch.allclose(after.float(), expected.float(), rtol=0.05, atol=0.3)
    doubled = awq.w4a16_matmul(x, qweight, qzeros, 2 * scales)
    assert torch.allclose(doubled.float(), 2 * after.float())
    scales *= 4
    assert torch.allclose(awq.w4a16_matmul(x, qweight, qzeros, scales).float(), 4 * after.float())
    where = id(qweight)
    assert where in awq._KEPT
    del qweight
    assert where not in awq._KEPT  # nor is what was made of it


def test_matmul_refuses_what_does_not_fit():
    qweight, qzeros, scales, _ = packed(64, 32, 32)
    x = torch.randn(3, 64)
    for arguments, message in [
        ((x[:, :63], qweight, qzeros, scales), r"x must be .* of shape \(..., 64\)"),
        ((x.int(), qweight, qzeros, scales), "x must be"),
        ((x, qweight.half(), qzeros, scales), "codes must stay int32 and scales float16"),
        ((x, qweight, qzeros, scales.float()), "codes must stay int32 and scales float16"),
        ((x, qweight.short(), qzeros, scales), "gemv_fast layout is not supported"),
        ((x, qweight, qzeros[:, :1], scales), r"qzeros \(inputs / g, outputs / 8\)"),
        ((x, qweight[:63], qzeros, scales), "qweight must be"),
        ((x, qweight, qzeros, scales, torch.ones(31)), "bias must be torch.float32"),
        ((x, qweight, qzeros, scales, torch.ones(32).half()), "bias must be torch.float32"),
        ((x.to("meta"), qweight, qzeros, scales), "must be on x's device meta, got cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            awq.w4a16_matmul(*arguments)


def test_the_gemv_layout_is_named_even_where_k_equals_n():
    K = N = 64
    qweight = torch.zeros(N, K // 8, dtype=torch.int32)  # the same shape as in the gemm layout
    qzeros, scales = torch.zeros(N, 1, dtype=torch.int32), torch.ones(N, 8).half()
    with pytest.raises(ValueError, match=r"gemv \(llm-awq\) layout is not supported"):
        awq.dequantize(qweight, qzeros, scales)


# --- the search -----------------------------------------------------------------------------------


def outlier_layer(seed, K=64, N=32, rows=50):
    """A Linear, and inputs of which a few channels are far larger than the others."""
    torch.manual_seed(seed)
    x = torch.randn(1, rows, K)
    x[..., torch.randperm(K)[:3]] *= 50
    return nn.Linear(K, N).requires_grad_(False), x


@settings(max_examples=20)
@given(st.integers(0, 999), st.sampled_from([16, 32, 64]))
def test_the_search_is_never_worse_than_rounding_to_nearest(seed, g):
    linear, x = outlier_layer(seed)
    before = linear.weight.clone()
    s = awq.search_scale(linear, [linear], [(x[:, :30],), (x[:, 30:],)], group_size=g)
    assert torch.equal(linear.weight, before)

    def loss(s):
        weight = awq.rounded(before * s, g).double() / s.double()
        return float((x.double() @ (weight - before.double()).T).square().mean())

    assert loss(s) <= loss(torch.ones_like(s)) * (1 + 1e-5)
    assert loss(s) < 0.9 * loss(torch.ones_like(s)) or s.max() == s.min()


def test_without_outliers_in_either_direction_nothing_is_scaled_by_the_first_step():
    linear, x = outlier_layer(0)
    s = awq.search_scale(linear, [linear], [(x,)], group_size=32, grid=1)
    assert torch.equal(s, torch.ones(64))


@settings(max_examples=20)
@given(st.integers(0, 999), st.sampled_from([16, 32]))
def test_the_clip_search_finds_the_smallest_error(seed, g):
    linear, x = outlier_layer(seed, N=8)
    weight = linear.weight
    limit = awq.search_clip(weight, [x[:, :20], x[:, 20:]], group_size=g)
    assert limit.shape == (8, 64 // g)
    groups, rows = weight.double().view(8, -1, g), x.double().view(-1, 64 // g, g)
    largest = groups.abs().amax(-1)

    def errors(limits):  # the partial products (T, N, K / g), written out
        limits = limits[..., None]
        clamped = groups.clamp(-limits, limits).view(8, 64).float()
        d = groups - awq.rounded(clamped, g).double().view_as(groups)
        return torch.einsum("tga,nga->tng", rows, d)

    tried = torch.stack([errors(largest * (1 - step / 20)).square().sum(0) for step in range(10)])
    found, unclipped = errors(limit.double()), errors(largest)
    for output in range(8):
        if torch.equal(limit[output], largest[output].float()):
            best = largest[output] * (1 - tried[:, output].argmin(0) / 20)
            best = torch.cat([largest[:output], best[None], largest[output + 1 :]])
            whole = errors(best)[:, output].sum(-1).square().sum()
            assert whole >= (1 - 1e-3) * unclipped[:, output].sum(-1).square().sum()
        else:
            least = tried[:, output].amin(0)
            assert torch.allclose(found[:, output].square().sum(0), least, rtol=1e-3)
    whole, before = (e.sum(-1).square().sum(0) for e in (found, unclipped))
    assert (whole <= before * (1 + 1e-5)).all()


def test_clipping_is_used_where_it_helps():
    """Of 64 random outputs some are clipped, some are not; both happen."""
    linear, x = outlier_layer(0, N=64)
    limit = awq.search_clip(linear.weight, [x], group_size=16)
    clipped = (limit < linear.weight.view(64, -1, 16).abs().amax(-1)).any(1)
    assert 0 < clipped.sum() < 64


def test_nan_in_the_calibration_is_refused():
    linear, x = outlier_layer(0)
    bad = x.clone()
    bad[0, 0, 0] = math.nan
    before = linear.weight.clone()
    with pytest.raises(ValueError, match="activations must be finite"):
        awq.search_scale(linear, [linear], [(bad,)])
    with pytest.raises(ValueError, match="activations must be finite"):
        awq.search_clip(linear.weight, [bad], group_size=32)
    with pytest.raises(ValueError, match="activations must be finite"):
        awq.smooth(nn.LayerNorm(64), [linear], bad.abs().amax((0, 1)))
    linear.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="weights must be finite"):
        awq.search_scale(linear, [linear], [(x,)], group_size=32)
    with pytest.raises(ValueError, match="weights must be finite"):
        awq.W8A8Linear.from_linear(linear)
    assert torch.equal(linear.weight[1:], before[1:])


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_folds_leave_the_block_as_it_was(kv_heads, group, bias, seed):
    """All four of a block, in float64, with shared heads and with biases."""
    vlm, _ = random_model(seed, kv_heads=kv_heads, group=group, qkv_bias=bias, dtype=torch.float64)
    block, config = vlm.decoder.layers[0], vlm.config.text
    embeddings = torch.randn(1, 7, config.width, dtype=torch.float64)
    before = vlm(embeddings)
    attention, mlp = block.self_attn, block.mlp
    heads = awq.SharedHeads(group, config.head_dim)
    shared = torch.rand(kv_heads, 1, config.head_dim) + 0.5
    for producer, consumers, s, sharing in [
        (
            block.input_layernorm,
            [attention.q_proj, attention.k_proj, attention.v_proj],
            torch.rand(config.width) + 0.5,
            awq.SharedHeads(),
        ),
        (attention.v_proj, [attention.o_proj], shared.expand(-1, group, -1).flatten(), heads),
        (
            block.post_attention_layernorm,
            [mlp.gate_proj, mlp.up_proj],
            torch.rand(config.width) + 0.5,
            awq.SharedHeads(),
        ),
        (mlp.up_proj, [mlp.down_proj], torch.rand(config.mlp) + 0.5, awq.SharedHeads()),
    ]:
        changed = producer.weight.clone()
        awq.fold(producer, consumers, s.double(), sharing)
        assert not torch.equal(producer.weight, changed)
        assert torch.allclose(vlm(embeddings), before, rtol=1e-10, atol=1e-12)


# --- whole models ---------------------------------------------------------------------------------


def multimodal_batches(vlm, processor, count=3):
    """Embeddings of a picture and a question each."""
    batches = []
    for number, picture in enumerate(random_pictures(0, count)):
        visual = vlm.project(torch.cat(vlm.encode(processor.pixels([picture]))))
        ids = processor.context([len(visual)]) + processor.question(
            f"what is {number}?", first=True
        )
        batches.append({"embeddings": vlm.embed(ids, visual)})
    return batches


def quantised(seed=0, dtype=torch.float32, tower=False, **options):
    vlm, processor = random_model(seed, dtype=dtype, **options)
    awq.quantize(vlm, multimodal_batches(vlm, processor), group_size=16)
    if tower:
        pixels = processor.pixels(random_pictures(0, 3)).to(dtype)
        awq.quantize_tower(vlm.vision_tower, [pixels])
    return vlm, processor


@pytest.mark.parametrize("group, bias", [(1, False), (2, True)])
def test_quantize_replaces_the_decoders_linears_and_nothing_else(group, bias):
    vlm, processor = random_model(3, group=group, qkv_bias=bias)
    before = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    batches, done = multimodal_batches(vlm, processor), []
    dense = [vlm(**batch) for batch in batches]
    awq.quantize(vlm, batches, group_size=16, on_block=lambda *n: done.append(n))
    layers = vlm.config.text.layers
    assert done == [(n + 1, layers) for n in range(layers)]
    linears = [m for m in vlm.decoder.modules() if isinstance(m, awq.W4A16Linear)]
    assert len(linears) == 7 * layers
    assert not any(isinstance(m, nn.Linear) for m in vlm.decoder.modules())
    after = vlm.state_dict()
    for name, tensor in before.items():
        if "decoder.layers" not in name:
            assert same_bits(after[name], tensor), name
    assert vlm.decoder.layers[0].self_attn.q_proj.bias is not None or not bias
    hooks = [m for m in vlm.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks
    for batch, expected in zip(batches, dense):  # close, on what it was calibrated on
        logits = vlm(**batch)
        assert float((logits - expected).norm() / expected.norm()) < 0.35


def test_awq_rounds_outlier_channels_better_than_to_nearest():
    """Blocks whose norms blow up a few channels, as those of large models do: the mean error of
    their outputs, on rows that the calibration did not see, over several of them."""

    def error(seed, **options):
        vlm, processor = random_model(seed, layers=1)
        block = vlm.decoder.layers[0]
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight[::11] *= 30
        batches = multimodal_batches(vlm, processor, 6)
        calls = awq._first_calls(vlm, block, batches[3:])
        dense = [block(*args) for args in calls]
        awq.quantize(vlm, batches[:3], group_size=16, **options)
        return sum(float((block(*args) - y).square().mean()) for args, y in zip(calls, dense))

    ratios = [error(seed) / error(seed, grid=1, clip=False) for seed in range(6)]
    assert math.prod(ratios) ** (1 / 6) < 0.75, ratios


def test_layers_of_their_own():
    """Biases are copies, no rows are rows, dtypes stay through every kind of cast."""
    linear = nn.Linear(64, 32)
    for layer in (awq.W4A16Linear.from_linear(linear, 32), awq.W8A8Linear.from_linear(linear)):
        assert layer(torch.zeros(2, 0, 64)).shape == (2, 0, 32)
        dtypes = [buffer.dtype for buffer in layer.buffers()]
        for cast in (layer.half, lambda layer=layer: layer.type(torch.bfloat16)):
            assert [buffer.dtype for buffer in cast().buffers()] == dtypes
        assert linear.bias.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16
        assert not layer.bias.requires_grad
        stored = layer.state_dict()
        layer.load_state_dict(stored)
        name = next(name for name, _ in layer.named_buffers())
        with pytest.raises(ValueError, match=f"{name} must be torch.int.*, got torch.float32"):
            layer.load_state_dict(stored | {name: stored[name].float()})
        empty = type(layer)(128, 32, device="meta").to_empty(device="cpu")
        assert [buffer.dtype for buffer in empty.buffers()] == dtypes
    with pytest.raises(ValueError, match="a norm must have weights"):
        awq.fold(nn.LayerNorm(64, elementwise_affine=False), [linear], torch.ones(64))


def test_quantize_refuses(tiny):
    vlm, processor = random_model(0)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        awq.quantize(vlm, [], group_size=16)
    with pytest.raises(ValueError, match="group_size must divide the 32 inputs or be -1, got 128"):
        awq.quantize(vlm, multimodal_batches(vlm, processor))
    with pytest.raises(ValueError, match="at least one batch, got none"):
        awq.quantize_tower(vlm.vision_tower, [])
    with pytest.raises(ValueError, match="number of outputs must be a multiple of 8, got 12"):
        awq.W4A16Linear(16, 12, 16)
    with pytest.raises(ValueError, match="inputs and outputs must be multiples of 8, got 12 and 8"):
        awq.W8A8Linear(12, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("protocol", ["conversation", "evaluation"])
def test_at_sparsity_0_the_quantised_model_has_the_bits_of_the_dense_one(dtype, protocol):
    vlm, processor = quantised(1, dtype, tower=True, group=2)
    logits = []
    for kind in (Dense, SparseVILA):
        session = kind(vlm, processor, prefill_sparsity=0, decode_sparsity=0, protocol=protocol)
        with Recorder(vlm) as recorder:
            session.see(random_pictures(5, 2))
            for question in ("what is it?", "where is it?"):
                session.ask(question, max_new_tokens=5)
        logits.append(recorder.logits)
    assert len(logits[0]) == len(logits[1]) > 2
    assert all(map(same_bits, *logits))


def test_the_order_of_questions_does_not_matter_to_the_quantised_model():
    vlm, processor = quantised(2, tower=True)
    session = SparseVILA(vlm, processor, decode_sparsity=0.5, protocol="evaluation")
    session.see(random_pictures(1, 1))
    questions = ["what?", "where is it?", "how many?"]
    forth, back = (
        {q: session.ask(q, max_new_tokens=4).token_ids for q in order}
        for order in (questions, questions[::-1])
    )
    assert forth == back


# --- SmoothQuant ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_leaves_the_outputs_as_they_were(alpha):
    torch.manual_seed(0)
    norm, linears = nn.LayerNorm(24).double(), [nn.Linear(24, n).double() for n in (8, 16)]
    norm.weight.data *= torch.rand(24) * 20
    norm.bias.data += torch.randn(24)
    x = torch.randn(50, 24).double()
    before = [linear(norm(x)) for linear in linears]
    s = awq.smooth(norm, linears, norm(x).detach().abs().amax(0), alpha=alpha)
    assert s.shape == (24,) and s.max() > s.min()
    assert all(torch.allclose(each(norm(x)), y, rtol=1e-6) for each, y in zip(linears, before))


def test_smoothing_shrinks_the_error_of_outlier_activations():
    def error(alpha):
        torch.manual_seed(0)
        norm, linear = nn.LayerNorm(64), nn.Linear(64, 32)
        norm.weight.data[:4] *= 60  # LayerNorm's weights make CLIP's outliers
        x = torch.randn(200, 64)
        expected = linear(norm(x)).detach()
        if alpha is not None:
            awq.smooth(norm, [linear], norm(x).detach().abs().amax(0), alpha=alpha)
        y = awq.W8A8Linear.from_linear(linear)(norm(x)).detach()
        return float((y - expected).norm() / expected.norm())

    assert error(0.5) < 0.7 * min(error(0.0), error(None))
    assert error(0.3) < error(0.0)


@given(st.integers(1, 40), st.sampled_from([8, 24, 64]), st.sampled_from([8, 40]), st.booleans())
def test_eight_bit_products_are_exact_but_for_the_rounding_to_codes(M, K, N, bias):
    torch.manual_seed(M)
    linear = nn.Linear(K, N, bias=bias).requires_grad_(False)
    layer, x = awq.W8A8Linear.from_linear(linear), torch.randn(M, K) * 3
    x[0] = 0
    x_scale = x.double().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    w_scale = linear.weight.double().abs().amax(-1) / 127
    codes = torch.round(x.double() / x_scale) @ torch.round(linear.weight.double().T / w_scale)
    expected = codes * x_scale * w_scale + (linear.bias.double() if bias else 0)
    assert torch.allclose(layer(x).double(), expected, rtol=1e-4, atol=1e-4 * float(w_scale.max()))
    assert layer(x.view(M, 1, K)).shape == (M, 1, N)


@pytest.mark.parametrize("instructions", [False, True])
@pytest.mark.parametrize("inputs", [1024, 1032, 2304])
def test_sums_of_eight_bit_products_are_exact(instructions, inputs, monkeypatch):
    """The largest ones as well, with the processor's instructions for them and in float32."""
    monkeypatch.setattr(awq, "_multiplied", lambda dtype: instructions)
    codes, weight = (torch.randint(-127, 128, (n, inputs), dtype=torch.int8) for n in (3, 8))
    codes[0], weight[0], weight[1] = 127, 127, -127
    codes[1, ::2] = weight[2, 1::2] = 1
    codes[0, 0] = 126  # with 2304 inputs the sum is odd and beyond 2^25: no float32
    expected = codes.long() @ weight.long().T
    assert expected.abs().max() == 127 * 127 * inputs - 127
    assert awq._int8_matmul(codes, weight).double().equal(expected.double())


def test_a_quantised_tower_sees_nearly_the_same(tiny, page):
    vlm, processor = load(TINY, device="cpu")
    pixels = processor.pixels([open_picture(page)])
    session = SparseVILA(vlm, processor)
    (features,), (salience,) = session.encode(pixels)
    awq.quantize_tower(vlm.vision_tower, [pixels])
    assert sum(isinstance(m, awq.W8A8Linear) for m in vlm.vision_tower.modules()) == 18
    (now,), (ranked,) = session.encode(pixels)
    assert float((now - features).norm() / features.norm()) < 0.05
    top = lambda s: set(s.topk(25).indices.tolist())  # noqa: E731
    assert len(top(salience) & top(ranked)) >= 22


# --- checkpoints ----------------------------------------------------------------------------------


def run(*arguments, **options):
    return command_line(quantise.main, *arguments, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model, quantised by the command of the README, with few samples."""
    target = tmp_path_factory.mktemp("awq") / "quantised"
    result = run(TINY, target, "--group-size", 32, "--vision-w8a8", "--samples", 3)
    assert result.returncode == 0, result.stderr
    assert "pictures of tiny/scenes.py. They suit the tiny model" in result.stdout
    assert result.stderr == ""  # bars are for terminals
    return target


def test_the_command_writes_a_folder_that_loads_and_answers(folder):
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "awq" and settings["version"] == "gemm"
    assert settings["bits"] == 4 and settings["group_size"] == 32 and settings["zero_point"]
    assert settings["vision_w8a8"] and [f.name for f in folder.parent.iterdir()] == ["quantised"]
    result = command_line(ask.main, "--model", folder, "--json")
    content = json.loads(result.stdout)
    assert content["answers"][0]["answer"] == "8.75"
    assert content["precision"] == "float32 + W4A16 decoder + W8A8 tower"
    assert content["weight_bytes"] < 0.4 * (TINY / "model.safetensors").stat().st_size


def test_tensors_are_named_typed_and_shaped_as_autoawq_does(folder):
    tensors = load_file(folder / "model.safetensors")
    down = "language_model.model.layers.0.mlp.down_proj."  # K = 384, N = 128
    assert tensors[down + "qweight"].shape == (384, 16)
    assert tensors[down + "qzeros"].shape == (12, 16)
    assert tensors[down + "scales"].shape == (12, 128)
    assert tensors[down + "qweight"].dtype == tensors[down + "qzeros"].dtype == torch.int32
    assert tensors[down + "scales"].dtype == torch.float16
    assert down + "weight" not in tensors
    tower = "vision_tower.vision_model.encoder.layers.0.mlp.fc1."
    assert tensors[tower + "weight"].dtype == torch.int8
    assert tensors[tower + "weight_scale"].dtype == torch.float32


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_checkpoint_reads_back_with_the_same_bits(tmp_path, parts, dtype):
    from test_loading import shard

    source = tmp_path / "source"
    shutil.copytree(TINY, source, ignore=shutil.ignore_patterns("samples", "*.py", "*.md"))
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = str(dtype)[6:]
    config["text_config"]["model_type"] = "qwen2"  # with biases on queries, keys and values
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for layer in range(6):
        for name, n in (("q", 128), ("k", 64), ("v", 64)):
            prefix = f"language_model.model.layers.{layer}.self_attn.{name}_proj"
            tensors[f"{prefix}.bias"] = torch.randn(n)
    tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(128)
    save_file(tensors, source / "model.safetensors")
    if parts > 1:
        shard(source, parts)
    vlm, processor = load(source, device="cpu")
    batches = multimodal_batches(vlm, processor, 1)
    awq.quantize(vlm, batches, group_size=-1)
    awq.quantize_tower(vlm.vision_tower, [processor.pixels(random_pictures(0, 1)).to(dtype)])
    quantise.save(vlm, source, tmp_path / "target", -1)
    again = load_model(tmp_path / "target", device="cpu")
    a, b = vlm.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    assert same_bits(vlm(**batches[0]), again(**batches[0]))
    files = sorted(file.name for file in (tmp_path / "target").glob("*.safetensors*"))
    assert len(files) == (1 if parts == 1 else parts + 1)
    kept = {k for f in (tmp_path / "target").glob("*.safetensors") for k in load_file(f)}
    assert "vision_tower.vision_model.post_layernorm.weight" in kept


def autoawq_folder(tmp_path, edit=lambda tensors, config: None):
    """A folder such as AutoAWQ writes: packed here by Python's integers, one Linear left alone."""
    folder = tmp_path / "autoawq"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("samples", "*.py", "*.md"))
    tensors = load_file(folder / "model.safetensors")
    noise, dense = torch.Generator().manual_seed(0), {}
    names = [n for n in tensors if ".layers." in n and "_proj.weight" in n and "vision" not in n]
    for name in names[1:]:
        N, K = tensors.pop(name).shape
        codes = torch.randint(0, 16, (K, N), generator=noise)
        zeros = torch.randint(0, 16, (K // 32, N), generator=noise)
        scales = (torch.rand(K // 32, N, generator=noise) * 0.02).half()
        dense[name] = (codes - zeros.repeat_interleave(32, 0)) * scales.repeat_interleave(32, 0)
        prefix = name.removesuffix("weight")
        for leaf, values in (("qweight", codes), ("qzeros", zeros)):
            words = [[word(row[c : c + 8]) for c in range(0, N, 8)] for row in values.tolist()]
            tensors[prefix + leaf] = torch.tensor(words, dtype=torch.int32)
        tensors[prefix + "scales"] = scales
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["model.visual"],
    }  # fmt: skip
    config["torch_dtype"] = "float16"
    edit(tensors, config)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder, dense, names[0]


def test_a_folder_made_by_autoawq_loads(tmp_path):
    folder, dense, left = autoawq_folder(tmp_path)
    for dtype in (None, torch.bfloat16):
        vlm = load_model(folder, device="cpu", dtype=dtype)
        for name, weight in dense.items():
            module = vlm.get_submodule(
                name.replace("language_model.model", "decoder").removesuffix(".weight")
            )
            assert isinstance(module, awq.W4A16Linear)
            tensors = module.qweight, module.qzeros, module.scales
            assert torch.equal(awq.dequantize(*tensors), weight)
    module = vlm.get_submodule(
        left.replace("language_model.model", "decoder").removesuffix(".weight")
    )
    assert isinstance(module, nn.Linear) and module.weight.dtype == torch.bfloat16
    assert vlm(torch.randn(1, 3, 128).bfloat16(), KVCache(6)).isfinite().all()


def test_casting_a_model_leaves_codes_and_scales_alone():
    vlm, _ = quantised(tower=True, qkv_bias=True)
    before = {n: b.clone() for n, b in vlm.named_buffers()}
    vlm.to(torch.bfloat16)
    assert all(same_bits(b, before[n]) for n, b in vlm.named_buffers())
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}
    assert vlm.half().decoder.layers[0].self_attn.q_proj.bias.dtype == torch.float16
    assert {b.device.type for b in vlm.to("meta").buffers()} == {"meta"}


QWEIGHT = "language_model.model.layers.1.mlp.up_proj.qweight"
SCALES = QWEIGHT.replace("qweight", "scales")


def setting(**changes):
    return lambda tensors, config: config["quantization_config"].update(changes)


def tensor(name, change):
    return lambda tensors, config: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    "edit, message",
    [
        (setting(bits=8), "quantization bits must be 4, got 8"),
        (setting(quant_method="gptq"), "quantization quant_method must be 'awq', got 'gptq'"),
        (setting(version="gemv"), "version must be 'gemm', got 'gemv'"),
        (setting(version="gemv_fast"), "version must be 'gemm', got 'gemv_fast'"),
        (setting(version="llm-awq"), "version must be 'gemm', got 'llm-awq'"),
        (setting(zero_point=False), "zero_point must be True, got False"),
        (setting(group_size=0), "group_size must be -1 or at least 1, got 0"),
        (setting(group_size="32"), "group_size must be -1 or at least 1, got '32'"),
        (setting(group_size=64), r"must have shape \(\d+, \d+\), got"),
        (setting(group_size=100), "_proj.qweight: group_size must divide the 128 inputs"),
        (tensor(SCALES, lambda w: w * math.nan), "scales must be finite, got NaN"),
        (
            lambda t, c: t.update({"lm_head.qweight": torch.zeros(128, 73, dtype=torch.int32)}),
            "a quantised output head is not supported",
        ),
        (lambda t, c: c.update(quantization_config=[]), "is quantised, but config.json has no"),
        (lambda t, c: c.update(quantization_config="awq"), "must be an object, got 'awq'"),
        (lambda t, c: c.pop("quantization_config"), "is quantised, but config.json has no"),
        (lambda t, c: t.pop(SCALES), "lacks 1 tensors, the first: decoder.layers.1.mlp.up_proj.sc"),
        (tensor(QWEIGHT, lambda w: w.half()), "qweight must be torch.int32, got torch.float16"),
        (tensor(SCALES, lambda w: w.bfloat16()), "scales must be torch.float16, got torch.bfloat"),
        (tensor(QWEIGHT, lambda w: w[:, :5].clone()), r"qweight must have shape \(128, 48\), got"),
        (
            lambda t, c: t.update({QWEIGHT.replace("qweight", "weight"): torch.ones(384, 128)}),
            "up_proj.weight has no place in this model",
        ),
        (
            lambda t, c: t.update({"language_model.nothing.qweight": torch.ones(8, 1)}),
            "nothing.qweight has no place",
        ),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, edit, message):
    folder, _, _ = autoawq_folder(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        load(folder, device="cpu")


def test_the_older_settings_file_is_read(tmp_path):
    folder, _, _ = autoawq_folder(tmp_path, lambda t, c: c.pop("quantization_config"))
    older = folder / "quant_config.json"
    older.write_text('{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}')
    assert group_size(open_folder(folder)[1]) == 32
    assert isinstance(
        load_model(folder, device="cpu").decoder.layers[3].mlp.up_proj, awq.W4A16Linear
    )
    older.write_text('{"zero_point": true, "q_group_size": 32, "w_bit": 3, "version": "GEMM"}')
    with pytest.raises(ValueError, match="bits must be 4, got 3"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("when", ["save_file", "copyfile"])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, when):
    vlm, processor = load(TINY, device="cpu")
    awq.quantize(vlm, multimodal_batches(vlm, processor, 1), group_size=32, grid=1, clip=False)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    module = quantise if when == "save_file" else shutil
    monkeypatch.setattr(module, when, interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantise.save(vlm, TINY, tmp_path / "target", 32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([TINY], "the following arguments are required: target"),
        ([TINY, TINY], "exists already"),
        ([TINY, "no/folder/here"], "no folder to make no/folder/here in"),
        (["no/where/at/all", "out"], "no folder no/where/at/all"),
        ([TINY, "out", "--samples", 0], "--samples must be at least 1, got 0"),
        ([TINY, "out", "--samples", 1], "group_size must divide the 128 inputs or be -1, got 100"),
        ([TINY, "out", "--images", "nowhere"], "nowhere"),
        ([TINY, "out", "--prompts", "nowhere.txt"], "nowhere.txt"),
        ([TINY, "out", "--device", "toaster"], "toaster"),
    ],
)
def test_bad_command_lines_are_one_line_and_leave_nothing(tmp_path, arguments, message):
    if message.startswith("group_size"):
        arguments = [*arguments, "--group-size", 100]
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())


def test_pictures_and_prompts_of_ones_own(folder, tmp_path):
    for number, picture in enumerate(random_pictures(0, 2)):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture.save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "prompts.txt").write_text("what is this?\n\nhow many?\n")
    ours = ["--images", tmp_path / "pictures", "--prompts", tmp_path / "prompts.txt"]
    result = run(TINY, tmp_path / "out", "--group-size", 32, "--samples", 2, *ours)
    assert result.returncode == 0 and "calibrating on 2 pictures of" in result.stdout
    a, b = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert not torch.equal(a[QWEIGHT], b[QWEIGHT])
    result = run(folder, tmp_path / "twice")
    assert result.returncode == 2 and "is quantised already, got" in result.stderr
    (tmp_path / "prompts.txt").write_text("\n")
    result = run(TINY, tmp_path / "none", *ours)
    assert result.returncode == 2 and "holds no prompts" in result.stderr
    (tmp_path / "prompts.txt").write_bytes(b"\xff")
    result = run(TINY, tmp_path / "none", *ours)
    assert result.returncode == 2 and "prompts.txt is not UTF-8 text" in result.stderr
