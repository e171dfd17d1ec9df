"""What several test files share: the tiny model, and random models around its tokenizer."""

import io
import math
import os
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

# Before torch is imported, and for all that tests start: on tensors as small as these, the threads
# of a busy machine mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels  # noqa: E402
import model  # noqa: E402
from checkpoints import load, load_processor  # noqa: E402
from checkpoints.processor import Processor  # noqa: E402

TINY = ROOT / "tiny"
# Folders of tests/golden, a tiny random checkpoint of each family and layout.
FAMILIES = [
    "llava", "llava_next", "llava_next_mistral", "smolvlm", "smolvlm2", "nvila", "longvila",
    "nvila_hf", "qwen2_5_vl", "qwen3_vl",
]  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/conformance; pytest wants them here."""
    group = parser.getgroup("conformance")
    group.addoption("--impl", help="module or Python file to check in place of this project")
    group.addoption("--quick", action="store_true", help="a tenth of the cases, no large ones")
    group.addoption("--impl-device", default="cpu", metavar="DEVICE", help="default: cpu")
    group.addoption(
        "--impl-dtypes", default="float32,float16,bfloat16", metavar="NAMES", help="by commas"
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process a core; none but this one where somebody's own implementation is checked, or a
    single file or test is run."""
    few = config.getoption("impl") or config.args and all(".py" in name for name in config.args)
    return 0 if few else os.cpu_count() or 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process has nothing left to do while another runs the notebook
    for minutes."""
    items.sort(key=lambda item: item.path.name not in ("test_tutorial.py", "test_interpreter.py"))


def pytest_terminal_summary(terminalreporter) -> None:
    """How many mutants of tests/test_mutants.py were caught, and by which check."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    found = [dict(report.user_properties).get("mutant") for report in reports]
    found = [pair for pair in found if pair]
    caught: dict[str, list[str]] = {}
    for mistake, check in found:
        caught.setdefault(check or "NOT CAUGHT", []).append(mistake)
    if found:
        missed = len(caught.get("NOT CAUGHT", []))
        terminalreporter.section(f"mutants caught: {len(found) - missed} of {len(found)}")
    for check, mistakes in caught.items():
        terminalreporter.line(f"{check} ({len(mistakes)})\n    " + "; ".join(mistakes))


settings.register_profile("house", deadline=None)  # two busy cores take their time
settings.load_profile("house")

# For the tests of Triton kernels: in the interpreter where it is switched on, else on a GPU.
ON = "cpu" if kernels.INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    not (kernels.INTERPRETED or (kernels.triton and torch.cuda.is_available())),
    reason="no GPU; see test_interpreter.py",
)
few = settings(max_examples=20 if kernels.INTERPRETED else 200)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="session")
def tiny() -> tuple[model.VLM, Processor]:
    return load(TINY, device="cpu")


@pytest.fixture
def page() -> Path:
    return TINY / "samples" / "receipt.png"


def random_model(
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 8,
    grid: int = 4,
    patch: int = 4,
    vision_layers: int = 2,
    feature_layer: int = -2,
    qkv_bias: bool = False,
    tied: bool = False,
) -> tuple[model.VLM, Processor]:
    """A model with random weights, and a processor with the tiny model's tokenizer."""
    processor = load_processor(TINY)
    processor.image_size = processor.resize_edge = grid * patch
    vision = model.VisionConfig(
        width=24, mlp=32, layers=vision_layers, heads=3, image_size=grid * patch,
        patch_size=patch, feature_layer=feature_layer,
    )  # fmt: skip
    text = model.TextConfig(
        vocab=processor.tokenizer.get_vocab_size(), width=32, mlp=48, layers=layers,
        heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim, qkv_bias=qkv_bias, tied=tied,
    )  # fmt: skip
    config = model.Config(vision, text, image_token_id=processor.image_token_id)
    processor.config = config
    torch.manual_seed(seed)
    vlm = model.VLM(config).eval().requires_grad_(False)
    for parameter in vlm.parameters():
        if parameter.dim() == 2:
            parameter *= 2  # attention that is not uniform, logits that are not alike
    return vlm.to(dtype), processor


def random_pictures(seed: int, count: int, side: int = 40) -> list[Image.Image]:
    noise = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, side * side * 3), generator=noise, dtype=torch.uint8)
    return [Image.frombytes("RGB", (side, side), bytes(p.tolist())) for p in pixels]


class Recorder:
    """Collects every logits vector that a model computes."""

    def __init__(self, vlm: model.VLM):
        self.logits: list[torch.Tensor] = []
        self.hook = vlm.lm_head.register_forward_hook(self._record)

    def _record(self, module, inputs, output) -> None:
        self.logits.append(output.detach().clone())

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception) -> None:
        self.hook.remove()


class Ran(NamedTuple):
    """What a command line printed, and its exit status."""

    returncode: int
    stdout: str
    stderr: str


def command_line(main: Callable, *arguments, stdin: str = "", cwd: Path | None = None) -> Ran:
    """Run a program's `main` in this process: to start Python and torch would take seconds."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    status = 0
    try:
        os.chdir(cwd or before)
        with redirect_stdout(out), redirect_stderr(err), patch("sys.stdin", io.StringIO(stdin)):
            main(list(map(str, arguments)))
    except SystemExit as stop:
        status = stop.code
    finally:
        os.chdir(before)
    return Ran(status, out.getvalue(), err.getvalue())


def python(arguments: list[str]) -> None:
    """`python ARGUMENTS` in the repository's folder, in this process; a `main` for
    `command_line`."""
    module = arguments[0] == "-m"
    with patch("sys.argv", arguments[module:]), patch("sys.path", [str(ROOT), *sys.path]):
        if module:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and values; NaN equals NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def softmax64(q, k, causal, scale=None):
    """Scores and softmax (B, H, M, N) in float64, heads expanded, mask right-aligned; a row that
    sees no key has weights 0."""
    H, M, D = q.shape[1:]
    G, N = k.shape[1:3]
    k = torch.stack([k[:, h * G // H] for h in range(H)], 1).double()
    scores = torch.einsum("bhmd,bhnd->bhmn", q.double(), k) * (scale or 1 / math.sqrt(D))
    if causal:
        hidden = [[j > i + N - M for j in range(N)] for i in range(M)]
        scores = scores.masked_fill(torch.tensor(hidden, device=q.device), -math.inf)
    return scores, torch.softmax(scores, -1).nan_to_num(0)


def check_rows_that_see_nothing(dtype: torch.dtype, causal: bool, device: str) -> None:
    """Rows with scores of -inf only: lse -inf, nothing added to the sums, attention 0; the other
    rows are not touched."""
    q, k, v = (torch.randn(2, h, 9, 16).to(dtype).to(device) for h in (4, 2, 2))
    k[..., 0] = 1
    q[:, :, [0, 5]], q[:, :, [0, 5], 0] = 0, -torch.inf
    scores, weights = softmax64(q, k, causal)
    lse = kernels.attention_lse(q, k, causal=causal)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert (lse[:, :, [0, 5]] == -torch.inf).all()
    for known in (None, lse):
        sums = kernels.attention_colsum(q, k, causal=causal, lse=known).double()
        torch.testing.assert_close(sums, weights.sum(-2), rtol=1e-4, atol=1e-6)
    assert not kernels.decode_attention(q[:, :, 5:6], k, v).any()
