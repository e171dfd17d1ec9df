"""Measurements that a reader can repeat. Every command prints the machine it ran on.

    python bench.py load                      memory and time of loading 10^9 weights
    python bench.py make smolvlm-256m FOLDER  a checkpoint of random weights in a real model's shape
    python bench.py versus FOLDER             our dense decoding beside Hugging Face transformers'

The last one needs transformers installed. To see the stages of a model, dense and sparse, give the
folder to `python sparsevila.py --model FOLDER`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model import VLM, Config, TextConfig, VisionConfig, load

HERE = Path(__file__).resolve().parent


def machine() -> str:
    """Processor, cores, torch and date, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {date.today()}"


# --- checkpoints of random weights ----------------------------------------------------------------

SMOLVLM_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
SMOLVLM_ADDED = [  # from id 49152 on
    "<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
    "<fake_token_around_image>", "<image>", *(f"<reserved_{n}>" for n in range(88)),
    "<end_of_utterance>",
]  # fmt: skip
# Sizes of HuggingFaceTB/SmolVLM-256M-Instruct and SmolVLM-500M-Instruct.
SMOLVLM_TEXT = {
    "smolvlm-256m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "smolvlm-500m": {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15, "num_key_value_heads": 5,
    },
}  # fmt: skip


def make(preset: str, folder: Path, seed: int = 0) -> None:
    """Write a SmolVLM of random weights, in float32, with a tokenizer of single bytes. Raises:
    FileExistsError for a folder that is there."""
    folder.mkdir()
    text = SMOLVLM_TEXT[preset] | {
        "model_type": "llama", "vocab_size": 49280, "rms_norm_eps": 1e-5, "rope_theta": 100000,
        "head_dim": 64, "max_position_embeddings": 8192,
    }  # fmt: skip
    vision = {
        "model_type": "idefics3", "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
    }  # fmt: skip
    files = {
        "config.json": {
            "model_type": "idefics3", "image_token_id": 49190, "scale_factor": 4,
            "torch_dtype": "float32", "text_config": text, "vision_config": vision,
        },
        "generation_config.json": {"eos_token_id": 49279},
        "preprocessor_config.json": {
            "size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512},
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    generator = torch.Generator().manual_seed(seed)
    config = Config.from_folder(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in VLM(config).named_parameters()}
    # One by one, with weights of size 1 / sqrt(inputs), norms of 1 and biases of 0.
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            weight = torch.randn(shape, generator=generator) * shape[1:].numel() ** -0.5
        else:
            weight = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        tensors[hub_name(name)] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def hub_name(name: str) -> str:
    """SmolVLM's name on the hub for one of ours."""
    for part in ("patch_embedding", "position_embedding"):
        name = name.replace(f"vision_tower.{part}", f"vision_tower.embeddings.{part}")
    for ours, theirs in (
        ("vision_tower.layers.", "model.vision_model.encoder.layers."),
        ("vision_tower.", "model.vision_model."),
        ("projector.layers.0.", "model.connector.modality_projection.proj."),
        ("decoder.", "model.text_model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def byte_tokenizer() -> Tokenizer:
    """A byte is a token; the special tokens have SmolVLM's ids, nothing has those between."""
    words = [*SMOLVLM_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<unused_{n}>" for n in range(49152 - len(words))]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SMOLVLM_TOKENS, *SMOLVLM_ADDED])
    return tokenizer


# --- load -----------------------------------------------------------------------------------------


def write_large_checkpoint(folder: Path, shards: int = 4) -> int:
    """A LLaVA of about 10^9 float16 weights in several shards; its bytes."""
    vision = VisionConfig(width=64, mlp=128, layers=2, heads=4, image_size=32, patch_size=8)
    text = TextConfig(width=2048, mlp=5632, layers=18, heads=16, kv_heads=16)
    with torch.device("meta"):
        model = VLM(Config(vision, text))
    config = {
        "model_type": "llava", "torch_dtype": "float16", "image_token_index": 31999,
        "vision_config": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        },
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18,
            "num_attention_heads": 16,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    names = {"projector.layers.0.": "multi_modal_projector.linear_1."}
    names |= {"projector.layers.2.": "multi_modal_projector.linear_2."}
    names |= {"decoder.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    tensors = {}
    for name, parameter in model.named_parameters():
        start = next((start for start in names if name.startswith(start)), "")
        tensors[names.get(start, "") + name.removeprefix(start)] = parameter.shape
    weight_map, total = {}, 0
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        chosen = dict(list(tensors.items())[number::shards])
        values = {name: torch.ones(shape, dtype=torch.float16) for name, shape in chosen.items()}
        save_file(values, folder / file)
        weight_map |= dict.fromkeys(values, file)
        total += sum(value.nbytes for value in values.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def load_large(dtype: str | None) -> None:
    """Make a checkpoint, load it in a process of its own and print what that took."""
    with tempfile.TemporaryDirectory() as folder:
        total = write_large_checkpoint(Path(folder))
        command = [sys.executable, __file__, "load", "--folder", folder]
        command += ["--dtype", dtype] if dtype else []
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(machine())
    print(f"checkpoint   {total / 1e6:8.0f} MB, 4 shards, float16")
    print(f"model        {result['weights'] / 1e6:8.0f} MB, {result['dtype']}")
    print(f"before       {result['before'] / 1e6:8.0f} MB resident, Python and torch imported")
    print(f"peak         {result['peak'] / 1e6:8.0f} MB resident")
    print(f"             {result['peak'] / total:8.2f} x the checkpoint's bytes")
    print(f"limit        {(1.15 * total + 300e6) / 1e6:8.0f} MB: 1.15 x the checkpoint + 300 MB")
    print(f"time         {result['seconds']:8.2f} s (the files are in the system's cache)")


def load_and_report(folder: str, dtype: str | None) -> None:
    """Load, run one token through every weight, and print one JSON object."""
    before = _peak()
    began = time.perf_counter()
    model = VLM.from_pretrained(
        folder, device="cpu", dtype=getattr(torch, dtype) if dtype else None
    )
    seconds = time.perf_counter() - began
    model(model.embed([1]))
    report = {"before": before, "peak": _peak(), "weights": model.weight_bytes}
    print(json.dumps(report | {"seconds": seconds, "dtype": str(model.dtype)[6:]}))


def _peak() -> int:
    """Bytes that were resident at most."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage begins with what the parent process held
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS


# --- versus ---------------------------------------------------------------------------------------


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
    n = ours.config.visual_tokens
    ids = processor.context([n] * len(views), views)
    ids += processor.question("What is in the picture?", first=True, views=views)

    def run_ours() -> tuple[list[int], list[float]]:
        times = [time.perf_counter()]
        visual = ours.project(ours.encode(pixels)[0]).flatten(0, 1)
        made = ours.generate(
            ours.embed(ids, visual), max_new_tokens=tokens, stop_ids=(),
            on_token=lambda _: times.append(time.perf_counter()),
        )  # fmt: skip
        return made, times

    class Clock:  # what transformers calls a streamer
        def __init__(self):
            self.times: list[float] = []

        def put(self, _) -> None:  # first with the prompt, then with every token
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

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
        print(
            f"{name:14} first token {_spread(first[name])} s, then {_spread(decode[name])} ms each"
        )
    for what, values in (("first token", first), ("decoding", decode)):
        ratio = statistics.median(values["transformers"]) / statistics.median(values["ours"])
        print(f"{what}: transformers takes {ratio:.2f} times as long")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measurements that a reader can repeat.")
    commands = parser.add_subparsers(dest="command", required=True)
    loading = commands.add_parser("load", help="memory and time of loading 10^9 weights")
    loading.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    loading.add_argument("--folder", help=argparse.SUPPRESS)  # the process that is measured
    making = commands.add_parser("make", help="a checkpoint of random weights in a real shape")
    making.add_argument("preset", choices=SMOLVLM_TEXT)
    making.add_argument("folder", type=Path)
    comparing = commands.add_parser("versus", help="dense decoding beside transformers'")
    comparing.add_argument("folder")
    comparing.add_argument("--tokens", type=int, default=64)
    comparing.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.preset, arguments.folder)
    elif arguments.command == "versus":
        versus(arguments.folder, arguments.tokens, arguments.runs)
    elif arguments.folder:
        load_and_report(arguments.folder, arguments.dtype)
    else:
        load_large(arguments.dtype)


if __name__ == "__main__":
    main()
