"""Every family against Hugging Face transformers on the same files, as tests/golden/record.py wrote
them, and deliberately wrong variants that must be seen to differ."""

import json
import math

import pytest
import torch
from conftest import FAMILIES, ROOT, TINY, command_line
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import model as model_file
import sparsevila
from checkpoints import llava_next, load
from checkpoints.processor import Clip, View
from model import ACTIVATIONS, merge_patches
from tools import ask

GOLDEN = ROOT / "tests" / "golden"
QUESTION = "what is it? 42\n\nIt's naïve…"


class Family:
    """A checkpoint, loaded here, and what was recorded with transformers."""

    def __init__(self, name: str):
        self.expected = load_file(GOLDEN / f"{name}.safetensors")
        self.folder = TINY if name == "tiny" else GOLDEN / name
        self.vlm, self.processor = load(self.folder, device="cpu")
        self.question = "how much is the coffee?" if name == "tiny" else QUESTION

    def pictures(self) -> list[Image.Image]:
        if self.folder == TINY:
            return [Image.open(TINY / "samples" / "receipt.png").convert("RGB")]
        names = sorted(name for name in self.expected if name.startswith("picture_"))
        return [Image.fromarray(self.expected[name].numpy()) for name in names]

    def ids(self, views: list[View]) -> torch.Tensor:
        """Context and first question; VILA's placeholders as they are recorded, and LLaVA-NeXT's
        new lines, which transformers counts among the visual tokens."""
        pieces = [torch.zeros(self.vlm.config.vision.visual_tokens)] * len(
            self.processor.pixels(views)
        )
        ids = self.processor.context(list(map(len, self.processor.join(views, pieces))), views)
        ids = torch.tensor(ids + self.processor.question(self.question, first=True, views=views))
        image = self.processor.image_token_id
        if self.vlm.config.newline_id is not None:
            ids[ids == self.vlm.config.newline_id] = image
        beyond = (self.expected["input_ids"] == -1).any()
        return torch.where(ids == image, -1, ids) if beyond else ids

    def differences(self) -> dict[str, float]:
        """The largest deviation from every recorded tensor, over 1e-4 + 1e-4 * |expected|."""
        expected, vlm = self.expected, self.vlm
        views = self.processor.views(self.pictures()[:1])
        pixels = self.processor.pixels(views)
        summary = vlm.vision_tower.summary_tokens
        states, q, k = vlm.vision_tower(pixels, -1)
        visual = vlm.project(torch.stack(vlm.encode(pixels)))
        joined = self.processor.join(views, list(visual))
        ids = self.processor.context(list(map(len, joined)), views)
        ids += self.processor.question(self.question, first=True, views=views)
        logits = vlm(vlm.embed(ids, torch.cat(joined)))
        ours = {
            "pixels": pixels,
            "input_ids": self.ids(views),
            "features": states[:, summary:],
            "salience": sparsevila.patch_salience(q, k, summary),
            "projected": visual,
            "logits": logits,
        }
        attention = expected["attention"]
        received = attention[:, :, 0, 1:] if summary else attention.mean(2)
        expected = expected | {"salience": received.mean(1)}
        return {name: deviation(got, expected[name]) for name, got in ours.items()}


def deviation(got: torch.Tensor, expected: torch.Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    got, expected = got.double(), expected.double()
    return float(((got - expected).abs() / (1e-4 + 1e-4 * expected.abs())).max())


ALIKE = [name for name in FAMILIES if not name.startswith("qwen")]  # see test_golden_qwen.py


@pytest.fixture(scope="module", params=["tiny", *ALIKE])
def family(request) -> Family:
    return Family(request.param)


def test_everything_agrees_with_transformers(family):
    deviations = family.differences()
    assert deviations["input_ids"] == 0 and deviations["pixels"] == 0
    assert all(deviation < 1 for deviation in deviations.values()), deviations


def test_the_greedy_answer_is_that_of_transformers(family):
    vlm, processor, expected = family.vlm, family.processor, family.expected
    views = processor.views(family.pictures()[:1])
    features = processor.join(views, vlm.encode(expected["pixels"]))
    ids = processor.context(list(map(len, features)), views)
    ids += processor.question(family.question, first=True, views=views)
    embeddings = vlm.embed(ids, vlm.project(torch.cat(features)))
    assert vlm.generate(embeddings, max_new_tokens=16) == expected["tokens"].tolist()


@pytest.mark.parametrize("case", ["many", "small", "squashed"])
def test_other_pictures_are_prepared_as_transformers_does(family, case):
    """Several pictures; one that fits into a tile; no cutting into tiles."""
    if f"{case}_pixels" not in family.expected:
        assert case != "many" or family.folder == TINY
        return
    processor, pictures = family.processor, family.pictures()
    if case == "small":
        pictures = pictures[2:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processor, "longest_edge", 32 if case == "small" else 96, raising=False)
        patch.setattr(processor, "split", case != "squashed", raising=False)
        views = processor.views(pictures)
    pixels = processor.pixels(views)
    assert torch.equal(pixels, family.expected[f"{case}_pixels"])
    assert torch.equal(family.ids(views), family.expected[f"{case}_input_ids"])


@pytest.mark.parametrize("case", range(5))
def test_clips_are_sampled_and_described_as_transformers_does(case):
    family = Family("smolvlm2")
    frames, fps = family.expected[f"clip_{case}"].tolist()
    pictures = [Image.new("RGB", (30, 20), (n % 256, n // 256, 0)) for n in range(int(frames))]
    views = family.processor.views(Clip.even(pictures, fps))
    shown = family.expected[f"clip_{case}_frames"].tolist()
    assert [view.second for view in views] == [index / fps for index in shown]
    first = [view.picture.getpixel((5, 5)) for view in views]
    assert first == [(index % 256, index // 256, 0) for index in shown]
    assert torch.equal(family.ids(views), family.expected[f"clip_{case}_input_ids"])


# --- wrong variants -------------------------------------------------------------------------------


def activation(name, where):
    def wrong(patch, vlm):
        if where == "projector":
            places = [m for m in vlm.projector.layers if isinstance(m, torch.nn.GELU)]
            for number, layer in enumerate(vlm.projector.layers):
                if layer in places:
                    vlm.projector.layers[number] = ACTIVATIONS[name]()
        else:
            for block in vlm.vision_tower.layers:
                patch.setattr(block.mlp, "activation", ACTIVATIONS[name]())

    return wrong


def layer(number):
    return lambda patch, vlm: patch.setattr(vlm.vision_tower, "feature_layer", number)


def rotate_interleaved(patch, vlm):
    def wrong(x, cos, sin):
        half = cos.shape[-1] // 2
        cos, sin = cos[..., half:], sin[..., half:]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    patch.setattr(model_file, "rotate", wrong)


def repeat_heads_interleaved(patch, vlm):
    right = model_file.causal_attention

    def wrong(q, k, v):  # query head h reads key head h % G
        order = torch.arange(q.shape[1]).view(-1, k.shape[1]).T.flatten()
        return right(q[:, order], k, v)[:, order.argsort()]

    patch.setattr(model_file, "causal_attention", wrong)


def without(module):
    def wrong(patch, vlm):
        patch.setattr(vlm.vision_tower, module, torch.nn.Identity())

    return wrong


def forget_scale(patch, vlm):
    right = sparsevila.attention_colsum
    patch.setattr(sparsevila, "attention_colsum", lambda q, k: right(q, k, scale=1.0))


def shuffle_as(change):
    """Merge patches in another order."""

    def wrong(patch, vlm):
        def merge(x, side, *, by_columns=False):
            right = merge_patches(x, side, by_columns=by_columns != (change == "tokens"))
            if change == "channels":  # C first, then the place in the block
                blocks = merge_patches(x, side, by_columns=by_columns)
                return blocks.unflatten(-1, (side**2, -1)).transpose(-1, -2).flatten(-2)
            if change == "block":  # down the block's columns
                blocks = merge_patches(x, side, by_columns=by_columns)
                blocks = blocks.unflatten(-1, (side, side, -1))
                return blocks.transpose(-2, -3).flatten(-3)
            return right

        patch.setattr(model_file, "merge_patches", merge)

    return wrong


def drop_bias(patch, vlm):
    for block in vlm.decoder.layers:
        patch.setattr(block.self_attn.k_proj, "bias", None)
        patch.setattr(block.self_attn.v_proj, "bias", None)


def forget_rope_factor(patch, vlm):
    right = model_file.rotary_table
    patch.setattr(
        model_file, "rotary_table", lambda p, config: right(p * config.rope_factor, config)
    )


def joined_otherwise(change):
    """LLaVA-NeXT's grid joined, cut out or ended in another way."""

    def wrong(patch, vlm):
        family = llava_next.Processor
        right = family.join

        def tile_by_tile(self, views, rows):
            whole, grid = right(self, views, rows)
            return [whole, torch.cat(rows[1:])[: len(grid)]]

        def all_of_the_canvas(self, view):
            side = math.isqrt(self.config.vision.patches)
            return 0, 0, side * max(1, view.columns), side * max(1, view.rows)

        def without_ends(self, view, kept):
            return [self.image_token_id] * len(kept)

        def one_end(self, view, kept):
            return [self.image_token_id] * len(kept) + [self.config.newline_id] * bool(view.rows)

        changes = {
            "tiles": ("join", tile_by_tile), "padding": ("_grid", all_of_the_canvas),
            "no ends": ("ids_of_view", without_ends), "one end": ("ids_of_view", one_end),
        }  # fmt: skip
        patch.setattr(family, *changes[change])

    return wrong


def wrong_newline(patch, vlm):
    patch.setattr(vlm, "image_newline", torch.nn.Parameter(torch.zeros_like(vlm.image_newline)))


def summary_only(patch, vlm):
    """The first patch taken for a class token."""
    patch.setattr(
        sparsevila,
        "patch_salience",
        lambda q, k, n: sparsevila.attention_colsum(q[:, :, :1], k).mean(1),
    )


@pytest.mark.parametrize(
    "name, mistake, seen_in",
    [
        ("tiny", activation("gelu", "tower"), "features"),
        ("tiny", activation("quick_gelu", "projector"), "projected"),
        ("llava", activation("gelu", "tower"), "features"),
        ("llava", activation("gelu_pytorch_tanh", "projector"), "projected"),
        ("llava", layer(1), "features"),
        ("llava", layer(3), "features"),
        ("llava", without("pre_layrnorm"), "features"),
        ("llava", forget_scale, "salience"),
        ("llava", rotate_interleaved, "logits"),
        ("llava_next", joined_otherwise("tiles"), "logits"),
        ("llava_next", joined_otherwise("padding"), "logits"),
        ("llava_next", joined_otherwise("no ends"), "logits"),
        ("llava_next_mistral", joined_otherwise("one end"), "logits"),
        ("llava_next", wrong_newline, "logits"),
        ("smolvlm", activation("gelu", "tower"), "features"),
        ("smolvlm", activation("quick_gelu", "tower"), "features"),
        ("smolvlm", layer(2), "features"),
        ("smolvlm", without("post_layernorm"), "features"),
        ("smolvlm", shuffle_as("tokens"), "projected"),
        ("smolvlm", shuffle_as("channels"), "projected"),
        ("smolvlm", shuffle_as("block"), "projected"),
        ("smolvlm", summary_only, "salience"),
        ("smolvlm", rotate_interleaved, "logits"),
        ("smolvlm", repeat_heads_interleaved, "logits"),
        ("smolvlm2", repeat_heads_interleaved, "logits"),
        ("nvila", activation("gelu", "tower"), "features"),
        ("nvila", activation("gelu_pytorch_tanh", "projector"), "projected"),
        ("nvila", layer(3), "features"),
        ("nvila", shuffle_as("tokens"), "projected"),
        ("nvila", shuffle_as("block"), "projected"),
        ("nvila", drop_bias, "logits"),
        ("nvila", rotate_interleaved, "logits"),
        ("nvila", repeat_heads_interleaved, "logits"),
        ("nvila_hf", shuffle_as("tokens"), "projected"),
        ("longvila", shuffle_as("tokens"), "projected"),
        ("longvila", forget_rope_factor, "logits"),
    ],
)
def test_the_comparison_sees_wrong_variants(monkeypatch, name, mistake, seen_in):
    family = Family(name)
    mistake(monkeypatch, family.vlm)
    assert family.differences()[seen_in] > 3


# --- whole sessions -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_command_line_runs_on_a_folder_of_every_family(name, tmp_path, page):
    arguments = ["--model", GOLDEN / name, "--image", page, "--ask", "what is it?"]
    arguments += ["--ask", "and this?", "--max-new-tokens", "5", "--json"]
    run = command_line(ask.main, *arguments, "--overlay", tmp_path / "overlay.png")
    assert run.returncode == 0 and run.stderr == f"wrote {tmp_path / 'overlay.png'}\n"
    result = json.loads(run.stdout)
    tokens = result["visual_tokens"]
    views = len(Family(name).processor.views([Image.open(page).convert("RGB")]))
    assert 0 <= tokens["kept"] - tokens["encoded"] / 4 < views
    assert len(result["answers"]) == 2 and (tmp_path / "overlay.png").stat().st_size > 1000


def test_the_recordings_say_where_they_come_from():
    for name in ["tiny", *FAMILIES]:
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            origin = json.loads(file.metadata()["origin"])
        assert origin["command"] == f"python tests/golden/record.py {name}"
        assert origin["transformers"]
