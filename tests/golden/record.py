"""Record what Hugging Face transformers computes: the oracle of tests/test_golden.py.

The only place where transformers is needed. Run it in an environment of its own:

    pip install torch torchvision transformers==5.23.0 pillow==13.0.0 num2words
    python tests/golden/record.py [--out FOLDER] [FAMILY ...]

Nothing of this project is imported. For every family it makes FOLDER/FAMILY/, a tiny checkpoint of
random weights in the family's own file layout, and FOLDER/FAMILY.safetensors: pictures, the pixels
and token ids that the public processor makes of them, the tower's features, the attention of its
last layer, the projected features, all logits and the tokens of a greedy answer. The family "tiny"
is the model of tiny/, which stays as it is.

VILA's models are not in transformers. Their tower (SiglipVisionModel), decoder (Qwen2ForCausalLM)
and picture processor are; the projector, the cutting of pictures and the prompt are written here,
patch by patch, after VILA's public code (llava/model/multimodal_projector/base_projector.py,
llava/mm_utils.py).
"""

import argparse
import json
import random
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.image_processing_utils import select_best_resolution

ROOT = Path(__file__).resolve().parent.parent.parent
QUESTION = "what is it? 42\n\nIt's naïve…"  # digits, empty lines, contractions, accents
TEXTS = [QUESTION, "where is the red car", "User: Assistant: USER: ASSISTANT: what who system"]
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
VISION |= {"num_attention_heads": 3, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}


# --- pictures, weights, files ---------------------------------------------------------------------


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Coarse noise, so that resizing and cutting show."""
    rng = random.Random(seed)
    small = Image.frombytes("RGB", (9, 7), bytes(rng.randrange(256) for _ in range(9 * 7 * 3)))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def as_tensor(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(
        image.height, image.width, 3
    )


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Weights that make attention uneven, logits different and norms and biases count."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() > 1:
            scale = 2.0 / parameter[0].numel() ** 0.5
            parameter.data = noise * (1.0 if "embed" in name else scale)
        else:
            parameter.data = 0.3 * noise + (1.0 if "norm" in name and "weight" in name else 0.0)
    return model.eval().requires_grad_(False)


# Our prompts as chat templates, for examples/transformers_vlm.py.
LLAVA_CHAT = r"""{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set pictures = message.content | selectattr('type', 'equalto', 'image') | list -%}
{{ 'USER: ' }}
{%- for picture in pictures -%}
{{ '<image>\n' }}
{%- endfor -%}
{{ message.content[-1].text ~ ' ASSISTANT:' }}
{%- else -%}
{{ message.content[-1].text ~ '</s>' }}
{%- endif -%}
{%- endfor -%}
"""
SMOLVLM_CHAT = r"""{%- for message in messages -%}
{%- set pictures = message.content | selectattr('type', 'equalto', 'image') | list -%}
{%- if message.role == 'user' -%}
{{ ('<|im_start|>User:' if loop.first else 'User: ') ~ '<image>' * (pictures | length) }}
{%- endif -%}
{{ message.content[-1].text ~ '<end_of_utterance>\n' }}
{%- if message.role == 'user' -%}
{{ 'Assistant:' }}
{%- endif -%}
{%- endfor -%}
"""


def write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def write_weights(file: Path, tensors: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(own, file, metadata={"format": "pt"})


def renamed(model: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """Its tensors with the names that the hub's files have: prefixes replaced, first match wins."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = next((old for old in names if name.startswith(old)), None)
        tensors[names[old] + name.removeprefix(old) if old is not None else name] = tensor
    return tensors


# --- tokenizers -----------------------------------------------------------------------------------


def byte_tokenizer(split: str | None, special: list[str]) -> Tokenizer:
    """Byte-level BPE, trained on a few words. split: Qwen2's pattern, or None for SmolVLM's, which
    takes digits apart."""
    tokenizer = Tokenizer(models.BPE())
    if split:
        tokenizer.normalizer = normalizers.NFC()
        steps = [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "\n\n\n\nUser: you are provided"] * 3, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def llama_tokenizer() -> Tokenizer:
    """Like Llama's: "▁" for spaces and before every text, bytes for unknown characters, <s>
    first."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    vocab += ["▁", *sorted(set("".join(TEXTS)) - set(" \n…"))]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


# --- recording ------------------------------------------------------------------------------------


def record_llava_like(model: nn.Module, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Everything from pixels to tokens, for models with a CLIP tower in transformers."""
    layer = model.config.vision_feature_layer
    tower = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    features = tower.hidden_states[layer][:, 1:]
    inputs = {"input_ids": ids[None], "pixel_values": pixels}
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, len(ids) :]
    return {
        "pixels": pixels,
        "input_ids": ids,
        "features": features,
        "attention": tower.attentions[-1][:, :, :1].clone(),  # the class token's
        "projected": model.model.multi_modal_projector(features),
        "logits": model(**inputs).logits,
        "tokens": tokens,
    }


def record_tiny(out: Path) -> dict[str, Tensor]:
    from transformers import LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = ROOT / "tiny"
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    page = Image.open(folder / "samples" / "receipt.png").convert("RGB")
    image_processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = image_processor(page, return_tensors="pt")["pixel_values"]
    image = "<image>" * model.config.image_seq_length
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(f"USER: {image}\nhow much is the coffee? ASSISTANT:")["input_ids"]
    return record_llava_like(model, pixels, torch.tensor(ids))


LLAVA_NAMES = {  # of transformers today, and of the hub's files
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}


def record_llava(out: Path) -> dict[str, Tensor]:
    """LLaVA-1.5: CLIP, two layers, Llama with as many key/value heads as heads; hub-old names."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer, folder = llama_tokenizer(), out / "llava"
    image_id, vocab = tokenizer.token_to_id("<image>"), tokenizer.get_vocab_size()
    config = {
        "model_type": "llava",
        "image_token_index": image_id,
        "torch_dtype": "float32",
        "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        "text_config": {
            **TEXT, "model_type": "llama", "vocab_size": vocab, "rms_norm_eps": 1e-5,
            "num_key_value_heads": 4,
        },
    }  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(**config))
    randomise(model, 1).set_attn_implementation("eager")
    del config["text_config"]["num_key_value_heads"]  # as on the hub: as many as heads
    images = {
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    write_json(folder / "preprocessor_config.json", images)
    rule = {
        "processor_class": "LlavaProcessor", "patch_size": 8, "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default", "image_token": "<image>",
    }  # fmt: skip
    write_json(folder / "processor_config.json", rule)
    (folder / "chat_template.jinja").write_text(LLAVA_CHAT)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_weights(folder / "model.safetensors", renamed(model, LLAVA_NAMES))
    pictures = [picture(1, 75, 50), picture(2, 33, 90)]
    process = CLIPImageProcessorPil(**images)
    pixels = process(pictures, return_tensors="pt")["pixel_values"]
    slow = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    many = slow(f"USER: {'<image>' * 16}\n{'<image>' * 16}\n{QUESTION} ASSISTANT:")["input_ids"]
    ids = slow(f"USER: {'<image>' * 16}\n{QUESTION} ASSISTANT:")["input_ids"]
    return record_llava_like(model, pixels[:1], torch.tensor(ids)) | {
        "picture_0": as_tensor(pictures[0]),
        "picture_1": as_tensor(pictures[1]),
        "many_pixels": pixels,
        "many_input_ids": torch.tensor(many),
    }


def record_llava_next(out: Path, name: str) -> dict[str, Tensor]:
    """llava_next: Vicuna's prompt, hub-old names. llava_next_mistral: Mistral's prompt and decoder,
    names and settings as transformers write them today."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    tokenizer, folder, new = llama_tokenizer(), out / name, name.endswith("mistral")
    image_id, vocab = tokenizer.token_to_id("<image>"), tokenizer.get_vocab_size()
    canvases = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    text = {**TEXT, "model_type": "mistral" if new else "llama", "vocab_size": vocab}
    text |= {"rms_norm_eps": 1e-5}
    if new:
        text |= {"sliding_window": None}
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    else:
        text |= {"rope_theta": 10000.0}
    config = {
        "model_type": "llava_next", "image_token_index": image_id, "torch_dtype": "float32",
        "image_grid_pinpoints": canvases, "tie_word_embeddings": False,
        "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
        "text_config": text,
    }  # fmt: skip
    theirs = json.loads(json.dumps(config))
    theirs["text_config"].setdefault(
        "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}
    )
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**theirs))
    randomise(model, 5 + new).set_attn_implementation("eager")
    images = {
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3,
        "image_grid_pinpoints": canvases,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    rule = {"processor_class": "LlavaNextProcessor", "patch_size": 8}
    rule |= {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    if new:
        write_json(folder / "processor_config.json", {"image_processor": images, **rule})
    else:
        write_json(folder / "preprocessor_config.json", images)
        write_json(folder / "processor_config.json", rule)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_weights(folder / "model.safetensors", renamed(model, {} if new else LLAVA_NAMES))

    slow = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    process = LlavaNextProcessor(
        LlavaNextImageProcessorPil(**images), slow, patch_size=8, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    start, end = ("[INST] ", " [/INST]") if new else ("USER: ", " ASSISTANT:")
    if not new:
        start = (
            "A chat between a curious human and an artificial intelligence assistant. The assistant"
            " gives helpful, detailed, and polite answers to the human's questions. " + start
        )
    pictures = [picture(8, 75, 50), picture(9, 33, 90), picture(10, 30, 31), picture(11, 200, 9)]

    def made(shown: list[Image.Image]) -> tuple[dict, Tensor]:
        """Inputs, and the pixels of all tiles that are no padding."""
        prompt = start + "<image>\n" * len(shown) + QUESTION + end
        inputs = process(images=shown, text=prompt, return_tensors="pt")
        counts = [
            1 + (h // 32) * (w // 32)
            for size in inputs["image_sizes"].tolist()
            for h, w in [select_best_resolution(size, canvases)]
        ]
        return inputs, torch.cat([x[:n] for x, n in zip(inputs["pixel_values"], counts)])

    inputs, pixels = made(pictures[:1])
    many, many_pixels = made(pictures)
    inputs.pop("token_type_ids", None)
    tower = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    features = tower.hidden_states[-2][:, 1:]
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return {
        "pixels": pixels,
        "input_ids": inputs["input_ids"][0],
        "features": features,
        "attention": tower.attentions[-1][:, :, :1].clone(),
        "projected": model.model.multi_modal_projector(features),
        "logits": model(**inputs).logits,
        "tokens": tokens[0, inputs["input_ids"].shape[1] :],
        "many_pixels": many_pixels,
        "many_input_ids": many["input_ids"][0],
        **{f"picture_{number}": as_tensor(image) for number, image in enumerate(pictures)},
    }


def record_smolvlm(out: Path, version: int = 1) -> dict[str, Tensor]:
    """SmolVLM (Idefics3) and SmolVLM2: SigLIP's last layer, pixel shuffle, grouped heads, tiles."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
    )  # fmt: skip
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm import processing_smolvlm

    folder = out / ("smolvlm" if version == 1 else "smolvlm2")
    rows = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)] if version == 2 else []
    tokenizer = byte_tokenizer(
        None, ["<|im_start|>", "<|im_end|>", "<global-img>", *rows, "<fake_token_around_image>",
               "<image>", "<end_of_utterance>"],
    )  # fmt: skip
    end, image_id = (tokenizer.token_to_id(token) for token in ("<end_of_utterance>", "<image>"))
    config = {
        "model_type": "idefics3" if version == 1 else "smolvlm",
        "image_token_id": image_id,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vision_config": {
            **VISION, "model_type": "idefics3" if version == 1 else "smolvlm_vision",
        },
        "text_config": {
            **TEXT, "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(),
            "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "bos_token_id": 0, "eos_token_id": 2,
        },
    }  # fmt: skip
    kind, settings = (
        (Idefics3ForConditionalGeneration, Idefics3Config)
        if version == 1
        else (SmolVLMForConditionalGeneration, SmolVLMConfig)
    )
    theirs = json.loads(json.dumps(config))
    theirs["vision_config"]["model_type"] = "idefics3_vision" if version == 1 else "smolvlm_vision"
    theirs["pad_token_id"] = theirs["text_config"]["pad_token_id"] = 2
    model = kind(settings(**theirs))
    randomise(model, 2).set_attn_implementation("eager")
    images = {
        "size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}, "resample": 1,
        "do_image_splitting": True, "do_pad": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    video = {"video_sampling": {"fps": 1, "max_frames": 5, "video_size": {"longest_edge": 64}}}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": end})
    write_json(folder / "preprocessor_config.json", images | (video if version == 2 else {}))
    rule = {"processor_class": "Idefics3Processor", "image_seq_len": 4}
    write_json(folder / "processor_config.json", rule)
    (folder / "chat_template.jinja").write_text(SMOLVLM_CHAT)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_weights(folder / "model.safetensors", renamed(model, {}))

    slow = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    process = Idefics3ImageProcessorPil(**images)

    def prompt(texts: list[str], question: str) -> Tensor:
        text = f"<|im_start|>User:{''.join(texts)}{question}<end_of_utterance>\nAssistant:"
        return torch.tensor(slow(text)["input_ids"])

    def expanded(made: dict) -> list[str]:
        return [
            processing_smolvlm.get_image_prompt_string(
                r, c, 4, "<fake_token_around_image>", "<image>", "<global-img>"
            )
            for r, c in zip(made["rows"][0], made["cols"][0])
        ]

    pictures = [picture(3, 90, 50), picture(4, 20, 61), picture(5, 40, 40)]
    one = process([pictures[:1]], return_tensors="pt", return_row_col_info=True)
    many = process([pictures], return_tensors="pt", return_row_col_info=True)
    small = Idefics3ImageProcessorPil(**images | {"size": {"longest_edge": 32}})(
        [[pictures[2]]], return_tensors="pt", return_row_col_info=True
    )
    squashed = Idefics3ImageProcessorPil(**images | {"do_image_splitting": False})(
        [pictures], return_tensors="pt", return_row_col_info=True
    )
    pixels, ids = one["pixel_values"], prompt(expanded(one), QUESTION)
    inner = model.model
    attention = torch.ones(pixels.shape[1], 4, 4, dtype=torch.bool)
    tower = inner.vision_model(
        pixel_values=pixels[0], patch_attention_mask=attention, output_attentions=True
    )
    features = tower.last_hidden_state
    inputs = {"input_ids": ids[None], "pixel_values": pixels}
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=end)
    recorded = {
        "pixels": pixels[0],
        "input_ids": ids,
        "features": features,
        "attention": tower.attentions[-1],
        "projected": inner.connector(features),
        "logits": model(**inputs).logits,
        "tokens": tokens[0, len(ids) :],
        "many_pixels": many["pixel_values"][0],
        "many_input_ids": prompt(expanded(many), QUESTION),
        "small_pixels": small["pixel_values"][0],
        "small_input_ids": prompt(expanded(small), QUESTION),
        "squashed_pixels": squashed["pixel_values"][0],
        "squashed_input_ids": prompt(expanded(squashed), QUESTION),
        **{f"picture_{number}": as_tensor(image) for number, image in enumerate(pictures)},
    }
    return recorded | (record_clips(prompt) if version == 2 else {})


def record_clips(prompt) -> dict[str, Tensor]:
    """Frames that SmolVLM2's processor chooses, and its text around them. (frames, frames per
    second, as integer tensors) -> indices and token ids."""
    from num2words import num2words
    from transformers.models.smolvlm import processing_smolvlm as source
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
    from transformers.video_utils import VideoMetadata

    recorded = {}
    for case, (frames, fps) in enumerate([(1, 1.0), (3, 1.0), (10, 2.5), (90, 7.5), (4000, 1.0)]):
        metadata = VideoMetadata(total_num_frames=frames, fps=fps, duration=frames / fps)
        indices = SmolVLMVideoProcessor.sample_frames(None, metadata, num_frames=5, fps=1)
        metadata.frames_indices = indices
        video_inputs = {
            "pixel_values": torch.zeros(1, len(indices)), "video_metadata": [metadata],
        }  # fmt: skip
        processor = source.SmolVLMProcessor.__new__(source.SmolVLMProcessor)
        processor.image_seq_len, processor.image_token = 4, "<image>"
        processor.fake_image_token = "<fake_token_around_image>"
        processor.global_image_token = "<global-img>"
        text = processor.replace_video_token(video_inputs, 0)
        assert num2words(len(indices)) in text
        recorded[f"clip_{case}"] = torch.tensor([frames, fps])
        recorded[f"clip_{case}_frames"] = torch.tensor(indices)
        recorded[f"clip_{case}_input_ids"] = prompt([" " + text], QUESTION)
    return recorded


# --- Qwen -----------------------------------------------------------------------------------------


def record_qwen(out: Path, name: str) -> dict[str, Tensor]:
    """qwen2_5_vl: flat settings and hub-old names. qwen3_vl: settings of today. Pictures of any
    size, and a clip whose frames need no resizing."""
    import importlib

    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.vision_utils import get_vision_window_index

    third = name == "qwen3_vl"
    source = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    folder = out / name
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(QWEN2_SPLIT, special)
    ids = {token.strip("<|>"): tokenizer.token_to_id(token) for token in special}
    vision = {
        "depth": 4, "hidden_size": 24, "num_heads": 2, "intermediate_size": 40, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "out_hidden_size": 32,
    }  # fmt: skip
    text = {**TEXT, "vocab_size": tokenizer.get_vocab_size(), "rms_norm_eps": 1e-6}
    text |= {"torch_dtype": "float32", "eos_token_id": ids["im_end"], "tie_word_embeddings": third}
    if third:
        vision |= {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
        vision |= {"hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_vl"}
        rope = {"rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True}
        text |= {"head_dim": 16, "num_hidden_layers": 3, "model_type": "qwen3_vl_text"}
        text |= {"rope_theta": 5e6, "rope_scaling": rope}
    else:
        vision |= {"window_size": 32, "fullatt_block_indexes": [1, 3], "hidden_act": "silu"}
        vision |= {"tokens_per_second": 1}
        rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
        text |= {"rope_theta": 1e6, "rope_scaling": rope, "use_sliding_window": False}
        text |= {"sliding_window": 64}
    top = {
        "model_type": name, "torch_dtype": "float32", "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"], "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"], "tie_word_embeddings": third,
    }  # fmt: skip
    nested = {"vision_config": vision, "text_config": text}
    write_json(
        folder / "config.json",
        top | (nested if third else {**text, **top, "vision_config": vision}),
    )
    theirs = json.loads(json.dumps(top | nested))
    theirs["text_config"]["rope_parameters"] = {
        **rope, "rope_type": "default", "rope_theta": text["rope_theta"],
    }  # fmt: skip
    del theirs["text_config"]["rope_scaling"], theirs["text_config"]["rope_theta"]
    made = source.__dict__[{True: "Qwen3VLConfig", False: "Qwen2_5_VLConfig"}[third]](**theirs)
    model = AutoModelForImageTextToText.from_config(made)
    randomise(model, 20 + third).set_attn_implementation("eager")
    if third:
        model.tie_weights()
    images = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    images |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if third else {}
    limits = {"min_pixels": 2048, "max_pixels": 8192}
    if third:
        limits = {"size": {"shortest_edge": 2048, "longest_edge": 8192}}
    bounds = {"shortest_edge": 1024, "longest_edge": 2**20 if third else 8192}
    write_json(folder / "video_preprocessor_config.json", {"size": bounds, "fps": 2, **images})
    write_json(folder / "preprocessor_config.json", images | limits)
    eos = [ids["im_end"], ids["endoftext"]]
    write_json(folder / "generation_config.json", {"eos_token_id": eos})
    tokenizer.save(str(folder / "tokenizer.json"))
    old = {"model.language_model.": "model.", "model.visual.": "visual."}
    tensors = renamed(model, {} if third else old)
    if third:
        del tensors["lm_head.weight"]
    write_weights(folder / "model.safetensors", tensors)

    slow = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    process = Qwen2VLImageProcessorPil(**images, **limits)
    last: list[Tensor] = []  # attention weights of every slice, in every layer of the tower
    right = source.eager_attention_forward

    def keep_weights(module, *arguments, **options):
        result = right(module, *arguments, **options)
        if type(module).__name__.endswith("VisionAttention"):
            last.append(result[1])
        return result

    source.eager_attention_forward = keep_weights
    system = "" if third else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

    def prompt(content: str) -> Tensor:
        text = f"{system}<|im_start|>user\n{content}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        return torch.tensor([slow(text)["input_ids"]])

    def shown(kind: str, tokens: int) -> str:
        return f"<|vision_start|>{f'<|{kind}_pad|>' * tokens}<|vision_end|>"

    def run(kind: str, pixels: Tensor, grid: Tensor, input_ids: Tensor, **more) -> dict:
        """What the tower and the model make of pictures, or of clips."""
        types = (input_ids == ids["image_pad"]).int() + 2 * (input_ids == ids["video_pad"]).int()
        key = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
        inputs = {key: pixels, f"{kind}_grid_thw": grid, "mm_token_type_ids": types, **more}
        positions, _ = model.model.get_rope_index(
            input_ids, mm_token_type_ids=types, **{f"{kind}_grid_thw": grid}, **more
        )
        last.clear()
        seen = model.model.visual(pixels, grid_thw=grid)
        slices = int(grid[:, 0].sum())
        received = torch.cat([weights[0].mean((0, 1)) for weights in last[-slices:]])
        received = received.view(-1, 4).mean(1)
        if not third:
            order, _ = get_vision_window_index(
                grid, spatial_merge_size=2, window_size=32, patch_size=8
            )
            received = torch.zeros_like(received).index_copy(0, order, received)
        deeper = getattr(seen, "deepstack_features", [])
        tokens = model.generate(
            input_ids, **inputs, max_new_tokens=16, do_sample=False, eos_token_id=eos
        )
        return {
            "input_ids": input_ids[0],
            "positions": positions[:, 0],
            "salience": received,
            "projected": torch.cat([seen.pooler_output, *deeper], -1),
            "logits": model(input_ids, **inputs).logits,
            "tokens": tokens[0, input_ids.shape[1] :],
        }

    pictures = [
        picture(12, 90, 61),
        picture(13, 40, 200),
        picture(14, 17, 9),
        picture(15, 300, 180),
    ]
    one, many = process(pictures[:1], return_tensors="pt"), process(pictures, return_tensors="pt")
    counts = (many["image_grid_thw"].prod(1) // 4).tolist()
    recorded = {
        "pixels": one["pixel_values"],
        **run("image", one["pixel_values"], one["image_grid_thw"],
              prompt(shown("image", counts[0]))),
        "many_pixels": many["pixel_values"],
        "many_input_ids": prompt("".join(shown("image", n) for n in counts))[0],
        **{f"picture_{number}": as_tensor(image) for number, image in enumerate(pictures)},
    }  # fmt: skip

    # Four frames, one a second, in two pairs; each frame's half of a pair from the picture that
    # transformers makes of it twice.
    frames = [picture(16 + number, 64, 48) for number in range(4)]
    made = process(frames, return_tensors="pt")["pixel_values"].view(4, 48, 3, 2, 64)
    pairs = torch.stack([made[::2, :, :, 0], made[1::2, :, :, 1]], 3).flatten(0, 1).flatten(1)
    if third:
        content = "".join(f"<{t} seconds>{shown('video', 12)}" for t in (0.5, 2.5))
        more = {}
    else:
        content, more = shown("video", 24), {"second_per_grid_ts": torch.tensor([2.0])}
    clip = run("video", pairs, torch.tensor([[2, 6, 8]]), prompt(content), **more)
    source.eager_attention_forward = right
    recorded |= {f"clip_{key}": tensor for key, tensor in clip.items()} | {"clip_pixels": pairs}
    return recorded | {f"frame_{number}": as_tensor(image) for number, image in enumerate(frames)}


# --- VILA -----------------------------------------------------------------------------------------

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class VILAProjector(nn.Module):
    """VILA's downsampling projectors, patch by patch."""

    def __init__(self, kind: str, C: int, E: int):
        super().__init__()
        self.kind, self.side = kind, 3 if "3x3" in kind else 2
        merged = self.side**2 * C
        if self.side == 3:
            layers = [nn.Identity(), nn.LayerNorm(merged), nn.Linear(merged, 3 * C), nn.GELU()]
            layers += [nn.LayerNorm(3 * C), nn.Linear(3 * C, E), nn.GELU(), nn.Linear(E, E)]
        else:
            layers = [nn.Identity(), nn.LayerNorm(merged), nn.Linear(merged, E), nn.GELU()]
            layers += [nn.Linear(E, E)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        images, patches, C = x.shape
        n, s = round(patches**0.5), self.side
        k = -(-n // s)
        tokens = []
        for first in range(k):
            for second in range(k):
                row, column = (second, first) if self.kind == "mlp_downsample" else (first, second)
                parts = [
                    x[:, i * n + j] if i < n and j < n else torch.zeros(images, C)
                    for i in range(row * s, row * s + s)
                    for j in range(column * s, column * s + s)
                ]
                tokens.append(torch.cat(parts, -1))
        return self.layers(torch.stack(tokens, 1))


def cut(image: Image.Image, S: int, most: int) -> list[Image.Image]:
    """InternVL's and VILA's tiles of a single picture, the whole of it last."""
    grids = sorted(
        {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most},
        key=lambda grid: grid[0] * grid[1],
    )
    best, least = (1, 1), float("inf")
    for i, j in grids:
        distance = abs(image.width / image.height - i / j)
        if distance < least:
            best, least = (i, j), distance
        elif distance == least and image.width * image.height > 0.5 * S * S * i * j:
            best = (i, j)
    i, j = best
    large = image.resize((S * i, S * j))
    tiles = [
        large.crop((S * (t % i), S * (t // i), S * (t % i + 1), S * (t // i + 1)))
        for t in range(i * j)
    ]
    return tiles + [image.resize((S, S))] * (len(tiles) > 1)


def record_vila(out: Path, name: str) -> dict[str, Tensor]:
    """nvila: folders, 3x3 with a ragged edge, tokenizer of vocab and merges. longvila: folders, the
    first 2x2 projector, linear RoPE scaling, a tied head, sharded. nvila_hf: one folder, 2x2."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    kind, edge = {
        "nvila": ("mlp_downsample_3x3_fix", 32),
        "longvila": ("mlp_downsample", 40),
        "nvila_hf": ("mlp_downsample_2x2_fix", 32),
    }[name]
    folder = out / name
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer(QWEN2_SPLIT, special)
    vocab, end = tokenizer.get_vocab_size(), tokenizer.token_to_id("<|im_end|>")
    vision = {**VISION, "image_size": edge, "model_type": "siglip_vision_model"}
    text = {**TEXT, "model_type": "qwen2", "vocab_size": vocab, "rms_norm_eps": 1e-6}
    text |= {"rope_theta": 1e6, "eos_token_id": end, "torch_dtype": "float32"}
    text |= {"tie_word_embeddings": name == "longvila"}
    if name == "longvila":
        text["rope_scaling"] = {"type": "linear", "factor": 4.0}
    theirs = text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    if name == "longvila":
        scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
        theirs = theirs | {"rope_parameters": scaled, "rope_scaling": None}
    tower = SiglipVisionModel(SiglipVisionConfig(**vision))
    llm = Qwen2ForCausalLM(Qwen2Config(**theirs))
    projector = VILAProjector(kind, VISION["hidden_size"], TEXT["hidden_size"])
    for number, part in enumerate((tower, llm, projector)):
        randomise(part, 10 + number)
    if name == "longvila":
        llm.tie_weights()
    tower.set_attn_implementation("eager")
    llm.set_attn_implementation("eager")

    images = {
        "size": {"height": edge, "width": edge}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "resample": 3,
    }  # fmt: skip
    top = {"image_aspect_ratio": "dynamic", "mm_vision_select_layer": -2, "max_tiles": 6}
    top |= {"mm_vision_select_feature": "cls_patch", "num_video_frames": 4, "fps": 0.0}
    tower_names = {"": "vision_model."}
    if any(key.startswith("vision_model.") for key in tower.state_dict()):
        tower_names = {}
    if name == "nvila_hf":
        whole = {"model_type": "nvila", "mm_projector_type": kind, "torch_dtype": "float32"}
        whole |= {"text_config": text, "vision_config": vision, "image_token_id": vocab + 1}
        write_json(folder / "config.json", top | whole)
        write_json(folder / "preprocessor_config.json", images)
        tokenizer.save(str(folder / "tokenizer.json"))
        tensors = {f"vision_tower.{k}": v for k, v in renamed(tower, tower_names).items()}
        tensors |= {f"mm_projector.{k}": v for k, v in projector.state_dict().items()}
        tensors |= {f"llm.{k}": v for k, v in llm.state_dict().items()}
        write_weights(folder / "model.safetensors", tensors)
    else:
        top |= {"model_type": "llava_llama", "model_dtype": "torch.float32", "llm_cfg": {}}
        write_json(folder / "config.json", top)
        write_json(folder / "llm" / "config.json", text)
        write_json(folder / "llm" / "generation_config.json", {"eos_token_id": [end, end - 2]})
        write_json(folder / "vision_tower" / "config.json", vision)
        write_json(folder / "vision_tower" / "preprocessor_config.json", images)
        write_json(
            folder / "mm_projector" / "config.json",
            {"mm_projector_type": kind, "model_type": "v2l_projector"},
        )
        tokenizer.model.save(str(folder / "llm"))  # vocab.json and merges.txt
        added = {token: tokenizer.token_to_id(token) for token in special}
        write_json(folder / "llm" / "added_tokens.json", added)
        tensors = renamed(tower, tower_names)
        write_weights(folder / "vision_tower" / "model.safetensors", tensors)
        write_weights(folder / "mm_projector" / "model.safetensors", projector.state_dict())
        tensors = dict(llm.state_dict())
        if name == "longvila":
            del tensors["lm_head.weight"]
            halves = list(tensors)[::2], list(tensors)[1::2]
            weight_map = {}
            for number, half in enumerate(halves, 1):
                file = f"model-{number:05}-of-00002.safetensors"
                write_weights(folder / "llm" / file, {k: tensors[k] for k in half})
                weight_map |= dict.fromkeys(half, file)
            index = {"metadata": {}, "weight_map": weight_map}
            write_json(folder / "llm" / "model.safetensors.index.json", index)
        else:
            write_weights(folder / "llm" / "model.safetensors", tensors)

    slow = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    process = SiglipImageProcessorPil(**images)
    pictures = [picture(6, 100, 60), picture(7, 31, 70)]
    tiles = cut(pictures[0], edge, 6)
    pixels = process(tiles, return_tensors="pt")["pixel_values"]
    n = projector(torch.zeros(1, (edge // 8) ** 2, VISION["hidden_size"])).shape[1]
    newline = slow("\n")["input_ids"]

    def prompt(content: list[str]) -> Tensor:
        """The ids of a prompt; "<image>" in the content becomes n times -1 and a new line."""
        start = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"
        text = start + "".join(content) + f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        first, *rest = text.split("<image>")
        ids = slow(first)["input_ids"]
        for part in rest:
            ids += [-1] * n + newline + (slow(part)["input_ids"] if part else [])
        return torch.tensor(ids)

    features = tower(pixels, output_hidden_states=True, output_attentions=True)
    attention, hidden = features.attentions[-1], features.hidden_states[-2]
    visual = projector(hidden)
    ids = prompt(["<image>\n"] * len(tiles))
    embeddings = llm.get_input_embeddings()(ids.clamp(min=0))
    embeddings[ids == -1] = visual.flatten(0, 1)
    tokens = llm.generate(
        inputs_embeds=embeddings[None], max_new_tokens=16, do_sample=False, eos_token_id=end
    )
    return {
        "pixels": pixels,
        "input_ids": ids,
        "features": hidden,
        "attention": attention,
        "projected": visual,
        "logits": llm(inputs_embeds=embeddings[None]).logits,
        "tokens": tokens[0],
        "many_pixels": process(pictures, return_tensors="pt")["pixel_values"],
        "many_input_ids": prompt(["<image>"] * 2),
        "picture_0": as_tensor(pictures[0]),
        "picture_1": as_tensor(pictures[1]),
    }


FAMILIES = {
    "tiny": record_tiny,
    "llava": record_llava,
    "llava_next": lambda out: record_llava_next(out, "llava_next"),
    "llava_next_mistral": lambda out: record_llava_next(out, "llava_next_mistral"),
    "smolvlm": record_smolvlm,
    "smolvlm2": lambda out: record_smolvlm(out, version=2),
    "qwen2_5_vl": lambda out: record_qwen(out, "qwen2_5_vl"),
    "qwen3_vl": lambda out: record_qwen(out, "qwen3_vl"),
    "nvila": lambda out: record_vila(out, "nvila"),
    "longvila": lambda out: record_vila(out, "longvila"),
    "nvila_hf": lambda out: record_vila(out, "nvila_hf"),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "families",
        nargs="*",
        default=[],
        metavar="FAMILY",
        help=f"{', '.join(FAMILIES)} (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "tests" / "golden",
        help="folder to write to (default: tests/golden)",
    )
    arguments = parser.parse_args()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    for family in arguments.families or FAMILIES:
        recorded = FAMILIES[family](arguments.out)
        origin = versions | {"command": f"python tests/golden/record.py {family}"}
        save_file(
            {name: tensor.clone().contiguous() for name, tensor in recorded.items()},
            arguments.out / f"{family}.safetensors",
            metadata={"origin": json.dumps(origin)},
        )
        print(family, {name: tuple(tensor.shape) for name, tensor in recorded.items()})


if __name__ == "__main__":
    main()
