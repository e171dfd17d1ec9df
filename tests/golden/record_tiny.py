"""Record what Hugging Face's own LLaVA computes for the tiny model: the oracle of
tests/test_golden.py.

The only place where transformers is needed. Run it once after training, in an environment of its
own:

    pip install torch==2.13.0 transformers==4.57.6 pillow safetensors
    python tests/golden/record_tiny.py

Nothing of this project is imported. The file written holds, for a sample picture and one question,
the pixels, the input ids, the tower's features, the class token's attention in the last layer, the
projected features, all logits, and the tokens of a greedy answer.
"""

import json
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPT = "USER: <image>\nwhat color is the 7? ASSISTANT:"


@torch.no_grad()
def main() -> None:
    folder = ROOT / "tiny"
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    pixels = CLIPImageProcessor.from_pretrained(folder)(
        Image.open(folder / "samples" / "board.png"), return_tensors="pt"
    )["pixel_values"]
    n = model.config.image_seq_length
    ids = tokenizer(PROMPT.replace("<image>", "<image>" * n), return_tensors="pt")["input_ids"]
    tower = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    features = tower.hidden_states[model.config.vision_feature_layer][:, 1:]
    tokens = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=16, do_sample=False)[
        0, ids.shape[1] :
    ]
    recorded = {
        "pixels": pixels,
        "input_ids": ids[0],
        "features": features,
        "class_attention": tower.attentions[-1][:, :, 0, 1:],
        "projected": model.model.multi_modal_projector(features),
        "logits": model(input_ids=ids, pixel_values=pixels).logits,
        "tokens": tokens,
    }
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "prompt": PROMPT,
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in recorded.items()},
        ROOT / "tests" / "golden" / "tiny.safetensors",
        metadata={"origin": json.dumps(versions)},
    )


if __name__ == "__main__":
    main()
