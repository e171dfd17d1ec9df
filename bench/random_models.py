"""Models of random weights in the shapes of real ones, in memory and on disk, and prompts for them.

Times depend on shapes, not on what the weights say. Axes as in model.py.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import awq
from checkpoints import llava, open_folder, values
from checkpoints.processor import Processor, View
from checkpoints.weights import hub_names, translate
from model import VLM, Config, TextConfig, VisionConfig

from . import positive

# --- in memory ------------------------------------------------------------------------------------


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
_VILA_TOWER = replace(_SIGLIP_SO400M, merge=2, merge_by_columns=True)
_QWEN2_7B = _qwen2(width=3584, mlp=18944, heads=28, kv_heads=4)
PRESETS = {
    # 256 frames of 27 x 27 patches, 2 x 2 merged: 50,176 visual tokens
    "longvila-7b": Preset(Config(_VILA_TOWER, _QWEN2_7B, projector="mlp_downsample"), 256),
    "longvila-1.5b": Preset(
        Config(
            _VILA_TOWER,
            _qwen2(vocab=151936, width=1536, mlp=8960, heads=12, kv_heads=2, tied=True),
            projector="mlp_downsample",
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
                eps=1e-6, feature_layer=-1, class_token=False, last_norm=True, merge=4,
            ),
            TextConfig(
                vocab=49280, width=576, mlp=1536, layers=30, heads=9, kv_heads=3, head_dim=64,
                max_positions=2**20,
            ),
            projector="linear",
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
    """Weights of size 1 / sqrt(inputs), norms of 1, biases of 0: finite at any depth.

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
    config: Config, dtype: torch.dtype, pictures: int, n: int, quantised: list[bool]
) -> None:
    """Raise ValueError if less is free than a dense run on a CPU needs at least: weights of one
    model or several, quantised or not, pixels, keys and values of that many pictures of n tokens
    each, and the activations of one block."""
    with torch.device("meta"):
        model = VLM(config)
    text, size, S = config.text, dtype.itemsize, config.vision.image_size
    blocks = {p for p in model.decoder.layers.parameters() if p.dim() > 1}
    rounded = {p for p in model.vision_tower.layers.parameters() if p.dim() > 1}
    row = 2 * text.layers * text.kv_heads * text.head_dim + 2 * text.mlp
    needed = pictures * (4 * 3 * S * S + n * size * row)  # pixels are in float32
    for weight in model.parameters():
        share = 0.5 / size if weight in blocks else 1 / size if weight in rounded else 1
        needed += weight.numel() * size * sum(share if small else 1 for small in quantised)
    meminfo = Path("/proc/meminfo")  # Linux
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = [1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")]
    if free and needed > free[0]:
        raise ValueError(
            f"this needs at least {needed / 1e9:.1f} GB, {free[0] / 1e9:.1f} GB are free: choose a "
            "smaller --preset or --visual-tokens, or --quantised, --dtype or --device"
        )


class NoiseProcessor(Processor):
    """What a session needs of a processor: noise for pictures, prompts of fixed length."""

    stop_ids = ()

    def __init__(self, config: Config, pictures: int):
        S = config.vision.image_size
        noise = torch.Generator().manual_seed(1)
        self.noise = torch.randn(pictures, 3, S, S, generator=noise)
        self.config, self.image_token_id = config, config.image_token_id

    def views(self, pictures: Sequence) -> list[View]:
        return [View(None, number) for number in range(len(pictures))]

    def pixels(self, views: list[View]) -> Tensor:
        return self.noise

    def context(self, kept: Sequence[Tensor], views: list[View] | None = None) -> list[int]:
        return [*range(1, TEXT_TOKENS + 1), *[self.image_token_id] * sum(map(len, kept))]

    def question(self, text: str, *, first: bool, views: list[View] | None = None) -> list[int]:
        return list(range(100, 100 + QUESTION_TOKENS))

    def decode(self, ids: list[int]) -> str:
        return ""


# --- on disk --------------------------------------------------------------------------------------


CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
SMOLVLM_TOWER = {
    "model_type": "idefics3", "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
}  # fmt: skip
QWEN_TEXT = {
    "hidden_size": 2048, "vocab_size": 151936, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "max_position_embeddings": 128000,
}  # fmt: skip
# Decoders of HuggingFaceTB/SmolVLM-256M-Instruct and -500M-Instruct, llava-hf/llava-v1.6-vicuna-7b,
# Qwen/Qwen2.5-VL-3B-Instruct and Qwen3-VL-2B-Instruct.
TEXTS = {
    "smolvlm-256m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    },
    "smolvlm-500m": {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64,
    },
    "llava-next-7b": {
        "model_type": "llama", "vocab_size": 32064, "num_hidden_layers": 32, "rms_norm_eps": 1e-5,
    },
    "qwen2.5-vl-3b": QWEN_TEXT | {
        "model_type": "qwen2_5_vl_text", "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2,
        "rope_parameters": {"rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "qwen3-vl-2b": QWEN_TEXT | {
        "model_type": "qwen3_vl_text", "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "rope_parameters": {"rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    },
}  # fmt: skip
TOWERS = {
    "llava-next-7b": CLIP_L,
    "qwen2.5-vl-3b": {"hidden_size": 1280, "out_hidden_size": 2048, "tokens_per_second": 2},
    "qwen3-vl-2b": {
        "hidden_size": 1024, "depth": 24, "num_heads": 16, "intermediate_size": 4096,
        "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17],
    },
}  # fmt: skip
SMOLVLM_TOKENS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
SMOLVLM_TOKENS |= {
    token: 49152 + n
    for n, token in enumerate(
        [
            "<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
            "<fake_token_around_image>", "<image>", *(f"<reserved_{n}>" for n in range(88)),
            "<end_of_utterance>",
        ]
    )
}  # fmt: skip
QWEN_TOKENS = {
    f"<|{name}|>": 151643 + n
    for n, name in enumerate(
        ["endoftext", "im_start", "im_end", *(f"reserved_{n}" for n in range(6)), "vision_start",
         "vision_end", "vision_pad", "image_pad", "video_pad"]
    )
}  # fmt: skip
LLAVA_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench make`."""
    parser.add_argument("preset", choices=TEXTS, help="whose shape")
    parser.add_argument("folder", type=Path, help="checkpoint to make")
    parser.add_argument(
        "--layers", type=positive, metavar="N",
        help="of tower and decoder, at most; DeepStack's first (default: all)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Write the checkpoint."""
    make(arguments.preset, arguments.folder, arguments.layers)


def settings_of(preset: str, layers: int | None) -> tuple[dict[str, dict], dict[str, int]]:
    """The JSON files of a checkpoint, and the special tokens of its tokenizer with their ids."""
    text, tower = dict(TEXTS[preset]), dict(TOWERS.get(preset, SMOLVLM_TOWER))
    depth = "depth" if preset.startswith("qwen") else "num_hidden_layers"
    if layers:
        text["num_hidden_layers"] = min(layers, text["num_hidden_layers"])
        tower[depth] = min(layers, tower.get(depth, 32))
    config = {"text_config": text, "vision_config": tower}
    if preset.startswith("smolvlm"):
        text |= {"model_type": "llama", "vocab_size": 49280, "rms_norm_eps": 1e-5}
        text |= {"rope_theta": 100000, "max_position_embeddings": 8192}
        config |= {"model_type": "idefics3", "image_token_id": 49190, "scale_factor": 4}
        config["torch_dtype"] = "float32"
        images = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
        tokens, stop = SMOLVLM_TOKENS, 49279
    elif preset.startswith("llava"):
        config |= {"model_type": "llava_next", "torch_dtype": "bfloat16"}
        text["max_position_embeddings"] = 4096
        images = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
        tokens, stop = LLAVA_TOKENS, 2
    else:
        third = preset.startswith("qwen3")
        if layers:
            deep = [n for n in tower.get("deepstack_visual_indexes", ()) if n < tower["depth"]]
            tower |= {"deepstack_visual_indexes": deep} if third else {}
            tower |= {} if third else {"fullatt_block_indexes": [tower["depth"] - 1]}
        config |= {"model_type": "qwen3_vl" if third else "qwen2_5_vl", "torch_dtype": "bfloat16"}
        config["tie_word_embeddings"] = True
        images = {} if third else {"min_pixels": 3136, "max_pixels": 12845056}
        tokens, stop = QWEN_TOKENS, 151645
    files = {"config.json": config, "preprocessor_config.json": images}
    return files | {"generation_config.json": {"eos_token_id": stop}}, tokens


def make(preset: str, folder: Path, layers: int | None = None, seed: int = 0) -> None:
    """Write a checkpoint of random weights in a real model's shape, with a tokenizer of single
    bytes. Raises: OSError for a folder that is there or cannot be made."""
    folder.mkdir()
    files, special = settings_of(preset, layers)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    byte_tokenizer(special).save(str(folder / "tokenizer.json"))
    generator = torch.Generator().manual_seed(seed)
    family, read = open_folder(folder)
    config = family.config(read)
    with torch.device("meta"):
        model = VLM(config, family.tower(config) if hasattr(family, "tower") else None)
        shapes = {name: p.shape for name, p in model.named_parameters()}
    # One by one, with weights of size 1 / sqrt(inputs), norms of 1 and biases of 0.
    tensors, names = {}, hub_names(family.NAMES)
    dtype = values.stored_dtype(read)
    for name, shape in shapes.items():
        if len(shape) > 1:
            weight = torch.randn(shape, generator=generator) * shape[1:].numel() ** -0.5
        else:
            weight = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        tensors[translate(name, names)] = weight.to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def byte_tokenizer(special: dict[str, int]) -> Tokenizer:
    """A byte is a token; the special tokens have these ids, unused words those between."""
    names = {number: token for token, number in special.items()}
    plain = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    words = [names.get(n) or next(plain, f"<unused_{n}>") for n in range(max(names) + 1)]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


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
    names = hub_names(llava.NAMES)
    tensors = {translate(name, names): p.shape for name, p in model.named_parameters()}
    weight_map, total = {}, 0
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        chosen = dict(list(tensors.items())[number::shards])
        ones = {name: torch.ones(shape, dtype=torch.float16) for name, shape in chosen.items()}
        save_file(ones, folder / file)
        weight_map |= dict.fromkeys(ones, file)
        total += sum(value.nbytes for value in ones.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
