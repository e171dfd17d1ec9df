"""Pictures of every kind to pixels, text to tokens."""

import math
import os
import re
import struct
import zlib

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from checkpoints import load_processor
from checkpoints.llava import Processor
from checkpoints.processor import CLIP_MEAN, CLIP_STD, open_clip, open_picture
from model import Config, TextConfig, VisionConfig

RED = (200, 30, 10)


@pytest.fixture
def processor(tiny):
    return tiny[1]


def test_pixels_are_resized_cut_and_normalised_as_clip_does(processor):
    """By hand for a picture whose resize is a plain doubling of one colour per half."""
    image = Image.new("RGB", (320, 160), RED)
    image.paste((10, 20, 250), (160, 0, 320, 160))
    pixels = processor.pixels([image])
    assert pixels.shape == (1, 3, 160, 160)
    for side, color in ((10, RED), (150, (10, 20, 250))):
        expected = [(c / 255 - m) / s for c, m, s in zip(color, CLIP_MEAN, CLIP_STD)]
        assert torch.allclose(pixels[0, :, 80, side], torch.tensor(expected), rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (160, 160), (161, 160), (7, 500), (3000, 2000), (500, 7)])
def test_pictures_of_any_shape_become_squares(processor, size):
    assert processor.pixels([Image.new("RGB", size, RED)]).shape == (1, 3, 160, 160)


def as_palette(image):
    return image.convert("P", palette=Image.Palette.ADAPTIVE)


def as_16_bit(image):
    return image.convert("L").convert("I").point(lambda v: v * 257).convert("I;16")


@pytest.mark.parametrize(
    "convert, suffix, expected",
    [
        (lambda i: i, "png", RED),
        (lambda i: i.convert("L"), "png", (79, 79, 79)),
        (lambda i: i.convert("1", dither=Image.Dither.NONE), "png", (0, 0, 0)),
        (as_palette, "png", RED),
        (as_palette, "gif", RED),
        (lambda i: i.convert("CMYK"), "jpg", RED),
        (as_16_bit, "png", (79, 79, 79)),
        (as_16_bit, "tiff", (79, 79, 79)),
        (lambda i: i.convert("RGBA"), "webp", RED),
        (lambda i: Image.new("RGBA", i.size, (*RED, 0)), "png", (255, 255, 255)),
        (lambda i: Image.new("LA", i.size, (0, 128)), "png", (127, 127, 127)),
    ],
)
def test_every_kind_of_picture_works(tmp_path, convert, suffix, expected):
    file = tmp_path / f"picture.{suffix}"
    convert(Image.new("RGB", (20, 10), RED)).save(file)
    image = open_picture(file)
    assert image.mode == "RGB" and image.size == (20, 10)
    for got, want in zip(image.getpixel((5, 5)), expected):
        assert abs(got - want) <= 3


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), "black")
    image.paste(RED, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_picture(tmp_path / "turned.png")
    assert upright.size == (10, 20) and upright.getpixel((5, 2)) == RED


def png(width, height, bits, kind, *chunks):
    """A PNG file of these chunks, by hand: what Pillow cannot write itself."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    content = (
        struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        for body in (header, *chunks, b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(content)


def png_header(width, height):
    """A file of a few bytes that claims to be so large."""
    return png(width, height, 8, 2, b"IDAT")


def test_a_transparent_16_bit_value_is_compared_with_all_its_bits(tmp_path):
    row = b"\0" + struct.pack(">4H", 0x1234, 0x1235, 0x0012, 0xFFFF)
    chunks = b"tRNS" + struct.pack(">H", 0x1234), b"IDAT" + zlib.compress(row)
    (tmp_path / "key.png").write_bytes(png(4, 1, 16, 0, *chunks))
    image = open_picture(tmp_path / "key.png")
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [255, 0x12, 0, 255]


def test_the_cover_of_an_apng_is_not_a_frame(tmp_path):
    cover, *frames = (Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (9, 50, 100, 150))
    for name, first, rest, options in (
        ("covered.png", cover, frames, {"default_image": True}),
        ("plain.png", frames[0], frames[1:], {}),
    ):
        file = tmp_path / name
        first.save(file, save_all=True, append_images=rest, duration=100, **options)
        shown, fps = open_clip(file)
        assert [frame.getpixel((0, 0))[0] for frame in shown] == [50, 100, 150] and fps == 10


def test_every_frame_of_a_clip_is_held_to_pillows_limit(tmp_path, monkeypatch):
    small, large = Image.new("RGB", (9, 9), RED), Image.new("RGB", (90, 90), RED)
    small.save(tmp_path / "clip.tiff", save_all=True, append_images=[large, small])
    assert [frame.size for frame in open_clip(tmp_path / "clip.tiff")[0]] == [
        (9, 9),
        (90, 90),
        (9, 9),
    ]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="clip.tiff: frame 2 exceeds limit 1000"):
        open_clip(tmp_path / "clip.tiff")


def test_files_that_are_no_pictures_are_refused(tmp_path):
    good = tmp_path / "good.png"
    Image.effect_noise((64, 64), 50).save(good)
    cases = {
        "text.png": (b"hello", "is not a picture"),
        "empty.png": (b"", "is not a picture"),
        "cut.png": (good.read_bytes()[:-300], "cannot be read"),
        "zero.png": (png_header(0, 5), "zero.png"),
        "bomb.png": (png_header(30_000, 30_000), "exceeds limit"),
        "large.png": (png_header(10_000, 10_000), "exceeds limit"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            open_picture(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no picture"):
        open_picture(tmp_path / "missing.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", ""):
        with pytest.raises(FileNotFoundError, match="is not a regular file"):
            open_picture(tmp_path / name)
    Image.new("F", (5, 5)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floating-point pixels have no known range"):
        open_picture(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="must be a path or a Pillow image, got int"):
        open_picture(3)
    with pytest.raises(ValueError, match="must have pixels, got 0 x 5"):
        open_picture(Image.new("RGB", (0, 5)))


def test_pillows_own_limit_is_honoured(tmp_path, monkeypatch):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(ValueError, match="exceeds limit"):
        open_picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    open_picture(tmp_path / "a.png")


@pytest.mark.parametrize("family", ["llava", "nvila_hf", "longvila"])
def test_a_picture_too_narrow_to_pad_is_refused(family, monkeypatch):
    """Before the work: 1 x 60,000 pixels would take 10.8 GB."""
    processor = load_processor(ROOT / "tests" / "golden" / family)
    processor.pad, processor.shape = True, "pad"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300 - 1)
    for size in ((1, 300), (300, 1)):
        with pytest.raises(ValueError, match=" is too narrow: it would be padded to 300 x 300"):
            processor.views([Image.new("RGB", size)])
    processor.views([Image.new("RGB", (299, 299))])


def test_a_picture_too_narrow_to_resize_is_refused(processor):
    with pytest.raises(
        ValueError, match="1 x 9000 is too narrow: it would be resized to 160 x 1440"
    ):
        processor.pixels([Image.new("RGB", (1, 9000))])


def test_the_context_holds_as_many_placeholders_as_tokens(processor):
    one, two = processor.context([3]), processor.context([2, 0, 1])
    image = processor.image_token_id
    assert one.count(image) == 3 and two.count(image) == 3
    assert one[0] == two[0] == processor.tokenizer.token_to_id("<s>")
    assert processor.tokenizer.decode(one) == "user: "
    assert processor.tokenizer.decode(two) == "user: frame 1: \nframe 2: \nframe 3: "


SPECIAL = ["<image>", "</s>", "<s>", "<pad>", "<unk>"]


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("first", [True, False])
def test_special_tokens_in_a_question_are_text(processor, special, first):
    question = f"what is {special}{special} here?"
    ids = processor.question(question, first=first)
    added = {processor.tokenizer.token_to_id(token) for token in SPECIAL}
    own = [] if first else [processor.tokenizer.token_to_id("</s>")]  # the prompt's
    assert [i for i in ids if i in added] == own
    assert question in processor.decode(ids)


def test_braces_in_a_question_are_text(processor):
    assert "{image} {question} {n}" in processor.decode(
        processor.question("{image} {question} {n}", first=True)
    )


def llama_tokenizer():
    """A tokenizer built like Llama's: "▁" before every text, bytes for unknown characters, <s>
    first."""
    letters = ["▁", *"USER:ASITN\nhiwatxy?"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    table = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    tokenizer = Tokenizer(models.BPE(table, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


IMAGE_CONFIG = {"size": {"shortest_edge": 8}, "crop_size": 8}


def config_of(tokenizer):
    vision = VisionConfig(image_size=8, patch_size=4)
    return Config(vision, TextConfig(), image_token_id=tokenizer.token_to_id("<image>"))


def test_a_whole_prompt_is_tokenised_as_the_family_does():
    """Context and question together are the ids of the prompt encoded in one piece, as the public
    processor encodes it: special tokens split the text, and every piece gets its own "▁"."""
    tokenizer = llama_tokenizer()
    processor = Processor(tokenizer, config_of(tokenizer), IMAGE_CONFIG)
    ids = processor.context([1]) + processor.question("what?", first=True)
    assert ids == tokenizer.encode("USER: <image>\nwhat? ASSISTANT:").ids
    ids = processor.context([1, 1]) + processor.question("hi", first=True)
    assert ids == tokenizer.encode("USER: <image>\n<image>\nhi ASSISTANT:").ids
    more = processor.question("why", first=False)
    whole = tokenizer.encode("</s>USER: why ASSISTANT:", add_special_tokens=False).ids
    assert more == whole


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": {"height": 8, "width": 8}}, "size in preprocessor_config.json must be one edge"),
        ({"size": {"shortest_edge": -3}}, "got -3"),
        ({"size": {"shortest_edge": math.inf}}, "got inf"),
        ({"crop_size": {"height": 8, "width": 9}}, "crop_size in preprocessor_config.json"),
        ({"crop_size": None}, "crop_size .* got None"),
        ({"resample": 99}, "99"),
        ({"image_mean": [0.5]}, r"image_mean in .* must be 3 numbers, got \[0.5\]"),
        ({"image_std": "x"}, "image_std in .* must be 3 numbers"),
        ({"image_std": [1, 0, 1]}, "image_std in .* must be 3 numbers"),
        ({"image_mean": [10**400] * 3}, "image_mean in .* must be 3 numbers"),
        ({"crop_size": {"height": [8], "width": [8]}}, "crop_size in preprocessor_config.json"),
        ({"rescale_factor": 0}, "rescale_factor must be a positive number, got 0"),
    ],
)
def test_odd_picture_settings_are_refused(changes, message):
    tokenizer = llama_tokenizer()
    with pytest.raises(ValueError, match=message):
        Processor(tokenizer, config_of(tokenizer), IMAGE_CONFIG | changes)


def test_the_processor_makes_pictures_of_the_towers_size(tmp_path):
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        text = (TINY / name).read_text()
        text = re.sub('"(height|width)": 160', r'"\1": 128', text)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="crop_size must be the tower's image_size 160, got 128"):
        load_processor(tmp_path)
