"""Every command of README.md, and of the pages it leads to, is run, the long ones on something
smaller; the README's sample output, length and line counts are true, and so are all links.
`python tests/test_readme.py` writes the line counts."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command_line, python
from test_house import MOST_LINES

from bench import __main__ as bench

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "results/README.md",
    "examples/README.md",
    "tiny/README.md",
]
GOLDEN = ROOT / "tests" / "golden"
COUNT = re.compile(r"^\| `(\w+\.py)` \| (\d+) \|", re.MULTILINE)


def blocks(language: str = "", text: str = README) -> list[str]:
    """A page's blocks of code in a language; commands and output are in none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands() -> list[str]:
    """All commands of all pages, in blocks and in running text, one by one."""
    pages = "\n\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks(text=pages))).splitlines()
    lines += [" ".join(c.split()) for c in re.findall(r"`((?:python|pytest|bash) [^`]+)`", pages)]
    single = [part.split("  #")[0].strip() for line in lines for part in line.split(" && ")]
    starts = ("python ", "pytest", "pip ", "ruff ", "bash ", "jupyter ")
    return [part for part in dict.fromkeys(single) if part.startswith(starts)]


def small(command: str, folder: Path) -> list[str]:
    """What is run in place of a command: other files, fewer questions."""
    for long, short in {
        " page.png": f" {folder / 'page.png'}",
        "photo.jpg": str(ROOT / "tiny" / "samples" / "timetable.png"),
        "llava-hf/llava-1.5-7b-hf": str(GOLDEN / "llava"),
        "HuggingFaceTB/SmolVLM-256M-Instruct": str(GOLDEN / "smolvlm"),
        "--model random256m": f"--model {GOLDEN / 'smolvlm'}",
        "versus random256m": f"versus {GOLDEN / 'smolvlm'} --tokens 3 --runs 1",
        "--max-new-tokens 64": "--max-new-tokens 2",
        "path/to/file.py": f"{ROOT / 'kernels.py'} --quick",
        "RESULTS_FOLDER": str(folder / "results"),
        " quantised": f" {folder / 'again'} --samples 2",
        "--model quantised": f"--model {folder / 'quantised'}",
        "--figure results/": f"--figure {folder}/",
        "tiny/overlay.png": str(folder / "overlay.png"),
        "retrieved.png": str(folder / "retrieved.png"),
        "bench accuracy": "bench accuracy --methods dense blind --questions 4 --seeds 2",
        "bench needle --clips 10": "bench needle --clips 1 --methods blind",
        "bench adapter": "bench adapter --side 8 --tokens 2 --runs 1",
        "vlm.py MODEL": f"vlm.py {GOLDEN / 'llava'}",
    }.items():
        if long == " quantised" and "awq.py" not in command:
            continue
        command = command.replace(long, short)
    if command.startswith("python sparsevila.py") and ("--chat" in command or "--ask" in command):
        command += " --max-new-tokens 4" if "--max-new-tokens" not in command else ""
    return shlex.split(command)


# Commands that other tests run, in small or in part, and the files of those.
ELSEWHERE = {
    "pip install -r requirements.txt": ".ci/run",
    "pip install -r requirements-dev.txt": ".ci/run",
    "ruff check .": ".ci/run",
    "ruff format --check .": ".ci/run",
    "pytest": ".ci/run",
    "bash .ci/run": None,  # runs this test
    "bash verify_real.sh": None,  # needs a network; the command in it: tests/test_bench.py
    "pytest -k golden": "tests/test_golden.py",  # which would find this very test
    "jupyter nbconvert --to notebook --execute --inplace "
    "--ExecutePreprocessor.record_timing=False tutorial.ipynb": "tests/test_tutorial.py",
    "python tests/test_readme.py": "tests/test_readme.py",
    "python tiny/train.py": "tests/test_tiny.py",
    "python -m bench load": "tests/test_families.py",
    "python -m bench make smolvlm-256m random256m": "tests/test_families.py",
    "python -m bench speed --figure results/speed.png": "tests/test_bench.py",
    "python -m bench speed": "tests/test_bench.py",
    "python -m bench speed --preset longvila-7b --quantised": "tests/test_bench.py",  # on a GPU
    "python -m bench speed --preset qwen2.5-vl-7b --quantised": "tests/test_bench.py",
    "python -m bench speed --preset smolvlm-256m --visual-tokens 320 --dtype bfloat16 --eager "
    "--answer-tokens 32 --quantised --versus unquantised": "tests/test_bench.py",
    "python -m bench speed --preset longvila-1.5b --visual-tokens 392 --dtype bfloat16 --eager "
    "--runs 3 --answer-tokens 16 --quantised --versus unquantised": "tests/test_bench.py",
    "python -m bench kernels": "test_the_benchmark_of_the_kernels",
    "python -m bench awq": "test_the_benchmark_of_the_products",
    "python -m bench quantised --questions 100": "test_the_tables_of_quantised_variants",
}
HERE_RUN = [command for command in commands() if command not in ELSEWHERE]


def test_the_list_of_commands_is_complete():
    """Also that nothing is listed that the README no longer says, and that CI runs its own."""
    assert set(ELSEWHERE) <= set(commands())
    assert len(HERE_RUN) >= 12
    ci = (ROOT / ".ci" / "run").read_text().replace(" --quiet", "")
    for command, place in ELSEWHERE.items():
        if place == ".ci/run":
            assert command in ci
        elif place and place.endswith(".py"):
            assert (ROOT / place).is_file()
        elif place:
            assert place in globals()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme")


MADE = {  # in the folder, before a command that reads it
    "results": "-m tests.conformance.run {}",
    "page.png": "tiny/scenes.py {}",
    "quantised": "awq.py tiny {} --group-size 32 --samples 2",
}


@pytest.mark.parametrize("command", HERE_RUN)
def test_command(command, folder):
    program, *arguments = small(command, folder)
    for name, how in MADE.items():
        path = folder / name
        if str(path) in arguments and not path.exists():
            assert command_line(python, *how.format(path).split(), cwd=ROOT).returncode == 0
    stdin = "how much is the milk?\n"
    if program == "pytest":
        start = [sys.executable, "-m", "pytest", "-q"]
        ran = subprocess.run(start + arguments, cwd=ROOT, capture_output=True, text=True)
    else:
        ran = command_line(python, *arguments, stdin=stdin, cwd=ROOT)
    if "versus" in arguments and not importlib.util.find_spec("transformers"):
        assert ran.returncode == 2 and "No module named 'transformers'" in ran.stderr
    else:
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout


def test_the_python_example(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (example,) = blocks("python")
    names: dict = {}
    exec(example, names)
    assert names["answer"].text == "2.49" and "2.49" in capsys.readouterr().out
    assert names["session"].cache.length == len(names["session"].cache.visual) + 4


def test_the_sample_output(monkeypatch):
    """As printed here, but for the times, and the path of the model."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # printed without a GPU
    ran = subprocess.run([sys.executable, ROOT / "sparsevila.py"], capture_output=True, text=True)
    (shown,) = (text for text in blocks() if text.startswith("[...]"))
    assert ran.returncode == 0, ran.stderr
    shown, printed = shown.splitlines(), ran.stdout.splitlines()
    assert re.fullmatch(re.escape(shown[0]).replace(re.escape("[...]"), ".*"), printed[0])
    assert len(shown) == len(printed)
    for a, b in zip(shown[1:], printed[1:]):
        if ", ms" in a or "tokens/s" in a:
            a, b = (re.sub(r" +[\d.]+", "", line) for line in (a, b))
        assert a == b


def test_the_benchmark_of_the_kernels(monkeypatch, capsys):
    from bench import kernels

    monkeypatch.setattr(kernels, "SHAPES", [("small", 1, 4, G, 8, 16, 8, True) for G in (2, 4)])
    monkeypatch.setattr(kernels, "LINEARS", ((512, 256),))
    monkeypatch.setattr(kernels, "LENGTHS", (16, 32, 64))
    monkeypatch.setattr(kernels, "_peaks", lambda new, gpu: (1e7, 1e8))
    kernels.benchmark()
    lines = capsys.readouterr().out.splitlines()
    assert sum("decode_attention" in line for line in lines[:-1]) == 3 and lines[-1][0] == "{"
    rows = 0 if torch.cuda.is_available() else 3 * 3  # numbers of rows, dtypes, on a CPU
    assert sum("linear: " in line for line in lines[:-1]) == rows


def test_the_tables_of_quantised_variants(monkeypatch, capsys):
    from bench import quantised

    monkeypatch.setattr(quantised, "EQUIVALENTS", 2)
    chosen = ("full precision", "round to nearest", "AWQ without clip", "AWQ")
    few = {name: quantised.VARIANTS[name] for name in chosen}
    monkeypatch.setattr(quantised, "VARIANTS", few)
    monkeypatch.setattr(quantised, "CALIBRATION_TURNS", 2)
    monkeypatch.setattr(quantised, "SCENES", 4)
    bench.main(["quantised", "--questions", "2"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:5]] == list(few)
    assert float(rows[1].split("|")[3].split()[0]) == 0  # of the model from itself
    assert sum("±" in row for row in rows) == 4 + 3


def test_the_benchmark_of_the_products(monkeypatch, capsys):
    from bench import awq

    monkeypatch.setattr(awq, "SHAPES", [("small", 256, 64)])
    awq.benchmark()
    lines = capsys.readouterr().out.splitlines()
    rows = 8 if torch.cuda.is_available() else 2 * 5  # in two dtypes on a CPU
    assert sum("small: " in line for line in lines[:-1]) == rows and lines[-1][0] == "{"


def line_count(name: str) -> int:
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def test_line_counts():
    found = {name: int(lines) for name, lines in COUNT.findall(README)}
    assert set(found) == set(MOST_LINES)
    right = {name: line_count(name) for name in found}
    assert found == right, "python tests/test_readme.py writes them"


def test_it_is_short():
    assert len(README.splitlines()) <= 215 and len(README.encode()) <= 14_000


@pytest.mark.parametrize(
    "files", ["kernels", "awq", "model kernels", "sparsevila model awq kernels checkpoints"]
)
def test_copied_files_work_alone(files, tmp_path):
    """As "Copy" under "Files" says, in a folder of their own."""
    names = files.split()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name)
        else:
            shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, "-c", f"import {names[0]}; print({names[0]}.__file__)"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).parent == tmp_path


@pytest.mark.parametrize("page", [*PAGES, "tests/conformance/README.md"])
def test_links_and_headings_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")

    def anchors(file: Path) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}

    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), link
            assert not anchor or anchor in anchors(file), link


def write_line_counts() -> None:
    def row(match: re.Match) -> str:
        return f"| `{match[1]}` | {line_count(match[1])} |"

    (ROOT / "README.md").write_text(COUNT.sub(row, README), encoding="utf-8")


if __name__ == "__main__":
    write_line_counts()
