"""Pictures of every kind to pixels, text to tokens."""

import json
import math
import os
import random
import re
import struct
import zlib
from itertools import accumulate

import pytest
import torch
from conftest import ROOT, TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from checkpoints import load_processor
from checkpoints.llava import Processor
from checkpoints.processor import (
    CLIP_MEAN,
    CLIP_STD,
    Clip,
    Pictures,
    TextStream,
    open_clip,
    open_picture,
)
from model import Config, TextConfig, VisionConfig

RED = (200, 30, 10)


@pytest.fixture
def processor(tiny):
    return tiny[1]


def test_pixels_are_resized_cut_and_normalised_as_clip_does(processor):
    """By hand for a picture whose resize is a plain doubling of one colour per half."""
    image = Image.new("RGB", (480, 240), RED)
    image.paste((10, 20, 250), (240, 0, 480, 240))
    pixels = processor.pixels([image])
    assert pixels.shape == (1, 3, 240, 240)
    for side, color in ((10, RED), (230, (10, 20, 250))):
        expected = [(c / 255 - m) / s for c, m, s in zip(color, CLIP_MEAN, CLIP_STD)]
        assert torch.allclose(pixels[0, :, 120, side], torch.tensor(expected), rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (240, 240), (241, 240), (7, 500), (3000, 2000), (500, 7)])
def test_pictures_of_any_shape_become_squares(processor, size):
    assert processor.pixels([Image.new("RGB", size, RED)]).shape == (1, 3, 240, 240)


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


def test_a_transparent_value_of_few_bits_is_scaled_like_the_pixels(tmp_path):
    for bits, values in (
        (1, [0, 1, 1, 0]),
        (2, [0, 1, 2, 3]),
        (4, [0, 5, 15, 3]),
        (8, [0, 5, 9, 7]),
    ):
        packed = int("".join(f"{v:0{bits}b}" for v in values), 2) << -4 * bits % 8
        row = b"\0" + packed.to_bytes(-(-4 * bits // 8), "big")
        chunks = b"tRNS" + struct.pack(">H", values[1]), b"IDAT" + zlib.compress(row)
        (tmp_path / "key.png").write_bytes(png(4, 1, bits, 0, *chunks))
        image = open_picture(tmp_path / "key.png")
        right = [255 if v == values[1] else round(255 * v / (2**bits - 1)) for v in values]
        assert [image.getpixel((x, 0))[0] for x in range(4)] == right
    row = b"\0" + struct.pack(">6H", *[0x1234] * 3, 0x1235, 0x1234, 0x1234)
    chunks = b"tRNS" + struct.pack(">3H", *[0x1234] * 3), b"IDAT" + zlib.compress(row)
    (tmp_path / "key.png").write_bytes(png(2, 1, 16, 2, *chunks))
    with pytest.raises(ValueError, match="a transparent colour of 16 bits a channel"):
        open_picture(tmp_path / "key.png")


def tiff(bits, photometric, data):
    """A TIFF file of two gray pixels, by hand."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, 1), (279, len(data))]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(data) + len(data) % 2)
    return start + data + b"\0" * (len(data) % 2) + struct.pack("<H", 9) + body + bytes(4)


@pytest.mark.parametrize("bits, data", [(16, b"\0\0\xff\xff"), (12, b"\0\x0f\xff"), (8, b"\0\xff")])
def test_a_tiff_says_how_bright_its_values_are(tmp_path, bits, data):
    for photometric, right in ((0, [255, 0]), (1, [0, 255])):  # 0: white is zero
        (tmp_path / "gray.tiff").write_bytes(tiff(bits, photometric, data))
        if (bits, photometric) == (12, 0):  # not even Pillow reads it
            with pytest.raises(ValueError, match="gray.tiff is not a picture"):
                open_picture(tmp_path / "gray.tiff")
            continue
        image = open_picture(tmp_path / "gray.tiff")
        assert [image.getpixel((x, 0))[0] for x in (0, 1)] == right


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
def test_a_damaged_picture_that_was_opened_before_is_refused(tmp_path, suffix):
    """Pillow raises only when it is read for the first time."""
    file = tmp_path / f"good.{suffix}"
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    noise.save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    for source in (file, Image.open(file)):
        with pytest.raises(ValueError, match="cannot be read"):
            open_picture(source)


def test_the_cover_of_an_apng_is_not_a_frame(tmp_path):
    cover, *frames = (Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (9, 50, 100, 150))
    for name, first, rest, options in (
        ("covered.png", cover, frames, {"default_image": True}),
        ("plain.png", frames[0], frames[1:], {}),
    ):
        file = tmp_path / name
        first.save(file, save_all=True, append_images=rest, duration=100, **options)
        clip = open_clip(file)
        assert [frame.getpixel((0, 0))[0] for frame in clip.frames] == [50, 100, 150]
        assert [clip.second(n) for n in range(3)] == [0, 0.1, 0.2] and clip.duration == 0.3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
@pytest.mark.parametrize("durations", [(10_000, 1000, 1000, 1000), (40, 40, 40, 40)])
def test_frames_come_when_the_file_says(tmp_path, suffix, durations):
    frames = [Image.new("RGB", (4, 4), (60 * n, 0, 0)) for n in range(4)]
    options = {"lossless": True} if suffix == "webp" else {}
    file = tmp_path / f"clip.{suffix}"
    frames[0].save(
        file, save_all=True, append_images=frames[1:], duration=list(durations), **options
    )
    clip, begins = open_clip(file), [0, *accumulate(durations)]
    assert [clip.second(n) for n in range(4)] == pytest.approx([b / 1000 for b in begins[:4]])
    assert clip.duration == pytest.approx(begins[4] / 1000)
    for number in (3, 0, 2, 1):  # in any order
        assert clip.frames[number].getpixel((0, 0)) == (60 * number, 0, 0)
    with pytest.raises(IndexError):
        clip.frames[4]
    # The families that choose frames choose by time: here one for every second, and the nearest.
    smolvlm2 = load_processor(ROOT / "tests" / "golden" / "smolvlm2")
    smolvlm2.clip_fps, smolvlm2.clip_frames = 1, 64
    shown = [view.second for view in smolvlm2.views(clip)]
    assert shown == ([0, 10, 11, 12] if durations[0] == 10_000 else [0])
    nvila = load_processor(ROOT / "tests" / "golden" / "nvila")
    shown = [view.second for view in nvila.views(clip)]  # of 0, 4, 8 and 12 s
    assert shown == pytest.approx(
        [0, 0, 10, 12] if durations[0] == 10_000 else [0, 0.04, 0.08, 0.12]
    )


def test_only_frames_that_are_shown_are_opened(tmp_path):
    """Of 240 frames 5 are decoded; of a folder the others need not even be pictures."""
    opened = []

    class Frames(list):
        def __getitem__(self, number):
            opened.append(number)
            return super().__getitem__(number)

    processor = load_processor(ROOT / "tests" / "golden" / "smolvlm2")
    frames = Frames([Image.new("RGB", (64, 36), (n, 0, 0)) for n in range(240)])
    views = processor.views(Clip.even(frames, 24.0))
    assert len(views) == 5 and opened == [round(view.second * 24) for view in views]
    files = [tmp_path / f"{n}.png" for n in range(240)]
    for number, file in enumerate(files):
        frames[number].save(file) if number in opened else file.write_bytes(b"not read")
    again = processor.views(Clip.even(Pictures(files), 24.0))
    assert all(
        a.picture.tobytes() == b.picture.tobytes() for a, b in zip(again, views, strict=True)
    )


def test_a_picture_that_needs_no_change_is_not_copied():
    picture = Image.new("RGB", (5, 5))
    assert open_picture(picture) is picture


def test_a_clip_has_a_limit_for_all_its_frames(tmp_path, monkeypatch):
    """Before any frame is decoded."""
    frames = [Image.new("L", (50, 50), n) for n in range(16)]
    file = tmp_path / "clip.gif"
    frames[0].save(file, save_all=True, append_images=frames[1:])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 50 * 50 // 8)
    assert len(open_clip(file).frames) == 16
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 50 * 50 // 8 - 1)
    monkeypatch.setattr(GifImageFile, "load", None)
    with pytest.raises(ValueError, match="clip.gif: 16 frames of 50 x 50 exceed limit 39992"):
        open_clip(file)


MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I;16 I;16L I;16B I;16N I F".split()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_read_or_refused_in_words(mode):
    picture = Image.new(mode, (3, 2))
    if mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"a picture of mode {mode}: .* have no known range"):
            open_picture(picture)
    else:
        assert open_picture(picture).mode == "RGB"


def test_16_bits_of_a_pgm_file(tmp_path):
    (tmp_path / "deep.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 0x1234, 0xFFFF))
    image = open_picture(tmp_path / "deep.pgm")
    assert [image.getpixel((x, 0))[0] for x in (0, 1)] == [0x12, 255]


def test_a_damaged_exif_block_is_no_matter(tmp_path, recwarn):
    """One byte of it wrong, each in turn: the picture is shown, turned or not, and nothing is said;
    and shown again when it was opened before."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), RED).save(tmp_path / "good.jpg", exif=exif)
    good = (tmp_path / "good.jpg").read_bytes()
    start = good.index(b"Exif")
    sizes = set()
    for place in range(start, start + 32):
        damaged = good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :]
        (tmp_path / "bad.jpg").write_bytes(damaged)
        sizes.add(open_picture(tmp_path / "bad.jpg").size)
        assert not recwarn.list
        with Image.open(tmp_path / "bad.jpg") as opened:
            opened.load()
            recwarn.clear()  # of this test's own call
            sizes.add(open_picture(opened).size)
        assert not recwarn.list
    assert sizes == {(20, 10), (10, 20)}


def test_programs_are_not_started_for_a_picture(tmp_path):
    """Pillow would ask Ghostscript for this one, whatever its name."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match="a.png is not a picture, or none of AVIF, BMP"):
        open_picture(tmp_path / "a.png")


def test_every_frame_of_a_clip_is_held_to_pillows_limit(tmp_path, monkeypatch):
    small, large = Image.new("RGB", (9, 9), RED), Image.new("RGB", (90, 90), RED)
    small.save(tmp_path / "clip.tiff", save_all=True, append_images=[large, small])
    assert [frame.size for frame in open_clip(tmp_path / "clip.tiff").frames] == [
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
        ValueError, match="1 x 9000 is too narrow: it would be resized to 240 x 2160000"
    ):
        processor.pixels([Image.new("RGB", (1, 9000))])


def test_the_context_holds_as_many_placeholders_as_tokens(processor):
    one, two = processor.context([3]), processor.context([2, 0, 1])
    image = processor.image_token_id
    assert one.count(image) == 3 and two.count(image) == 3
    assert one[0] == two[0] == processor.tokenizer.token_to_id("<s>")
    assert processor.tokenizer.decode(one) == "user: "
    assert processor.tokenizer.decode(two) == "user: page 1: \npage 2: \npage 3: "


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


@pytest.mark.parametrize("first", [True, False])
def test_tokens_of_the_prompt_are_text_in_a_question_whatever_the_file_calls_them(first):
    tokenizer = llama_tokenizer()
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    tokenizer = Tokenizer.from_str(json.dumps(content))
    ids = Processor(tokenizer, config_of(tokenizer), IMAGE_CONFIG).question(
        "what <image></s>?", first=first
    )
    added = tokenizer.token_to_id("<image>"), tokenizer.token_to_id("</s>")
    assert [i for i in ids if i in added] == ([] if first else [added[1]])


@pytest.mark.parametrize("text", ["hi   why", "hi  why", "what hat, hat", "that hats", "hat   hat"])
def test_added_words_stay_tokens_in_a_question(text):
    """Such as runs of spaces; against the tokenizers library, which encodes the prompt at once."""
    tokenizer = llama_tokenizer()
    tokenizer.add_tokens(["   ", AddedToken("hat", single_word=True)])
    processor = Processor(tokenizer, config_of(tokenizer), IMAGE_CONFIG)
    whole = tokenizer.encode(f"</s>USER: {text} ASSISTANT:", add_special_tokens=False).ids
    assert processor.question(text, first=False) == whole
    template = f"{{image}}{text}\n{{question}}{{answer}}</s>{text}{{question}} {text}"
    processor.set_template(template)
    whole = tokenizer.encode(f"</s>{text}why {text}", add_special_tokens=False).ids
    assert processor.question("why", first=False) == whole


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
        text = re.sub('"(height|width)": 240', r'"\1": 128', text)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="crop_size must be the tower's image_size 240, got 128"):
        load_processor(tmp_path)


@pytest.mark.parametrize("before, after", [("", ""), ("<s>", ""), ("<s>", "</s>"), ("", "</s>")])
@pytest.mark.parametrize("written", ["", "<s>", " <s>"])
def test_a_prompt_begins_with_one_begin_token_and_no_stop_token(before, after, written):
    """Whatever the tokenizer adds around a text, and whether or not the template writes <s>."""
    tokenizer = llama_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    template = written + "U{image}\n{question} A{answer}</s>U{question} A"
    processor = Processor(tokenizer, config_of(tokenizer), IMAGE_CONFIG, template)
    text = tokenizer.encode(written + "U", add_special_tokens=False).ids
    assert processor.context([0]) == ([1] if before and not written else []) + text


def test_a_stop_token_never_begins_a_prompt():
    tokenizer = llama_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    processor = Processor(tokenizer, config_of(tokenizer), IMAGE_CONFIG)
    assert 2 not in processor.context([0])


@given(st.binary(max_size=12), st.integers(0, 3))
def test_bytes_that_are_no_character_are_shown_as_python_shows_them(bad, cut):
    """Bytes within other text, such as an answer cut inside of a character; and as a stream."""
    processor = Processor(
        tokenizer := llama_tokenizer(), config_of(llama_tokenizer()), IMAGE_CONFIG
    )
    good = "世界".encode()
    content = good[: len(good) - cut] + bad
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in content]
    around = [tokenizer.token_to_id(c) for c in "hi"]
    expected = "hi" + content.decode(errors="replace")
    assert processor.decode(around + ids + around) == expected + "hi"
    shown = []
    stream = TextStream(processor, shown.append)
    for token in around + ids:
        stream.add(token)
    stream.finish()
    assert "".join(shown) == stream.text == processor.decode(around + ids) == expected
