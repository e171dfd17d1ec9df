"""The package that `pip install` makes: one name, whatever else is installed."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")

PROGRAM = """
import sys
import sparsevila_reference
from sparsevila_reference import awq, baselines
from sparsevila_reference.checkpoints import load
from sparsevila_reference.sparsevila import SparseVILA

home = sparsevila_reference.HOME
session = SparseVILA(*load(home / "tiny", device="cpu"))
session.see(home / "tiny/samples/receipt.png")
print(session.ask("how much is the coffee?").text)
print(sorted(name for name in sys.modules if name.split(".")[0] in sparsevila_reference.FILES))
import kernels
print(kernels.theirs, awq.__name__, baselines.SparseVILA is SparseVILA)
print("torch._dynamo" in sys.modules)  # which takes a second to import
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder that imports look into, with our package and PyPI's of the same names."""
    (tmp_path / "sparsevila_reference").symlink_to(ROOT / "sparsevila_reference")
    for name in ("kernels", "awq", "model", "tools"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("theirs = True\n")
    return tmp_path


def run(path: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=path, env={"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_lives_beside_others_of_the_same_names(installed):
    assert run(installed, "-c", PROGRAM).splitlines() == [
        "8.75", "[]", "True sparsevila_reference.awq True", "False",
    ]  # fmt: skip


def test_the_commands_run_as_modules_of_the_package(installed):
    plain = run(ROOT, "sparsevila.py", "--ask", "what costs 3.10?")
    assert "bread" in plain
    package = run(installed, "-m", "sparsevila_reference.sparsevila", "--ask", "what costs 3.10?")
    assert package == plain
    assert "--group-size" in run(installed, "-m", "sparsevila_reference.awq", "--help")


def test_an_import_leaves_no_compiled_file_behind(installed):
    """A .pyc of kernels.py with other imports in it would be taken by `import kernels` as well."""
    run(installed, "-c", "from sparsevila_reference import model")
    assert (
        run(ROOT, "-c", "import model, kernels; print(model.linear is kernels.linear)") == "True\n"
    )


def test_all_rooms_are_packaged_but_those_of_the_repository_itself():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    packaged = {p.rpartition(".")[2] for p in project["tool"]["setuptools"]["packages"][2:]}
    assert folders - packaged == {"bench", "examples", "sparsevila_reference", "tests"}
    assert packaged < folders


def test_the_pinned_versions_are_within_the_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ranges = [Requirement(text) for text in project["project"]["dependencies"]]
    pins = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pinned = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    assert {r.name for r in ranges} == pinned.keys() - {"triton"}
    assert all(r.specifier.contains(pinned[r.name]) for r in ranges)
