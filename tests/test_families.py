"""What the families of checkpoints have apart: tiles, merged patches, prompts, file layouts."""

import json
import math
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import FAMILIES, ROOT, random_pictures, same_bits
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata

from bench import __main__ as bench
from bench import random_models
from checkpoints import llava_next, load, load_model, load_processor, open_folder, vila
from checkpoints.processor import Clip, View, read_tokenizer
from checkpoints.smolvlm import in_words
from checkpoints.values import Folder
from checkpoints.weights import hub_names, translate, weight_files
from model import Config, TextConfig, VisionConfig, merge_patches
from sparsevila import SparseVILA, merge_salience
from tools import quantise

GOLDEN = ROOT / "tests" / "golden"


# --- merging --------------------------------------------------------------------------------------


def blocks_of(n: int, side: int, by_columns: bool) -> list[list[int | None]]:
    """The patches of every merged token, None beyond the edge."""
    k = math.ceil(n / side)
    order = [(i, j) for i in range(k) for j in range(k)]
    order = [(i, j) for j, i in order] if by_columns else order
    return [
        [
            r * n + c if r < n and c < n else None
            for r in range(i * side, i * side + side)
            for c in range(j * side, j * side + side)
        ]
        for i, j in order
    ]


@given(st.integers(1, 7), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_merging_takes_every_block_and_the_mean_of_real_patches(n, side, by_columns, seed):
    torch.manual_seed(seed)
    x, salience = torch.randn(2, n * n, 3), torch.rand(2, n * n)
    blocks = blocks_of(n, side, by_columns)
    merged = merge_patches(x, side, by_columns=by_columns)
    means = merge_salience(salience, partial(merge_patches, block=side, by_columns=by_columns))
    assert merged.shape == (2, len(blocks), side * side * 3) and means.shape == merged.shape[:2]
    for token, patches in enumerate(blocks):
        parts = [torch.zeros(2, 3) if p is None else x[:, p] for p in patches]
        assert torch.equal(merged[:, token], torch.cat(parts, -1))
        real = [salience[:, p] for p in patches if p is not None]
        assert torch.allclose(means[:, token], torch.stack(real).mean(0), rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_boxes_show_where_a_token_lies(name):
    """The patches of a token lie in its box, and no others."""
    processor = load_processor(GOLDEN / name)
    vision = processor.config.vision
    n, p = math.isqrt(vision.patches), vision.patch_size
    size = (vision.image_size, vision.image_size)
    boxes = processor.token_boxes(View(Image.new("RGB", size)), size)
    assert len(boxes) == vision.visual_tokens
    for box, patches in zip(
        boxes, blocks_of(n, vision.merge, vision.merge_by_columns), strict=True
    ):
        inside = {
            r * n + c
            for r in range(n)
            for c in range(n)
            if box[0] <= c * p <= box[2] and box[1] <= r * p <= box[3]
        }
        assert inside == {patch for patch in patches if patch is not None}


# --- tiles and prompts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, edges, size, views, tokens",
    [  # the real models' numbers of tiles; sizes scaled to the tiny checkpoints' 32 pixels a tile
        ("smolvlm", 4, (40, 30), 13, None),  # 640 x 480 with 2048 / 512: 13 views
        ("smolvlm", 4, (80, 45), 13, None),  # 720p
        ("smolvlm", 4, (10, 10), 17, None),  # square
        ("nvila", None, (640, 480), 13, 12),
        ("nvila", None, (1280, 720), 9, 12),
        ("nvila", None, (20, 20), 1, 12),
    ],
)
def test_pictures_are_cut_into_as_many_tiles_as_documented(name, edges, size, views, tokens):
    processor = load_processor(GOLDEN / name)
    if edges:
        processor.longest_edge = edges * 32
    else:
        processor.max_tiles = tokens
    made = processor.views([Image.new("RGB", size)])
    assert len(made) == views
    assert all(view.picture.size == (32, 32) for view in made)
    tiles = [(view.row, view.column) for view in made[:-1]]
    rows, columns = made[-1].rows, made[-1].columns
    assert tiles == [(r + 1, c + 1) for r in range(rows) for c in range(columns)]


@pytest.mark.parametrize(
    "size, tokens",
    [((640, 480), 2340), ((1280, 720), 1948), ((1920, 1080), 1948), ((336, 336), 1176)],
)
def test_llava_next_has_as_many_visual_rows_as_documented(size, tokens, tmp_path):
    """As transformers counts them for the real models (480 x 640 and so on, new lines included)."""
    folder = shutil.copytree(GOLDEN / "llava_next", tmp_path / "llava_next")
    inner("vision_config", image_size=336, patch_size=14)(folder)
    edit(folder / "config.json", image_grid_pinpoints=llava_next.PINPOINTS)
    crop = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    edit(folder / "preprocessor_config.json", **crop)
    processor = load_processor(folder)
    views = processor.views([Image.new("RGB", size)])
    sizes = [len(processor.token_boxes(view, (99, 99))) for view in views]
    ids = processor.context(sizes, views)
    newline = processor.config.newline_id
    assert ids.count(processor.image_token_id) + ids.count(newline) == tokens
    assert len(processor.pixels(views)) == 1 + views[1].rows * views[1].columns


@pytest.mark.parametrize("name", ["llava_next", "smolvlm", "nvila", "llava"])
@pytest.mark.parametrize("size", [(96, 40), (31, 90), (64, 64)])
def test_the_boxes_of_the_brightest_tokens_lie_on_the_bright_square(name, size):
    """A white square on a black picture, whole or in tiles: the patches that are brightest for the
    tower are those whose boxes show it, and every pixel of every view has one box at most."""
    vlm, processor = load(GOLDEN / name, device="cpu")
    picture = Image.new("RGB", size)
    picture.paste("white", (size[0] // 3, size[1] // 3, size[0] // 3 + 17, size[1] // 3 + 17))
    views = processor.views([picture])
    pixels = processor.pixels(views)
    side, vision = math.isqrt(vlm.config.vision.patches), vlm.config.vision
    light = torch.nn.functional.adaptive_avg_pool2d(pixels.mean(1), side).flatten(1)
    light = vlm.vision_tower.merge((light - light.min())[..., None]).sum(-1)
    for view, tokens in zip(views, processor.join(views, list(light))):
        shown = torch.frombuffer(bytearray(view.picture.convert("L").tobytes()), dtype=torch.uint8)
        shown = shown.view(view.picture.height, view.picture.width).float()
        boxes = processor.token_boxes(view, view.picture.size)
        seen = torch.stack([shown[b : d + 1, a : c + 1].sum() for a, b, c, d in boxes])
        assert len(boxes) == len(tokens)
        if vision.merge == 1:
            assert torch.corrcoef(torch.stack([seen, tokens]))[0, 1].nan_to_num(1.0) > 0.99
        else:
            assert int(seen.argmax()) == int(tokens.argmax())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 60), (900, 5), (33, 32)])
def test_pictures_of_any_shape_work(name, size):
    vlm, processor = load(GOLDEN / name, device="cpu")
    session = SparseVILA(vlm, processor)
    session.see(Image.new("RGB", size, "red"))
    session.ask("what?", max_new_tokens=2)
    assert session.stats["views"] == len(session.views)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("fps", [None, 1.0])
def test_pruning_leaves_all_text_and_some_of_every_tile(name, count, fps):
    vlm, processor = load(GOLDEN / name, device="cpu")
    session = SparseVILA(vlm, processor, prefill_sparsity=0.5)
    session.see(random_pictures(1, count, side=70), fps=fps)
    views = session.views
    sizes = [len(processor.token_boxes(view, (96, 96))) for view in views]
    assert [len(index) for index in session.kept] == [n - n // 2 for n in sizes]
    full, image = processor.context(sizes, views), processor.image_token_id
    kept = processor.context(session.kept, views)
    assert [i for i in full if i != image] == [i for i in kept if i != image]
    assert len(session.cache.visual) == sum(map(len, session.kept)) == kept.count(image)
    assert session.cache.length == len(kept)
    answer = session.ask("what?", max_new_tokens=3)
    assert all(int(chosen[-1]) < kept.count(image) for chosen in answer.retrieved)


def test_a_given_rate_stands_in_place_of_a_clips_own_times():
    session = SparseVILA(*load(GOLDEN / "smolvlm2", device="cpu"))
    clip = Clip(random_pictures(1, 2, side=70), begins=[0, 10], end=11, rate=1)
    for fps, seconds in ((None, [0, 10]), (1.0, [0, 1])):
        session.see(clip, fps=fps)
        assert [view.second for view in session.views] == seconds


def test_padding_puts_the_picture_in_the_middle_of_the_mean_colour():
    """`do_pad`, as original LLaVA had it: nothing is cut off."""
    processor = load_processor(GOLDEN / "llava")
    processor.pad = True
    (view,) = processor.views([Image.new("RGB", (64, 32), "red")])
    column = [view.picture.getpixel((16, y)) for y in (2, 16, 29)]
    assert column == [(122, 116, 104), (255, 0, 0), (122, 116, 104)]
    assert view.picture.getpixel((1, 16)) == (255, 0, 0)


def test_vila_shows_frames_evenly_spread():
    processor = load_processor(GOLDEN / "nvila")
    frames = [Image.new("RGB", (9, 9), (n, 0, 0)) for n in range(11)]
    views = processor.views(Clip.even(frames, 2.0))
    assert [view.second for view in views] == [0, 1.5, 3.5, 5]  # frames 0, 3, 7, 10 (6.67 up)
    assert [view.picture.getpixel((4, 4))[0] for view in views] == [0, 3, 7, 10]


def test_a_template_replaces_the_familys_prompt():
    folder = GOLDEN / "nvila"
    turns = "<|im_start|>Q{image}?\n{question}<|im_end|>A{answer}<|im_end|>Q{question}A"
    processor = load_processor(folder, template=turns)
    views = processor.views([Image.new("RGB", (9, 9))])
    ids = processor.context([0], views) + processor.question("why", first=True, views=views)
    assert processor.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>Q\n\n?\nwhy<|im_end|>A"  # the new lines that VILA has after a tile
    )
    more = processor.question("how", first=False)
    assert processor.tokenizer.decode(more, skip_special_tokens=False) == "<|im_end|>QhowA"


def test_numbers_in_words():
    expected = {1: "one", 11: "eleven", 20: "twenty", 64: "sixty-four", 99: "ninety-nine"}
    assert {n: in_words(n) for n in expected} == expected and in_words(120) == "120"


# --- folders --------------------------------------------------------------------------------------


def copied(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    return folder


def edit(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def inner(part, **changes):
    """Change an object in config.json."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        edit(folder / "config.json", **{part: config[part] | changes})

    return damage


def change(file, **changes):
    return lambda folder: edit(folder / file, **changes)


def tensors(file, change):
    def damage(folder):
        content = load_file(folder / file)
        change(content)
        save_file(content, folder / file)

    return damage


LLM = "llm/model.safetensors"
CLIPS = "video_preprocessor_config.json"
TABLE = "model.embed_tokens.weight"


def without_token(token: str):
    """Gives a special token of tokenizer.json another name."""

    def damage(folder):
        file = folder / "tokenizer.json"
        file.write_text(file.read_text().replace(json.dumps(token), '"<other>"'))

    return damage


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("llava", change("config.json", model_type="llava_gem"), "model_type 'llava_gem' is not"),
        (
            "llava_next",
            change("preprocessor_config.json", size={"shortest_edge": 30}),
            "size must be crop_size, 32, got 30",
        ),
        ("llava_next", change("preprocessor_config.json", do_pad=False), "do_pad in preprocessor"),
        ("llava_next", change("config.json", image_grid_pinpoints=[[32, 40]]), "multiples of 32"),
        ("llava_next", change("config.json", image_grid_pinpoints=[]), "must be pairs of heights"),
        ("llava_next", inner("vision_config", image_size=40), "crop_size must be the tower's"),
        ("llava", change("config.json", model_type="qwen2_vl"), "'qwen2_vl' is not supported"),
        ("nvila", change("config.json", image_aspect_ratio="dynamic_s2"), "dynamic_s2, features"),
        ("nvila", change("config.json", dynamic_s2=True), "dynamic_s2, features of several"),
        ("nvila", change("config.json", image_aspect_ratio="odd"), "image_aspect_ratio .*'odd'"),
        ("nvila", change("config.json", mm_vision_select_feature="patch"), "must be one of full"),
        ("nvila", change("config.json", max_tiles=0), "max_tiles must be an integer"),
        ("nvila", change("config.json", video_encoder={"_target_": "TSPVideoEncoder"}), "TSPVideo"),
        ("nvila", change("mm_projector/config.json", mm_projector_type="q"), "one of .* got 'q'"),
        ("nvila", change("vision_tower/config.json", model_type="radio"), "vision .*got 'radio'"),
        ("nvila", change("llm/config.json", model_type="gemma"), "text model_type .*'gemma'"),
        ("nvila", lambda f: (f / LLM).unlink(), "must hold .safetensors weights, found none"),
        ("nvila", lambda f: shutil.copy(f / LLM, f), "stands beside the parts .*: remove one"),
        (
            "smolvlm2",
            lambda f: (f / CLIPS).write_text('{"image_mean": [0, 0, 0]}'),
            "image_mean of clips must be that of pictures, got",
        ),
        ("nvila", lambda f: (f / "llm/config.json").unlink(), "no config.json in .*llm"),
        ("nvila", lambda f: shutil.rmtree(f / "mm_projector"), "no config.json in .*mm_projector"),
        ("nvila", lambda f: (f / "llm/merges.txt").unlink(), "no tokenizer.json in"),
        ("nvila", lambda f: (f / "llm/merges.txt").write_text("a b c d\n" * 3), "vocab.json is da"),
        ("nvila", change("llm/added_tokens.json", odd=900), "leave a gap before 'odd', 900"),
        ("nvila", lambda f: (f / "llm/added_tokens.json").unlink(), "no special token '</s>'"),
        ("smolvlm", without_token("<|im_start|>"), r"no special token '<\|im_start\|>'"),
        ("smolvlm", without_token("<fake_token_around_image>"), "no special token '<fake_token_"),
        ("llava", without_token("</s>"), "no special token '</s>'"),
        ("llava", change("config.json", image_token_index=40), "image token must be a special one"),
        ("llava", change("generation_config.json", eos_token_id=[]), r"list of ids, got \[\]"),
        ("llava", change("generation_config.json", eos_token_id=-5), "list of ids, got"),
        ("smolvlm", change("config.json", scale_factor=3), "must divide the 4 patches of a side"),
        ("nvila", tensors(LLM, lambda t: t.pop(TABLE)), "lacks 1 tensors, the first: decoder.emb"),
        ("nvila", tensors(LLM, lambda t: t.update(x=torch.ones(1))), "x has no place in this"),
        ("nvila", change("llm/config.json", vocab_size=9999), r"must have shape \(9999, 32\), got"),
        ("longvila", change("llm/config.json", rope_scaling={"type": "yarn"}), "rope scaling must"),
        ("longvila", change("llm/config.json", rope_scaling={"type": "linear"}), "factor must be"),
        ("smolvlm", change("preprocessor_config.json", max_image_size=16), "must be the tower's"),
        ("smolvlm", change("preprocessor_config.json", size={"longest_edge": 5000}), "edge in"),
        ("smolvlm", change("preprocessor_config.json", size=...), "size in .* got None"),
        ("smolvlm", change("config.json", scale_factor=0), "scale_factor must be an integer"),
        ("smolvlm", inner("text_config", rope_scaling={"rope_type": "llama3"}), "rope scaling"),
        ("smolvlm2", change("preprocessor_config.json", video_sampling={"fps": 0}), "fps must"),
        ("smolvlm", inner("vision_config", model_type="intern_vit_6b"), "got 'intern_vit_6b'"),
    ],
)  # fmt: skip
def test_odd_folders_are_refused_in_one_line(name, damage, message, tmp_path):
    folder = copied(name, tmp_path)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
@pytest.mark.parametrize("name", ["smolvlm", "nvila_hf"])
def test_special_tokens_that_swallow_white_space_do(tmp_path, name, side):
    """Against the tokenizers library, which encodes the whole text at once."""
    folder = copied(name, tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token[side] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    processor = load_processor(folder)
    stop = processor.tokenizer.id_to_token(processor.stop_ids[0])
    processor.set_template(f"{{image}}{{question}}{{answer}} {stop} \n{{question}} {stop} \nyes:")
    text = processor._close + "why?" + processor._last
    expected = processor.tokenizer.encode(text, add_special_tokens=False).ids
    assert processor.question("why?", first=False) == expected
    spaces = (
        text.replace(" " + stop, stop) if side == "lstrip" else text.replace(stop + " \n", stop)
    )
    assert processor.question("why?", first=False) == processor._encode(spaces)


@pytest.mark.parametrize("close", ["", " <end_of_utterance>", "\n<end_of_utterance>"])
def test_a_template_of_ones_own_leaves_the_familys_end_of_turn(close):
    processor = load_processor(GOLDEN / "smolvlm")
    (stop,) = processor.stop_ids
    processor.set_template(f"{{image}}{{question}}{{answer}}{close}\n{{question}}")
    assert processor.stop_ids == (stop,)


def test_added_tokens_may_stand_in_the_tokenizers_settings(tmp_path):
    folder = copied("nvila", tmp_path)
    expected = load_processor(folder).question("what?", first=True)
    added = folder / "llm" / "added_tokens.json"
    decoder = {str(i): {"content": token} for token, i in json.loads(added.read_text()).items()}
    settings = folder / "llm" / "tokenizer_config.json"
    settings.write_text(json.dumps({"added_tokens_decoder": decoder}))
    added.unlink()
    assert load_processor(folder).question("what?", first=True) == expected


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_conversation_is_encoded_as_if_in_one_piece(scheme, tmp_path):
    """Some tokenizers mark the start of a text: "first" not after a special token."""
    folder = copied("llava", tmp_path)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme}
    content |= {"normalizer": None, "pre_tokenizer": metaspace | {"split": False}}
    file.write_text(json.dumps(content))
    processor = load_processor(folder)
    whole = "USER: <image>\nwhat? ASSISTANT:</s>USER: where? ASSISTANT:"
    ids = processor.context([1]) + processor.question("what?", first=True)
    ids += processor.question("where?", first=False)
    assert ids == processor.tokenizer.encode(whole).ids


@pytest.mark.parametrize("count", [1, 3])
def test_vicunas_prompt_is_that_of_vila_15(count):
    """As its own code made it (run_vila.py and tokenizer_image_token, commit 1c88211): an image and
    a new line for every picture, the text between the images encoded piece by piece."""
    tokenizer = read_tokenizer(Folder(GOLDEN / "llava", {}))
    image = tokenizer.get_vocab_size() + 5
    settings = {"size": {"height": 32, "width": 32}, "image_aspect_ratio": "resize"}
    config = Config(VisionConfig(image_size=32, patch_size=8), TextConfig(), image_token_id=image)
    processor = vila.Processor(read_tokenizer(Folder(GOLDEN / "llava", {})), config, settings)
    views = processor.views(random_pictures(0, count))
    got = processor.context([2] * count, views)
    got += processor.question("what?", first=True, views=views)
    system = "A chat between a curious user and an artificial intelligence assistant. The "
    system += "assistant gives helpful, detailed, and polite answers to the user's questions."
    chunks = [f"{system} USER: ", *["\n"] * (count - 1), "\nwhat? ASSISTANT:"]
    first, *others = (tokenizer.encode(chunk).ids for chunk in chunks)
    expected = first
    for ids in others:
        expected = expected + [image] * 2 + ids[1:]  # without the begin token
    assert got == expected


def test_a_template_must_not_hold_the_image_token():
    template = "{image}{question}{answer}<image>{question}"
    with pytest.raises(ValueError, match="must not hold '<image>'"):
        load_processor(GOLDEN / "llava", template=template)


def test_model_safetensors_stands_alone(tmp_path):
    """Beside it may lie adapters, or the same weights once more in another form."""
    folder = copied("llava", tmp_path)
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    load(folder, device="cpu")


def test_settings_of_quantisation_in_the_decoders_folder(tmp_path):
    folder = copied("nvila", tmp_path)
    settings = {"quant_method": "gptq", "bits": 4}
    edit(folder / "llm" / "config.json", quantization_config=settings)
    with pytest.raises(ValueError, match="gptq"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    "kind, pads", [("LlavaImageProcessor", True), ("CLIPImageProcessor", False)]
)
def test_only_llavas_own_processor_pads(kind, pads, tmp_path):
    folder = copied("llava", tmp_path)
    edit(folder / "preprocessor_config.json", do_pad=True, image_processor_type=kind)
    assert load_processor(folder).pad is pads


def test_a_folder_with_a_sentencepiece_model_only_says_so(tmp_path):
    folder = copied("nvila", tmp_path)
    (folder / "llm" / "merges.txt").unlink()
    (folder / "llm" / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="only llm/tokenizer.model, which transformers can"):
        load_processor(folder)


def test_remote_code_is_never_run(tmp_path):
    folder = copied("nvila_hf", tmp_path)
    edit(folder / "config.json", auto_map={"AutoModel": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('remote code was run')")
    load(folder, device="cpu")


@pytest.mark.parametrize("name", ["smolvlm", "nvila", "longvila"])
def test_a_stored_head_wins_over_the_word_that_it_is_tied(name, tmp_path):
    folder, head = copied(name, tmp_path), "lm_head.weight"
    part = folder if name == "smolvlm" else folder / "llm"
    file = next(part.glob("*.safetensors"))
    content = load_file(file)
    if name == "longvila":  # tied, without a head
        vlm = load_model(folder, device="cpu")
        assert vlm.lm_head.weight is vlm.decoder.embed_tokens.weight
        (folder / "llm" / "model.safetensors.index.json").unlink()
        content[head] = torch.full((load_processor(folder).config.text.vocab, 32), 0.5)
    save_file(content, file)
    edit(part / "config.json", tie_word_embeddings=True)
    vlm = load_model(folder, device="cpu")
    assert same_bits(vlm.lm_head.weight, content[head])
    assert not same_bits(vlm.lm_head.weight, vlm.decoder.embed_tokens.weight)


def test_in_every_part_of_a_checkpoint_a_whole_model_wins_over_older_shards(tmp_path):
    """longvila's decoder is stored in shards with an index."""
    folder = copied("longvila", tmp_path)
    expected = load_model(folder, device="cpu").state_dict()
    whole = {}
    for shard in (folder / "llm").glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard)
        whole |= tensors
    save_file(whole, folder / "llm" / "model.safetensors")
    loaded = load_model(folder, device="cpu").state_dict()
    assert all(same_bits(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_name_table_is_read_both_ways(name):
    """Of every parameter the name that the files of the golden checkpoint have; from there back."""
    family, folder = open_folder(GOLDEN / name)
    names, stored = hub_names(family.NAMES), set()
    for file, prefix in weight_files(folder).items():
        stored |= {prefix + key for key in load_file(file)}
    model = load_model(GOLDEN / name, device="cpu")
    for ours, _ in model.named_parameters():
        theirs = translate(ours, names)
        assert translate(theirs, family.NAMES) == ours
        assert theirs in stored or name == "llava_next_mistral"  # it has today's spelling


def test_names_that_newer_transformers_write(tmp_path):
    """SmolVLM as it is in memory, the inner vision_model left out of VILA's tower."""
    for name, file, old, new in (
        ("smolvlm", "model.safetensors", "model.vision_model.", "model.vision_model.vision_model."),
        ("nvila", "vision_tower/model.safetensors", "vision_model.", ""),
    ):
        folder = copied(name, tmp_path)
        content = load_file(folder / file)
        renamed = {
            (new + key.removeprefix(old) if key.startswith(old) else key): value
            for key, value in content.items()
        }
        assert renamed.keys() != content.keys()
        save_file(renamed, folder / file)
        a, b = (
            dict(load_model(f, device="cpu").named_parameters()) for f in (folder, GOLDEN / name)
        )
        assert all(same_bits(a[key], b[key]) for key in b)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_quantised_and_read_back(name, tmp_path):
    target = tmp_path / "quantised"
    quantise.main(
        [str(GOLDEN / name), str(target), "--group-size", "16", "--vision-w8a8", "--samples", "2"]
    )
    vlm, processor = load(target, device="cpu")
    assert vlm.precision == "float32 + W4A16 decoder + W8A8 tower"
    again = tmp_path / "again"
    quantise.main(
        [str(GOLDEN / name), str(again), "--group-size", "16", "--vision-w8a8", "--samples", "2"]
    )
    a, b = (load_model(folder, device="cpu").state_dict() for folder in (target, again))
    assert a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    session = SparseVILA(vlm, processor)
    session.see(random_pictures(0, 1, side=60))
    assert session.ask("what?", max_new_tokens=3).token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_calibration_reads_what_a_session_reads(name):
    """The same rows at the same positions, on all three axes where there are three; the answer's
    last token, which a session does not read, comes behind them."""
    vlm, processor = load(GOLDEN / name, device="cpu")
    picture, read = random_pictures(0, 1, side=60), []
    hook = vlm.decoder.register_forward_pre_hook(lambda _, args: read.append(args[:2]))
    session = SparseVILA(vlm, processor, prefill_sparsity=0.75, decode_sparsity=0)
    session.see(picture)
    session.ask("what?", max_new_tokens=32)
    hook.remove()
    rows = torch.cat([embeddings for embeddings, _ in read], 1)
    _, (batch,) = quantise.calibration(vlm, processor, picture, ["what?"], 1)
    axes = batch["positions"].shape[:-1]
    positions = torch.cat([x.expand(*axes, -1) for _, x in read], -1)
    assert torch.equal(batch["embeddings"][:, : rows.shape[1]], rows)
    assert torch.equal(batch["positions"][..., : rows.shape[1]], positions)
    assert batch["embeddings"].shape[1] == batch["positions"].shape[-1] > rows.shape[1]
    assert ("qwen" in name) == (axes == (3,))


def test_the_benchmark_writes_a_model_that_runs(tmp_path, monkeypatch):
    """`python -m bench make` in small, and the sizes of the real one."""
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    monkeypatch.setitem(random_models.TEXTS, "smolvlm-256m", tiny)
    bench.main(["make", "smolvlm-256m", str(tmp_path / "made")])
    config = load_model(tmp_path / "made", device="cpu").config
    assert config.vision.visual_tokens == 64 and config.text.vocab == 49280
    tokenizer = load_processor(tmp_path / "made").tokenizer
    ids = {"<|im_start|>": 1, "<global-img>": 49152, "<row_1_col_1>": 49153, "<row_6_col_6>": 49188}
    ids |= {"<fake_token_around_image>": 49189, "<image>": 49190, "<end_of_utterance>": 49279}
    assert {token: tokenizer.token_to_id(token) for token in ids} == ids


def test_loading_takes_little_more_memory_than_the_checkpoint():
    """In a process of its own, on a checkpoint of 2 GB: `python -m bench load`."""
    command = [sys.executable, "-m", "bench", "load"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    numbers = {line.split()[0]: line.split()[1] for line in run.stdout.split("\n")[1:] if line}
    assert 2000 < int(numbers["checkpoint"]) < int(numbers["peak"]) < int(numbers["limit"])


@pytest.mark.parametrize("only", ["video_sampling", "num_frames"])
@pytest.mark.parametrize("file", ["processor_config.json", "video_preprocessor_config.json"])
def test_settings_for_clips_are_found_where_transformers_writes_them(tmp_path, file, only):
    """As transformers 5.24 saves a processor: pictures and clips apart, the sampling twice."""
    folder = shutil.copytree(GOLDEN / "smolvlm2", tmp_path / "copy")
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    sampling = pictures.pop("video_sampling")
    clips = SmolVLMVideoProcessor(video_sampling=sampling, max_image_size={"longest_edge": 32})
    clips = json.loads(clips.to_json_string())
    for key in ("num_frames", "fps", "size") if only == "video_sampling" else ("video_sampling",):
        del clips[key]
    if file == "processor_config.json":
        (folder / "preprocessor_config.json").unlink()
        (folder / file).write_text(
            json.dumps({"image_processor": pictures, "video_processor": clips})
        )
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
        (folder / file).write_text(json.dumps(clips))
    frames = [Image.new("RGB", (64, 36), (n, 0, 0)) for n in range(24)]
    metadata = VideoMetadata(total_num_frames=24, fps=4.0, duration=6.0)
    expected = SmolVLMVideoProcessor.sample_frames(None, metadata, num_frames=5, fps=1)
    views = load_processor(folder).views(Clip.even(frames, 4.0))
    assert [view.second * 4 for view in views] == expected.tolist() == [0, 5, 11, 17, 23]
