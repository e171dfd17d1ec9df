"""Quantise a checkpoint, calibrated on pictures and prompts, and write it in its own layout.

python awq.py SOURCE TARGET [--group-size 128] [--vision-w8a8] [--images DIR] [--prompts FILE]

Axes: T rows of a turn, E decoder width.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import awq
from checkpoints import fetch, load, open_folder
from checkpoints.processor import Processor, open_picture
from checkpoints.values import Folder
from checkpoints.weights import Names, is_unused, progress, translate, weight_files
from model import VLM, KVCache
from sparsevila import SparseVILA
from tiny.scenes import kinds_of, make_scene, question_and_answer, render, to_images

from . import command, files_in


def main(argv: list[str] | None = None) -> None:
    """The command line. Bad input ends it with one line on standard error and exit status 2."""
    arguments = parse_arguments(argv)
    with command("awq.py"):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Quantise as the command line asks. Raises: ValueError or OSError for bad input."""
    target = Path(arguments.target)
    check_target(target)
    pictures, prompts, what = calibration_set(
        arguments.images, arguments.prompts, arguments.samples
    )
    source = fetch(arguments.source)
    model, processor = load(source, device=arguments.device)
    awq.check_sizes(model, arguments.group_size)
    print(f"calibrating on {what}.")
    before = model.weight_bytes
    pixels, batches = calibration(model, processor, pictures, prompts, arguments.samples)
    with progress(None, "quantising", " blocks", len(model.decoder.layers)) as moving:
        awq.quantize(
            model, batches, group_size=arguments.group_size, on_block=lambda *_: moving.update()
        )
    if arguments.vision_w8a8:
        awq.quantize_tower(
            model.vision_tower, (batch for views in pixels for batch in model.batches(views))
        )
    save(model, source, target, arguments.group_size)
    print(f"wrote {target}: {model.weight_bytes:,} bytes of weights, {before:,} before")


def calibration_set(
    images: str | None, prompts: str | None, samples: int
) -> tuple[list, list[str], str]:
    """Pictures, prompts, and a sentence that says what they are. Raises: ValueError for folders and
    files that hold none."""
    texts = None
    if prompts is not None:
        try:
            lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{prompts} is not UTF-8 text: {error}") from None
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise ValueError(f"{prompts} holds no prompts")
    if images is not None:
        files = files_in(images)
        if not files:
            raise ValueError(f"the folder {images} holds no pictures")
        pictures = [open_picture(file) for file in files[:samples]]
        return pictures, texts or ["Describe the picture."], f"{len(pictures)} pictures of {images}"
    pictures, questions = [], []
    for number in range(samples):
        rng = random.Random(f"calibrate {number}")
        scene = make_scene(rng)
        pictures += to_images(render(scene, rng))
        questions.append(question_and_answer(rng.choice(kinds_of(scene)), scene, rng)[0])
    what = (
        f"{samples} pictures of tiny/scenes.py. They suit the tiny model. Other checkpoints see "
        "little of their usual input in them: give --images and --prompts"
    )
    return pictures, texts or questions, what


def calibration(
    model: VLM, processor: Processor, pictures: list, prompts: list[str], samples: int
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Pixels, and whole turns, picture, prompt and the model's own answer, as arguments of the
    model: embeddings (1, T, E), and positions as a session gives them, (T,) or, M-RoPE, (3, T).
    Pictures and prompts are taken in turn, as often as needed. Of the visual tokens the most
    salient quarter is read, as SparseVILA's decoder does; with all of them the search would serve
    the background of the pictures more than the text."""
    pixels, batches, session = [], [], SparseVILA(model, processor, prefill_sparsity=0.75)
    for number in range(samples):
        # 1. A picture as the session prunes it.
        views = processor.views([pictures[number % len(pictures)]])
        pixels.append(processor.pixels(views))
        features, salience = (processor.join(views, x) for x in session.encode(pixels[-1]))
        sizes = [len(x) for x in features]
        features, kept = session.prune(features, salience)

        # 2. A question about it, and the model's own answer.
        ids, positions, after = processor.layout(views, sizes, kept, session.positions)
        context = model.embed(ids, model.project(torch.cat(features)))
        question = processor.question(prompts[number % len(prompts)], first=True, views=views)
        asked, cache = model.embed(question), KVCache(model.config.text.layers)
        model.read(context, cache, positions=positions, next_position=after)
        answer = model.generate(asked, cache=cache, max_new_tokens=32)
        embeddings = torch.cat([context, asked, model.embed(answer)], 1)
        text = torch.arange(after, after + len(question) + len(answer))
        text = text.expand(*positions.shape[:-1], -1)  # the same on all axes
        batches.append({"embeddings": embeddings, "positions": torch.cat([positions, text], -1)})
    return pixels, batches


def save(model: VLM, path: Path, target: Path, group_size: int) -> None:
    """Write a quantised model as a checkpoint folder like that at `path`: same file names, same
    tensor names, with qweight, qzeros and scales (AWQ) or weight and weight_scale (W8A8) in place
    of a quantised weight. The folder appears when it is complete, or not at all. An eight-bit tower
    is marked `vision_w8a8` in the settings: only `checkpoints.load` reads it.

    Raises: ValueError if the target exists; OSError if it cannot be written.
    """
    check_target(target)
    family, source = open_folder(path)
    copied = Path(tempfile.mkdtemp(prefix=".awq.", dir=target.parent))
    try:
        copied.chmod(0o755)
        for part in dict.fromkeys(("", *source.parts)):
            copy = copied / part
            copy.mkdir(exist_ok=True)
            for file in (source.path / part).iterdir():
                kept = file.suffix in (".json", ".txt", ".model", ".jinja") and file.is_file()
                if kept and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, copy / file.name)
        config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [
                *("vision_tower", "vision_model", "multi_modal_projector", "connector"),
                *("mm_projector", "lm_head"),
            ],
            "vision_w8a8": any(isinstance(module, awq.W8A8Linear) for module in model.modules()),
        }
        (copied / "config.json").write_text(json.dumps(config, indent=2))
        _save_weights(model, source, family.NAMES, copied)
        copied.rename(target)
    finally:
        shutil.rmtree(copied, ignore_errors=True)


def _save_weights(model: VLM, source: Folder, names: Names, copied: Path) -> None:
    """Write the safetensors files, one for each of the source's, and their index."""
    written: dict[Path, dict[str, int]] = {}  # bytes of every tensor, by folder
    for file, prefix in weight_files(source).items():
        with safe_open(file, framework="pt") as content:
            tensors = {
                new: tensor.cpu().contiguous()
                for name in content.keys()
                for new, tensor in _replacements(model, names, prefix, name, content.get_tensor)
            }
        target = copied / file.relative_to(source.path)
        try:
            save_file(tensors, target, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise OSError(f"{target} cannot be written: {error}") from None
        shutil.copymode(file, target)
        sizes = {(name, file.name): tensor.nbytes for name, tensor in tensors.items()}
        written[target.parent] = written.get(target.parent, {}) | sizes
    for part, sizes in written.items():
        if {file for _, file in sizes} != {"model.safetensors"}:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": dict(sizes.keys()),
            }
            (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _replacements(
    model: VLM, names: Names, prefix: str, name: str, stored: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors to write in place of one tensor of the source."""
    ours = translate(prefix + name, names)
    if is_unused(ours, model):  # but others may need it
        yield name, stored(name)
        return
    parent, _, leaf = ours.rpartition(".")
    module = model.get_submodule(parent)
    if leaf == "weight" and isinstance(module, (awq.W4A16Linear, awq.W8A8Linear)):
        for buffer, tensor in module.named_buffers():
            yield name.removesuffix("weight") + buffer, tensor
    else:
        yield name, getattr(module, leaf).data


def check_target(target: Path) -> None:
    """Raise ValueError or OSError for a folder that cannot be made."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists already")
    if not target.parent.is_dir():
        raise ValueError(f"no folder to make {target} in")
    Path(tempfile.mkdtemp(prefix=".awq.", dir=target.parent)).rmdir()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command line; `python awq.py --help` lists them."""
    parser = argparse.ArgumentParser(
        description="Quantise a checkpoint: 4-bit weights (AWQ) in the decoder, with --vision-w8a8 "
        "8-bit weights and activations (SmoothQuant) in the vision tower."
    )
    parser.add_argument("source", help="checkpoint folder or hub repository")
    parser.add_argument("target", help="folder to make")
    parser.add_argument(
        "--group-size",
        type=int,
        default=128,
        metavar="G",
        help="inputs that share a scale of four-bit weights (default: 128)",
    )
    parser.add_argument(
        "--vision-w8a8",
        action="store_true",
        help="eight bits in the vision tower (default: it stays as it is)",
    )
    parser.add_argument(
        "--images", metavar="DIR", help="pictures to calibrate on (default: pages of tiny/)"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="questions to calibrate on, one a line (default: those of the pages)",
    )
    parser.add_argument(
        "--samples", type=int, default=32, metavar="N", help="calibration turns (default: 32)"
    )
    parser.add_argument(
        "--device", help="where to compute (default: cuda if there is one, else cpu)"
    )
    arguments = parser.parse_args(argv)
    if arguments.samples < 1:
        parser.error(f"--samples must be at least 1, got {arguments.samples}")
    return arguments


if __name__ == "__main__":
    main()
