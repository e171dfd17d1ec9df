"""tutorial.ipynb runs from top to bottom on a fresh kernel, and what is saved in it is what comes
out: the printed sources to the letter, words too, numbers nearly (times and rounding errors differ
from machine to machine)."""

import ast
import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from test_docs import MODULES, public

FILE = ROOT / "tutorial.ipynb"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


@pytest.fixture(scope="module")
def saved():
    return nbformat.read(FILE, as_version=4)


def sections(notebook) -> list[list]:
    """The cells of each numbered section."""
    found: list[list] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.match(r"## \d+\. ", cell.source):
            found.append([])
        if found:
            found[-1].append(cell)
    return found


def texts(cell, mime: str) -> str:
    """All that a cell shows in one format; "stream" is what it prints."""
    if mime == "stream":
        return "".join(out.text for out in cell.outputs if out.output_type == "stream")
    shown = [out.data[mime] for out in cell.outputs if mime in out.get("data", {})]
    return "\n".join(shown)


def same_numbers(a: str, b: str) -> bool:
    """Within one, or one part in twenty; any two rounding errors are the same."""
    for x, y in zip(NUMBER.findall(a), NUMBER.findall(b), strict=True):
        x, y = (float(number.replace(",", "")) for number in (x, y))
        error = max(abs(x), abs(y)) < 1e-5
        if not error and abs(x - y) > max(1, abs(x) / 20):
            return False
    return True


def test_it_runs_and_gives_what_is_saved(saved):
    """Its checks are assertions: a claim that does not hold is an error here."""
    ran = nbformat.from_dict(saved.copy())
    NotebookClient(ran, timeout=900, resources={"metadata": {"path": ROOT}}).execute()
    for number, (before, now) in enumerate(zip(saved.cells, ran.cells, strict=True)):
        if now.cell_type != "code":
            continue
        printed, shown = (texts(now, mime) for mime in ("stream", "text/markdown"))
        hint = f"cell {number}: run the notebook again and save it"
        assert shown == texts(before, "text/markdown"), hint
        assert all(out.get("name") != "stderr" for out in now.outputs), printed
        assert bool(texts(now, "image/png")) == bool(texts(before, "image/png")), hint
        old = texts(before, "stream")
        assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", old).split(), hint
        if "measured" not in now.metadata.get("tags", []):
            assert same_numbers(printed, old), f"{hint}: {printed!r}, saved is {old!r}"


def test_it_was_saved_after_a_run_from_the_top(saved):
    counts = [cell.execution_count for cell in saved.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert FILE.stat().st_size < 3_000_000


def test_every_section_has_picture_formula_check_and_exercise(saved):
    assert len(sections(saved)) == 10
    for number, cells in enumerate(sections(saved), 1):
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        code = [cell for cell in cells if cell.cell_type == "code"]
        assert cells[0].source.startswith(f"## {number}. ")
        assert "$$" in prose or "$" in prose, number
        assert any(texts(cell, "image/png") for cell in code), number
        assert any("check(" in cell.source for cell in code), number
        assert prose.count("**Exercise.**") == prose.count("<details><summary>Answer") == 1, number
        assert prose.count("</details>") == 1, number


def test_every_picture_has_a_caption_below_and_a_description(saved):
    cells = saved.cells
    for cell, below in zip(cells, cells[1:]):
        if cell.cell_type == "code" and texts(cell, "image/png"):
            assert below.source.startswith("*Picture: "), cell.source[-200:]
            assert len(cell.metadata["alt"].split()) > 12, "a description for who does not see it"


def test_it_imports_and_does_not_write_again(saved):
    """No function or class of the notebook has the name of one in the files."""
    code = "\n".join(cell.source for cell in saved.cells if cell.cell_type == "code")
    kinds = ast.FunctionDef, ast.ClassDef
    defined = {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, kinds)}
    ours = {name.split(".")[1] for module in MODULES for name, _ in public(module)}
    assert defined and not defined & ours
