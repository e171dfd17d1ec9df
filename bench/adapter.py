"""`python -m bench adapter`: a decoding step of transformers' own `generate`, beside the same model
under examples/transformers_vlm.py, dense and sparse, at thousands of visual tokens."""

import argparse
import statistics
from functools import partial

import torch
from PIL import Image

from checkpoints.weights import progress

from . import TINY, machine, median_and_range, positive
from .random_models import TEXTS
from .versus import Clock

PATCH = 4  # pixels; the picture is a square of `side` patches
ROWS = {"0 / 0": (0, 0), "0 / 90": (0, 0.9), "75 / 90": (0.75, 0.9)}  # per cent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--side", type=positive, default=64, help="of the picture, in visual tokens (default: 64)"
    )
    parser.add_argument("--tokens", type=positive, default=32, help="of the answer (default: 32)")
    parser.add_argument("--runs", type=positive, default=5, help="of each, in turn (default: 5)")


@torch.no_grad()
def run(arguments: argparse.Namespace) -> None:
    """Measure and print. The decoder is random, in the shape of SmolVLM-256M's."""
    import transformers

    from examples.transformers_vlm import SparseVILA, load_processor

    # 1. A model with as many visual tokens as patches, and a processor for it.
    side, tokens = arguments.side, arguments.tokens
    if tokens < 2:
        raise ValueError(f"--tokens must be at least 2, got {tokens}")
    processor = load_processor(str(TINY))
    processor.patch_size, edge = PATCH, side * PATCH
    processor.image_processor.size = {"shortest_edge": edge}
    processor.image_processor.crop_size = {"height": edge, "width": edge}
    config = transformers.LlavaConfig(
        image_token_id=processor.image_token_id,
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": edge,
            "patch_size": PATCH,
        },
        text_config=TEXTS["smolvlm-256m"] | {
            "model_type": "llama", "head_dim": 64, "vocab_size": len(processor.tokenizer),
            "max_position_embeddings": 2 * side**2 + 4096,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    picture = Image.effect_noise((edge, edge), 80).convert("RGB")
    question = "what is it?"
    fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    # 2. Everything but the question is read once.
    text = f"USER: <image>\n{question} ASSISTANT:"
    inputs = processor(text=text, images=[picture], return_tensors="pt")
    before, ids = transformers.DynamicCache(config=config.get_text_config()), inputs["input_ids"]
    end = int((ids == config.image_token_id).nonzero().max()) + 1
    model(input_ids=ids[:, :end], pixel_values=inputs["pixel_values"], cache=before)

    def plain(clock: Clock) -> None:
        model.set_attn_implementation("sdpa")
        model.generate(ids, cache=before, **fixed, streamer=clock)
        before.crop(end - before.get_seq_length())

    sessions = {}
    for name, (prefill, decode) in ROWS.items():
        sparsity = {"prefill_sparsity": prefill, "decode_sparsity": decode}
        sessions[name] = SparseVILA(model, processor, **sparsity, protocol="evaluation")
        sessions[name].see(picture)

    def adapted(clock: Clock, name: str) -> None:
        model.set_attn_implementation("sparsevila")
        sessions[name].ask(question, **fixed, streamer=clock)

    # 3. All answer in turn; the first round warms up.
    runners = {"generate": plain} | {name: partial(adapted, name=name) for name in ROWS}
    steps: dict[str, list[float]] = {name: [] for name in runners}
    for number in progress(range(arguments.runs + 1), "measuring", " rounds"):
        for name, runner in runners.items():
            runner(clock := Clock())
            if number:
                first, *_, last = clock.times[1:]  # at 0 comes the prompt
                steps[name].append(1000 * (last - first) / (tokens - 1))

    # 4. The table.
    print(f"{machine()}, transformers {transformers.__version__}")
    print(f"{side * side} visual tokens, answers of {tokens}, float32; medians, least and most\n")
    print("| | ms a step | times as fast as `generate` |\n|---|---|---|")
    for name, values in steps.items():
        ratio = statistics.median(steps["generate"]) / statistics.median(values)
        print("| {} | {:.1f} ({:.1f} to {:.1f}) | {:.2f} |".format(
            name, *median_and_range(values), ratio
        ))  # fmt: skip
