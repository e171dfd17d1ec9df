"""Towers and decoders that several families share: defaults, and their sections of config.json.

Files on the hub leave out what equals the default of Hugging Face's class, so that a table of those
defaults is part of the format.
"""

from dataclasses import replace

from model import ACTIVATIONS, TextConfig, VisionConfig

from . import values

# Towers by the model_type of vision_config.
_SIGLIP = VisionConfig(patch_size=16, activation="gelu_pytorch_tanh", eps=1e-6, class_token=False)
_IDEFICS = replace(_SIGLIP, width=1152, heads=16, patch_size=32)
TOWERS = {
    "clip_vision_model": VisionConfig(),
    "siglip_vision_model": _SIGLIP,
    "idefics3": _IDEFICS,
    "idefics3_vision": _IDEFICS,
    "smolvlm_vision": _IDEFICS,
}
# Decoders by the model_type of text_config; defaults that follow from other keys: `text_config`.
DECODERS = {
    "llama": TextConfig(),
    "mistral": TextConfig(mlp=14336, kv_heads=8, max_positions=131072),
    "qwen2": TextConfig(vocab=151936, mlp=22016, max_positions=32768, qkv_bias=True),
    "qwen2_5_vl_text": TextConfig(
        vocab=152064, width=8192, mlp=29568, layers=80, heads=64, kv_heads=8, eps=1e-5,
        rope_theta=1e6, max_positions=32768, qkv_bias=True,
    ),
    "qwen3_vl_text": TextConfig(
        vocab=151936, mlp=22016, rope_theta=5e5, max_positions=128000, qk_norm=True,
    ),
}  # fmt: skip


def vision_config(raw: dict, default_tower: str, layer_key: str | None = None) -> VisionConfig:
    """The tower of vision_config, `default_tower` where it names none.

    layer_key: the key of config.json that names the layer which feeds the projector (default: -2);
    None for families that always use the last. Raises: ValueError for what model.py does not
    implement.
    """
    section = values.section(raw, "vision_config")
    tower = values.choice(section, "model_type", default_tower, TOWERS, what="vision model_type")
    default = TOWERS[tower]
    vision = replace(
        default,
        width=values.size(section, "hidden_size", default.width),
        mlp=values.size(section, "intermediate_size", default.mlp),
        layers=values.size(section, "num_hidden_layers", default.layers, most=1000),
        heads=values.size(section, "num_attention_heads", default.heads),
        image_size=values.size(section, "image_size", default.image_size, most=2**16),
        patch_size=values.size(section, "patch_size", default.patch_size),
        activation=values.choice(section, "hidden_act", default.activation, ACTIVATIONS),
        eps=values.number(section, "layer_norm_eps", default.eps),
    )
    if vision.width % vision.heads:
        raise ValueError(f"vision width {vision.width} is not a multiple of {vision.heads} heads")
    if vision.patch_size > vision.image_size:
        raise ValueError(
            f"patch_size {vision.patch_size} is larger than image_size {vision.image_size}"
        )
    if layer_key is None:
        return replace(vision, feature_layer=-1)
    states = vision.layers + 1
    layer = values.integer_in(raw, [layer_key], -2, -states, states)
    return replace(vision, feature_layer=layer)


def select_words(vision: VisionConfig) -> tuple[str, str]:
    """LLaVA's and VILA's word for the features that model.py uses: "patches only"; for a tower
    without a class token, where all tokens are patches, "all tokens"."""
    return ("default", "patch") if vision.class_token else ("full", "cls_patch")


def text_config(raw: dict) -> TextConfig:
    """The decoder of text_config. Raises: ValueError for what model.py does not implement."""
    section = values.section(raw, "text_config")
    kind = values.choice(section, "model_type", "llama", DECODERS, what="text model_type")
    default = DECODERS[kind]

    # 1. Refuse what is not implemented.
    if section.get("hidden_act", "silu") != "silu":
        raise ValueError(f"the decoder's hidden_act must be 'silu', got {section['hidden_act']!r}")

    # 2. Rotary positions, linearly scaled or not.
    rope = section.get("rope_parameters") or section.get("rope_scaling") or {}
    if rope != (section.get("rope_scaling") or rope):
        raise ValueError(
            f"rope_parameters and rope_scaling disagree: {rope!r} and {section['rope_scaling']!r}"
        )
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters must be an object, got {rope!r}")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling == "mrope" and kind.startswith("qwen2_5_vl"):
        scaling = "default"
    if scaling not in ("default", "linear") or (scaling == "default" and "factor" in rope):
        raise ValueError(f"rope scaling must be 'default' or 'linear', got {rope!r}")
    factor = values.number(rope, "factor", None) if scaling == "linear" else 1.0

    # 3. Sizes.
    width = values.size(section, "hidden_size", default.width)
    heads = values.size(section, "num_attention_heads", default.heads)
    positions = values.size(section, "max_position_embeddings", default.max_positions, most=2**28)
    text = TextConfig(
        vocab=values.size(section, "vocab_size", default.vocab),
        width=width,
        mlp=values.size(section, "intermediate_size", default.mlp),
        layers=values.size(section, "num_hidden_layers", default.layers, most=1000),
        heads=heads,
        kv_heads=values.size(
            section, "num_key_value_heads", heads if kind == "llama" else default.kv_heads
        ),
        head_dim=values.size(section, "head_dim", 128 if default.qk_norm else width // heads),
        eps=values.number(section, "rms_norm_eps", default.eps),
        rope_theta=values.number(section | rope, "rope_theta", default.rope_theta),
        rope_factor=factor,
        max_positions=min(int(positions * factor), sliding_window(section, kind)),
        qkv_bias=default.qkv_bias,
        qk_norm=default.qk_norm,
        tied=values.flag(raw, "tie_word_embeddings", False)
        or values.flag(section, "tie_word_embeddings", False),
    )

    # 4. Do the heads fit?
    if text.heads % text.kv_heads or text.head_dim % 2:
        raise ValueError(
            f"the key/value heads must divide the query heads and the head size must be even, "
            f"got {text.kv_heads}, {text.heads} and {text.head_dim}"
        )
    return text


def sliding_window(section: dict, kind: str) -> int:
    """How many positions a row sees in the layers that see fewest; 2**28 where all see everything.
    Up to that many, attention with a window is full attention, so that model.py needs none."""
    if kind.startswith("qwen2") and not values.flag(section, "use_sliding_window", False):
        return 2**28
    if kind in ("llama", "qwen3_vl_text") or section.get("sliding_window", 0) is None:
        return 2**28
    return values.size(section, "sliding_window", 4096, most=2**28)


def image_token_id(raw: dict, default: int) -> int:
    """The placeholder of a visual token; it may stand beyond the table of embeddings."""
    keys = ("image_token_index", "image_token_id")
    return values.integer_in(raw, keys, default, 0, 2**31)


def tower_names(*, theirs: list[str]) -> list[tuple[str, str]]:
    """Rows of a name table (see weights.py) for a CLIP or SigLIP tower of model.py, whose tensors'
    names begin in one of these ways in the files; the first is the one to write."""
    inner = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.": "patch_embedding.",
        "embeddings.position_embedding.": "position_embedding.",
        "encoder.layers.": "layers.",
        "": "",
    }
    return [
        (beginning + hub, "vision_tower." + ours)
        for beginning in theirs
        for hub, ours in inner.items()
    ]
