"""Train the tiny VLM of this folder from scratch: `python tiny/train.py`, half an hour on 2 cores.

Two stages, each step's data made on the fly from (seed, stage, step), so that an interrupted run
goes on where its last state was saved and ends with the same model:

1. *Tower.* The class token learns to say which digits and colours are in the picture; every patch
   learns the digit, colour, row and column of its glyph, or that it has none. The first signal
   makes the class token look at the glyphs, which is what SparseVILA's salience reads; the second
   puts the place into the features, as large towers do.
2. *Decoder.* The tower is frozen and its features are scaled to unit variance; projector and
   decoder learn to answer eight questions a scene: first look-ups in single pictures, then all
   kinds of questions, in clips as well. Then half of the sequences are conversations; in the others
   every question sees the pictures but not the other questions (the evaluation protocol).

Nothing is ever pruned or dropped in training: the method is training-free.
The result is a checkpoint in the folder layout of LLaVA-1.5, which `transformers` loads as well.
"""

import argparse
import functools
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from checkpoints import llava, load_processor  # noqa: E402
from checkpoints.processor import CLIP_MEAN, CLIP_STD, Processor  # noqa: E402
from checkpoints.weights import hub_names, translate  # noqa: E402
from model import VLM, Config, TextConfig, VisionConfig  # noqa: E402
from tiny.scenes import (  # noqa: E402
    BOARD,
    CELL,
    COLORS,
    SIDE,
    Glyph,
    Scene,
    make_scene,
    question_and_answer,
    render,
)

TOWER_STEPS, TOWER_BATCH, TOWER_RATE = 1200, 48, 1.5e-3
DECODER_STEPS, DECODER_BATCH, DECODER_RATE = 4000, 24, 2e-3
SIMPLE_STEPS = 400  # of the decoder: single pictures, look-ups only
QUESTIONS = 8  # per scene
CLIP_SHARE, CLIP_FRAMES, CLIP_BATCH = 0.5, (2, 4), 8
HEADS = [11, 1 + len(COLORS), BOARD, BOARD]  # none or a digit, none or a colour, row, column
SINK = 0.35  # length of every embedding along the direction of <s>
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
STATE = HERE / "training_state.pt"  # deleted when the model is finished
SAVE_EVERY = 200  # steps


# --- tokenizer ------------------------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE in which every word of the task is one token, together with a comma before it
    (", c4"), so that each can be looked up from the one before; any other text falls into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    words = Regex(r",? ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # it finds fewer
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random("tokenizer")
    scenes = [make_scene(rng, 4) for _ in range(4000)]
    kinds = ("color", "digit", "place", "count", "frame")
    turns = (question_and_answer(rng.choice(kinds), scene, rng) for scene in scenes)
    text = (f"user: frame 1: \nframe 2: \n{q} assistant: {a} {vary(q, rng)}" for q, a in turns)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def vary(question: str, rng: random.Random) -> str:
    """People spell and punctuate differently."""
    if rng.random() < 0.2:
        question = question.replace("color", "colour")
    return question.rstrip("?") if rng.random() < 0.2 else question


# --- data -----------------------------------------------------------------------------------------


def normalise(frames: Tensor) -> Tensor:
    """(frames, 3, S, S) uint8 -> pixels as the Processor makes them."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    return (frames.float() / 255 - mean) / std


def patch_labels(scene: Scene) -> Tensor:
    """(frames, patches, 4) int64: digit and colour of the patch's glyph, counted from 1 (0: none),
    row and column of the patch."""
    labels = torch.zeros(scene.frames, BOARD, BOARD, 4, dtype=torch.int64)
    labels[..., 2], labels[..., 3] = torch.arange(BOARD)[:, None], torch.arange(BOARD)
    for glyph in scene.glyphs:
        values = torch.tensor([glyph.digit, list(COLORS).index(glyph.color)])
        labels[glyph.frame, glyph.row, glyph.column, :2] = 1 + values
    return labels.flatten(1, 2)


def draw_turns(scene: Scene, rng: random.Random, count_share: float) -> list[tuple[str, str]]:
    """Questions about a scene; with that probability one is the counting question."""
    kinds = ["color", "digit", "place"] + (["frame"] if scene.frames > 1 else [])
    chosen = [rng.choice(kinds) for _ in range(QUESTIONS)]
    if rng.random() < count_share:
        chosen[rng.randrange(QUESTIONS)] = "count"
    return [question_and_answer(kind, scene, rng) for kind in chosen]


class Writer:
    """Scenes and turns to training sequences, with the processor's own prompts."""

    def __init__(self, processor: Processor, patches: int):
        self.processor, self.patches = processor, patches
        self.stop = processor.tokenizer.token_to_id("</s>")
        self.question = functools.lru_cache(None)(processor.question)
        self.answer = functools.lru_cache(100_000)(
            lambda text: processor.tokenizer.encode(" " + text, add_special_tokens=False).ids
        )

    def write(self, frames: int, turns: list, isolated: bool, rng: random.Random) -> list[tuple]:
        """One sequence as (token id, position, turn, is it to be predicted), turn 0 the context."""
        context = self.processor.context([self.patches] * frames)
        rows = [(token, position, 0, False) for position, token in enumerate(context)]
        for turn, (question, answer) in enumerate(turns, 1):
            first = isolated or turn == 1
            asked = self.question(vary(question, rng), first=first)
            answered = self.answer(answer)
            start = len(context) if isolated else len(rows)
            tokens = [(token, False) for token in asked] + [(token, True) for token in answered]
            if isolated or turn == len(turns):
                tokens.append((self.stop, True))
            if not first:  # the stop token that opens a later prompt ends the answer before it
                tokens[0] = (tokens[0][0], True)
            rows += [(t, start + i, turn, loss) for i, (t, loss) in enumerate(tokens)]
        return rows


def make_batch(writer: Writer, seed: int, step: int) -> tuple[Tensor, Tensor, bool]:
    """Frames (B, frames, 3, S, S) uint8, rows (B, T, 4) int64 as `Writer.write` gives them,
    isolated."""
    rng = random.Random(f"train {seed} decoder {step}")
    simple = step < SIMPLE_STEPS  # look-ups in single pictures, one question at a time
    clip = rng.random() < CLIP_SHARE and not simple
    frames, batch = (rng.randint(*CLIP_FRAMES), CLIP_BATCH) if clip else (1, DECODER_BATCH)
    isolated = rng.random() < 0.5 or simple
    count_share = 0 if simple else 0.8
    scenes = [make_scene(rng, frames) for _ in range(batch)]
    pictures = torch.stack([render(scene, rng) for scene in scenes])
    sequences = [
        writer.write(frames, draw_turns(s, rng, count_share), isolated, rng) for s in scenes
    ]
    longest = max(map(len, sequences))
    padding = (0, 0, QUESTIONS + 1, False)
    rows = [sequence + [padding] * (longest - len(sequence)) for sequence in sequences]
    return pictures, torch.tensor(rows), isolated


# --- stage 1: the tower ---------------------------------------------------------------------------


class Heads(nn.Module):
    """What the tower is asked while it is trained; only `post_layernorm` is kept."""

    def __init__(self, width: int):
        super().__init__()
        self.post_layernorm = nn.LayerNorm(width, 1e-5)
        self.present = nn.Linear(width, 10 + len(COLORS))
        self.patch = nn.Linear(width, sum(HEADS))


def tower_loss(model: VLM, heads: Heads, seed: int, step: int) -> tuple[Tensor, str]:
    """The first stage's loss on a batch of pictures, and words for the log: every patch says what
    it shows, the class token which digits and colours there are."""
    rng = random.Random(f"train {seed} tower {step}")
    scenes = [make_scene(rng) for _ in range(TOWER_BATCH)]
    pixels = normalise(torch.cat([render(scene, rng) for scene in scenes]))
    labels = torch.cat([patch_labels(scene) for scene in scenes])  # (B, patches, 4)
    tower = model.vision_tower
    x = tower.embed(pixels)
    for block in tower.layers[:-1]:
        x = block(x)
    guesses = heads.patch(x[:, 1:]).split(HEADS, -1)
    glyph = labels[..., 0] > 0
    loss = torch.zeros(())
    for guess, label in zip(guesses, labels.unbind(-1)):
        loss = loss + F.cross_entropy(guess.flatten(0, 1), label.flatten())
        loss = loss + F.cross_entropy(guess[glyph], label[glyph])
    present = torch.cat(
        [F.one_hot(labels[..., i], n).amax(1)[:, 1:] for i, n in ((0, 11), (1, 1 + len(COLORS)))],
        -1,
    )
    summary = heads.present(heads.post_layernorm(tower.layers[-1](x)[:, 0]))
    loss = loss + 4 * F.binary_cross_entropy_with_logits(summary, present.float())
    right = torch.stack([g.argmax(-1) == lab for g, lab in zip(guesses, labels.unbind(-1))])
    seen = ((summary > 0) == present.bool()).float().mean()
    return loss, f"patches {right.all(0)[glyph].float().mean():.3f} class token {seen:.3f}"


# --- between the stages: where projector and decoder start from ----------------------------------


@torch.no_grad()
def start_words(model: VLM, heads: Heads, tokenizer: Tokenizer, sink: Tensor) -> None:
    """A visual token starts as the sum of the embeddings of the words that the tower reads from its
    patch: from plain noise the decoder takes far longer to notice a few glyphs in a hundred."""
    E = model.config.text.width

    def vectors(n: int) -> Tensor:
        x = torch.randn(n, E)
        return x - (x @ sink)[:, None] * sink

    digits, colors = vectors(1 + 10), vectors(1 + len(COLORS))  # the first of each: none
    rows, columns = 0.7 * vectors(BOARD), 0.7 * vectors(BOARD)
    meaning = dict(zip(map(str, range(10)), digits[1:])) | dict(zip(COLORS, colors[1:]))
    for row in range(BOARD):
        for column in range(BOARD):
            meaning[Glyph(0, "", row, column, 0).cell] = rows[row] + columns[column]
    words = model.decoder.embed_tokens.weight
    words.copy_(vectors(len(words)))
    for word, vector in meaning.items():
        for spelling in (f" {word}", f", {word}"):
            ids = tokenizer.encode(spelling, add_special_tokens=False).ids
            if len(ids) == 1:
                words[ids[0]] = vector + 0.3 * vectors(1)[0]
    model.lm_head.weight.copy_(0.3 * words)
    words += SINK * E**0.5 * sink
    words[tokenizer.token_to_id("<s>")] = E**0.5 * sink
    # The projector's first units are those of the tower's heads, about 2.5 where a head is sure.
    weight = torch.cat([part - part.mean(0) for part in heads.patch.weight.split(HEADS)]) / 4
    bias = torch.cat([part - part.mean() for part in heads.patch.bias.split(HEADS)]) / 4
    first, _, second = model.projector.layers
    first.weight[: len(bias)] = weight * model.feature_std
    first.bias[: len(bias)] = bias + weight @ model.feature_mean
    second.weight[:, : len(bias)] = torch.cat([digits, colors, rows, columns]).T
    second.weight[:, len(bias) :] *= 0.05
    second.bias.copy_(SINK * 2.5 * 2 * E**0.5 * sink)


@torch.no_grad()
def start_attention(model: VLM, sink: Tensor) -> None:
    """Mimetic initialisation (Trockman and Kolter, arXiv 2305.09828): queries look for keys of
    similar content, values are passed on as they are. A query that finds nothing attends to <s>, an
    attention sink (Xiao et al., arXiv 2309.17453) as in large models; without it the model rests on
    the empty patches, and misses them once they are pruned."""
    text = model.config.text
    E, D, group = text.width, text.head_dim, text.heads // text.kv_heads
    for block in model.decoder.layers:
        attention = block.self_attn
        for g in range(text.kv_heads):
            match, carry = torch.randn(E, D), torch.randn(E, D)
            match[:, 0] = sink
            match, carry = (torch.linalg.qr(x)[0].T for x in (match, carry))
            match = match.roll(-1, 0)  # the sink in the last of the D: it turns least with distance
            match[-1] *= 1.22
            carry = carry - (carry @ sink)[:, None] * sink
            attention.k_proj.weight[g * D : (g + 1) * D] = match
            attention.v_proj.weight[g * D : (g + 1) * D] = carry
            for h in range(g * group, (g + 1) * group):
                attention.q_proj.weight[h * D : (h + 1) * D] = match + 0.06 * torch.randn(D, E)
                attention.o_proj.weight[:, h * D : (h + 1) * D] = carry.T
        block.mlp.down_proj.weight.normal_(std=0.02)


@torch.no_grad()
def measure_features(model: VLM, seed: int) -> None:
    """Mean and standard deviation of the features that the projector sees as (f - mean) / std."""
    rng = random.Random(f"train {seed} scale")
    frames = torch.cat([render(make_scene(rng), rng) for _ in range(64)])
    features = torch.cat(model.encode(normalise(frames)))
    model.feature_mean.copy_(features.mean(0))
    model.feature_std.copy_(features.std(0))


# --- stage 2: projector and decoder ---------------------------------------------------------------


def decoder_loss(model: VLM, writer: Writer, seed: int, step: int) -> tuple[Tensor, str]:
    """The second stage's loss on a batch of conversations, and words for the log: cross-entropy of
    the answers' tokens."""
    pictures, rows, isolated = make_batch(writer, seed, step)
    ids, positions, turn, loss_here = rows.unbind(-1)
    features = torch.stack(model.encode(normalise(pictures.flatten(0, 1))))
    features = (features - model.feature_mean) / model.feature_std
    visual = model.projector(features).flatten(0, 1)  # (B * frames * patches, E)
    embeddings = model.decoder.embed_tokens(ids)
    placeholder = (ids == model.config.image_token_id)[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(placeholder, visual)
    T = ids.shape[1]
    allowed = torch.ones(T, T, dtype=torch.bool).tril().expand(len(ids), T, T)
    if isolated:
        allowed = allowed & ((turn[:, None, :] == 0) | (turn[:, None, :] == turn[:, :, None]))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = allowed[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    hidden = model.decoder(embeddings, positions[:, None], attend)
    predict = loss_here[:, 1:].bool()
    logits, target = model.lm_head(hidden[:, :-1][predict]), ids[:, 1:][predict]
    right = (logits.argmax(-1) == target).float().mean()
    return F.cross_entropy(logits, target), f"tokens {right:.4f}"


# --- the loop -------------------------------------------------------------------------------------


def new_model(vocab: int) -> VLM:
    """The untrained model; the tower's features are standardised for the projector."""
    vision = VisionConfig(width=128, mlp=384, layers=3, heads=4, image_size=SIDE, patch_size=CELL)
    text = TextConfig(
        vocab=vocab, width=128, mlp=384, layers=4, heads=4, kv_heads=2, head_dim=32, eps=1e-5
    )
    model = VLM(Config(vision, text, image_token_id=SPECIAL.index("<image>")))
    small = ("out_proj.weight", "fc2.weight", "embed_tokens.weight")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02 if name.endswith(small) else 0.06)
    model.register_buffer("feature_mean", torch.zeros(vision.width))
    model.register_buffer("feature_std", torch.ones(vision.width))
    return model


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
    tokenizer = make_tokenizer()
    model = new_model(tokenizer.get_vocab_size())
    heads = Heads(model.config.vision.width)
    write_json_files(out, model, tokenizer)
    writer = Writer(load_processor(out), model.config.vision.patches)
    state = {"stage": 0, "step": 0, "optimizer": None, "seed": seed}
    if STATE.exists():
        state = torch.load(STATE, weights_only=True)
        if state["seed"] != seed:
            raise SystemExit(f"{STATE} is of seed {state['seed']}: delete it to start anew")
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])

    def save(stage: int, step: int, optimizer: dict | None) -> None:
        content = {"stage": stage, "step": step, "optimizer": optimizer, "seed": seed}
        content |= {"model": model.state_dict(), "heads": heads.state_dict()}
        torch.save(content, STATE.with_suffix(".new"))
        STATE.with_suffix(".new").replace(STATE)

    if state["stage"] == 0:
        run_stage(
            "tower",
            [*model.vision_tower.parameters(), *heads.parameters()],
            lambda step: tower_loss(model, heads, seed, step),
            TOWER_STEPS, TOWER_RATE, state, lambda *args: save(0, *args),
        )  # fmt: skip
        measure_features(model, seed)
        sink = F.normalize(torch.randn(model.config.text.width), dim=0)
        start_words(model, heads, tokenizer, sink)
        start_attention(model, sink)
        state = {"step": 0, "optimizer": None}
        save(1, 0, None)
    run_stage(
        "decoder",
        [*model.projector.parameters(), *model.decoder.parameters(), *model.lm_head.parameters()],
        lambda step: decoder_loss(model, writer, seed, step),
        DECODER_STEPS, DECODER_RATE, state, lambda *args: save(1, *args),
    )  # fmt: skip
    write_weights(out, model, heads)
    STATE.unlink(missing_ok=True)


# --- the checkpoint -------------------------------------------------------------------------------


def write_weights(out: Path, model: VLM, heads: Heads) -> None:
    """model.safetensors with the tensor names of LLaVA-1.5, the feature scale folded in."""
    parameters = dict(model.named_parameters())
    parameters |= {
        f"vision_tower.post_layernorm.{name}": tensor
        for name, tensor in heads.post_layernorm.named_parameters()
    }
    names = hub_names(llava.NAMES)
    tensors = {translate(name, names): t.detach().clone() for name, t in parameters.items()}
    weight = tensors["multi_modal_projector.linear_1.weight"]
    weight /= model.feature_std
    tensors["multi_modal_projector.linear_1.bias"] -= weight @ model.feature_mean
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
            "prompt": {"frame": "frame {n}: {image}"},
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
    tokenizer.save(str(out / "tokenizer.json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    train(arguments.seed, arguments.out)
