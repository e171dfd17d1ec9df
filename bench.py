"""Measurements that a reader can repeat. Every command prints the machine it ran on.

    python bench.py speed                     dense and sparse, stage by stage, end to end
    python bench.py accuracy                  SparseVILA, other methods and variants, tiny model
    python bench.py needle                    one glyph in clips of growing length, tiny model
    python bench.py load                      memory and time of loading 10^9 weights
    python bench.py make smolvlm-256m FOLDER  a checkpoint of random weights in a real model's shape
    python bench.py versus FOLDER             our dense decoding beside Hugging Face transformers'

`versus` and `speed --versus transformers` need transformers installed, `--figure` matplotlib. To
see the stages of a model, dense and sparse, give the folder to `python sparsevila.py --model
FOLDER`. Axes as in model.py.
"""

import argparse
import importlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import awq
import baselines
import model as model_file
from kernels import decode_attention
from model import (
    CPUINFO,
    VLM,
    Config,
    KVCache,
    Processor,
    Stopwatch,
    TextConfig,
    View,
    VisionConfig,
    load,
)
from sparsevila import (
    Dense,
    RetrievalCache,
    SparseVILA,
    check_sparsity,
    drop_output_that_cannot_be_written,
)
from tiny.evaluate import Method, find_needle, measure

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


def show_progress(done: int, total: int) -> None:
    """How far a measurement is, on a line of standard error that is written over."""
    end = "\n" if done == total else ""
    print(f"\r{done} of {total}", end=end, file=sys.stderr, flush=True)


def machine(device: torch.device = CPU) -> str:
    """Processor, cores, the GPU that is used, torch and date, in one line."""
    name = platform.processor() or platform.machine()
    if CPUINFO.exists():
        lines = CPUINFO.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    if device.type == "cuda":
        name += f", {torch.cuda.get_device_name(device)}"
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
    OSError for a folder that is there or cannot be made."""
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
    """A byte is a token; the special tokens have SmolVLM's ids, unused words those between."""
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
    """Load, run one token through the decoder, and print one JSON object."""
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


# --- speed ----------------------------------------------------------------------------------------


class Preset(NamedTuple):
    """A decoder, a vision tower and a clip in a real model's shape, all of random weights."""

    config: Config
    pictures: int  # frames, or tiles of pictures
    tokens: int = 0  # visual tokens of a picture whose tower is not one of ours, and is left out


def _qwen2(**sizes: Any) -> TextConfig:
    common = TextConfig(vocab=152064, layers=28, rope_theta=1e6, qkv_bias=True)
    return replace(common, **{"max_positions": 2**20} | sizes)


_SIGLIP_SO400M = VisionConfig(
    width=1152, mlp=4304, layers=27, heads=16, image_size=384, patch_size=14,
    activation="gelu_pytorch_tanh", eps=1e-6, class_token=False,
)  # fmt: skip
_QWEN2_7B = _qwen2(width=3584, mlp=18944, heads=28, kv_heads=4)
_VILA = {"projector": "mlp_downsample", "merge": 2}
PRESETS = {
    # 256 frames of 27 x 27 patches, 2 x 2 merged: 50,176 visual tokens
    "longvila-7b": Preset(Config(_SIGLIP_SO400M, _QWEN2_7B, **_VILA), 256),
    "longvila-1.5b": Preset(
        Config(
            _SIGLIP_SO400M,
            _qwen2(vocab=151936, width=1536, mlp=8960, heads=12, kv_heads=2, tied=True),
            **_VILA,
        ),
        256,
    ),
    # the whole and four tiles: 2,880 visual tokens
    "llava-next-7b": Preset(
        Config(
            VisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14),
            TextConfig(vocab=32064, eps=1e-5, max_positions=2**20),
        ),
        5,
    ),
    # one picture of 1920 x 1080; the tower is never called
    "qwen2.5-vl-7b": Preset(
        Config(replace(_SIGLIP_SO400M, layers=1, feature_layer=-1), _QWEN2_7B), 1, tokens=2691
    ),
    # the whole and sixteen tiles: 1,088 visual tokens
    "smolvlm-256m": Preset(
        Config(
            VisionConfig(
                768, 3072, 12, 12, image_size=512, patch_size=16, activation="gelu_pytorch_tanh",
                eps=1e-6, feature_layer=-1, class_token=False, last_norm=True,
            ),
            TextConfig(
                vocab=49280, width=576, mlp=1536, layers=30, heads=9, kv_heads=3, head_dim=64,
                max_positions=2**20,
            ),
            projector="linear", merge=4,
        ),
        17,
    ),
    # small enough for two cores, long enough to mean something: 64 frames, 16,384 visual tokens
    "laptop": Preset(
        Config(
            VisionConfig(
                384, 1536, 6, 6, image_size=224, patch_size=14, activation="gelu_pytorch_tanh",
                eps=1e-6, feature_layer=-1, class_token=False,
            ),
            TextConfig(
                vocab=8192, width=512, mlp=1408, layers=8, heads=8, kv_heads=4, head_dim=64,
                max_positions=2**20,
            ),
        ),
        64,
    ),
}  # fmt: skip
TEXT_TOKENS = 16  # before the pictures
QUESTION_TOKENS = 32


def random_model(
    config: Config, device: torch.device, dtype: torch.dtype, *, quantised: bool = False
) -> VLM:
    """Weights of size 1 / sqrt(inputs), norms of 1, biases of 0: finite whatever the depth.

    quantised: the decoder's blocks are rounded to four bits and the tower's to eight, as awq.py
    would leave them (which numbers are in the weights makes no difference to the time), each as
    soon as it is made: the whole model is never there in full precision.
    """
    with torch.device("meta"):
        model = VLM(config)
    model = model.to(dtype).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)

    def fill(part: torch.nn.Module) -> None:
        for module in part.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
                for name, weight in module.named_parameters(recurse=False):
                    if weight.dim() > 1:
                        weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
                    else:  # of a norm, or a bias
                        weight.fill_(float(name == "weight"))

    for blocks, rounded in (
        (model.decoder.layers, four_bits),
        (model.vision_tower.layers, awq.W8A8Linear.from_linear),
    ):
        for block in blocks:
            fill(block)
            if quantised:
                awq.replace_linears(block, rounded)
    fill(model)
    if config.text.tied:  # which `to_empty` undoes
        model.lm_head.weight = model.decoder.embed_tokens.weight
    return model


def four_bits(linear: torch.nn.Linear) -> torch.nn.Module:
    """A decoder's linear layer in four bits."""
    return awq.W4A16Linear.from_linear(linear, math.gcd(128, linear.in_features))


def check_memory(
    config: Config, dtype: torch.dtype, pictures: int, n: int, quantised: bool
) -> None:
    """Raise ValueError if less is free than a dense run on a CPU needs at least: weights, pixels,
    keys and values of so many pictures of n tokens, and the activations of one block."""
    with torch.device("meta"):
        model = VLM(config)
    text, size, S = config.text, dtype.itemsize, config.vision.image_size
    blocks = {p for p in model.decoder.layers.parameters() if p.dim() > 1}
    rounded = {p for p in model.vision_tower.layers.parameters() if p.dim() > 1}
    row = 2 * text.layers * text.kv_heads * text.head_dim + 2 * text.mlp
    needed = pictures * (4 * 3 * S * S + n * size * row)  # pixels are in float32
    for weight in model.parameters():
        share = 0.5 / size if weight in blocks else 1 / size if weight in rounded else 1
        needed += weight.numel() * size * (share if quantised else 1)
    meminfo = Path("/proc/meminfo")  # Linux
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = [1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")]
    if free and needed > free[0]:
        raise ValueError(
            f"this needs at least {needed / 1e9:.1f} GB, {free[0] / 1e9:.1f} GB are free: choose a "
            "smaller --preset or --visual-tokens, or --quantised, --dtype or --device"
        )


class Script(Processor):
    """What `SparseVILA` needs of one: noise for pictures, prompts of fixed length."""

    def __init__(self, config: Config, pictures: int):
        S = config.vision.image_size
        noise = torch.Generator().manual_seed(1)
        self.noise = torch.randn(pictures, 3, S, S, generator=noise)
        self.image_token_id = config.image_token_id

    def views(self, pictures: list, fps: float | None = None) -> list[View]:
        return [View(picture, number) for number, picture in enumerate(pictures)]

    def pixels(self, views: list[View]) -> Tensor:
        return self.noise

    def context(self, counts: list[int], views: list[View] | None = None) -> list[int]:
        return [*range(1, TEXT_TOKENS + 1), *[self.image_token_id] * sum(counts)]

    def question(self, text: str, *, first: bool, views: list[View] | None = None) -> list[int]:
        return list(range(100, 100 + QUESTION_TOKENS))

    def decode(self, ids: list[int]) -> str:
        return ""


@contextmanager
def timed(owner: Any, name: str, device: torch.device) -> Iterator[list[float]]:
    """While open, every call of owner.name adds its milliseconds to a list."""
    function, times = getattr(owner, name), []

    def measured(*arguments, **options):
        watch = Stopwatch(device)
        result = function(*arguments, **options)
        watch.lap("call")
        times.append(watch.milliseconds["call"])
        return result

    setattr(owner, name, measured)
    try:
        yield times
    finally:
        setattr(owner, name, function)


class StaticStep:
    """A decoding step that a CUDA graph can replay: all that changes, the token, its position and
    the rows to write, is in tensors on the device. Continues a session's cache, greedily."""

    def __init__(self, model: VLM, cache: KVCache, first: int, steps: int):
        self.model = model
        self.caches = [cache, cache.packed] if isinstance(cache, RetrievalCache) else [cache]
        new = {"device": model.device, "dtype": torch.int64}
        self.rows = [torch.tensor([each.length], **new) for each in self.caches]
        self.position = torch.tensor([cache.next_position], **new)
        self.token = torch.tensor([first], **new)
        self.state = [self.token, self.position, *self.rows]
        for each in self.caches:
            for layer, length in enumerate(each.filled):  # make room for the rows to come
                k, v = (
                    b[:, :, :1].expand(-1, -1, steps, -1) for b in (each.k[layer], each.v[layer])
                )
                each.append(layer, k, v)
                each.filled[layer] = length

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write one row into every cache; attention over the last of them."""
        for cache, row in zip(self.caches, self.rows):
            cache.k[layer].index_copy_(2, row, k)
            cache.v[layer].index_copy_(2, row, v)
        length = self.rows[-1][0] + 1
        return decode_attention(q, cache.k[layer], cache.v[layer], length=length)

    @torch.no_grad()
    def __call__(self) -> None:
        embedding = self.model.decoder.embed_tokens(self.token)[None]
        hidden = self.model.decoder(embedding, self.position, self.attend)
        self.token.copy_(self.model.lm_head(hidden[0, -1]).argmax())
        for rows in (self.position, *self.rows):
            rows += 1

    def captured(self) -> Callable[[], None]:
        """The step as a CUDA graph."""
        start = [tensor.clone() for tensor in self.state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled before the capture
            self()
            self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        for tensor, value in zip(self.state, start):
            tensor.copy_(value)
        return graph.replay


def decode_statically(
    model: VLM, cache: KVCache, first: int, steps: int
) -> tuple[list[int], float]:
    """The tokens after the first and the milliseconds they take, by a CUDA graph on a GPU. To
    capture it is not counted: a session could pack into the same buffer for every question."""
    static = StaticStep(model, cache, first, steps + 2)
    step = static
    if model.device.type == "cuda":
        with torch.cuda.device(model.device):
            step = static.captured()
    made, watch = [], Stopwatch(model.device)
    for _ in range(steps):
        step()
        made.append(static.token.clone())
    watch.lap("decode")
    return torch.cat(made).tolist(), watch.milliseconds["decode"]


# What is measured in a run, in the order of the data; milliseconds.
STAGES = ("vision", "salience", "prune", "prefill", "question", "scoring", "packing", "decode")


def run_once(session: SparseVILA, pictures: int, tokens: int) -> tuple[dict[str, float], list[int]]:
    """One clip, one question and its answer: milliseconds by stage, bytes of keys and values, peak
    of memory in bytes; and the tokens of the answer."""
    device, blank = session.model.device, Image.new("RGB", (1, 1))
    graph = device.type == "cuda"
    reset_peak(device)
    with (
        timed(model_file, "token_salience", device) as salience,
        timed(RetrievalCache, "score", device) as scoring,
    ):
        session.see([blank] * pictures)
        answer = session.ask("?", max_new_tokens=1 if graph else tokens)
    laps, cache = session.stats["milliseconds"] | answer.timings, session.cache
    made = answer.token_ids
    if graph:
        rest, milliseconds = decode_statically(session.model, cache, made[0], tokens - 1)
        made, laps["decode"] = made + rest, laps["decode"] + milliseconds
    laps["vision"] -= sum(salience)
    laps["question"] -= sum(scoring)
    laps |= {"salience": sum(salience), "scoring": sum(scoring), "packing": laps["retrieve"]}
    if isinstance(session, Dense):
        laps["salience"] = 0.0  # a dense model has no use for it
    run = {stage: laps[stage] for stage in STAGES}
    run["end to end"] = sum(run.values())
    run["first token"] = run["end to end"] - run["decode"]
    buffers = [*cache.k, *cache.v]
    row = sum(buffer[:, :, 0].nbytes for buffer in buffers)
    run["bytes attended"] = answer.kv_bytes_per_token + row * tokens / 2  # each row is read too
    if isinstance(cache, RetrievalCache):
        buffers += [*cache.packed.k, *cache.packed.v]
    run["bytes held"] = sum(buffer.nbytes for buffer in buffers)
    return run | {"peak bytes": peak(device)}, made


def reset_peak(device: torch.device) -> None:
    """Begin to watch the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):  # Linux
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident


def peak(device: torch.device) -> int:
    """Bytes that were in use at most: allocated on a GPU, resident on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak()


def read_bandwidth(device: torch.device) -> float:
    """Bytes per millisecond at which a large tensor is read and added up: the best of a few."""
    big = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)
    watch, times = Stopwatch(device), []
    for _ in range(6):
        big.sum()
        watch.lap("sum")
        times.append(watch.milliseconds["sum"])
    return big.nbytes / min(times)


def decoder_bytes(model: VLM) -> int:
    """Bytes of all weights that a decoding step reads: blocks, last norm and output head."""
    parts = (model.decoder.layers, model.decoder.norm, model.lm_head)
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    return sum(t.nbytes for t in tensors)


def leave_out_tower(model: VLM, pictures: int, n: int) -> None:
    """Let `encode` give noise for n visual tokens a picture, in no time."""
    width = model.config.merge**2 * model.config.vision.width
    noise = torch.Generator(model.device).manual_seed(2)
    new = {"device": model.device, "generator": noise}
    features = torch.randn(pictures, n, width, dtype=model.dtype, **new)
    salience = torch.rand(pictures, n, **new)
    model.encode = lambda pixels: (features, salience)


def compile_decoding(model: VLM, eager: bool) -> str:
    """Compile the decoding of the model unless `eager`, or in vain; how it decodes."""
    if eager:
        return "eager"
    try:
        model.compile_decoding()
    except RuntimeError as error:
        return f"eager ({error})"
    return "torch.compile"


def speed(arguments: argparse.Namespace) -> dict:
    """Dense and sparse in turn on one random model: the figures of `python bench.py speed`. Raises:
    ValueError for options that mean nothing, or a model that does not fit."""
    config, pictures, tokens_each = PRESETS[arguments.preset]
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    sparsity = ("prefill_sparsity", "decode_sparsity")
    settings = {name: getattr(arguments, name) for name in sparsity}
    n = tokens_each or config.visual_tokens
    pictures = max(1, round((arguments.visual_tokens or pictures * n) / n))
    check_speed(arguments, settings, device, TEXT_TOKENS + pictures * n)
    if device.type == "cpu":
        check_memory(config, dtype, pictures, n, arguments.quantised)
    script = Script(config, pictures)
    model = random_model(replace(config, stop_ids=()), device, dtype, quantised=arguments.quantised)
    decoding = "CUDA graph" if device.type == "cuda" else compile_decoding(model, arguments.eager)
    if tokens_each:  # a tower that is not ours: features and salience from nowhere
        leave_out_tower(model, pictures, n)
    theirs = Transformers(model, script, pictures * n) if arguments.versus else None
    kinds = {"dense": Dense, "sparse": SparseVILA}
    rounds: list[dict[str, dict]] = []
    bandwidths = []
    for number in range(arguments.runs + 1):
        tokens = arguments.answer_tokens if number else 2  # the first round warms up
        runs, made = {}, {}
        for name in list(kinds)[:: -1 if number % 2 else 1]:  # neither is always first
            session = kinds[name](model, script, **settings)
            runs[name], made[name] = run_once(session, pictures, tokens)
        rounds.append(runs)
        bandwidths.append(read_bandwidth(device))
        if theirs:
            theirs.run(made["dense"])
        show_progress(number, arguments.runs)
    result = {
        "machine": machine(device), "preset": arguments.preset, "precision": model.precision,
        "decoding": decoding, "visual_tokens": pictures * n, "question_tokens": QUESTION_TOKENS,
        "answer_tokens": arguments.answer_tokens, "runs": arguments.runs, "tower": not tokens_each,
        **settings,
    }  # fmt: skip
    if decoding == "torch.compile":  # when the first round decodes
        result["compile_seconds"] = sum(run["decode"] for run in rounds[0].values()) / 1000
    weights = decoder_bytes(model)
    result |= summarise(rounds[1:], arguments.answer_tokens, weights, bandwidths[1:])
    return result | ({"transformers": theirs.summary(result["dense"])} if theirs else {})


def check_speed(
    arguments: argparse.Namespace, settings: dict, device: torch.device, context: int
) -> None:
    """Raise ValueError or ImportError, before anything is made, for options that mean nothing."""
    for name, sparsity in settings.items():
        check_sparsity(name, sparsity)
    if arguments.answer_tokens < 2:
        raise ValueError("--answer-tokens must be at least 2, for there to be a decoding step")
    rows = context + QUESTION_TOKENS + arguments.answer_tokens
    most = PRESETS[arguments.preset].config.text.max_positions
    if rows > most:
        raise ValueError(f"context, question and answer are {rows:,} tokens, at most {most:,} fit")
    if arguments.eager and device.type == "cuda":
        raise ValueError("--eager is for a CPU: a GPU decodes by a CUDA graph")
    if arguments.versus and arguments.quantised:
        raise ValueError("--versus compares weights that are not quantised: leave out --quantised")
    if arguments.versus:
        importlib.import_module(arguments.versus)


def summarise(
    rounds: list[dict[str, dict]], tokens: int, weights: int, bandwidths: list[float]
) -> dict:
    """Medians with the least and the most, and what follows from the medians; of ratios and of the
    bound's share also the least and the most of a round. rounds: a dense and a sparse run each;
    weights: bytes; bandwidths: bytes per millisecond, after each round."""
    spread = {
        name: {key: _spread([runs[name][key] for runs in rounds]) for key in rounds[0][name]}
        for name in ("dense", "sparse")
    }
    dense, sparse = ({key: value[0] for key, value in each.items()} for each in spread.values())
    bandwidth, least, most = _spread(bandwidths)

    def bound(run: dict, rate: float) -> float:
        return (weights + run["bytes attended"]) / rate

    def reached(run: dict, rate: float) -> float:
        return bound(run, rate) / (run["decode"] / (tokens - 1))

    for name, one in (("dense", dense), ("sparse", sparse)):
        one["decode a token"] = one["decode"] / (tokens - 1)
        one["bound"], one["reached"] = bound(one, bandwidth), reached(one, bandwidth)
        shares = [reached(runs[name], rate) for runs, rate in zip(rounds, bandwidths)]
        one["reached_range"] = [min(shares), max(shares)]
    saved = dense["decode a token"] - sparse["decode a token"]
    result = {
        "read_bandwidth_gb_per_s": bandwidth / 1e6,
        "read_bandwidth_range_gb_per_s": [least / 1e6, most / 1e6],
        "decoder_weight_bytes": weights, "milliseconds_and_bytes": spread, "dense": dense,
        "sparse": sparse,
    }  # fmt: skip
    for name, stages in SPEEDUPS.items():
        result[f"{name}_speedup"] = _ratio(dense, sparse, stages)
        ratios = [_ratio(runs["dense"], runs["sparse"], stages) for runs in rounds]
        result[f"{name}_speedup_range"] = [min(ratios), max(ratios)]
    for which, stages in BEFORE_DECODING.items():
        cost = sum(sparse[stage] - dense[stage] for stage in stages)
        start, stop = break_even(cost, saved)
        result[f"break_even_tokens_{which}"], result[f"pays_up_to_tokens_{which}"] = start, stop
    return result


SPEEDUPS = {  # of which stages together
    "prefill": ("salience", "prune", "prefill"),
    "decode": ("scoring", "packing", "decode"),
    "first_token": ("first token",),
    "end_to_end": ("end to end",),
}
BEFORE_DECODING = {  # the tower's work is the same, dense and sparse
    "first_question": ("salience", "prune", "prefill", "question", "scoring", "packing"),
    "later_questions": ("question", "scoring", "packing"),
}


def break_even(cost: float, saved: float) -> tuple[float | None, float | None]:
    """Lengths of an answer, in tokens, from which on and up to which sparsity saves time, if it
    costs this much before decoding and saves that much in every step (either may be negative); the
    first token takes no step. (None, None): at no length; (x, None): from x on."""
    if cost > 0:
        return 1 + cost / saved if saved > 0 else None, None
    return 1.0, 1 + cost / saved if saved < 0 else None


def _spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def _ratio(dense: dict, sparse: dict, stages: tuple[str, ...]) -> float:
    return sum(dense[stage] for stage in stages) / sum(sparse[stage] for stage in stages)


class Transformers:
    """Hugging Face's dense decoder with the same weights, answering the same prompt."""

    def __init__(self, model: VLM, script: Script, visual_tokens: int):
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
        visual = model.project(model.encode(script.pixels([]))[0]).flatten(0, 1)
        ids = script.context([visual_tokens]) + script.question("", first=True)
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


def print_speed(result: dict) -> None:
    """A table of the stages, and what follows from it."""
    print(result["machine"])
    print(
        f"{result['preset']}, {result['precision']}, {result['visual_tokens']:,} visual tokens, "
        f"question of {result['question_tokens']}, answer of {result['answer_tokens']}; sparsity "
        f"{result['prefill_sparsity']:.0%} / {result['decode_sparsity']:.0%}; decoding: "
        f"{result['decoding']}; medians of {result['runs']} runs in turn (least to most)\n"
    )
    if not result["tower"]:
        print("without a vision tower: this model's is not one of ours\n")
    _print_stages(result)
    _print_ratios(result)
    if "transformers" in result:
        theirs = result["transformers"]
        print(
            f"transformers {theirs['version']}, dense decoder: first token "
            f"{theirs['first_token_ms']:,.1f} ms, {theirs['first_token_ratio']:.2f} x ours, then "
            f"{theirs['decode_ms_a_token']:.2f} ms a token, {theirs['decode_ratio']:.2f} x ours; "
            f"same tokens: {theirs['same_tokens']}"
            + (" (theirs without a CUDA graph)" if result["decoding"] == "CUDA graph" else "")
        )


def _print_stages(result: dict) -> None:
    dense, sparse = result["dense"], result["sparse"]

    def cell(name: str, key: str) -> str:
        middle, least, most = result["milliseconds_and_bytes"][name][key]
        return f"{middle:,.1f} ({least:,.1f} to {most:,.1f})"

    def line(label: str, dense: str, sparse: str) -> None:
        print(f"{label:36}{dense:>32}{sparse:>32}")

    line("", "dense", "sparse")
    for stage in (*STAGES, "first token", "end to end"):
        line(f"{stage}, ms", *(cell(name, stage) for name in ("dense", "sparse")))
    for label, key in (
        ("KV read a token, MB", "bytes attended"), ("KV held, MB", "bytes held"),
        ("peak memory, MB", "peak bytes"),
    ):  # fmt: skip
        line(label, *(f"{one[key] / 1e6:,.1f}" for one in (dense, sparse)))
    for label, key in (("decode, ms a token", "decode a token"), ("  its bound, ms", "bound")):
        line(label, *(f"{one[key]:.2f}" for one in (dense, sparse)))
    shares = ((one["reached"], *one["reached_range"]) for one in (dense, sparse))
    line("  bound reached", *("{:.0%} ({:.0%} to {:.0%})".format(*share) for share in shares))


def _print_ratios(result: dict) -> None:
    least, most = result["read_bandwidth_range_gb_per_s"]
    print(
        f"\nbound: decoder weights ({result['decoder_weight_bytes'] / 1e6:.0f} MB) and KV read, at "
        f"{result['read_bandwidth_gb_per_s']:.1f} GB/s, measured after every round "
        f"({least:.1f} to {most:.1f})"
    )
    if "compile_seconds" in result:
        print(f"compiling, once, in none of the stages: {result['compile_seconds']:.1f} s")

    def times(name: str) -> str:
        least, most = result[f"{name}_speedup_range"]
        return f"{result[f'{name}_speedup']:.2f} x ({least:.2f} to {most:.2f})"

    print(
        f"prefill {times('prefill')}, with salience and prune; decode {times('decode')}, with "
        f"scoring and packing; first token {times('first_token')}; end to end "
        f"{times('end_to_end')}"
    )
    for which in BEFORE_DECODING:
        start, stop = result[f"break_even_tokens_{which}"], result[f"pays_up_to_tokens_{which}"]
        if start is None:
            text = "at no length"
        elif stop is not None:
            text = f"up to {math.floor(stop)} tokens"
        else:
            text = f"from {math.ceil(start)} tokens on" if start > 1 else "at any length"
        print(f"break-even length of an answer, {which.replace('_', ' ')}: sparsity pays {text}")


def draw_speed(result: dict, file: str) -> None:
    """Seconds by stage, dense above sparse; short ones are to be read in the legend."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(10, 3.6))
    hatches, left = ("", "//", "..", "\\\\", "xx", "++", "oo", "--"), {"dense": 0.0, "sparse": 0.0}
    for stage, hatch, shade in zip(STAGES, hatches, range(len(STAGES))):
        seconds = {name: result[name][stage] / 1000 for name in left}
        for name, width in seconds.items():
            label = f"{stage}: {seconds['dense']:.2f}, {seconds['sparse']:.2f} s"
            axes.barh(
                name, width, left=left[name], hatch=hatch, edgecolor="black", height=0.6,
                color=str(0.95 - 0.08 * shade), label=label if name == "dense" else None,
            )  # fmt: skip
            left[name] += width
    for name, end in left.items():
        axes.text(end, name, f" {end:.1f} s", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(left.values()))
    axes.set_xlabel(f"seconds, {result['preset']}, {result['visual_tokens']:,} visual tokens")
    axes.legend(
        title="stage: dense, sparse", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1),
        frameon=False,
    )  # fmt: skip
    figure.savefig(file, dpi=110, bbox_inches="tight")


# --- accuracy -------------------------------------------------------------------------------------

# Of 100 visual tokens SparseVILA keeps 25 and attends to 3 while it decodes. Methods that only
# prune appear with either budget: 25 tokens, and 3 for the same cost of decoding. FastV and
# SparseVLM cannot go below half of the tokens in four layers: 62 are for comparison with them.
VARIANTS = {
    "global scope": Method(SparseVILA, options={"scope": "global"}),
    "original positions": Method(SparseVILA, options={"positions": "original"}),
    "mean-attention salience": Method(baselines.MeanSalience),
    "random salience": Method(baselines.RandomSalience),
    "random relevance": Method(baselines.RandomRetrieval),
    "one index set for all layers": Method(baselines.OneIndexSet),
    "relevance over visual keys only": Method(baselines.VisualSoftmax),
    "retrieved anew every 8 tokens": Method(baselines.Reselect),
    "retrieved anew every 2 tokens": Method(baselines.ReselectEveryTwo),
}
PRUNERS = {
    "pruning only": SparseVILA,
    "random": baselines.RandomPruning,
    "uniform": baselines.Uniform,
    "pool": baselines.Pool,
    "downsample": baselines.Downsample,
    "VisionZip": baselines.VisionZip,
    "VisionZip, last layer": baselines.VisionZipLastLayer,
    "PruMerge": baselines.PruMerge,
    "FastV": baselines.FastV,
    "SparseVLM": baselines.SparseVLM,
    "first-turn oracle": baselines.FirstTurnOracle,
}
METHODS = {
    "dense": Method(Dense, 0, 0),
    "SparseVILA": Method(SparseVILA),
    "blind": Method(baselines.Blind, 0, 0),
    **{
        f"{name}, {keep}": Method(kind, sparsity, 0)
        for name, kind in PRUNERS.items()
        for keep, sparsity in ((25, 0.75), (3, 0.975))
    },
    **{
        f"{name}, 62": Method(PRUNERS[name], 0.38, 0)
        for name in ("pruning only", "random", "uniform")
    },
    **{f"retrieval only, {n}": Method(SparseVILA, 0, 1 - n / 100) for n in (62, 3)},
    **{f"SparseVILA, {name}": method for name, method in VARIANTS.items()},
}
# What it costs (tiny/evaluate.py), then per cent right.
COSTS = ("entering", "attended", "KV kB", "CPU ms")
COLUMNS = (
    *COSTS, "color", "digit", "place", "first word", "later words", "first turn", "later turns",
    "later turns, conversation", "count", "frame",
)  # fmt: skip


def _exit(*_: Any) -> None:
    raise SystemExit(143)


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """Processes, one a core, that end at once when something goes wrong here, or when this process
    is asked to end."""
    pool = ProcessPoolExecutor(os.cpu_count(), initializer=_default_signals)
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


def accuracy(names: list[str], questions: int, seeds: int) -> dict:
    """Every method on the same unseen scenes, in both protocols: for every column, and again as
    "..., conversation", the mean over seeds and its standard deviation. A seed has scenes and
    random choices of its own."""
    each = questions // seeds
    names = list(dict.fromkeys(names))
    jobs = [
        (name, protocol, seed)
        for name in names
        for protocol in ("evaluation", "conversation")
        for seed in range(seeds)
    ]
    arguments = []
    for name, protocol, seed in jobs:
        method = METHODS[name]._replace(options=METHODS[name].options | {"protocol": protocol})
        arguments.append((method, str(HERE / "tiny"), each, (1, 4), seed * each))
    results: dict[str, dict] = {name: defaultdict(list) for name in names}
    with workers() as pool:
        measured = pool.map(measure, *zip(*arguments))
        for done, ((name, protocol, _), values) in enumerate(zip(jobs, measured), 1):
            end = ", conversation" if protocol == "conversation" else ""
            for column, value in values.items():
                results[name][column + end].append(value)
            show_progress(done, len(jobs))
    summary = {
        name: {c: [statistics.mean(v), statistics.stdev(v)] for c, v in columns.items()}
        for name, columns in results.items()
    }
    where = {"machine": machine(), "questions_of_each_kind": each * seeds, "seeds": seeds}
    return where | {"methods": summary}


def print_accuracy(result: dict) -> None:
    """A table of all methods, in Markdown."""
    print(result["machine"])
    print(
        f"{result['questions_of_each_kind']} questions of each kind, {result['seeds']} seeds: means"
        " and standard deviations over seeds\n"
    )
    print("| method | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name, values in result["methods"].items():
        cells = []
        for column in COLUMNS:
            mean, deviation = values[column]
            cells.append(f"{mean:.1f}" + ("" if column in COSTS else f" ± {deviation:.1f}"))
        print(f"| {name} | " + " | ".join(cells) + " |")


OURS = ("SparseVILA", "pruning only", "retrieval only")  # drawn in black


def draw_accuracy(result: dict, file: str) -> None:
    """Right answers in later turns against visual tokens attended to, all methods; the variants
    of SparseVILA, most of which would lie on it, if nothing else was measured."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 5.5))
    markers = itertools.cycle("s*xoD^v<>PXd+1p")
    variants = {f"SparseVILA, {variant}" for variant in VARIANTS}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in [name for name in result["methods"] if name not in variants]:
        groups[name.rsplit(",", 1)[0]].append(name)
    for group, names in (groups or {name: [name] for name in result["methods"]}).items():
        points = sorted(
            [result["methods"][name] for name in names], key=lambda point: point["attended"]
        )
        x = [max(point["attended"][0], 0.7) for point in points]  # blind has no place on a log axis
        y, error = zip(*(point["later turns"] for point in points))
        ours = group in OURS
        axes.errorbar(
            x, y, error, label=group, marker=next(markers), linestyle=":", capsize=3,
            color="black" if ours else "0.45", markersize=16 if group == OURS[0] else 8,
            markerfacecolor="black" if ours else "white",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([0.7, 3, 10, 25, 50, 100], ["0", "3", "10", "25", "50", "100"])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens of 100 that a layer attends to for each generated token")
    axes.set_ylabel("right answers in later turns, %")
    axes.set_ylim(-3, 105)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(file, dpi=110, bbox_inches="tight")


# --- needle ---------------------------------------------------------------------------------------

LENGTHS = (2, 4, 6, 8, 12, 16)  # frames of 100 visual tokens
TRAINED = 4  # the longest clips that the tiny model was trained on
DEPTHS = (0, 25, 50, 75, 100)  # per cent of the clip before the needle's frame
NEEDLE_METHODS = (
    "dense", "SparseVILA", "pruning only, 3", "VisionZip, 25", "PruMerge, 25",
)  # fmt: skip


def needle(names: list[str], clips: int) -> dict:
    """Share of right answers about one glyph, by length of the clip and depth of its frame."""
    names = list(dict.fromkeys(names))
    cells = [(name, frames, depth) for name in names for frames in LENGTHS for depth in DEPTHS]
    arguments = [
        (METHODS[name], str(HERE / "tiny"), frames, round(depth / 100 * (frames - 1)), clips)
        for name, frames, depth in cells
    ]
    right: dict[str, dict] = {name: defaultdict(list) for name in names}
    attended: dict[str, dict] = {name: defaultdict(list) for name in names}
    with workers() as pool:
        found = pool.map(find_needle, *zip(*arguments))
        for done, ((name, frames, _), values) in enumerate(zip(cells, found), 1):
            right[name][frames].append(values["right"])
            attended[name][frames].append(values["attended"])
            show_progress(done, len(cells))
    return {
        "machine": machine(), "clips": clips, "lengths": LENGTHS, "depths": DEPTHS,
        "trained": TRAINED, "right": right,
        "attended": {n: {f: statistics.mean(v) for f, v in a.items()} for n, a in attended.items()},
    }  # fmt: skip


def print_needle(result: dict) -> None:
    """A table of lengths, in Markdown."""
    print(result["machine"])
    print(
        f"{result['clips']} clips for each length and depth; mean over depths (worst depth); "
        "* longer than any in training\n"
    )
    heads = [f"{n} frames{' *' if n > result['trained'] else ''}" for n in result["lengths"]]
    print("| method | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|")
    for name, lengths in result["right"].items():
        cells = [f"{statistics.mean(v):.0f} ({min(v):.0f})" for v in lengths.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")
        cells = [f"{tokens:.0f}" for tokens in result["attended"][name].values()]
        print("| — tokens attended | " + " | ".join(cells) + " |")


def draw_needle(result: dict, file: str) -> None:
    """A heat map for each method: length to the right, depth downwards."""
    plt = pyplot()
    lengths, depths, names = result["lengths"], result["depths"], list(result["right"])
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 3.4 * rows), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names):
        values = torch.tensor([result["right"][name][frames] for frames in lengths]).T
        image = axes.imshow(values.tolist(), vmin=0, vmax=100, cmap="Greys_r", aspect="auto")
        for row, column in itertools.product(*map(range, values.shape)):
            value = values[row, column]
            shade = "black" if value > 45 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade, size=11)
        trained = lengths.index(result["trained"]) + 0.5
        axes.axvline(trained, color="0.5", linewidth=3, linestyle=":")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.tick_params(labelbottom=True)
        axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
        axes.set_title(name, fontsize=13)
    figure.supxlabel("frames")
    figure.supylabel("depth of the needle")
    figure.colorbar(image, ax=grid, label="right answers, %", pad=0.02)
    figure.savefig(file, dpi=110)


def pyplot() -> Any:
    """matplotlib's, without a screen, fonts large enough for a README."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["font.size"] = 13
    from matplotlib import pyplot

    return pyplot


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
    return "{:.2f} ({:.2f} to {:.2f})".format(*_spread(values))


# --- command line ---------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A count given on the command line."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command line; `python bench.py --help` lists the commands."""
    parser = argparse.ArgumentParser(description="Measurements that a reader can repeat.")
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("speed", help="dense and sparse, stage by stage, random weights")
    timing.add_argument("--preset", choices=PRESETS, default="laptop")
    timing.add_argument("--visual-tokens", type=positive, metavar="N", help="in whole pictures")
    timing.add_argument("--answer-tokens", type=positive, default=128, metavar="N")
    timing.add_argument("--prefill-sparsity", type=float, default=0.75, metavar="S")
    timing.add_argument("--decode-sparsity", type=float, default=0.9, metavar="S")
    timing.add_argument("--quantised", action="store_true", help="four-bit decoder, int8 tower")
    timing.add_argument(
        "--eager", action="store_true", help="on a CPU: decode without torch.compile"
    )
    timing.add_argument("--runs", type=positive, default=5, help="of each, in turn (default: 5)")
    timing.add_argument("--device", help="default: cuda if there is one, else cpu")
    timing.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"],
        help="default: float32 on a CPU, float16 on a GPU",
    )  # fmt: skip
    timing.add_argument(
        "--versus", choices=["transformers"], help="beside Hugging Face's dense decoder"
    )
    scoring = commands.add_parser("accuracy", help="all methods on the tiny model's unseen scenes")
    scoring.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    scoring.add_argument("--questions", type=positive, default=500, help="of each kind, in all")
    scoring.add_argument("--seeds", type=positive, default=5)
    finding = commands.add_parser("needle", help="a glyph in one frame of clips of growing length")
    finding.add_argument("--methods", nargs="+", choices=METHODS, default=list(NEEDLE_METHODS))
    finding.add_argument("--clips", type=positive, default=40, help="for each length and depth")
    for command in (timing, scoring, finding):
        command.add_argument("--figure", metavar="FILE", help="draw the result")
        command.add_argument("--json", action="store_true", help="one JSON object as the last line")
    loading = commands.add_parser("load", help="memory and time of loading 10^9 weights")
    loading.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    loading.add_argument("--folder", help=argparse.SUPPRESS)  # the process that is measured
    making = commands.add_parser("make", help="a checkpoint of random weights in a real shape")
    making.add_argument("preset", choices=SMOLVLM_TEXT)
    making.add_argument("folder", type=Path)
    comparing = commands.add_parser("versus", help="dense decoding beside transformers'")
    comparing.add_argument("folder")
    comparing.add_argument("--tokens", type=positive, default=64)
    comparing.add_argument("--runs", type=positive, default=5)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command line. Bad input ends it with one line on standard error and exit status 2."""
    arguments = parse_arguments(argv)
    try:
        if sys.stdout is None:
            raise ValueError("standard output must be open")
        run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # nobody reads on, as in `| head`
        raise SystemExit(141) from None
    # torch without CUDA answers a request for a GPU with an AssertionError.
    except (ValueError, OSError, RuntimeError, ImportError, AssertionError) as error:
        print(f"bench.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        drop_output_that_cannot_be_written()


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if getattr(arguments, "figure", None) is not None:
        check_figure(Path(arguments.figure))
    if arguments.command == "speed":
        result = speed(arguments)
        report(result, print_speed, draw_speed, arguments)
    elif arguments.command == "accuracy":
        if arguments.seeds < 2 or arguments.questions < arguments.seeds:
            raise ValueError("--seeds must be at least 2, and --questions at least as many")
        result = accuracy(arguments.methods, arguments.questions, arguments.seeds)
        report(result, print_accuracy, draw_accuracy, arguments)
    elif arguments.command == "needle":
        result = needle(arguments.methods, arguments.clips)
        report(result, print_needle, draw_needle, arguments)
    elif arguments.command == "make":
        make(arguments.preset, arguments.folder)
    elif arguments.command == "versus":
        versus(arguments.folder, arguments.tokens, arguments.runs)
    elif arguments.folder:
        load_and_report(arguments.folder, arguments.dtype)
    else:
        load_large(arguments.dtype)


def check_figure(file: Path) -> None:
    """Raise ValueError, before anything is measured, for a file that cannot be drawn."""
    if not file.parent.is_dir():
        raise ValueError(f"no folder to write {file} to")
    formats = pyplot().figure().canvas.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(f"--figure must end in one of {', '.join(formats)}, got {file}")


def report(result: dict, show: Callable, draw: Callable, arguments: argparse.Namespace) -> None:
    """Print a result, then its JSON, and draw it, if asked."""
    try:
        show(result)
        if arguments.json:
            print(json.dumps(result), flush=True)
    finally:  # even if nobody reads on
        if arguments.figure:
            draw(result, arguments.figure)


if __name__ == "__main__":
    main()
