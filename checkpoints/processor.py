"""Pictures to pixels, text to token ids: what families share.

    pictures --views--> views --pixels--> pixels of every view
    views, what was kept --layout--> token ids of the context, their positions
    question --question--> token ids                 token ids --decode--> text

`Processor` is the base of every family's own. It shows every picture whole, squeezed into a square,
and makes all text from one template, so that in text many families differ by a string alone.

Axes: S edge of a view, n visual tokens of a view, K kept of them, T tokens of the context.
"""

import json
import math
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, groupby
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import ExifTags, Image, ImageMath, ImageOps, UnidentifiedImageError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from model import Config

from . import values
from .values import Folder

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


class View(NamedTuple):
    """What the vision tower sees at once: a picture, or a tile of one."""

    picture: Image.Image  # S x S, unless the family says otherwise
    number: int = 0  # of the picture among all that are shown
    rows: int = 0  # of tiles in that picture; 0 if it is not cut
    columns: int = 0  # likewise
    row: int = 0  # of this tile, from 1; 0 if this is the whole picture
    column: int = 0  # likewise
    second: float | None = None  # of a frame: when it comes in its clip
    duration: float | None = None  # of the clip, in seconds
    original: tuple[int, int] | None = None  # size of the picture as given, if the family needs it
    second_picture: Image.Image | None = None  # of a pair of frames that are one view (Qwen)


class Layout(NamedTuple):
    """The prompt before the first question."""

    ids: list[int]  # a placeholder for every kept visual token
    positions: Tensor  # (T,) rotary positions of the ids, or (3, T) for M-RoPE
    next_position: int  # of the question


class Processor:
    """Pictures to pixels and text to token ids; the families' own are subclasses.

    Text from users is encoded by a tokenizer that knows no special tokens: "<image>" or "</s>" in a
    question is text, never a command. Added tokens that are not special stay what they are.

    A template is a conversation of two turns: {image} stands for all pictures, {question} for a
    question, {answer} for the generated text without its stop token. Special tokens are written as
    text.

    Args:
        tokenizer: of the family.
        config: of the model.
        settings: of preprocessor_config.json, and of config.json what the family keeps there.
        template, frame: in place of the family's.

    Raises: ValueError for settings, templates and tokenizers that do not fit.
    """

    # What a family sets: its prompt, and the defaults and spellings of its settings.
    template: str  # the family's prompt
    frame = "{image}"  # one of several pictures; {n} counts from 1
    default_resample, default_mean, default_std = 3, CLIP_MEAN, CLIP_STD  # 3: bicubic
    required_steps: tuple[str, ...] = ()  # settings that must be true, besides all families'
    size_key = "size"  # the setting that holds the edge of a view
    picture_tokens: list[str] = []  # special tokens that pictures need
    config_keys: tuple[str, ...] = ()  # of config.json, that belong to the settings
    end_of_view: tuple[int, ...] = ()  # token ids that follow the visual tokens of every view
    sampling: dict[str, Any] = {}  # how the checkpoint's authors draw tokens; not applied

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Config,
        settings: dict,
        template: str | None = None,
        frame: str | None = None,
    ):
        # 1. Text: the tokenizer, the prompt, and the special tokens that the prompt needs.
        self.config, self.image_token_id = config, config.image_token_id
        template = self.template if template is None else template
        of_prompt = re.findall(r"<[^<>\s]+>", f"{self.template}{template}")
        self._read_tokenizer(tokenizer, {*self.picture_tokens, *of_prompt})
        self.set_template(template)
        # (A template of the user's own may write other tokens.)
        for token in self.picture_tokens + (of_prompt if template is self.template else []):
            if token not in self._added:
                raise ValueError(
                    f"the tokenizer has no special token {token!r}, which the family's prompt needs"
                )
        self.frame = self.frame if frame is None else frame
        if not isinstance(self.frame, str) or self.frame.count("{image}") != 1:
            raise ValueError(f"the text of a frame must hold one {{image}}, got {frame!r}")

        # 2. Pictures: how they are resized and normalised; a step that is switched off is refused.
        for step in ("do_resize", "do_rescale", "do_normalize", *self.required_steps):
            values.switched_on(settings, step)
        self.resample = Image.Resampling(values.resample(settings, self.default_resample))
        self.rescale = values.number(settings, "rescale_factor", 1 / 255)
        self.mean = values.per_channel(settings, "image_mean", self.default_mean)
        self.std = values.per_channel(settings, "image_std", self.default_std)
        self.read_settings(settings)
        if self.image_size != config.vision.image_size:
            raise ValueError(
                f"{self.size_key} must be the tower's image_size {config.vision.image_size}, "
                f"got {self.image_size}"
            )

    @classmethod
    def from_folder(
        cls, folder: Folder, config: Config, template: str | None = None
    ) -> "Processor":
        """The processor of a checkpoint. A `prompt` object in config.json may hold `template` and
        `frame` as well. Raises: FileNotFoundError and ValueError, naming what was found."""
        texts = values.prompt_texts(folder) | ({} if template is None else {"template": template})
        settings = picture_settings(folder)
        settings |= {key: folder.config[key] for key in cls.config_keys if key in folder.config}
        try:
            tokenizer = read_tokenizer(folder, max(config.text.vocab, config.image_token_id + 1))
            made = cls(tokenizer, config, settings, **texts)
            made.sampling = values.sampling(folder)
            return made
        except ValueError as error:
            raise ValueError(f"{folder.path}: {error}") from None

    def read_settings(self, settings: dict) -> None:
        """The family's own settings, and `image_size`, the edge of a view."""
        self.image_size = values.edge(settings, self.size_key, {"height", "width"})

    # --- pictures

    def views(self, pictures: "Sequence[Image.Image] | Clip") -> list[View]:
        """What the model sees of upright RGB pictures, in order. Of a clip a family may take some
        of the frames; one that knows no clips takes all as pictures."""
        size = (self.image_size, self.image_size)
        return [
            View(picture.resize(size, self.resample), number)
            for number, picture in enumerate(pictures_of(pictures))
        ]

    def pixels(self, pictures: list[Image.Image] | list[View]) -> Tensor | list[Tensor]:
        """Pictures, or their views -> (pieces, 3, S, S) float32, scaled and normalised per channel;
        where pieces differ in size, one tensor for each."""
        views = pictures if isinstance(pictures[0], View) else self.views(pictures)
        pixels = [x for view in views for x in self.pixels_of(view)]
        return torch.stack(pixels) if len({p.shape for p in pixels}) == 1 else pixels

    def pixels_of(self, view: View) -> list[Tensor]:
        """The pixels of the pieces of a view, which the tower sees one by one; in most families it
        is one piece."""
        return [self._normalise(view.picture)]

    def join(self, views: list[View], rows: list[Tensor]) -> list[Tensor]:
        """Of every piece its rows of patches (T, ...) -> of every view its visual tokens (n, ...),
        in the order of the prompt."""
        return rows

    def _normalise(self, image: Image.Image) -> Tensor:
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        x = raw.view(image.height, image.width, 3).permute(2, 0, 1)
        return ((x.double() * self.rescale).float() - self.mean) / self.std

    def token_boxes(self, view: View, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
        """Where each visual token of a view lies in its picture, drawn width x height pixels large:
        left, top, right and bottom, all of them inside, in the order of the tokens."""
        vision = self.config.vision
        side, span = math.isqrt(vision.visual_tokens), vision.merge * vision.patch_size
        x, y = (
            [min(round(i * edge * span / vision.image_size), edge) for i in range(side + 1)]
            for edge in size
        )
        boxes = boxes_between(x, y)
        if vision.merge_by_columns:
            return [box for column in range(side) for box in boxes[column::side]]
        return boxes

    # --- text

    def layout(
        self, views: list[View], sizes: list[int], kept: list[Tensor], positions: str
    ) -> Layout:
        """The prompt before the first question, and its rotary positions.

        Args:
            views: what is seen.
            sizes: visual tokens of each view, n.
            kept: of each view, which of them (K,) stay, ascending.
            positions: "contiguous" numbers what stays from 0 on, as if the others had never been;
                "original" leaves gaps where tokens are missing, and text goes on where it would
                have.
        """
        ids = self.context(kept, views)
        if positions == "contiguous":
            return Layout(ids, torch.arange(len(ids), device="cpu"), len(ids))
        everything = torch.tensor(self.context(sizes, views), device="cpu")
        visual = (everything == self.image_token_id).nonzero()[:, 0]
        first = accumulate(sizes, initial=0)  # of each view among all visual tokens
        stays = torch.ones_like(everything, dtype=torch.bool)
        stays[visual] = False
        stays[visual[torch.cat([start + index for start, index in zip(first, kept)])]] = True
        return Layout(ids, stays.nonzero()[:, 0], len(everything))

    def context(
        self, kept: Sequence[Tensor] | Sequence[int], views: list[View] | None = None
    ) -> list[int]:
        """Token ids of everything up to the last picture, with `image_token_id` for every visual
        token.

        kept: of each view the visual tokens that stay, (K,) ascending; a number n for the first n.
        views: separate whole pictures if None.
        """
        return [i for part in self.parts(kept, views) for i in part]

    def parts(
        self, kept: Sequence[Tensor] | Sequence[int], views: list[View] | None = None
    ) -> list[list[int]]:
        """The token ids of `context`, apart: text, the first view, text, and so on."""
        views = _whole(len(kept)) if views is None else views
        # The text after the last picture belongs to the first question, see `question`.
        before, *after = (self._start + self._text(views)).split("{image}")
        ids = self._encode(before, start=True)
        begin = [i for i in self._begin_ids if i not in {*self.config.stop_ids, *self.stop_ids}]
        parts = [ids if {*begin} <= {*ids} else begin + ids]  # the template may have its own
        for view, stays, text in zip(views, kept, [*after[:-1], ""], strict=True):
            stays = torch.arange(stays, device="cpu") if isinstance(stays, Integral) else stays
            parts += [self.ids_of_view(view, stays), self._encode(text)]
        return parts

    def ids_of_view(self, view: View, kept: Tensor) -> list[int]:
        """Token ids that stand for a view of which the visual tokens `kept` (K,) stay."""
        return [self.image_token_id] * len(kept) + list(self.end_of_view)

    def question(self, text: str, *, first: bool, views: list[View] | None = None) -> list[int]:
        """Token ids of a question: `first` right after the context of these views (one whole
        picture if None), otherwise after an answer."""
        if not first:
            return self._encode(self._close + "{question}" + self._last, text)
        after = self._text(_whole(1) if views is None else views).split("{image}")[-1]
        return self._encode(after + self._lead + "{question}" + self._reply, text)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens and leading white space. Bytes that are no
        character become U+FFFD as in Python's errors="replace"."""
        whole: list[int] = []
        for is_byte, run in groupby(ids, self._bytes.__contains__):
            if is_byte:  # tokenizers gives up a whole run for one bad byte
                text = bytes(self._bytes[i] for i in run).decode(errors="replace")
                run = (self.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode())
            whole += run
        return self.tokenizer.decode(whole).lstrip()

    def _text(self, views: list[View]) -> str:
        """The text that stands for the views, {image} for each."""
        if len(views) == 1:
            return "{image}"
        frames = [self.frame.replace("{n}", str(n + 1)) for n in range(len(views))]
        return "\n".join(frames)

    def _read_tokenizer(self, tokenizer: Tokenizer, of_prompt: set[str]) -> None:
        """Keep the tokenizer, and copies of it that take special tokens, the image token and those
        of the prompt for text."""
        tokenizer.no_truncation()  # a checkpoint may carry its training's settings
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self._added = {t.content: t for t in tokenizer.get_added_tokens_decoder().values()}
        image = tokenizer.id_to_token(self.image_token_id)
        if image is not None and image not in self._added:
            raise ValueError(
                f"the image token must be a special one, got {self.image_token_id}: {image!r}"
            )
        content = json.loads(tokenizer.to_str())
        for token in content["added_tokens"]:  # others are words, such as runs of spaces
            token["special"] |= token["content"] in {image, *of_prompt}
        special = [token for token in content["added_tokens"] if token["special"]]
        special.sort(key=lambda token: -len(token["content"]))  # the longest first
        patterns = (
            rf"(?<!\w){text}(?!\w)" if token["single_word"] else text
            for token in special
            if (text := re.escape(token["content"]))
        )
        self._special = re.compile("|".join(patterns) or r"(?!)")
        plain = json.dumps(content | {"post_processor": None})
        inside = re.sub(r'("prepend_scheme": )"first"', r'\1"never"', plain)
        with _tokenizing("the tokenizer is damaged"):  # some mark the start of a text by a space
            self._plain_at_start, self._plain = map(Tokenizer.from_str, (plain, inside))
            self._plain_at_start.encode_special_tokens = True  # as text
            self._plain.encode_special_tokens = True
            text, marked = (tokenizer.encode("a", add_special_tokens=s).ids for s in (False, True))
        # What the tokenizer puts before any text: begin of text, where the family has it.
        starts = (n for n in range(len(marked)) if marked[n : n + len(text)] == text)
        self._begin_ids = marked[: next(starts, 0)]
        bytes_of = {tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        falls_back = '"ByteFallback"' in json.dumps(content["decoder"])
        self._bytes = bytes_of if falls_back and len(bytes_of) == 256 else {}

    def set_template(self, template: str) -> None:
        """Raises: ValueError for a template that is not a conversation of two turns."""
        parts = re.split(r"\{(image|question|answer)\}", template if type(template) is str else "")
        if parts[1::2] != ["image", "question", "answer", "question"]:
            raise ValueError(
                "a prompt template must hold {image}, {question}, {answer} and {question}, in this "
                f"order, each once, got {template!r}"
            )
        image = self.tokenizer.id_to_token(self.image_token_id)
        if image and image in template:
            raise ValueError(f"a prompt template must not hold {image!r}, got {template!r}")
        # _start{image}_lead{question}_reply{answer}_close{question}_last
        self._start, self._lead, self._reply, self._close, self._last = parts[::2]
        # The special token that closes a turn ends an answer, whatever the files call the end; in
        # the family's own template as well, for so the model was trained.
        closes = (t.partition("{answer}")[2].lstrip() for t in (template, self.template))
        closing = filter(None, map(self._special.match, closes))
        self.stop_ids = tuple(
            dict.fromkeys(self.tokenizer.token_to_id(match.group()) for match in closing)
        )

    def _encode(self, template: str, question: str = "", *, start: bool = False) -> list[int]:
        """Ids of a template: its own special tokens are commands, everything in the question is
        text. start: nothing comes before it."""
        ids: list[int] = []
        position, before = 0, None  # the special token before the text
        for match in [*self._special.finditer(template), None]:
            text = template[position : match.start() if match else None]
            text = text.replace("{question}", question)
            after = match and self._added[match.group()]
            text = text.lstrip() if before and before.rstrip else text  # some swallow white space
            text = text.rstrip() if after and after.lstrip else text
            if text:
                plain = self._plain_at_start if start and position == 0 else self._plain
                with _tokenizing(f"text that cannot be tokenized: {_short(text)}"):
                    ids += plain.encode(text, add_special_tokens=False).ids
            if match:
                ids.append(self.tokenizer.token_to_id(match.group()))
                position, before = match.end(), after
        return ids


def _whole(count: int) -> list[View]:
    return [View(None, number) for number in range(count)]


class TextStream:
    """Turns tokens into text as they come; holds back what may be the first bytes of a character.

    on_text: called with every new piece; the pieces together are `text`.
    """

    def __init__(self, processor: Processor, on_text: Callable[[str], None] | None):
        self.processor, self.on_text = processor, on_text
        self.ids: list[int] = []
        self.text = ""

    def add(self, token: int) -> None:
        """The next token."""
        self.ids.append(token)
        self._emit(self.processor.decode(self.ids).rstrip("\ufffd"))

    def finish(self) -> None:
        """No more tokens will come."""
        self._emit(self.processor.decode(self.ids))

    def _emit(self, text: str) -> None:
        piece = text[len(self.text) :]
        self.text += piece
        if piece and self.on_text:
            self.on_text(piece)


# --- opening pictures -----------------------------------------------------------------------------


class Pictures(Sequence):
    """Pictures that are opened when they are asked for, so that few of them are in memory at once.

    sources: paths or Pillow images, see `open_picture`.
    """

    def __init__(self, sources: Sequence[str | Path | Image.Image]):
        self.sources = sources

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, number: int) -> Image.Image:
        return open_picture(self.sources[number])


@dataclass(frozen=True)
class Clip:
    """The frames of a clip and when they come: frame n from tick begins[n] on, the last one until
    tick `end`; `rate` ticks are a second."""

    frames: Sequence[Image.Image]
    begins: Sequence[float]  # ascending
    end: float
    rate: float

    def __post_init__(self):
        if not isinstance(self.frames, (Pictures, Animation)):  # paths, or pictures of any mode
            object.__setattr__(self, "frames", Pictures(self.frames))

    @classmethod
    def even(cls, frames: Sequence[Image.Image], fps: float) -> "Clip":
        """Frames of equal length, `fps` of them in a second."""
        return cls(frames, range(len(frames)), len(frames), fps)

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.end / self.rate

    def second(self, number: int) -> float:
        """When frame `number` comes."""
        return self.begins[number] / self.rate

    def place(self, tick: float) -> float:
        """What is shown at a tick: 2.5 is the middle of frame 2, wherever the others begin."""
        number = bisect_right(self.begins, tick) - 1
        begin, after = self.begins[number], [*self.begins[number + 1 : number + 2], self.end][0]
        return number + (tick - begin) / ((after - begin) or 1)


def pictures_of(pictures: Sequence[Image.Image] | Clip) -> Sequence[Image.Image]:
    """The frames of a clip, or the pictures themselves."""
    return pictures.frames if isinstance(pictures, Clip) else pictures


class Animation(Sequence):
    """The frames of an animated file, decoded one by one as they are asked for.

    durations: milliseconds, 0 where the file does not say. Raises: like `open_picture`; for more
    than `MOST_PICTURES` times Pillow's limit of pixels, all frames together, before any is decoded.
    """

    def __init__(self, path: str | Path):
        _check_file(path)
        self.path, self.durations = path, []
        with _readable(path):
            self.file = _open(path)
            cover = bool(self.file.info.get("default_image"))  # an APNG's, not part of the clip
            self.first, limit = int(cover), Image.MAX_IMAGE_PIXELS
            count = getattr(self.file, "n_frames", 1) - self.first
            if limit and count * self.file.width * self.file.height > MOST_PICTURES * limit:
                raise Image.DecompressionBombError(
                    f"{count} frames of {self.file.width} x {self.file.height} exceed limit "
                    f"{MOST_PICTURES * limit}"
                )
            for number in range(count):
                self._seek(number)
                self.durations.append(self.file.info.get("duration", 0))

    def _seek(self, number: int) -> None:
        if self.first + number < self.file.tell():  # Pillow's way back fails for some APNGs
            self.file = _open(self.path)
        self.file.seek(self.first + number)
        limit = Image.MAX_IMAGE_PIXELS  # Pillow itself checks the first frame only
        if limit and self.file.width * self.file.height > limit:
            raise Image.DecompressionBombError(f"frame {number + 1} exceeds limit {limit}")
        self.file.load()  # WebP knows the duration only now

    def __len__(self) -> int:
        return len(self.durations)

    def __getitem__(self, number: int) -> Image.Image:
        number = range(len(self))[number]
        with _readable(self.path):
            self._seek(number)
            return _upright_rgb(self.file.copy())


MOST_PICTURES = 8  # the pixels of a whole clip, in pictures of Pillow's limit
# Pillow reads more, some of it by starting other programs.
FORMATS = "AVIF BMP GIF ICO JPEG JPEG2000 PNG PPM TGA TIFF WEBP".split()


def open_picture(source: str | Path | Image.Image) -> Image.Image:
    """A picture as upright 8-bit RGB: a path, or a Pillow image of any mode, which is returned as
    it is if it is that already.

    Transparent parts become white, 16-bit values lose their low byte, EXIF rotation is applied.
    Raises: ValueError or OSError for what is not one of `FORMATS`, for a damaged or an empty
    picture, for pixels whose range is not in the file (floating-point, 32-bit integers), and for a
    file with more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    if isinstance(source, Image.Image):
        with _readable(f"a picture of mode {source.mode}"):
            return _upright_rgb(source)
    _check_file(source)
    with _readable(source), _open(source) as image:
        return _upright_rgb(image)


def open_clip(path: str | Path) -> Clip:
    """The frames of an animated picture and their times; one a second if the file does not say.
    Raises: like `open_picture` and `Animation`."""
    frames = Animation(path)
    *begins, end = accumulate(frames.durations, initial=0)
    if end == 0:
        return Clip.even(frames, 1.0)
    if len(set(frames.durations)) == 1:
        return Clip.even(frames, 1000 * len(frames) / end)
    return Clip(frames, begins, end, 1000)


def _check_file(path: str | Path) -> None:
    if not isinstance(path, (str, Path)):
        raise ValueError(f"a picture must be a path or a Pillow image, got {type(path).__name__}")
    if not Path(path).is_file():  # a pipe would be waited for
        found = f"{path} is not a regular file" if Path(path).exists() else f"no picture {path}"
        raise FileNotFoundError(found)


def _open(path: str | Path) -> Image.Image:
    """A file whose header has been read."""
    Image.init()
    return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])


class _Refused(ValueError):
    """Pillow can read it, we do not."""


@contextmanager
def _readable(what: str | Path) -> Iterator[None]:
    """Within, anything that Pillow raises becomes one clear error about `what`; its warnings are
    not shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, _Refused) as error:
        raise ValueError(f"{what}: {error}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{what} is not a picture, or none of {', '.join(FORMATS)}") from None
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise ValueError(f"{what} cannot be read: {error!r}") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Raises: ValueError, and whatever Pillow raises."""
    if 0 in image.size:
        raise _Refused(f"a picture must have pixels, got {image.width} x {image.height}")
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise _Refused(f"{kind} pixels have no known range, convert them to 8 bits")
    stored = image.tile[0][3] if getattr(image, "tile", None) else None  # how: gone once it is read
    image.load()  # damage shows now; read again, the picture would pass for whole
    clear, tags = image.info.get("transparency"), getattr(image, "tag_v2", {})  # tags: TIFF's
    if stored == "RGB;16B" and clear is not None:
        raise _Refused("a transparent colour of 16 bits a channel is not read, convert to 8 bits")
    if stored in ("L;2", "L;4") and isinstance(clear, int):  # unlike the pixels not scaled
        image = image.copy()
        image.info["transparency"] = clear * (85 if stored == "L;2" else 17)
    with suppress(Exception):  # a damaged Exif block, of which Pillow may raise anything
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, in a 16- or 32-bit container
        wide, bits = image.convert("I"), tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
        image = wide.point(lambda value: value * 2.0 ** (8 - bits)).convert("L")
        image.info.clear()
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
            image = ImageOps.invert(image)
        if clear is not None:  # one 16-bit value means transparent
            mask = ImageMath.lambda_eval(lambda of: (of["wide"] == clear) * 255, wide=wide)
            image.paste(255, mask=mask.convert("L"))
    if image.mode == "La":  # gray, multiplied by its opacity
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


# --- what families do to pictures -----------------------------------------------------------------


def resized(picture: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Raises: ValueError for a size beyond Pillow's limit."""
    _check_size(picture, size, "resized")
    return picture.resize(size, resample)


def pad_to_square(picture: Image.Image, mean: Tensor) -> Image.Image:
    """The picture in the middle of a square of the mean colour (original LLaVA). Raises: ValueError
    for a size beyond Pillow's limit."""
    edge = max(picture.size)
    _check_size(picture, (edge, edge), "padded")
    square = Image.new("RGB", (edge, edge), tuple(int(255 * m) for m in mean.flatten().double()))
    square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return square


def _check_size(picture: Image.Image, size: tuple[int, int], verb: str) -> None:
    """A narrow picture would explode: 1 x 60,000 pixels, padded, are 10.8 GB."""
    if Image.MAX_IMAGE_PIXELS and math.prod(size) > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"a picture of {picture.width} x {picture.height} is too narrow: "
            f"it would be {verb} to {size[0]} x {size[1]}"
        )


def boxes_between(x: list[int], y: list[int]) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of the boxes between these edges, row by row."""
    return [(a, top, b - 1, end - 1) for top, end in zip(y, y[1:]) for a, b in zip(x, x[1:])]


def tiles(picture: Image.Image, edge: int, number: int) -> list[View]:
    """A picture of whole tiles cut into them, row by row."""
    rows, columns = picture.height // edge, picture.width // edge
    return [
        View(
            picture.crop((column * edge, row * edge, (column + 1) * edge, (row + 1) * edge)),
            number, rows, columns, row + 1, column + 1,
        )
        for row in range(rows)
        for column in range(columns)
    ]  # fmt: skip


def evenly_spaced(first: int, last: int, count: int) -> list[float]:
    """`count` numbers from first to last, evenly spaced, rounded as numpy.linspace rounds them."""
    step = (last - first) / max(count - 1, 1)
    return [first + step * number for number in range(count - 1)] + [last if count > 1 else first]


# --- files ----------------------------------------------------------------------------------------


def picture_settings(folder: Folder) -> dict:
    """The settings for pictures, and under "video_processor" those for clips, where they stand
    apart: of the sections of processor_config.json or else of a file each, as in transformers."""
    newer = folder.read("processor_config.json")
    images, clips = (
        [section for raw in newer if isinstance(section := raw.get(name), dict)] + folder.read(file)
        for name, file in (
            ("image_processor", "preprocessor_config.json"),
            ("video_processor", "video_preprocessor_config.json"),
        )
    )
    if not images:
        raise FileNotFoundError(f"no preprocessor_config.json in {folder.path}")
    return images[0] | ({"video_processor": clips[0]} if clips else {})


def read_tokenizer(folder: Folder, reach: int = 2**20) -> Tokenizer:
    """tokenizer.json of a checkpoint, or what vocab.json, merges.txt and added_tokens.json of Qwen2
    say. reach: how many ids the model knows; some tokenizers have a few more. Raises:
    FileNotFoundError without either; ValueError for damaged files."""
    parts = [folder.path / part for part in dict.fromkeys(("", *folder.parts))]
    for part in parts:
        if (part / "tokenizer.json").is_file():
            build, file = Tokenizer.from_file, part / "tokenizer.json"
            raw = values.read_json(file)
            break
        if (part / "vocab.json").is_file() and (part / "merges.txt").is_file():
            build, file = _qwen2_tokenizer, part / "vocab.json"
            raw = {"model": {"vocab": values.read_json(file)}}
            break
    else:
        found = [str(p.relative_to(folder.path)) for part in parts for p in part.glob("*.model")]
        hint = f" (only {found[0]}, which transformers can convert)" if found else ""
        raise FileNotFoundError(f"no tokenizer.json in {folder.path}{hint}")
    check_tokenizer(file, raw, reach + SPARE_IDS)
    with _tokenizing(f"{file} is damaged"):
        tokenizer = build(str(file))
    for token in raw.get("added_tokens") or []:  # a gap, or the vocabulary has it elsewhere
        if (number := tokenizer.token_to_id(token["content"])) != token["id"]:
            raise ValueError(
                f"{file}: {token['content']!r} is {token['id']} there, becomes {number}"
            )
    return tokenizer


SPARE_IDS = 2**16  # of a tokenizer, beyond those that the model knows
REPEATED = r"(?:[+*]|\{\d*,\})"
NESTED = re.compile(rf"\((?:[^()\\]|\\.)*{REPEATED}(?:[^()\\]|\\.)*\){REPEATED}")  # as in (a+)+
MOST_GROWTH = 64  # of a text, by a tokenizer's normalizers or its decoders


def check_tokenizer(file: Path, raw: dict, most: int) -> None:
    """Raise ValueError for the content of a tokenizer.json that the tokenizers library would answer
    with gigabytes of memory or with a panic: ids of `most` or more, two tokens of one id, texts
    that grow, repetitions that are repeated, and merges without the prefix that they need."""
    model = raw.get("model") if isinstance(raw.get("model"), dict) else {}
    ids = dict(model["vocab"]) if isinstance(model.get("vocab"), dict) else {}
    added = raw.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"{file} is damaged: added_tokens must be a list of objects")
    ids |= {str(token.get("content")): token.get("id") for token in added}
    token_of: dict[int, str] = {}
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number < most:
            raise ValueError(f"{file}: the id of {token!r} must be in [0, {most}), got {number!r}")
        if number in token_of:
            raise ValueError(
                f"{file}: {token_of[number]!r} and {token!r} have the same id {number}"
            )
        token_of[number] = token
    for kind in ("normalizer", "decoder"):
        growth = 1.0
        for step in _objects(raw.get(kind)):
            if step.get("type") == "Replace":
                growth *= _growth(step.get("pattern"), len(str(step.get("content"))))
        if growth > MOST_GROWTH:
            raise ValueError(f"{file}: its {kind}s make texts up to {growth:.3g} times as long")
    for pattern in (part["Regex"] for part in _objects(raw) if isinstance(part.get("Regex"), str)):
        if len(pattern) > 10_000 or NESTED.search(pattern):
            raise ValueError(f"{file}: the regex {_short(pattern)} may take forever")
    if model.get("dropout"):
        raise ValueError(f"{file}: dropout {model['dropout']} would cut the same text differently")
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if isinstance(prefix, str) and prefix and isinstance(merges, list):
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in merges)
        if not all(isinstance(p, list) and str(p[-1]).startswith(prefix) for p in pairs):
            raise ValueError(f"{file}: a merge lacks continuing_subword_prefix {prefix!r}")


def _objects(raw: Any) -> Iterator[dict]:
    """All objects of a JSON value, however nested."""
    waiting = [raw]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _growth(pattern: Any, content: int) -> float:
    """How many times as long a text can become where `content` characters replace a pattern."""
    pattern = pattern if isinstance(pattern, dict) else {}
    if text := str(pattern.get("String") or ""):
        return max(1, content / len(text))
    with suppress(re.error):  # what may be empty is found before every character
        if all(match.group() for match in re.finditer(str(pattern.get("Regex") or ""), "a 1_\n")):
            return max(1, content)
    return 1 + content


@contextmanager
def _tokenizing(what: str) -> Iterator[None]:
    """Within, whatever the tokenizers library raises becomes one clear error: bare Exception, and
    its own PanicException, which is none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {error}") from None


def _short(text: str) -> str:
    return repr(text) if len(text) < 200 else f"{text[:200]!r} ..."


def _qwen2_tokenizer(vocab: str) -> Tokenizer:
    """Byte-level BPE with Qwen2's rule for splitting text, and special tokens with the ids that
    added_tokens.json gives them."""
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    folder = Path(vocab).parent
    tokenizer = Tokenizer(models.BPE.from_file(vocab, str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, number in sorted(_added_tokens(folder).items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([token])
        if tokenizer.token_to_id(token) != number:
            raise ValueError(f"the added tokens leave a gap before {token!r}, {number}")
    return tokenizer


def _added_tokens(folder: Path) -> dict[str, int]:
    """Special tokens and their ids, from added_tokens.json or else tokenizer_config.json."""
    added, settings = folder / "added_tokens.json", folder / "tokenizer_config.json"
    if added.exists():
        tokens = values.read_json(added)
    elif settings.exists():
        listed = values.read_json(settings).get("added_tokens_decoder", {})
        tokens = {entry["content"]: int(number) for number, entry in listed.items()}
    else:
        tokens = {}
    if not all(type(number) is int for number in tokens.values()):
        raise ValueError(f"the ids of added tokens must be integers, got {tokens}")
    return tokens
