"""Shapes in docstrings and comments against those of real calls, and that everything public is
documented."""

import argparse
import ast
import functools
import importlib
import inspect
import itertools
import random
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, python
from torch import Tensor

import awq
import baselines
import bench
import checkpoints
import kernels
import model
import sparsevila
import tools
from checkpoints import load
from model import KVCache
from sparsevila import RetrievalCache, SparseVILA
from tools import quantise

ROOMS = (checkpoints, tools, bench)
MODULES = [sparsevila, model, awq, kernels, baselines, *ROOMS] + [
    importlib.import_module(f"{room.__name__}.{file.stem}")
    for room in ROOMS
    for file in sorted(Path(room.__file__).parent.glob("*.py"))
    if file.stem not in ("__init__", "__main__")
]


def public(module) -> Iterator[tuple[str, Callable]]:
    """Public functions, classes and methods of a module, with their names."""
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) != module.__name__ or name.startswith("_"):
            continue
        if inspect.isfunction(thing) or inspect.isclass(thing):
            yield f"{module.__name__}.{name}", thing
        for member in vars(thing) if inspect.isclass(thing) else ():
            if inspect.isroutine(function := getattr(thing, member)) and member[0] != "_":
                yield f"{module.__name__}.{name}.{member}", function


def test_public_names_have_docstrings_and_type_hints():
    """A method may leave its docstring to the class that it overrides."""
    wrong = []
    for name, thing in itertools.chain.from_iterable(map(public, MODULES)):
        if not inspect.getdoc(thing):
            wrong.append(f"{name} has no docstring")
        if inspect.isclass(thing):
            continue
        signature = inspect.signature(thing)
        hints = {name: p.annotation for name, p in signature.parameters.items() if name != "self"}
        if inspect.Signature.empty in {**hints, "return": signature.return_annotation}.values():
            wrong.append(f"{name}{signature} lacks type hints")
    assert not wrong, "\n".join(wrong)


# --- docstrings -----------------------------------------------------------------------------------

AXES = {"B": 2, "H": 6, "G": 3, "M": 5, "N": 16, "D": 8, "K": 32, "E": 128, "C": 128, "n": 400}
AXES |= {"g": 8, "rows": 4, "views": 2, "patches": 400, "T": 9, "S": 240, "V": 5, "L": 6}
AXES |= {"inputs": 32, "outputs": 16, "block": 2, "blocks": 3, "width": 128}
AXES |= {"merge": 1, "side": 6, "capacity": 24, "vocabulary": 293, "keep": 3}
TUPLE = re.compile(r"\(([^()]+,[^()]*)\)")


def sizes(text: str, axes: dict[str, int]) -> tuple | None:
    """The numbers that a tuple of axes in a docstring stands for; None if it is none."""
    dims = [dim.strip().replace(" x ", " * ") for dim in text.rstrip(", ").split(",")]
    try:
        return tuple(... if dim == "..." else int(eval(dim, {}, axes)) for dim in dims)
    except (NameError, SyntaxError, TypeError, ValueError):
        return None


def fits(shape: tuple, text: str, axes: dict[str, int]) -> bool:
    """Whether some tuple of axes in a text is this shape; "..." stands for any number of axes."""
    for match in TUPLE.finditer(text):
        wanted = sizes(match[1], axes)
        if (
            wanted == shape
            or wanted
            and wanted[0] is ...
            and wanted[1:] == shape[-len(wanted) + 1 :]
        ):
            return True
    return False


def after(name: str, doc: str) -> Iterator[str]:
    """What the docstring says of an argument, up to the end of the sentence or entry."""
    for match in re.finditer(rf"\b{name}\b", doc, re.IGNORECASE):
        yield re.split(r"[.;](?=\s)|\n\s*\n", doc[match.end() : match.end() + 300])[0]


def check_docstring(function: Callable, arguments: dict, *, said_in=None, axes=AXES) -> None:
    """Call a function; the shape of every tensor in and out must stand in its docstring (or that of
    `said_in`, to which it refers)."""
    doc = (inspect.getdoc(function) or "") + "\n\n" + (inspect.getdoc(said_in) or "")
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dim():
            found = fits(tuple(value.shape), "\n".join(after(name, doc)), axes)
            assert found, f"{function.__qualname__}: {name} is {tuple(value.shape)}"
    results = function(**arguments)
    returned = "\n".join(re.split(r"Returns:|->", doc)[1:]) or doc
    for result in results if isinstance(results, tuple) else (results,):
        if isinstance(result, Tensor):
            found = fits(tuple(result.shape), returned, axes)
            assert found, f"{function.__qualname__} returns {tuple(result.shape)}"


def test_docstrings_of_the_kernels():
    q, k = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 16, 8)
    lse = kernels.attention_lse(q, k)
    check_docstring(kernels.attention_lse, {"q": q, "k": k})
    arguments = {"q": q, "k": k, "lse": lse}
    check_docstring(kernels.attention_colsum, arguments, said_in=kernels.attention_lse)
    index = torch.arange(32)[None].expand(2, 32) % 16
    check_docstring(kernels.gather_tokens, {"x": torch.randn(2, 16, 128), "index": index})
    check_docstring(kernels.gather_tokens, {"x": k, "index": index})
    both = {"k": k, "v": k, "index": index}
    check_docstring(kernels.gather_keys_values, both, said_in=kernels.gather_tokens)
    buffer = torch.randn(2, 3, 24, 8)
    arguments = {"q": q[:, :, :1], "k": buffer, "v": buffer, "length": 7}
    check_docstring(kernels.decode_attention, arguments)


def test_docstrings_of_quantisation():
    weight, x = torch.randn(16, 32), torch.randn(4, 9, 32)
    check_docstring(awq.quantize_groups, {"weight": weight, "group_size": 8})
    check_docstring(awq.rounded, {"weight": weight, "group_size": 8})
    codes, scales, zeros = awq.quantize_groups(weight, 8)
    packed = {"qweight": awq.pack(codes.T), "qzeros": awq.pack(zeros.T), "scales": scales.T}
    check_docstring(awq.pack, {"codes": torch.zeros(4, 16, dtype=torch.int8)})
    check_docstring(awq.unpack, {"packed": torch.zeros(4, 2, dtype=torch.int32)})
    check_docstring(awq.dequantize, packed)
    arguments = {"x": x, **packed, "bias": torch.zeros(16)}
    check_docstring(awq.w4a16_matmul, arguments, said_in=awq.dequantize)
    linear = torch.nn.Linear(32, 16)
    arguments = {"module": linear, "linears": [linear], "calls": [(x,)], "group_size": 8}
    check_docstring(awq.search_scale, arguments)
    arguments = {"weight": linear.weight, "activations": [x], "group_size": 8}
    check_docstring(awq.search_clip, arguments)
    arguments = {"norm": torch.nn.LayerNorm(32), "linears": [linear], "largest": torch.ones(32)}
    check_docstring(awq.smooth, arguments)


def test_docstrings_of_the_method():
    scores = torch.rand(2, 400)
    check_docstring(sparsevila.select_tokens, {"scores": scores, "keep": 3})
    arguments = {"features": torch.randn(2, 400, 128), "salience": scores, "sparsity": 0.92}
    doc = inspect.getdoc(sparsevila.prune)
    for kept, index in zip(*sparsevila.prune(**arguments)):
        for name, view in (("features", arguments["features"][0]), ("salience", scores[0])):
            assert fits(tuple(view.shape), "\n".join(after(name, doc)), AXES)
        assert fits(tuple(kept.shape), doc.split("Returns:")[1], AXES)
        assert "their index (K,)" in doc and index.shape == (AXES["K"],)
    tower = torch.randn(2, 6, 401, 8)
    doc = inspect.getdoc(sparsevila.patch_salience).replace(
        "summary tokens + patches", "1 + patches"
    )
    assert fits(tuple(tower.shape), doc, AXES)
    salience = sparsevila.patch_salience(tower, tower, 1)
    assert fits(tuple(salience.shape), doc.split("Returns:")[1], AXES)
    merge = functools.partial(model.merge_patches, block=2)
    arguments = {"salience": torch.rand(2, 36), "merge": merge}
    check_docstring(sparsevila.merge_salience, arguments, axes=AXES | {"n": 9, "patches": 36})
    cache, axes = RetrievalCache(1, visual=torch.arange(2, 7)), AXES | {"H": 4, "G": 2}
    cache.start_question()
    q, k = torch.randn(1, 4, 16, 8), torch.randn(1, 2, 16, 8)
    arguments = {"layer": 0, "q": q, "k": k, "v": k}
    check_docstring(cache.attend, arguments, said_in=KVCache.attend, axes=axes | {"M": 16})
    check_docstring(cache.score, {"q": q, "k": k}, axes=axes | {"M": 16})


def test_docstrings_of_the_model():
    vlm, _ = load(TINY, device="cpu")
    q, k = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 16, 8)
    check_docstring(model.causal_attention, {"q": q, "k": k, "v": k})
    check_docstring(model.merge_patches, {"x": torch.randn(2, 36, 128), "block": 2})
    check_docstring(kernels.linear, {"x": torch.randn(4, 32), "weight": torch.randn(16, 32)})
    positions = torch.arange(9)
    angles = {"positions": positions, "config": vlm.config.text}
    check_docstring(model.rotary_table, angles, axes=AXES | {"D": 32})
    pixels = torch.randn(2, 3, 240, 240)
    check_docstring(vlm.encode, {"pixels": pixels})
    tower_axes = AXES | {"T": 401, "H": 4, "D": 32}
    arguments = {"pixels": pixels, "attention_layer": -1}
    check_docstring(vlm.vision_tower.forward, arguments, axes=tower_axes)
    features = torch.stack(vlm.encode(pixels))
    assert fits(tuple(features[0].shape), inspect.getdoc(vlm.encode), AXES)
    check_docstring(vlm.project, {"features": features})
    image = vlm.config.image_token_id
    ids = torch.tensor([1, *[image] * 5, 5, 6, 7])
    check_docstring(vlm.embed, {"input_ids": ids, "visual": torch.randn(5, 128)})
    embeddings = torch.randn(1, 9, 128)
    axes = AXES | {"vocabulary": vlm.config.text.vocab}
    check_docstring(vlm.read, {"embeddings": embeddings})
    check_docstring(vlm.forward, {"embeddings": embeddings}, axes=axes)
    x = torch.randn(2, 400, 128)
    check_docstring(vlm.vision_tower.layers[0].forward, {"x": x}, said_in=model.VisionBlock,
                    axes=AXES | {"T": 400})  # fmt: skip
    for part in (vlm.decoder.layers[0].mlp, vlm.vision_tower.layers[0].mlp):
        rows = torch.randn(2, 9, 128)
        check_docstring(part.forward, {"x": rows}, said_in=type(part))
    attention = vlm.decoder.layers[0].self_attn
    cos, sin = model.rotary_table(positions, vlm.config.text)
    out = attention(x[:, :9], 0, cos, sin, model.attend_uncached)
    assert fits(tuple(out.shape), inspect.getdoc(type(attention).forward), AXES)


def test_a_wrong_docstring_is_seen():
    def double(x: Tensor) -> Tensor:
        """Twice x (B, N). Returns: (N, B)."""
        return 2 * x

    with pytest.raises(AssertionError, match="returns"):
        check_docstring(double, {"x": torch.zeros(2, 16)})
    with pytest.raises(AssertionError, match="x is"):
        check_docstring(double, {"x": torch.zeros(16, 2)})


# --- comments -------------------------------------------------------------------------------------


class Shape:
    """A comment behind a statement that says the shapes of what it assigns."""

    def __init__(self, statement: ast.Assign, comment: str):
        self.first, self.last = statement.lineno, statement.end_lineno
        targets = [ast.unparse(t) for t in getattr(statement.targets[0], "elts", statement.targets)]
        if comment.startswith("("):
            self.shapes = {name: comment for name in targets}
        else:  # "q (B, H, T, D), k and v (B, G, T, D)"
            parts = re.findall(r"(\w+(?: and \w+)*) (\([^()]+\))", comment)
            self.shapes = {n: shape for names, shape in parts for n in names.split(" and ")}
        self.seen = False

    def check(self, frame, known: dict[str, int]) -> None:
        """Compare with the frame's tensors. An axis is the frame's own integer of that name, or
        whatever it was first; so is any expression of unknown axes."""
        integers = {k: v for k, v in frame.f_locals.items() if type(v) is int}
        for name, comment in self.shapes.items():
            value = eval(name, frame.f_globals, frame.f_locals)
            dims = [dim.strip() for dim in re.match(r"\(([^()]*)\)", comment)[1].split(",")]
            dims = [dim for dim in dims if dim]
            where = f"{frame.f_code.co_filename}:{self.first}: {name} is {tuple(value.shape)}"
            shape = tuple(value.shape)
            if dims[0] == "...":  # any axes before the others
                dims, shape = dims[1:], shape[1 - len(dims) :]
            assert len(shape) == len(dims), f"{where}, not {comment}"
            self.seen = True
            for dim, size in zip(dims, shape):
                try:
                    expected = int(eval(dim, {}, known | integers))
                except (NameError, SyntaxError):
                    expected = known.setdefault(dim, size)
                assert size == expected, f"{where}, not {comment} with {dim} = {expected}"


def shapes_in(file: Path) -> dict[int, Shape]:
    """Comments with shapes behind assignments, by the first line of the statement."""
    with open(file, "rb") as lines:
        tokens = list(tokenize.tokenize(lines.readline))
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign):
            comment = comments.get(node.end_lineno, "")
            if re.match(r"(\w+ )?\([\w*/^. +-]+,[^()]*\)", comment):
                found[node.lineno] = Shape(node, comment)
    return found


class Watch:
    """While open, checks comments with shapes whenever their statements have run."""

    def __init__(self, *modules):
        self.files = {module.__file__: shapes_in(Path(module.__file__)) for module in modules}

    def __enter__(self) -> "Watch":
        self.before = sys.gettrace()
        sys.settrace(self.enter_frame)
        return self

    def __exit__(self, *exception) -> None:
        sys.settrace(self.before)

    def enter_frame(self, frame, event: str, argument) -> Callable | None:
        shapes = self.files.get(frame.f_code.co_filename)
        if not shapes:
            return None
        pending: list[Shape] = []
        known: dict[str, int] = {}

        def trace(frame, event: str, argument) -> Callable:
            if pending and not pending[0].first <= frame.f_lineno <= pending[0].last:
                pending.pop().check(frame, known)
            if event == "line" and frame.f_lineno in shapes:
                pending[:] = [shapes[frame.f_lineno]]
            return trace

        return trace


def test_comments_with_shapes(monkeypatch):
    """Sessions, quantisation and other methods; every comment must have been met."""
    vlm, processor = load(TINY, device="cpu")
    picture = TINY / "samples" / "receipt.png"
    with Watch(sparsevila, model, awq, kernels, baselines) as watch:
        kinds = (SparseVILA, baselines.VisionZip, baselines.PruMerge, baselines.SparseVLM)
        for kind in (*kinds, baselines.VisualSoftmax):
            session = kind(vlm, processor)
            session.see([picture, picture])
            session.ask("how much is the coffee?", max_new_tokens=2)
        awq.dequantize_reference(*packed_linear())
        awq.w4a16_matmul(torch.randn(3, 32).bfloat16(), *packed_linear(group=32))
        monkeypatch.setattr(awq, "CPU_PLAIN", 0)
        awq.w4a16_matmul(torch.randn(3, 32).bfloat16(), *packed_linear(group=32))
        awq.w4a16_matmul(torch.randn(3, 32), *packed_linear(group=32))
        pictures, prompts, _ = quantise.calibration_set(None, None, 2)
        quantise.calibration(vlm, processor, pictures, prompts, 2)
        block, calls = vlm.decoder.layers[0], [(torch.randn(1, 9, 128),)]
        o = block.self_attn.o_proj
        heads = awq.folds_of(block)[1].heads
        awq.search_scale(o, [o], calls, group_size=32, grid=2, heads=heads)
        awq.search_clip(block.mlp.gate_proj.weight, [calls[0][0]], group_size=32)
        model.merge_patches(torch.randn(2, 25, 4), 2)
        baselines.Pool(vlm, processor).see(picture)
        text = replace(vlm.config.text, rope_axes=(0, 1) * 8)
        model.rotary_table(torch.arange(27).view(3, 9), text)
        with torch.no_grad():
            model.Linear(512, 256)(torch.randn(1, 512))
    unseen = [
        f"{Path(file).name}:{line}"
        for file, shapes in watch.files.items()
        for line, shape in shapes.items()
        if not shape.seen
    ]
    assert not unseen, f"comments that no call reached: {unseen}"
    assert sum(map(len, watch.files.values())) >= 25


def packed_linear(group: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, zeros = awq.quantize_groups(torch.randn(16, 32), group)
    return awq.pack(codes.T), awq.pack(zeros.T), scales.T.contiguous()


def test_a_wrong_comment_is_seen(tmp_path):
    def run(comment: str) -> None:
        file = tmp_path / f"example{random.random()}.py"
        file.write_text(
            f"def double(x):\n    B, N = x.shape\n    y = x.mT  # {comment}\n    return y"
        )
        names: dict = {"__name__": "example"}
        exec(compile(file.read_text(), str(file), "exec"), names)
        watch = Watch()
        watch.files = {str(file): shapes_in(file)}
        with watch:
            names["double"](torch.zeros(2, 3))

    run("(N, B)")
    for wrong in ("(B, N)", "(N, B, 1)", "(N, N)"):
        with pytest.raises(AssertionError, match="y is"):
            run(wrong)


def test_axes_of_docstrings_are_in_the_legend_of_their_file():
    """Single capitals in the shapes of a file's docstrings stand in its module docstring."""
    for module in MODULES:
        legend = inspect.getdoc(module)
        if elsewhere := re.search(r"Axes as\s+in (\w+)\.py", legend):
            other = next(m for m in MODULES if m.__name__.split(".")[-1] == elsewhere[1])
            legend += inspect.getdoc(other)
        source = Path(module.__file__).read_text()
        used = set()
        for match in re.finditer(r"\((?:\w+|\.\.\.)(?:[ */+-]+\w+)*(?:, [\w */+-]+)+\)", source):
            if '"' not in match[0] and "=" not in match[0]:
                used |= set(re.findall(r"\b[A-Z]\b", match[0]))
        missing = [axis for axis in sorted(used) if not re.search(rf"\b{axis}\b", legend)]
        assert not missing, f"{module.__name__}: {missing} are not in the legend"


COMMANDS = (
    "sparsevila.py", "awq.py", "bench", "tiny/scenes.py", "tiny/train.py",
    "examples/transformers_vlm.py", "tests.conformance.check", "tests.conformance.run",
    "tests.conformance.vectors", "tests/golden/record.py", "tests/hf_models.py",
)  # fmt: skip


class Parsed(Exception):
    """In place of what a command does with its arguments."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_sentence_and_its_default(command, monkeypatch):
    """As `--help` shows them; what is off or missing by default has none to tell."""

    def parse(parser, *_):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed) as caught:
        python([command] if command.endswith(".py") else ["-m", command])
    parsers, checked = [caught.value.args[0]], 0
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.help not in (argparse.SUPPRESS, "show this help message and exit"):
                assert action.help, f"{parser.prog}: {action.dest} has no sentence"
                told = "default" in action.help or action.default in (None, [])
                told = told or action.default is False
                assert told, f"{parser.prog}: {action.dest} does not tell its default"
                checked += 1
    assert checked
