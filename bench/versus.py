"""`python -m bench versus FOLDER`: dense answers by us and by Hugging Face transformers in turn."""

import argparse
import statistics
import time

import torch
from PIL import Image
from torch import Tensor

from checkpoints import load
from model import VLM, KVCache

from . import machine, median_and_range, positive
from .random_models import NoiseProcessor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", help="checkpoint, for example of `python -m bench make`")
    parser.add_argument("--tokens", type=positive, default=64, help="of the answer (default: 64)")
    parser.add_argument("--runs", type=positive, default=5, help="of each, in turn (default: 5)")


def run(arguments: argparse.Namespace) -> None:
    """Compare and print."""
    versus(arguments.folder, arguments.tokens, arguments.runs)


@torch.no_grad()
def versus(folder: str, tokens: int, runs: int) -> None:
    """Greedy answers about one picture by us and by transformers: the same weights, pixels and
    token ids, in turn in one process. Medians, with the least and the most."""
    import transformers
    from transformers import AutoModelForImageTextToText

    ours, processor = load(folder, device="cpu", dtype=torch.float32)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    picture = Image.effect_noise((640, 480), 80).convert("RGB")
    views = processor.views([picture])
    pixels = processor.pixels(views)
    n = ours.config.vision.visual_tokens
    ids = processor.context([n] * len(views), views)
    ids += processor.question("What is in the picture?", first=True, views=views)

    def run_ours() -> tuple[list[int], list[float]]:
        times = [time.perf_counter()]
        visual = ours.project(torch.cat(ours.encode(pixels)))
        cache = KVCache(ours.config.text.layers, len(ids) + tokens)
        hidden, made = ours.read(ours.embed(ids, visual), cache), []
        for token in ours.decode(hidden, cache, max_new_tokens=tokens, stop_ids=()):
            made.append(token)
            times.append(time.perf_counter())
        return made, times

    def run_theirs() -> tuple[list[int], list[float]]:
        clock, began = Clock(), time.perf_counter()
        made = theirs.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)),
            pixel_values=pixels[None], max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, streamer=clock,
        )  # fmt: skip
        return made[0, len(ids) :].tolist(), [began, *clock.times[1:]]

    runners = {"ours": run_ours, "transformers": run_theirs}
    answers: dict[str, list[int]] = {}
    first: dict[str, list[float]] = {name: [] for name in runners}
    decode: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(runs + 1):  # the first round warms up
        for name, run in runners.items():
            answers[name], times = run()
            if number:
                first[name].append(times[1] - times[0])
                decode[name].append(1000 * (times[-1] - times[1]) / (tokens - 1))
    print(f"{machine()}, transformers {transformers.__version__}")
    print(f"{len(views)} views, {len(views) * n} visual tokens, prompt of {len(ids)}, float32")
    print(f"the same {tokens} tokens: {answers['ours'] == answers['transformers']}")
    for name in runners:
        print(f"{name:14} first token {_range(first[name])} s, then {_range(decode[name])} ms each")
    for what, values in (("first token", first), ("decoding", decode)):
        ratio = statistics.median(values["transformers"]) / statistics.median(values["ours"])
        print(f"{what}: transformers takes {ratio:.2f} times as long")


def _range(values: list[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*median_and_range(values))


class Transformers:
    """Hugging Face's dense decoder with the same weights, answering the same prompt."""

    def __init__(self, model: VLM, script: NoiseProcessor, features: list[Tensor]):
        import transformers

        text, self.version = model.config.text, transformers.__version__
        config = transformers.AutoConfig.for_model(
            "qwen2" if text.qkv_bias else "llama", vocab_size=text.vocab, hidden_size=text.width,
            intermediate_size=text.mlp, num_hidden_layers=text.layers, head_dim=text.head_dim,
            num_attention_heads=text.heads, num_key_value_heads=text.kv_heads,
            rms_norm_eps=text.eps, max_position_embeddings=text.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            tie_word_embeddings=text.tied,
        )  # fmt: skip
        self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
        weights = {
            name.replace("decoder.", "model.", 1): weight
            for name, weight in model.state_dict().items()
            if name.startswith(("decoder.", "lm_head."))
        }
        self.model.load_state_dict(weights, assign=True)
        self.model.eval().to(model.device)
        visual = model.project(torch.cat(features))
        ids = script.context([len(visual)]) + script.question("", first=True)
        self.prompt, self.first, self.decode, self.same = model.embed(ids, visual), [], [], []

    @torch.no_grad()
    def run(self, expected: list[int]) -> None:
        """Generate as many tokens as are expected."""
        clock, began = Clock(), time.perf_counter()
        made = self.model.generate(
            inputs_embeds=self.prompt, max_new_tokens=len(expected), do_sample=False,
            min_new_tokens=len(expected), streamer=clock,
        )[0].tolist()  # fmt: skip
        first, last = clock.times[1], clock.times[-1]  # at 0 comes the prompt
        self.first.append(1000 * (first - began))
        self.decode.append(1000 * (last - first) / (len(expected) - 1))
        self.same.append(made == expected)

    def summary(self, ours: dict) -> dict:
        """Medians without the first run, and how many times as long as ours they take."""
        first, decode = statistics.median(self.first[1:]), statistics.median(self.decode[1:])
        before = ours["prefill"] + ours["question"]
        return {
            "version": self.version, "same_tokens": all(self.same), "first_token_ms": first,
            "decode_ms_a_token": decode, "first_token_ratio": first / before,
            "decode_ratio": decode / ours["decode a token"],
        }  # fmt: skip


class Clock:
    """What transformers calls a streamer: notes when things come."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        """The prompt has come, or a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The last token has come."""
