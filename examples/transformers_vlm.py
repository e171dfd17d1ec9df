"""SparseVILA for vision-language models of Hugging Face transformers: one file to copy.

    python examples/transformers_vlm.py MODEL --image photo.jpg --ask "What is this?"

No model's code is changed. Its attention becomes PyTorch's, overheard: in the tower's last layer
how much of it every patch receives, by which `see` prunes (Algorithm 2); in the decoder how much a
question gives to every visual token. A cache layer packs the best of them, and the answer is
decoded from those (Algorithm 3). For transformers 5.24; pictures, batch 1. See README.md here.
"""

import argparse
import math
import re
import runpy
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import transformers as hf
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation.utils import _slice_mm_encoder_output
from transformers.image_utils import load_image
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.vision_utils import get_vision_window_index

beside = [folder / "kernels.py" for folder in Path(__file__).resolve().parents[:2]]
if files := [file for file in beside if file.is_file()]:  # by its path: PyPI has another "kernels"
    attention_colsum = runpy.run_path(str(files[0]), run_name="kernels")["attention_colsum"]
else:  # its definition, head by head

    def attention_colsum(q: Tensor, k: Tensor, *, causal: bool = False, scale=None) -> Tensor:
        """What keys (B, G, N, D) receive from all rows (B, H, M, D), the last M of N if causal."""
        (_, H, M, D), (_, G, N, _) = q.shape, k.shape
        hidden = torch.ones(M, N, dtype=torch.bool, device=q.device).triu(N - M + 1) & causal
        pairs = ((q[:, h].float(), k[:, h * G // H].float()) for h in range(H))
        scores = ((x @ y.mT * (scale or D**-0.5)).masked_fill(hidden, -math.inf) for x, y in pairs)
        return torch.stack([s.softmax(-1).sum(1) for s in scores], 1)  # (B, H, N)


class RetrievalLayer(DynamicLayer):
    """All rows of a decoder layer, and `packed`: those that an answer is decoded from.

    visual: where the visual rows are, (V,). window: whether the layer has one, and then retrieves
    nothing. ranks: over how many processes the heads are split.
    """

    is_croppable = False  # for assisted decoding, which knows nothing of `packed`

    def __init__(self, visual: Tensor, sparsity: float, window: bool, ranks: int):
        super().__init__()
        self.visual, self.sparsity, self.is_sliding, self.ranks = visual, sparsity, window, ranks
        self.length, self.asked, self.packed, self.retrieved = 0, False, None, None

    def update(self, key: Tensor, value: Tensor, *args, **kwargs):
        """Append rows. What is returned becomes `key` and `value` of the attention function."""
        self.length += key.shape[2]
        if self.packed:  # an answer is being decoded
            self.packed = [torch.cat(pair, 2) for pair in zip(self.packed, (key, value))]
            return self.packed
        keys, values = super().update(key, value)
        if self.asked:  # mark the question's keys, for that function is given no cache
            keys = keys.view_as(keys)
            keys.layer = self
        return keys, values

    def retrieve(self, query: Tensor, scale: float) -> None:
        """Once a question is cached, whose rows are query (1, H, M, D): score, select, pack."""
        relevance = attention_colsum(query, self.keys, causal=True, scale=scale)[0].sum(0)
        if self.ranks > 1:  # a sum over all heads
            torch.distributed.all_reduce(relevance)
        visual, wanted = self.visual.to(relevance.device), torch.ones_like(relevance).bool()
        self.retrieved = select(relevance[visual], self.sparsity)
        wanted[visual] = False
        wanted[visual[self.retrieved]] = True
        self.packed = [x[:, :, wanted] for x in (self.keys, self.values)]

    def get_seq_length(self) -> int:
        """Rows so far, for positions."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that `update` will return, for the mask."""
        return (self.packed[0].shape[2] if self.packed else self.length) + query_length, 0

    def truncate(self, length: int, asked: bool) -> None:
        """Keep the first rows, and read all of them from now on. asked: a question comes next."""
        if self.packed and length > self.keys.shape[2]:  # the answer moves to the other rows
            super().update(*(x[:, :, self.keys.shape[2] - self.length :] for x in self.packed))
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.length, self.packed, self.asked = length, None, asked and not self.is_sliding


def attention(module, query, key, *args, scaling=None, **kwargs):
    """PyTorch's, overheard."""
    if hasattr(module, "received"):  # the tower's last layer: (views, patches), or some of a view's
        rows = query[:, :, : module.class_tokens or None]  # all rows where there is no class token
        received = attention_colsum(rows, key, scale=scaling).mean(1) / rows.shape[2]
        module.received.append(received[:, module.class_tokens :])
    elif hasattr(key, "layer"):  # the question is being read
        key.layer.retrieve(query, scaling)
    return sdpa_attention_forward(module, query, key, *args, scaling=scaling, **kwargs)


hf.AttentionInterface.register("sparsevila", attention)
hf.AttentionMaskInterface.register("sparsevila", sdpa_mask)  # without it there is none, silently


def select(scores: Tensor, sparsity: float) -> Tensor:
    """Ascending indices of the best n - floor(sparsity n) of n finite scores, ties to the lower
    one, and of all infinite ones."""
    dropped = int(Fraction(str(sparsity)) * int(scores.isfinite().sum()))  # exact: 0.57 * 100 is 57
    return scores.sort(descending=True, stable=True).indices[: len(scores) - dropped].sort().values


def contiguous(positions: Tensor, visual: Tensor) -> Tensor:
    """Positions (..., T) without gaps: runs of text and of visual tokens, visual (T,) bool, follow
    each other, and within a run every axis keeps its order."""
    pieces, begin = [], 0
    for run in positions.split(visual.unique_consecutive(return_counts=True)[1].tolist(), -1):
        axes = [axis.unique(return_inverse=True)[1] for axis in run.flatten(0, -2)]
        pieces.append(begin + torch.stack(axes).view_as(run))
        begin = int(pieces[-1].max()) + 1
    return torch.cat(pieces, -1)


class Answer(NamedTuple):
    text: str
    token_ids: list[int]
    retrieved: list[Tensor | None]  # per layer (K,): of the kept patches; None with a window


class SparseVILA:
    """A session: `see` pictures, then `ask` any number of questions.

    prefill_sparsity: share of the visual tokens to prune. decode_sparsity: share of the kept ones
    that decoding leaves out. positions of the kept: "contiguous" or "original". protocol:
    "conversation" keeps earlier turns, "evaluation" evicts each.
    """

    def __init__(self, model, processor, *, prefill_sparsity: float = 0.75,
                 decode_sparsity: float = 0.8, positions: str = "contiguous",
                 protocol: str = "conversation"):  # fmt: skip
        # 1. Refuse settings out of range, and decoders that cannot retrieve.
        words = positions in ("contiguous", "original"), protocol in ("conversation", "evaluation")
        if not (all(words) and 0 <= prefill_sparsity < 1 and 0 <= decode_sparsity < 1):
            found = f"{prefill_sparsity}, {decode_sparsity}, {positions!r}, {protocol!r}"
            raise ValueError(
                "sparsities must be in [0, 1), positions 'contiguous' or 'original', protocol "
                f"'conversation' or 'evaluation', got {found}"
            )
        layers = DynamicCache(config=model.config.get_text_config()).layers
        kinds = [type(layer).__name__ for layer in layers]
        if "DynamicLayer" not in kinds or {*kinds} - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
            raise ValueError(
                "every decoder layer must cache keys and values of its own, at least one without a "
                f"window, got {', '.join(sorted({*kinds}))}"
            )
        self.model, self.processor, self.cache = model, processor, None
        self.prefill_sparsity, self.decode_sparsity = prefill_sparsity, decode_sparsity
        self.positions, self.protocol = positions, protocol
        self.windows = [kind != "DynamicLayer" for kind in kinds]

        # 2. Overhear the model, and find the last attention of its tower.
        model.set_attn_implementation("sparsevila")
        towers = [m for m in model.modules() if getattr(m, "is_causal", None) is False]
        if not towers:
            raise ValueError(f"the model must have a vision tower, got {type(model).__name__}")
        self.tower = towers[-1]
        names = " ".join(name for name, _ in model.named_parameters())
        self.tower.class_tokens = int("class_embedding" in names or "cls_token" in names)

    @torch.inference_mode()
    def see(self, images) -> None:
        """Encode, prune and prefill a picture (Pillow image, file, address) or a list of them;
        forget everything before."""
        # 1. The prompt as the model's own processor writes it; the context ends with the pictures.
        images = [load_image(x) for x in (images if isinstance(images, list) else [images])]
        text = self.chat(len(images))
        prompt = re.split(r"\{question\}|\{answer\}", text)
        if len(prompt) != 4:
            raise ValueError(f"two questions and an answer must stand in a template, got {text!r}")
        inputs = self._inputs(prompt, images).to(self.model.device, self.model.dtype)
        ids = inputs["input_ids"][0]
        visual = ids == self.model.config.image_token_id
        context_end = int(visual.nonzero().max()) + 1

        # 2. Encode, and prune every view by its salience: what the tower's last layer receives.
        self.tower.received = []
        try:
            pictures = {k: x for k, x in inputs.items() if k.startswith(("pixel", "image"))}
            encoded = self.model.model.get_image_features(**pictures, return_dict=True)
        finally:
            received = vars(self.tower).pop("received")
        salience = self._salience(torch.cat(received, -1).to(ids.device), inputs, int(visual.sum()))
        sizes, slots = [len(view) for view in salience], visual.nonzero()[:, 0]
        if sum(sizes) != len(slots):
            raise ValueError(f"{len(slots)} visual tokens must have a salience each, got {sizes}")
        kept = [select(view, self.prefill_sparsity) for view in salience]
        first = accumulate(sizes, initial=0)
        index = torch.cat([start + chosen for start, chosen in zip(first, kept)])
        stays = ~visual
        stays[slots[index]], stays[context_end:] = True, False
        encoded = _slice_mm_encoder_output(encoded, index.cpu())

        # 3. Positions (1, T) or, for M-RoPE, (3, 1, T).
        positions = torch.arange(len(ids), device=ids.device)[None]
        if hasattr(self.model.model, "get_rope_index"):
            positions = self.model.model.get_rope_index(**inputs)[0]
        next_position = int(positions[..., :context_end].max()) + 1
        positions = positions[..., stays]
        if self.positions == "contiguous":
            positions = contiguous(positions, visual[stays])
            next_position = int(positions.max()) + 1

        # 4. Prefill once. Separators, whose salience is infinite, are text to the cache.
        finite = torch.cat([*salience])[index].isfinite()
        left, ranks = visual[stays].nonzero()[finite, 0], getattr(self.model, "tp_size", None) or 1
        cache = Cache(layers=[
            RetrievalLayer(left, self.decode_sparsity, window, ranks) for window in self.windows
        ])  # fmt: skip
        types = {k: x[:, stays] for k, x in inputs.items() if k == "token_type_ids"}  # Gemma 3
        self.model.model(
            input_ids=ids[None, stays], position_ids=positions, cache=cache, use_cache=True,
            mm_encoder_outputs={"image": encoded}, **types,
        )  # fmt: skip
        self.images, self.prompt, self.kept, self.cache = images, prompt, kept, cache
        self.context_end, self.ids, self.turns = context_end, ids[stays].tolist(), []
        self.context_positions, self.next_position = positions, next_position

    def ask(self, question: str, **generation) -> Answer:
        """Answer a question. generation: arguments of `generate`, such as max_new_tokens (20 unless
        given), do_sample and streamer; one sequence, no beams, no assistant. A call that fails or
        is interrupted leaves the session as it was."""
        # 1. Token ids and positions, those of the cache first.
        if self.cache is None:
            raise RuntimeError("nothing to ask about: call see(images) first")
        tokenizer, question = self.processor.tokenizer, question.strip()
        special = {*tokenizer.all_special_tokens, self.processor.image_token}
        if not question or any(token in question for token in special):
            raise ValueError(f"a question must be text without special tokens, got {question!r}")
        if self.turns:
            _, _, close, last = self.prompt
            new = tokenizer(close + question + last, add_special_tokens=False)["input_ids"]
        else:  # only the processor knows what its family writes between pictures and text
            inputs = self._inputs(self.prompt, self.images, question)
            new = inputs["input_ids"][0, self.context_end :].tolist()
        ids = torch.tensor([self.ids + new], device=self.model.device)
        context = self.context_positions
        after = torch.arange(ids.shape[1] - context.shape[-1]).to(context) + self.next_position
        positions = torch.cat([context, after.expand(*context.shape[:-1], -1)], -1)

        # 2. Question, retrieval and answer; of ids and positions `generate` reads what is not in
        #    the cache. (A question in chunks would be scored by its first one.)
        start = self.cache.get_seq_length()
        self._truncate(start, asked=True)
        try:
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), cache=self.cache, use_cache=True,
                position_ids=positions, return_dict_in_generate=False, prefill_chunk_size=None,
                **generation,
            )[0].tolist()  # fmt: skip
        except BaseException:
            self._truncate(start)
            raise

        # 3. Keep the turn, or evict it. The last token was generated, not read; a stop token is
        #    written again by the template.
        self._truncate(len(out) - 1)
        self.turns.append((self.ids, start))
        stops = generation.get("eos_token_id", self.model.generation_config.eos_token_id)
        self.ids = out[:-1] if out[-1] in (stops if isinstance(stops, list) else [stops]) else out
        if self.protocol == "evaluation":
            self.forget()
        tokens = out[ids.shape[1] :]
        text = self.processor.decode(tokens, skip_special_tokens=True).lstrip()
        return Answer(text, tokens, [layer.retrieved for layer in self.cache.layers])

    def forget(self) -> None:
        """Evict the last question and its answer."""
        if self.turns:
            self.ids, start = self.turns.pop()
            self._truncate(start)

    def _truncate(self, length: int, asked: bool = False) -> None:
        for layer in self.cache.layers:
            layer.truncate(length, asked)

    def chat(self, pictures: int) -> str:
        """A conversation with places for two questions and an answer, by the chat template."""
        turns = ("user", "{question}"), ("assistant", "{answer}"), ("user", "{question}")
        chat = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns]
        chat[0]["content"] = [{"type": "image"}] * pictures + chat[0]["content"]
        return self.processor.apply_chat_template(chat, add_generation_prompt=True)

    def _inputs(self, prompt: list[str], images: list, question: str = ""):
        text, begin = prompt[0] + question + prompt[-1], self.processor.tokenizer.bos_token
        add = not (begin and text.startswith(begin))  # the template may write it
        return self.processor(text=text, images=images, return_tensors="pt", add_special_tokens=add)

    def _salience(self, received: Tensor, inputs, tokens: int):
        """What patches (views, n) received -> salience of the visual tokens, (n,) for each view. A
        merged token has the mean of its patches."""
        model = self.model.model
        if "image_grid_thw" in inputs:  # Qwen: the patches of a token are neighbours
            tower, grid = model.visual, inputs["image_grid_thw"]
            merge = tower.spatial_merge_size
            blocks = received.view(-1, merge**2).mean(1)
            if hasattr(tower, "window_size"):
                order, _ = get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)
                blocks = blocks[order.argsort()]
            return blocks.split((grid.prod(1) // merge**2).tolist())
        if hasattr(model, "image_newline"):  # LLaVA-NeXT: a picture's tiles side by side, unpadded
            tiles = inputs["pixel_values"].flatten(2).any(-1).sum(-1).tolist()  # others are empty
            separator = received.new_full((1,), math.inf)
            views = received[..., None].split(tiles), inputs["image_sizes"], "default", separator
            views, whole = model.pack_image_features(*views)[0], received.shape[1]
            return [part for view in views for part in view[:, 0].split([whole, len(view) - whole])]
        side, merged = math.isqrt(received.shape[1]), math.isqrt(received.numel() // tokens)
        if side**2 != received.shape[1]:
            raise ValueError(f"the patches of a view must be a square, got {received.shape[1]}")
        squares = received.view(-1, 1, side, side)  # a token is a square of them
        return torch.nn.functional.avg_pool2d(squares, merged).flatten(1)


def without_videos(kind: type) -> type:
    """A processor class without its part for videos, which needs torchvision."""
    parts = {"get_attributes": classmethod(lambda kind: ["image_processor", "tokenizer"])}
    return type(kind.__name__, (kind,), parts)


def load_processor(name: str):
    """AutoProcessor's; where torchvision is missing, that of pictures alone."""
    try:
        return hf.AutoProcessor.from_pretrained(name)
    except (ImportError, ValueError) as error:
        if "torchvision" not in str(error).lower():
            raise
        kind = PROCESSOR_MAPPING[type(hf.AutoConfig.from_pretrained(name))]
        return without_videos(kind).from_pretrained(name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("--image", nargs="+", required=True, help="files or addresses")
    parser.add_argument("--ask", nargs="+", required=True, help="questions")
    parser.add_argument("--device-map", help="how to spread over devices: auto, ...")
    given = parser.parse_args()
    try:
        load = hf.AutoModelForImageTextToText.from_pretrained
        session = SparseVILA(
            load(given.model, device_map=given.device_map), load_processor(given.model)
        )
        session.see(given.image)
        streamer = hf.TextStreamer(session.processor, skip_prompt=True, skip_special_tokens=True)
        for question in given.ask:
            print(f"> {question}")
            session.ask(question, max_new_tokens=128, streamer=streamer)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
