"""Qwen2.5-VL and Qwen3-VL against Hugging Face transformers on the same files, as
tests/golden/record.py wrote them: pictures and clips, positions on three axes, wrong variants."""

import functools
import json
import shutil

import numpy
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from test_golden import QUESTION, deviation

import model as model_file
from checkpoints import load, load_processor, qwen2_5_vl
from checkpoints.processor import Clip
from checkpoints.qwen2_5_vl import places, windows
from sparsevila import SparseVILA

GOLDEN = ROOT / "tests" / "golden"
KINDS = ["qwen2_5_vl", "qwen3_vl"]
SHOWN = ["", "clip_"]


class Golden:
    """A checkpoint, loaded here, and what was recorded of a picture ("") or a clip ("clip_")."""

    def __init__(self, name: str):
        self.recorded = load_file(GOLDEN / f"{name}.safetensors")
        self.vlm, self.processor = load(GOLDEN / name, device="cpu")

    def pictures(self, kind: str) -> list[Image.Image]:
        names = sorted(name for name in self.recorded if name.startswith(kind))
        return [Image.fromarray(self.recorded[name].numpy()) for name in names]

    def shown(self, kind: str):
        pictures = self.pictures("frame_" if kind else "picture_")
        return Clip.even(pictures, 1) if kind else pictures[:1]

    def ids(self, views, sizes, kind: str = "") -> torch.Tensor:
        """Our placeholders as they are recorded: those of clips have an id of their own."""
        ids = self.processor.context(sizes, views)
        ids = torch.tensor(ids + self.processor.question(QUESTION, first=True, views=views))
        of_clips = self.processor.tokenizer.token_to_id("<|video_pad|>")
        return ids.masked_fill(ids == self.processor.image_token_id, of_clips) if kind else ids

    def differences(self, kind: str) -> dict[str, float]:
        """The largest deviation from every recorded tensor, over 1e-4 + 1e-4 * |expected|."""
        vlm, processor = self.vlm, self.processor
        views = processor.views(self.shown(kind))
        pixels = processor.pixels(views)
        features, salience = SparseVILA(vlm, processor).encode(pixels)
        visual, sizes = vlm.project(torch.cat(features)), [len(x) for x in features]
        every = [torch.arange(n) for n in sizes]
        context, positions, after = processor.layout(views, sizes, every, "original")
        question = processor.question(QUESTION, first=True, views=views)
        positions = torch.cat([positions, after + torch.arange(len(question)).expand(3, -1)], 1)
        logits = vlm(vlm.embed(context + question, visual), positions=positions)
        ours = {
            "pixels": torch.cat([view.flatten(0, 2) for view in pixels]),
            "input_ids": self.ids(views, sizes, kind),
            "positions": positions,
            "salience": torch.cat(salience),
            "projected": visual,
            "logits": logits,
        }
        return {name: deviation(got, self.recorded[kind + name]) for name, got in ours.items()}


@pytest.fixture(scope="module", params=KINDS)
def golden(request) -> Golden:
    return Golden(request.param)


@pytest.mark.parametrize("kind", SHOWN)
def test_everything_agrees_with_transformers(golden, kind):
    deviations = golden.differences(kind)
    assert all(deviations[name] == 0 for name in ("pixels", "input_ids", "positions")), deviations
    assert all(deviation < 1 for deviation in deviations.values()), deviations


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("kind", SHOWN)
def test_a_session_answers_as_transformers_does(golden, kind, positions):
    """At full budget, from pictures to tokens; positions of the answer's rows included."""
    session = SparseVILA(
        golden.vlm, golden.processor, prefill_sparsity=0, decode_sparsity=0, positions=positions
    )
    session.see(golden.shown(kind))
    answer = session.ask(QUESTION, max_new_tokens=16)
    assert answer.token_ids == golden.recorded[kind + "tokens"].tolist()


def test_pictures_of_any_size_are_prepared_as_transformers_does(golden):
    views = golden.processor.views(golden.pictures("picture_"))
    pixels = golden.processor.pixels(views)
    expected = golden.recorded["many_pixels"]
    assert torch.equal(torch.cat([view.flatten(0, 2) for view in pixels]), expected)
    sizes = [view.shape[0] * view.shape[1] for view in pixels]
    assert torch.equal(golden.ids(views, sizes), golden.recorded["many_input_ids"])


# --- positions after pruning ----------------------------------------------------------------------


loaded = functools.cache(Golden)


def rank(values: list[int]) -> list[int]:
    return [sorted(set(values)).index(value) for value in values]


def positions_by_hand(golden, views, kept, contiguous: bool) -> tuple[list[tuple], int]:
    """(time, row, column) of every token, token by token, and the position that follows."""
    parts = golden.processor.parts(kept, views)
    spans = [[n] for n in range(len(views))]
    if golden.vlm.config.vision.tokens_per_second and views[0].second is not None:
        spans = [list(range(len(views)))]  # a clip is one span
    where, now = [(p, p, p) for p in range(len(parts[0]))], len(parts[0])
    for span in spans:
        cells, extents = [], [0, 0, 0]
        for time, n in enumerate(span):
            columns, rows = (side // 16 for side in views[n].picture.size)
            cells += [(time, i // columns, i % columns) for i in kept[n].tolist()]
            extents = [time + 1, max(extents[1], rows), max(extents[2], columns)]
        if contiguous:
            cells = list(zip(*map(rank, map(list, zip(*cells)))))
            extents = [max(axis) + 1 for axis in zip(*cells)] if cells else [0, 0, 0]
        step = golden.vlm.config.vision.tokens_per_second * (views[0].duration or 0) / len(span)
        where += [(now + int(t * step), now + r, now + c) for t, r, c in cells]
        last = [int((extents[0] - 1) * step) + 1 if extents[0] else 0, *extents[1:]]
        now += max(last)
        text = parts[2 * span[-1] + 2]
        where += [(p, p, p) for p in range(now, now + len(text))]
        now += len(text)
    return where, now


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.sampled_from(["pictures", *SHOWN]), st.randoms(), st.booleans())
def test_pruned_positions_are_the_smallest_grid_or_the_old_ones(name, kind, rng, contiguous):
    golden = loaded(name)
    shown = golden.pictures("picture_") if kind == "pictures" else golden.shown(kind)
    views = golden.processor.views(shown)
    sizes = [len(golden.processor.token_boxes(view, (99, 99))) for view in views]
    kept = [
        torch.tensor(sorted(rng.sample(range(n), rng.choice([0, 1, n // 4, n - 1, n])))).long()
        for n in sizes
    ]
    order = "contiguous" if contiguous else "original"
    ids, positions, after = golden.processor.layout(views, sizes, kept, order)
    where, now = positions_by_hand(golden, views, kept, contiguous)
    assert ids == golden.processor.context(kept, views)
    assert list(map(tuple, positions.T.tolist())) == where and after == now


# --- wrong variants -------------------------------------------------------------------------------


def everywhere(patch, golden):
    object.__setattr__(golden.vlm.vision_tower.config, "whole_layers", (0, 1, 2, 3))


def other_windows(patch, golden):
    """Windows of another size."""
    patch.setattr(qwen2_5_vl, "windows", lambda R, U, edge: windows(R, U, edge + 1))


def row_by_row(patch, golden):
    """Patches take their places as if there were no blocks."""

    def wrong(R, U):
        rows, columns = torch.meshgrid(torch.arange(2 * R), torch.arange(2 * U), indexing="ij")
        return torch.stack([rows, columns]).flatten(1)

    patch.setattr(qwen2_5_vl, "places", wrong)


def columns_first(patch, golden):
    patch.setattr(qwen2_5_vl, "places", lambda R, U: places(R, U).flip(0))


def other_axes(change):
    def wrong(patch, golden):
        text = golden.vlm.config.text
        axes = {
            "sections": tuple(sorted(text.rope_axes)),
            "by turns": (0, 1, 2, 0, 1, 2, 0, 1)[: len(text.rope_axes)],
            "swapped": tuple((0, 2, 1)[axis] for axis in text.rope_axes),
            "none": (0,) * len(text.rope_axes),
        }[change]
        assert axes != text.rope_axes
        object.__setattr__(text, "rope_axes", axes)

    return wrong


def without_norm_of_heads(patch, golden):
    for block in golden.vlm.decoder.layers:
        block.self_attn.q_norm = block.self_attn.k_norm = torch.nn.Identity()


def deepstack_later(patch, golden):
    right = model_file.VLM.embed

    def wrong(self, ids, visual=None):
        first, *others = right(self, ids, visual).split(self.config.text.width, -1)
        return torch.cat([first, *others[1:], others[0]], -1)

    patch.setattr(model_file.VLM, "embed", wrong)


def no_deepstack(patch, golden):
    right, E = model_file.VLM.embed, golden.vlm.config.text.width
    patch.setattr(model_file.VLM, "embed", lambda *a: right(*a)[..., :E])


def corners_apart(patch, golden):
    right = qwen2_5_vl.F.interpolate
    wrong = lambda *a, **o: right(*a, **o | {"align_corners": False})  # noqa: E731
    patch.setattr(qwen2_5_vl.F, "interpolate", wrong)


def one_frame_twice(patch, golden):
    right = golden.processor.pixels_of
    patch.setattr(
        golden.processor, "pixels_of", lambda view: right(view._replace(second_picture=None))
    )


def no_time(patch, golden):
    object.__setattr__(golden.vlm.vision_tower.config, "tokens_per_second", 0)
    object.__setattr__(golden.vlm.config.vision, "tokens_per_second", 0)


@pytest.mark.parametrize(
    "name, kind, mistake, seen_in",
    [
        ("qwen2_5_vl", "", everywhere, "projected"),
        ("qwen2_5_vl", "", other_windows, "projected"),
        ("qwen2_5_vl", "", row_by_row, "projected"),
        ("qwen2_5_vl", "", columns_first, "projected"),
        ("qwen3_vl", "", row_by_row, "projected"),
        ("qwen3_vl", "", corners_apart, "projected"),
        ("qwen2_5_vl", "", other_axes("by turns"), "logits"),
        ("qwen2_5_vl", "", other_axes("swapped"), "logits"),
        ("qwen2_5_vl", "", other_axes("none"), "logits"),
        ("qwen3_vl", "", other_axes("sections"), "logits"),
        ("qwen3_vl", "", other_axes("swapped"), "logits"),
        ("qwen3_vl", "", without_norm_of_heads, "logits"),
        ("qwen3_vl", "", deepstack_later, "logits"),
        ("qwen3_vl", "clip_", no_deepstack, "logits"),
        ("qwen2_5_vl", "clip_", one_frame_twice, "pixels"),
        ("qwen2_5_vl", "clip_", no_time, "positions"),
        ("qwen2_5_vl", "clip_", no_time, "logits"),
    ],
)
def test_the_comparison_sees_wrong_variants(monkeypatch, name, kind, mistake, seen_in):
    golden = Golden(name)
    mistake(monkeypatch, golden)
    assert golden.differences(kind)[seen_in] > 3


# --- the real models' numbers ---------------------------------------------------------------------

COUNTS = [  # visual tokens of pictures of these sizes, as the public processors count them
    ("qwen2_5_vl", 14, {(640, 480): 391, (1280, 720): 1196, (1920, 1080): 2691, (336, 336): 144}),
    ("qwen3_vl", 16, {(640, 480): 300, (1280, 720): 880, (1920, 1080): 2040, (224, 224): 64}),
]


@pytest.mark.parametrize("name, patch, counts", COUNTS)
def test_pictures_have_as_many_tokens_as_documented(name, patch, counts, tmp_path):
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"] |= {"patch_size": patch, "window_size": 8 * patch}
    (folder / "config.json").write_text(json.dumps(raw))
    settings = {"patch_size": patch}
    settings |= {"min_pixels": 3136, "max_pixels": 12845056} if patch == 14 else {}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "video_preprocessor_config.json").unlink()
    processor = load_processor(folder)
    for size, tokens in counts.items():
        (view,) = processor.views([Image.new("RGB", size)])
        assert len(processor.token_boxes(view, view.picture.size)) == tokens
        assert processor.pixels([view]).shape[1:3].numel() == tokens
    with pytest.raises(ValueError, match="200 times as long as wide, got 4001 x 20"):
        processor.views([Image.new("RGB", (4001, 20))])


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("qwen2_5_vl", {"vision_config": {"hidden_act": "gelu"}}, "vision hidden_act must be one"),
        ("qwen2_5_vl", {"vision_config": {"spatial_merge_size": 4}}, "spatial_merge_size must be"),
        ("qwen2_5_vl", {"vision_config": {"fullatt_block_indexes": [3, 1]}}, "must be ascending"),
        ("qwen2_5_vl", {"vision_config": {"out_hidden_size": 33}}, "out_hidden_size must be one"),
        ("qwen2_5_vl", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}}, "3 counts of"),
        ("qwen2_5_vl", {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope scaling must be"),
        ("qwen3_vl", {"vision_config": {"num_position_embeddings": 35}}, "must be a square, got"),
        ("qwen3_vl", {"vision_config": {"deepstack_visual_indexes": [0, 9]}}, "of 4 layers, got"),
        ("qwen3_vl", {"vision_config": {"num_heads": 5}}, "must be a multiple of 4 x 5"),
        ("qwen3_vl", {"model_type": "qwen3_vl_moe"}, "'qwen3_vl_moe' is not supported"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, change, message, tmp_path):
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    raw = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        raw[key] = raw[key] | value if key.endswith("config") else value
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        load(folder, device="cpu")


def test_frames_are_chosen_by_the_families_rules():
    """Qwen3-VL's rule as in transformers' video processor, numpy's rounding with it; Qwen2.5-VL's
    an even number."""
    for frames, fps in [(1, 1.0), (2, 1.0), (5, 1.0), (9, 3.0), (100, 24.0), (2000, 2.0)]:
        clip = Clip.even([Image.new("RGB", (32, 32))] * frames, fps)
        count = min(max(int(frames / fps * 2), 4), 768, frames)
        expected = numpy.linspace(0, frames - 1, count).round().astype(int).tolist()
        assert loaded("qwen3_vl").processor._sampled(clip) == expected
        chosen = loaded("qwen2_5_vl").processor._sampled(clip)
        assert len(chosen) % 2 == 0 and chosen == sorted(chosen) and chosen[-1] == frames - 1
        assert len(chosen) == max(2, min(max(frames / fps * 2, 4), 768, frames) // 2 * 2)


@pytest.mark.parametrize("size", [(96, 40), (31, 90), (64, 64)])
@pytest.mark.parametrize("name", KINDS)
def test_boxes_lie_where_the_tokens_pixels_are(name, size):
    """A white square on a black picture: how bright a token's pixels are, by its box."""
    processor = loaded(name).processor
    picture = Image.new("RGB", size)
    picture.paste("white", (size[0] // 3, size[1] // 3, size[0] // 3 + 17, size[1] // 3 + 17))
    (view,) = processor.views([picture])
    light = processor.pixels([view])[0].mean((2, 3)).flatten()
    shown = torch.frombuffer(bytearray(view.picture.convert("L").tobytes()), dtype=torch.uint8)
    shown = shown.view(view.picture.height, view.picture.width).float()
    boxes = processor.token_boxes(view, view.picture.size)
    seen = torch.stack([shown[b : d + 1, a : c + 1].mean() for a, b, c, d in boxes])
    assert torch.corrcoef(torch.stack([seen, light]))[0, 1] > 0.999


def test_newer_spellings_mean_the_same(tmp_path):
    """Names, sections and settings as transformers writes them today, beside those of the hub."""
    old, new = GOLDEN / "qwen2_5_vl", shutil.copytree(GOLDEN / "qwen2_5_vl", tmp_path / "new")
    renamed = {}
    for name, tensor in load_file(old / "model.safetensors").items():
        name = name.replace("model.", "model.language_model.", 1) if name[:6] == "model." else name
        renamed[f"model.{name}" if name.startswith("visual.") else name] = tensor
    save_file(renamed, new / "model.safetensors")
    raw = json.loads((old / "config.json").read_text())
    vision, top = raw.pop("vision_config"), ("model_type", "image_token_id", "video_token_id")
    rope = {"rope_type": "default", "rope_theta": raw.pop("rope_theta"), **raw.pop("rope_scaling")}
    del rope["type"]
    text = {key: value for key, value in raw.items() if key not in top}
    text |= {"model_type": "qwen2_5_vl_text", "rope_parameters": rope, "dtype": "float32"}
    config = {key: raw[key] for key in top} | {"text_config": text, "vision_config": vision}
    (new / "config.json").write_text(json.dumps(config))
    pictures, clips = (
        json.loads((new / file).read_text())
        for file in ("preprocessor_config.json", "video_preprocessor_config.json")
    )
    least, most = pictures.pop("min_pixels"), pictures.pop("max_pixels")
    pictures["size"] = {"shortest_edge": least, "longest_edge": most}
    nested = {"image_processor": pictures, "video_processor": clips | {"fps": None}}
    (new / "processor_config.json").write_text(json.dumps(nested))
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (new / file).unlink()
    (a, p), (b, q) = load(old, device="cpu"), load(new, device="cpu")
    assert a.config == b.config and a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    settings = ("pixels_bounds", "clip_bounds", "clip_fps", "clip_least", "clip_most")
    assert [getattr(p, name) for name in settings] == [getattr(q, name) for name in settings]
