"""Train the tiny VLM of this folder from scratch: `python tiny/train.py`.

Everything that is known of a place on a page has a *code*, a vector of the decoder's width: the 38
characters, the lines, the places within a word, the letters that a name begins with or holds, the
pages of a clip. All codes are orthogonal. Two stages, each step's data made on the fly from (seed,
stage, step), so that an interrupted run goes on where its last state was saved and ends with the
same model:

1. *Tower and projector.* The visual token of a patch becomes the sum of the codes of what it shows:
   its character, its line, its place in its word, and the letters of that line's name, which other
   patches show: as in large towers, a token tells of its surroundings. The class token learns how
   often each character occurs, which makes it look at all ink; SparseVILA's salience reads that.
2. *Decoder.* The tower is frozen. Embeddings start as sums of codes as well, and attention starts
   with one look-up: the end of a question looks for what was asked, then for tokens of its codes. A
   patch looks for the number of its page, the highest before it, and what finds nothing for <s>.
   Sixteen questions a page, hidden from each other as in the evaluation protocol; from
   `SIMPLE_STEPS` on also conversations, and clips of two to four pages. Visual tokens have random,
   ascending positions (Ruoss et al., arXiv 2305.16843) with gaps of any size between them, and most
   of a head hardly turns with RoPE, so that place is read from features.
   Beside the answer's tokens, the end of a question is asked for more, by heads that are thrown
   away: for the line, and, in every layer but the first, for the set of characters that the
   answer has, by what this layer's attention brought alone. So a question looks at all that its
   answer needs, as it does in large models, and not just at the answer's first character.

Nothing is ever pruned, dropped, masked or packed in training: the method is training-free.
The result is a checkpoint in the folder layout of LLaVA-1.5, which `transformers` loads as well.
"""

import argparse
import functools
import itertools
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from checkpoints import llava, load_processor  # noqa: E402
from checkpoints.processor import CLIP_MEAN, CLIP_STD, Processor  # noqa: E402
from checkpoints.weights import hub_names, translate  # noqa: E402
from model import VLM, Config, TextConfig, VisionBlock, VisionConfig  # noqa: E402
from tiny.scenes import (  # noqa: E402
    ALL_WORDINGS,
    CELL,
    CHARACTERS,
    FIRST_ROW,
    FONTS,
    GRID,
    LINE_PITCH,
    LINES,
    LONGEST_TITLE,
    LONGEST_VALUE,
    PAGES,
    SIDE,
    TITLE_ROW,
    Page,
    kinds_of,
    make_scene,
    question_and_answer,
    render,
)

TOWER_STEPS, TOWER_BATCH, TOWER_RATE = 2400, 16, 2.5e-3
DECODER_STEPS, DECODER_BATCH, DECODER_RATE = 4600, 4, 2e-3
SIMPLE_STEPS = 700  # of the decoder: single pages, every question by itself
QUESTIONS = 16  # per scene
CLIP_SHARE, CLIP_PAGES = 0.35, (2, 4)
CONVERSATION_SHARE = 0.35
SHARES = {"value": 34, "name": 26, "line": 20, "title": 12, "list": 4, "total": 4, "page": 40}
FIRST_HELPED = 1  # the layer from which on attention is asked for the answer's characters
E = 128  # the decoder's width
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
STATE = HERE / "training_state.pt"  # deleted when the model is finished
SAVE_EVERY = 100  # steps


# --- tokenizer ------------------------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """The words of the questions are tokens, and so are "line 3" and "page 2"; everything else
    falls into characters, the first of a word with the space before it, or into bytes."""
    words = set(re.findall("[a-z]+", " ".join(ALL_WORDINGS))) | {"user", "assistant"}
    letters = CHARACTERS[:36]  # and digits; Ġ is a space
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"Ġ{x}" for x in letters)]
    pieces += sorted(f"{space}{word}" for word in words for space in ("", "Ġ"))
    pieces += [f"ĠlineĠ{n}" for n in range(1, LINES + 1)]
    pieces += [f"{space}pageĠ{n}" for n in range(1, PAGES + 1) for space in ("", "Ġ")]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("Ġ", x) for x in letters]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.Lowercase()
    split = Regex(r" line [0-9]| ?page [0-9]| ?[a-z]+| ?[0-9]+|\n| ?[^\sa-z0-9]|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


# --- data -----------------------------------------------------------------------------------------


@functools.cache
def training_fonts() -> list[tuple[str | None, int]]:
    """Pillow's font, and those that come with matplotlib, in sizes that fit a cell."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    others = {
        "DejaVuSans": (11, 12), "DejaVuSans-Bold": (10,), "DejaVuSansMono": (13,),
        "DejaVuSansMono-Bold": (13,), "DejaVuSerif": (10, 11), "STIXGeneral": (12,),
        "STIXGeneralBol": (12,), "cmtt10": (13,),
    }  # fmt: skip
    return FONTS + [
        (str(folder / f"{n}.ttf"), size) for n, sizes in others.items() for size in sizes
    ]


def normalise(pictures: Tensor) -> Tensor:
    """(pages, 3, S, S) uint8 -> pixels as the Processor makes them."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    return (pictures.float() / 255 - mean) / std


# What a patch is labelled with, and how many values there are.
LABELS = {
    "character": len(CHARACTERS),
    "line": LINES + 1,  # 0: the title
    "slot": LONGEST_TITLE + LONGEST_VALUE,  # its place in a title or name, or in a value
    "first": 26 + 1,  # the first letter of the line's name; the last: none, a title
}
TITLE = 26
# What a token does: idle attention rests on it; it is asked for; it looks for that; it is a patch
# with ink or, with a minus, anything else; it is the number of a page.
ROLES = ("sink", "ask", "look", "ink", "mark")


def patch_labels(page: Page) -> tuple[Tensor, Tensor, Tensor]:
    """Of every patch of a page: the labels (400, 4) int64, the letters of its line's name (400, 26)
    in {0, 1}, and whether it has ink (400,). Without ink, only its line means something, and is -1
    between lines."""
    labels, letters = torch.zeros(GRID, GRID, 4, dtype=torch.int64), torch.zeros(GRID, GRID, 26)
    ink = torch.zeros(GRID, GRID, dtype=torch.bool)
    labels[..., 1] = -1
    labels[TITLE_ROW, :, 1] = 0
    for line in range(1, LINES + 1):
        labels[FIRST_ROW + LINE_PITCH * (line - 1), :, 1] = line
    for row, column, character, line, field, slot in page.cells():
        name = page.lines[line - 1].name if line else ""
        slot += LONGEST_TITLE * (field == "value")
        first = CHARACTERS.index(name[0]) if name else TITLE
        labels[row, column] = torch.tensor([CHARACTERS.index(character), line, slot, first])
        letters[row, column, [CHARACTERS.index(letter) for letter in name]] = 1
        ink[row, column] = True
    return labels.flatten(0, 1), letters.flatten(0, 1), ink.flatten()


def draw_turns(scene: list[Page], rng: random.Random) -> list[tuple[str, str, int | None]]:
    """Questions about a scene, their answers, and the line that they are about, if it is one."""
    kinds, turns = kinds_of(scene), []
    for kind in rng.choices(kinds, [SHARES[kind] for kind in kinds], k=QUESTIONS):
        page = rng.choice(scene)
        line = rng.choice(page.lines)
        wording = rng.choice([0, 0, 1, 2])
        question, answer = question_and_answer(kind, scene, rng, line, wording)
        question = question.rstrip("?") if rng.random() < 0.15 else question
        about = {"title": 0, "total": len(page.lines), "list": None}
        turns.append((question, answer, about.get(kind, page.lines.index(line) + 1)))
    return turns


class Writer:
    """Scenes and turns to training sequences, with the processor's own prompts."""

    def __init__(self, processor: Processor):
        tokenizer, self.processor = processor.tokenizer, processor
        self.stop = tokenizer.token_to_id("</s>")
        self.end = {tokenizer.token_to_id(word) for word in ("?", "Ġassistant", ":")}
        self.question = functools.lru_cache(100_000)(processor.question)
        self.answer = functools.lru_cache(100_000)(
            lambda text: tokenizer.encode(" " + text, add_special_tokens=False).ids
        )

    def write(
        self, pages: int, turns: list, isolated: bool, rng: random.Random
    ) -> list[tuple[int, ...]]:
        """One sequence as (token id, position, turn, is it to be predicted, mark): turn 0 is the
        context, the mark of a row at a question's end is 2 plus its line, 1 without one, else 0."""
        context = self.processor.context([GRID**2] * pages)
        positions = list(range(len(context)))
        if rng.random() < 0.7:
            positions = random_positions(len(context), rng)
        rows = [(token, position, 0, False, 0) for token, position in zip(context, positions)]
        after = positions[-1] + 1
        for turn, (question, answer, line) in enumerate(turns, 1):
            first = isolated or turn == 1
            asked, answered = self.question(question, first=first), self.answer(answer)
            start = after if isolated else rows[-1][1] + 1
            mark = 1 if line is None else 2 + line
            marks = [mark if token in self.end else 0 for token in asked[-3:]]
            tokens = [(token, False, 0) for token in asked[:-3]]
            tokens += [(token, False, mark) for token, mark in zip(asked[-3:], marks)]
            tokens += [(token, True, 0) for token in answered]
            if isolated or turn == len(turns):
                tokens.append((self.stop, True, 0))
            if not first:  # the stop token that opens a later prompt ends the answer before it
                tokens[0] = (tokens[0][0], True, 0)
            rows += [(token, start + i, turn, *rest) for i, (token, *rest) in enumerate(tokens)]
        return rows


def random_positions(count: int, rng: random.Random) -> list[int]:
    """Ascending from 0, some of them equal; the gaps between them differ by orders of magnitude."""
    spread = rng.uniform(0, 2.5)
    ends = list(itertools.accumulate(rng.lognormvariate(0, spread) for _ in range(count)))
    span = rng.uniform(0.25, 1) * count / ends[-1]
    return [int(span * (end - ends[0])) for end in ends]


def make_batch(writer: Writer, seed: int, step: int) -> tuple[Tensor, Tensor, bool]:
    """Pictures (B * pages, 3, S, S) uint8, rows (B, T, 5) int64 as `Writer.write` gives them,
    isolated."""
    rng = random.Random(f"train {seed} decoder {step}")
    simple = step < SIMPLE_STEPS
    clip = rng.random() < CLIP_SHARE and not simple
    isolated = rng.random() >= CONVERSATION_SHARE or simple
    pages, batch = (rng.randint(*CLIP_PAGES), 1) if clip else (1, DECODER_BATCH)
    scenes = [make_scene(rng, pages) for _ in range(batch)]
    pictures = torch.cat([render(scene, rng, training_fonts()) for scene in scenes])
    turns = [
        draw_turns(scene, rng)[: QUESTIONS if isolated else QUESTIONS // 2] for scene in scenes
    ]
    sequences = [writer.write(pages, each, isolated, rng) for each in turns]
    longest = max(map(len, sequences))
    padding = (0, 0, QUESTIONS + 1, False, 0)
    rows = [sequence + [padding] * (longest - len(sequence)) for sequence in sequences]
    return pictures, torch.tensor(rows), isolated


# --- stage 1: tower and projector -----------------------------------------------------------------


def make_codes() -> dict[str, Tensor]:
    """Orthogonal vectors of length sqrt(E): a table (values, E) for every label and for the letters
    in a name and for pages, and one for each of the ROLES."""
    roles = dict.fromkeys(ROLES, 1)
    sizes = LABELS | {"letters": 26} | roles | {"page": PAGES}
    vectors = torch.linalg.qr(torch.randn(E, E))[0] * E**0.5
    codes = dict(zip(sizes, vectors[: sum(sizes.values())].split(list(sizes.values()))))
    return codes | {name: codes[name][0] for name in ROLES}


def meaning(codes: dict[str, Tensor], labels: Tensor, letters: Tensor, ink: Tensor) -> Tensor:
    """What the visual tokens (..., E) of labelled patches shall be."""
    line = labels[..., 1]
    blank = 0.35 * codes["sink"] - codes["ink"]
    written = 0.8 * codes["sink"] + codes["ink"] + letters @ codes["letters"] / 2
    for name, label in zip(LABELS, labels.unbind(-1)):
        if name != "line":
            written = written + codes[name][label]
    place = 0.7 * codes["line"][line] * (line >= 0)[..., None]
    return place + torch.where(ink[..., None], written, blank)


class Heads(nn.Module):
    """What the class token is asked while the tower is trained; only `post_layernorm` is kept."""

    def __init__(self, width: int):
        super().__init__()
        self.post_layernorm = nn.LayerNorm(width, 1e-5)
        self.counts = nn.Linear(width, len(CHARACTERS))


def class_token(block: VisionBlock, x: Tensor) -> Tensor:
    """block(x)[:, 0] (B, C), without the work for all other rows."""
    attention, y = block.self_attn, block.layer_norm1(x)
    q, k, v = (
        projection(rows).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for projection, rows in (
            (attention.q_proj, y[:, :1]), (attention.k_proj, y), (attention.v_proj, y)
        )
    )  # fmt: skip
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x[:, :1] + attention.out_proj(out)
    return (x + block.mlp(block.layer_norm2(x)))[:, 0]


def tower_loss(
    model: VLM, heads: Heads, codes: dict[str, Tensor], seed: int, step: int
) -> tuple[Tensor, str]:
    """The first stage's loss on a batch of pages, and words for the log."""
    rng = random.Random(f"train {seed} tower {step}")
    pages = [make_scene(rng)[0] for _ in range(TOWER_BATCH)]
    pixels = normalise(render(pages, rng, training_fonts()))
    labels, letters, ink = map(torch.stack, zip(*map(patch_labels, pages)))
    tower = model.vision_tower
    x = tower.embed(pixels)
    for block in tower.layers[:-1]:
        x = block(x)
    visual = model.projector(x[:, 1:])

    # 1. Visual tokens are near the sum of their codes, and each code can be told from the others.
    error = (visual - meaning(codes, labels, letters, ink)).square().mean(-1)
    loss = 0.5 * (error.mean() + error[ink].mean())
    right = []
    for name, label in zip(LABELS, labels[ink].unbind(-1)):
        guess = visual[ink] @ codes[name].T * (10 / E)
        loss = loss + F.cross_entropy(guess, label)
        right.append((guess.argmax(-1) == label).float().mean())
    guess = visual[ink] @ codes["letters"].T * (20 / E) - 5
    loss = loss + 10 * F.binary_cross_entropy_with_logits(guess, letters[ink])
    right.append(((guess > 0) == letters[ink].bool()).all(-1).float().mean())

    # 2. The class token counts characters.
    counts = F.one_hot(labels[..., 0], len(CHARACTERS)).mul(ink[..., None]).sum(1)
    guess = heads.counts(heads.post_layernorm(class_token(tower.layers[-1], x)))
    loss = loss + 8 * F.mse_loss(guess, counts / 4)
    words = " ".join(f"{n} {r:.3f}" for n, r in zip((*LABELS, "letters"), right))
    return loss, f"{words} off {error[ink].mean():.2f}"


# --- between the stages: where the decoder starts from --------------------------------------------


@torch.no_grad()
def start_words(model: VLM, codes: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Embeddings as sums of codes: a character is itself, and in a name a letter of it; what can be
    asked about asks; the end of a question looks, and so does every character of an answer, for the
    next one."""
    words = model.decoder.embed_tokens.weight
    roles = torch.stack([codes[name] for name in ROLES]) / E**0.5
    noise = torch.randn(len(words), E)
    noise -= noise @ roles.T @ roles
    words.copy_(noise)
    told = noise.clone()

    def put(piece: str, code: Tensor, **shares: float) -> None:
        number = tokenizer.token_to_id(piece)
        vector = F.normalize(code + 0.3 * noise[number], dim=0) * E**0.5
        words[number] = vector + sum(share * codes[role] for role, share in shares.items())

    for number, character in enumerate(CHARACTERS):
        for piece in (character, f"Ġ{character}"):
            code = codes["character"][number]
            if (place := tokenizer.token_to_id(piece)) is None:  # a space comes before no dot
                continue
            told[place] = code + 0.3 * noise[place]
            if character.isalpha():
                code = code + codes["letters"][number]
                code = code + 2 * codes["first"][number] * (piece != character)
            put(piece, code, look=1.2, ask=float(character.isalnum()))
    for line in range(1, LINES + 1):
        put(f"ĠlineĠ{line}", codes["line"][line], ask=1)
    for page in range(1, PAGES + 1):  # the higher, the more it draws
        for piece in (f"pageĠ{page}", f"ĠpageĠ{page}"):
            put(piece, codes["page"][page - 1], mark=0.4 + 0.2 * page)
            told[tokenizer.token_to_id(piece)] = codes["page"][page - 1]
    for word in ("title", "called"):
        put(f"Ġ{word}", codes["line"][0] + codes["first"][TITLE], ask=1)
    letters = [CHARACTERS.index(letter) for letter in "total"]
    put("Ġtotal", codes["first"][letters[0]] + codes["letters"][sorted(set(letters))].sum(0), ask=1)
    for word in ("?", "Ġassistant", ":"):
        number = tokenizer.token_to_id(word)
        code = codes["character"][CHARACTERS.index(":")] if word == ":" else noise[number]
        words[number] = 0.5 * code + 1.2 * codes["look"]
    model.lm_head.weight.copy_(0.15 * told)
    words += 0.35 * codes["sink"] - codes["ink"]
    words[tokenizer.token_to_id("<s>")] = codes["sink"]


@torch.no_grad()
def start_attention(model: VLM, codes: dict[str, Tensor]) -> None:
    """Queries look for keys of the same codes, values are passed on as they are (mimetic
    initialisation, Trockman and Kolter, arXiv 2305.09828), in dimensions that RoPE turns slowly,
    where a match does not depend on distance. Of the last two dimensions one sends the tokens that
    look to those that ask (layer 0) or to ink, and the other sends idle queries to <s>, an
    attention sink (Xiao et al., arXiv 2309.17453) as in large models; without it the model rests on
    blank paper, and misses it once it is pruned."""
    text = model.config.text
    D, group = text.head_dim, text.heads // text.kv_heads
    turns = torch.tensor([text.rope_theta ** (-2 * (i % (D // 2)) / D) for i in range(D - 2)])
    slow = (turns < 0.001).nonzero()[:, 0]
    character, line, slot = codes["character"], codes["line"], codes["slot"]
    letters, digits, first = codes["letters"], character[26:36], codes["first"]
    page = codes["page"]
    nothing = torch.zeros(0, E)
    # For layers 0, 1 and all others, for the first and the second half of the heads: what is
    # matched, what is carried.
    plans = [
        [((nothing,), (page, letters)), ((nothing,), (line, digits, first))],
        [((letters,), (page, line, character)), ((line, digits), (line, character))],
        [((line, letters), (slot, character)), ((page, line, slot), (line, character))],
    ]
    for number, block in enumerate(model.decoder.layers):
        attention = block.self_attn
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight.normal_(std=0.06 if number else 0.02)
        for g, (matched, carried) in enumerate(plans[min(number, 2)]):
            match, carry = combine(len(slow), *matched), combine(D, *carried)
            aim = codes["ink"] - codes["ask"] - codes["look"] if number else codes["ask"]
            keys, values = (
                p.weight[g * D : (g + 1) * D] for p in (attention.k_proj, attention.v_proj)
            )
            keys[slow] = match
            keys[-2], keys[-1] = 2 * aim / E**0.5, 1.22 * codes["sink"] / E**0.5
            if number == 0:  # patches look for pages' numbers, of which the highest draws most
                keys[slow[0]] = 2 * codes["mark"] / E**0.5
            values.copy_(carry)
            for h in range(g * group, (g + 1) * group):
                queries = attention.q_proj.weight[h * D : (h + 1) * D]
                queries[slow] = 1.2 * match + 0.06 * torch.randn(len(slow), E)
                queries[-2], queries[-1] = 2 * codes["look"] / E**0.5, 1.22 * codes["sink"] / E**0.5
                if number == 0:
                    queries[slow[0]] = 2 * codes["ink"] / E**0.5
                out = attention.o_proj.weight[:, h * D : (h + 1) * D]
                out.copy_(carry.T * (1 if number else 2.5))
        block.mlp.down_proj.weight.normal_(std=0.02)


def combine(rows: int, *groups: Tensor) -> Tensor:
    """(rows, E): for every group of codes about as many orthonormal rows within its span; zeros if
    there are fewer codes. The smallest groups first."""
    made = torch.zeros(0, E)
    for left, group in zip(range(len(groups), 0, -1), groups):
        share = min(len(group), (rows - len(made)) // left)
        mix = torch.linalg.qr(torch.randn(len(group), share))[0]
        made = torch.cat([made, mix.T @ group / E**0.5])
    return torch.cat([made, torch.zeros(rows - len(made), E)])


# --- stage 2: projector and decoder ---------------------------------------------------------------


class Helpers(nn.Module):
    """What the end of a question is asked in training, layer by layer; nothing of it is kept."""

    def __init__(self, layers: int, codes: dict[str, Tensor], tokenizer: Tokenizer):
        super().__init__()
        self.line = codes["line"] * 1.5 / E**0.5
        self.characters = nn.ModuleList(
            nn.Linear(E, len(CHARACTERS)) for _ in range(FIRST_HELPED, layers)
        )
        for head in self.characters:
            nn.init.zeros_(head.bias)
            head.weight.data.copy_(codes["character"] * 1.5 / E**0.5)
        self.character_of = torch.full((tokenizer.get_vocab_size(),), -1)
        for number, character in enumerate(CHARACTERS):
            for piece in (character, f"Ġ{character}"):
                if (token := tokenizer.token_to_id(piece)) is not None:
                    self.character_of[token] = number

    def answers(self, ids: Tensor, turn: Tensor, answer: Tensor) -> Tensor:
        """How the characters of every turn's answer are distributed (B, QUESTIONS + 2, 38)."""
        character = self.character_of[ids]
        counts = torch.zeros(len(ids), QUESTIONS + 2, len(CHARACTERS))
        b, t = (answer & (character >= 0)).nonzero(as_tuple=True)
        counts.index_put_((b, turn[b, t], character[b, t]), torch.ones(len(b)), accumulate=True)
        return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def decoder_loss(
    model: VLM, helpers: Helpers, writer: Writer, seed: int, step: int
) -> tuple[Tensor, str]:
    """The second stage's loss on a batch, and words for the log: cross-entropy of the answers'
    tokens, and half of that of the helpers."""
    pictures, rows, isolated = make_batch(writer, seed, step)
    ids, positions, turn, predicted, mark = rows.unbind(-1)
    visual = model.projector(torch.stack(model.encode(normalise(pictures)))).flatten(0, 1)
    embeddings = model.decoder.embed_tokens(ids)
    placeholder = (ids == model.config.image_token_id)[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(placeholder, visual)
    C, T = int((turn[0] == 0).sum()), ids.shape[1]  # rows of the context, all rows
    allowed = torch.ones(T, T, dtype=torch.bool).tril()[C:].expand(len(ids), T - C, T)
    if isolated:
        allowed = allowed & ((turn[:, None, :] == 0) | (turn[:, None, :] == turn[:, C:, None]))
    brought = []  # by attention to the rows of the text, in every layer

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        context = F.scaled_dot_product_attention(
            q[:, :, :C], k[:, :, :C], v[:, :, :C], is_causal=True, enable_gqa=True
        )
        text = F.scaled_dot_product_attention(
            q[:, :, C:], k, v, attn_mask=allowed[:, None], enable_gqa=True
        )
        brought.append(
            model.decoder.layers[layer].self_attn.o_proj(text.transpose(1, 2).flatten(2))
        )
        return torch.cat([context, text], 2)

    hidden = model.decoder(embeddings, positions[:, None], attend)[:, C:]
    ids, turn, predicted, mark = ids[:, C:], turn[:, C:], predicted[:, C:].bool(), mark[:, C:]

    # 1. The answers.
    wanted = predicted[:, 1:]
    logits, target = model.lm_head(hidden[:, :-1][wanted]), ids[:, 1:][wanted]
    loss = F.cross_entropy(logits, target)
    right = (logits.argmax(-1) == target).float().mean()

    # 2. What the end of a question knows: the line, and the answer's characters.
    end = mark > 0
    line, known = mark[end] - 2, mark[end] > 1
    loss = loss + 0.5 * F.cross_entropy((hidden[end] @ helpers.line.T)[known], line[known])
    answers = helpers.answers(ids, turn, predicted)
    b, _ = end.nonzero(as_tuple=True)
    target = answers[b, turn[end]]
    for rows_of, head in zip(brought[FIRST_HELPED:], helpers.characters):
        guess = head(F.normalize(rows_of[end], dim=-1) * E**0.5)
        loss = loss + 0.5 * F.cross_entropy(guess, target) / len(helpers.characters)
    return loss, f"{'single' if isolated else 'chat'} tokens {right:.4f}"


# --- the loop -------------------------------------------------------------------------------------


def new_model(vocab: int) -> VLM:
    """The untrained model. RoPE turns slowly: with theta 10,000 most dimensions of a small head
    would turn by more than a radian within a page."""
    vision = VisionConfig(width=128, mlp=384, layers=3, heads=4, image_size=SIDE, patch_size=CELL)
    text = TextConfig(
        vocab=vocab, width=E, mlp=384, layers=6, heads=4, kv_heads=2, head_dim=32, eps=1e-5,
        rope_theta=1e10, max_positions=8192,
    )  # fmt: skip
    model = VLM(Config(vision, text, image_token_id=SPECIAL.index("<image>")))
    small = ("out_proj.weight", "fc2.weight")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02 if name.endswith(small) else 0.06)
    return model


@torch.no_grad()
def start_tower(model: VLM) -> None:
    """A patch's position starts as the sum of vectors for its row and its column, and attention
    looks for patches of similar content or place."""
    tower = model.vision_tower
    width, heads = model.config.vision.width, model.config.vision.heads
    row, column = torch.randn(GRID, 1, width), torch.randn(1, GRID, width)
    tower.position_embedding.weight[1:] = 1.2 * (row + column).flatten(0, 1)
    for block in tower.layers[:-1]:
        for h in range(heads):
            match = torch.linalg.qr(torch.randn(width, width // heads))[0].T
            for projection in (block.self_attn.q_proj, block.self_attn.k_proj):
                projection.weight.unflatten(0, (heads, -1))[h] = match


def run_stage(name, parameters, loss_at, steps, rate, state, save) -> None:
    """AdamW with warm-up and cosine decay, from state["step"] on."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    began = time.monotonic()
    for step in range(state["step"], steps):
        for group in optimizer.param_groups:
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = rate * min(1, (step + 1) / 100) * max(decay, 0.01)
        loss, note = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            spent = time.monotonic() - began
            left = spent / (step + 1 - state["step"]) * (steps - 1 - step)
            print(
                f"{name} {step:5}/{steps} loss {loss.item():.4f} {note} {left / 60:.1f} min left",
                flush=True,
            )
        if (step + 1) % SAVE_EVERY == 0:
            save(step + 1, optimizer.state_dict())


def train(seed: int, out: Path) -> None:
    """Train both stages, going on from STATE if there is one, and write the checkpoint to `out`."""
    torch.manual_seed(seed)
    tokenizer, codes = make_tokenizer(), make_codes()
    model = new_model(tokenizer.get_vocab_size())
    heads = Heads(model.config.vision.width)
    start_tower(model)
    start_words(model, codes, tokenizer)
    start_attention(model, codes)
    helpers = Helpers(model.config.text.layers, codes, tokenizer)
    write_json_files(out, model, tokenizer)
    writer = Writer(load_processor(out))
    parts = {"model": model, "heads": heads, "helpers": helpers}
    state = {"stage": 0, "step": 0, "optimizer": None, "seed": seed}
    if STATE.exists():
        state = torch.load(STATE, weights_only=True)
        if state["seed"] != seed:
            raise SystemExit(f"{STATE} is of seed {state['seed']}: delete it to start anew")
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def save(stage: int, step: int, optimizer: dict | None) -> None:
        content = {"stage": stage, "step": step, "optimizer": optimizer, "seed": seed}
        content |= {name: part.state_dict() for name, part in parts.items()}
        torch.save(content, STATE.with_suffix(".new"))
        STATE.with_suffix(".new").replace(STATE)

    projector = list(model.projector.parameters())
    if state["stage"] == 0:
        run_stage(
            "tower",
            [*model.vision_tower.parameters(), *projector, *heads.parameters()],
            lambda step: tower_loss(model, heads, codes, seed, step),
            TOWER_STEPS, TOWER_RATE, state, lambda *args: save(0, *args),
        )  # fmt: skip
        state = {"step": 0, "optimizer": None}
        save(1, 0, None)
    decoder = [*model.decoder.parameters(), *model.lm_head.parameters()]
    run_stage(
        "decoder",
        [*projector, *decoder, *helpers.parameters()],
        lambda step: decoder_loss(model, helpers, writer, seed, step),
        DECODER_STEPS, DECODER_RATE, state, lambda *args: save(1, *args),
    )  # fmt: skip
    write_weights(out, model, heads)
    STATE.unlink(missing_ok=True)


# --- the checkpoint -------------------------------------------------------------------------------


def write_weights(out: Path, model: VLM, heads: Heads) -> None:
    """model.safetensors with the tensor names of LLaVA-1.5."""
    parameters = dict(model.named_parameters())
    parameters |= {
        f"vision_tower.post_layernorm.{name}": tensor
        for name, tensor in heads.post_layernorm.named_parameters()
    }
    names = hub_names(llava.NAMES)
    tensors = {translate(name, names): t.detach().clone() for name, t in parameters.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def write_json_files(out: Path, model: VLM, tokenizer: Tokenizer) -> None:
    """Configuration, preprocessing and tokenizer files in LLaVA-1.5's layout."""
    vision, text = model.config.vision, model.config.text
    files = {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": model.config.image_token_id,
            "image_seq_length": vision.patches,
            "projector_hidden_act": model.config.projector_activation,
            "vision_feature_layer": vision.feature_layer,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "prompt": {"frame": "page {n}: {image}"},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": vision.width,
                "intermediate_size": vision.mlp,
                "num_hidden_layers": vision.layers,
                "num_attention_heads": vision.heads,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "projection_dim": vision.width,
            },
            "text_config": {
                "model_type": "llama",
                "vocab_size": text.vocab,
                "hidden_size": text.width,
                "intermediate_size": text.mlp,
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "num_key_value_heads": text.kv_heads,
                "head_dim": text.head_dim,
                "rms_norm_eps": text.eps,
                "rope_theta": text.rope_theta,
                "max_position_embeddings": text.max_positions,
                "tie_word_embeddings": False,
            },
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": vision.image_size},
            "crop_size": {"height": vision.image_size, "width": vision.image_size},
            "do_convert_rgb": True,
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "rescale_factor": 1 / 255,
            "resample": 3,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "model_max_length": text.max_positions,
            "clean_up_tokenization_spaces": False,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    (out / "chat_template.jinja").write_text((HERE / "chat_template.jinja").read_text())
    tokenizer.save(str(out / "tokenizer.json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0] + " Takes about 80 minutes on two cores, and replaces "
        "what is in the folder; interrupted, it goes on where it was."
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and pages (default: 0)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: tiny)")
    arguments = parser.parse_args()
    train(arguments.seed, arguments.out)
