"""Tiny random models of Hugging Face transformers, with processors for pictures.

    python tests/hf_models.py qwen2_5_vl FOLDER

saves one in the hub's layout; `PICTURE` names all kinds.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.transformers_vlm import without_videos

# What stands for a picture in the prompt of each kind.
PICTURE = {
    "llava": "<image>\n",
    "llava_next": "<image>\n",
    "smolvlm": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>\n",
    "gemma3": "<boi>",
}
NAMES = {  # special tokens, and what processors call them
    "pad_token": "<pad>", "eos_token": "</s>", "image_token": "<image>",
    "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>", "video_token": "<|video_pad|>",
    "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
    "start_image_token": "<img>", "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>", "boi_token": "<boi>", "eoi_token": "<eoi>",
}  # fmt: skip
SPECIAL = [*NAMES.values(), *(f"<row_{row}_col_{column}>" for row in "12" for column in "12")]
PAD, STOP, IMAGE = range(3)  # ids
# As in LLaVA's template, what is before an answer differs from what asks for one.
CHAT = """{%- for m in messages -%}{{ m.role ~ ': ' }}{%- for part in m.content -%}
{%- if part.type == 'image' -%}{{ PICTURE }}{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{{ '</s>\n' if m.role == 'assistant' else '\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}"""
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
    "bos_token_id": None, "eos_token_id": STOP, "pad_token_id": PAD,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
SQUARE = {"height": 32, "width": 32}


def make(kind: str, **changes):
    """(model, processor) of a kind. changes: of the decoder's configuration."""
    names = NAMES | ({"image_token": "<|image_pad|>"} if kind.startswith("qwen") else {})
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), pad_token=names["pad_token"],
        eos_token=names["eos_token"], extra_special_tokens=names,
    )  # fmt: skip
    text = TEXT | {"vocab_size": len(tokenizer)} | changes
    config, images, processor, options = MAKERS[kind](kind, text)
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():  # attention that is uneven, logits that differ
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    chat = CHAT.replace("PICTURE", repr(PICTURE[kind]))
    return model, processor(images, tokenizer, chat_template=chat, **options)


def byte_tokenizer() -> Tokenizer:
    """The special tokens first, then one for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _llava(kind: str, text: dict) -> tuple:
    grids = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]} if kind != "llava" else {}
    config = (hf.LlavaNextConfig if grids else hf.LlavaConfig)(
        vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        text_config={"model_type": "llama"} | text, image_token_id=IMAGE, **grids,
    )  # fmt: skip
    images = hf.LlavaNextImageProcessorPil if grids else hf.CLIPImageProcessorPil
    options = {
        "patch_size": 8, "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    processor = hf.LlavaNextProcessor if grids else hf.LlavaProcessor
    size = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
    return config, images(**size, **grids), processor, options


def _smolvlm(kind: str, text: dict) -> tuple:
    text = {"model_type": "llama"} | text
    config = hf.SmolVLMConfig(
        vision_config=VISION, text_config=text, image_token_id=IMAGE, scale_factor=2
    )
    images = hf.Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return config, images, hf.Idefics3Processor, {"image_seq_len": 4}


def _internvl(kind: str, text: dict) -> tuple:
    config = hf.InternVLConfig(
        vision_config=VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2"} | text,
        image_token_id=SPECIAL.index("<IMG_CONTEXT>"), downsample_ratio=0.5,
    )  # fmt: skip
    images = hf.GotOcr2ImageProcessorPil(
        size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4
    )
    return config, images, without_videos(hf.InternVLProcessor), {"image_seq_length": 4}


def _gemma3(kind: str, text: dict) -> tuple:
    layers = ["sliding_attention", "full_attention"] * 2
    windows = {"sliding_window": 8, "layer_types": layers, "query_pre_attn_scalar": 8}
    config = hf.Gemma3Config(
        vision_config=VISION | {"model_type": "siglip_vision_model"}, text_config=windows | text,
        mm_tokens_per_image=4, image_token_id=IMAGE,
        boi_token_index=SPECIAL.index("<boi>"), eoi_token_index=SPECIAL.index("<eoi>"),
    )  # fmt: skip
    images = hf.Gemma3ImageProcessorPil(size=SQUARE)
    return config, images, hf.Gemma3Processor, {"image_seq_length": 4}


def _qwen(kind: str, text: dict) -> tuple:
    third = kind == "qwen3_vl"
    patch = 16 if third else 14
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 2,
        "out_hidden_size": 32, "patch_size": patch, "spatial_merge_size": 2,
    }  # fmt: skip
    if third:
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    else:
        vision |= {"window_size": 56, "fullatt_block_indexes": [2]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    rope |= {"mrope_interleaved": True} if third else {}
    tokens = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = [SPECIAL.index(f"<|{token}|>") for token in tokens]
    keys = "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"
    config = (hf.Qwen3VLConfig if third else hf.Qwen2_5_VLConfig)(
        vision_config=vision, text_config={"rope_parameters": rope} | text, **dict(zip(keys, ids))
    )
    size = {"shortest_edge": (4 * patch) ** 2, "longest_edge": (16 * patch) ** 2}
    images = hf.Qwen2VLImageProcessorPil(patch_size=patch, size=size)
    processor = hf.Qwen3VLProcessor if third else hf.Qwen2_5_VLProcessor
    return config, images, without_videos(processor), {}


MAKERS = {
    "llava": _llava, "llava_next": _llava, "smolvlm": _smolvlm, "internvl": _internvl,
    "gemma3": _gemma3, "qwen2_5_vl": _qwen, "qwen3_vl": _qwen,
}  # fmt: skip


def save(kind: str, folder: Path) -> None:
    """In the hub's layout."""
    model, processor = make(kind)
    for part in (model, processor.image_processor, processor):
        part.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=PICTURE, help="architecture")
    parser.add_argument("folder", type=Path, help="checkpoint to make")
    arguments = parser.parse_args()
    save(arguments.kind, arguments.folder)
