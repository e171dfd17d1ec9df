"""The tiny model against Hugging Face's LLaVA on the same files, as tests/golden/record_tiny.py
wrote it, and deliberately wrong variants that must be seen to differ."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file

import model as model_file
from model import ACTIVATIONS

GOLDEN = load_file(TINY.parent / "tests" / "golden" / "tiny.safetensors")


def differences(vlm, processor) -> dict[str, float]:
    """The largest deviation from every recorded tensor, over 1e-4 + 1e-4 * |expected|."""
    with Image.open(TINY / "samples" / "board.png") as image:
        pixels = processor.pixels([image.convert("RGB")])
    features, salience = vlm.encode(pixels)
    projected = vlm.project(features)
    ids = processor.context([100]) + processor.question("what color is the 7?", first=True)
    logits = vlm(vlm.embed(ids, projected[0]))
    ours = {
        "pixels": pixels,
        "input_ids": torch.tensor(ids),
        "features": features,
        "class_attention": salience,
        "projected": projected,
        "logits": logits,
    }
    expected = GOLDEN | {"class_attention": GOLDEN["class_attention"].mean(1)}
    return {
        name: float(((got - expected[name]).abs() / (1e-4 + 1e-4 * expected[name].abs())).max())
        for name, got in ours.items()
    }


def test_everything_agrees_with_transformers(tiny):
    deviations = differences(*tiny)
    assert deviations["input_ids"] == 0 and deviations["pixels"] < 0.02
    assert all(deviation < 1 for deviation in deviations.values()), deviations


def test_the_greedy_answer_is_that_of_transformers(tiny):
    vlm, processor = tiny
    visual = vlm.project(vlm.encode(GOLDEN["pixels"])[0])[0]
    embeddings = vlm.embed(GOLDEN["input_ids"], visual)
    assert vlm.generate(embeddings, max_new_tokens=16) == GOLDEN["tokens"].tolist()


def use_erf_gelu(patch, vlm):
    for block in vlm.vision_tower.layers:
        patch.setattr(block.mlp, "activation", F.gelu)


def use_quick_gelu(patch, vlm):
    patch.setattr(vlm.projector, "activation", ACTIVATIONS["quick_gelu"])


def use_last_layer(patch, vlm):
    patch.setattr(vlm.vision_tower, "feature_layer", len(vlm.vision_tower.layers))


def rotate_interleaved(patch, vlm):
    def wrong(x, cos, sin):
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    patch.setattr(model_file, "rotate", wrong)


def repeat_heads_interleaved(patch, vlm):
    right = model_file.causal_attention

    def wrong(q, k, v):  # query head h reads key head h % G
        order = torch.arange(q.shape[1]).view(-1, k.shape[1]).T.flatten()
        return right(q[:, order], k, v)[:, order.argsort()]

    patch.setattr(model_file, "causal_attention", wrong)


def skip_pre_norm(patch, vlm):
    patch.setattr(vlm.vision_tower, "pre_layrnorm", torch.nn.Identity())


def forget_scale(patch, vlm):
    right = model_file.attention_colsum
    patch.setattr(model_file, "attention_colsum", lambda q, k: right(q, k, scale=1.0))


@pytest.mark.parametrize(
    "mistake, seen_in",
    [
        (use_erf_gelu, "features"),
        (use_quick_gelu, "projected"),
        (use_last_layer, "features"),
        (skip_pre_norm, "features"),
        (forget_scale, "class_attention"),
        (rotate_interleaved, "logits"),
        (repeat_heads_interleaved, "logits"),
    ],
)
def test_the_comparison_sees_wrong_variants(tiny, monkeypatch, mistake, seen_in):
    vlm, processor = tiny
    mistake(monkeypatch, vlm)
    assert differences(vlm, processor)[seen_in] > 5
