"""What tests/conformance tells about bad input, and that its files are what its script makes."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conformance import vectors
from conformance.check import bits, expectations, main
from conformance.conftest import load_implementation
from conformance.contracts import PROMISES
from conformance.laws import Lab, wrong
from conformance.recipe import VALUES, bell, numbers, simplified
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
NAME = "attention_lse/0/lse"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of right results of one operation: what is expected."""
    manifest, tensors = expectations()
    places = [p["tensor"] for case in manifest for p in case["outputs"].values()]
    right = {name: tensors[name] for name in places if name.startswith("attention_lse/")}
    save_file(right, tmp_path / "results.safetensors")
    return tmp_path


def verdict(folder: Path, capsys) -> tuple[int, str]:
    status = main([str(folder)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def changed(folder: Path, change) -> None:
    """Change the results of a folder in place."""
    tensors = load_file(folder / "results.safetensors")
    tensors = change({name: tensor.clone() for name, tensor in tensors.items()})
    save_file(tensors, folder / "results.safetensors")


def test_right_results_exit_with_zero(results, capsys):
    status, words = verdict(results, capsys)
    assert status == 0 and "attention_lse" in words and words.count("not provided") == 13


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t | {NAME: torch.zeros(7)}, "shape must be [1, 1, 1], got [7]"),
        (lambda t: t | {NAME: t[NAME].double()}, "dtype must be float32, got float64"),
        (lambda t: t | {NAME: t[NAME] * torch.nan}, "1 NaN"),
        (lambda t: t | {NAME: t[NAME] + torch.inf}, "inf in place of"),
        (lambda t: t | {NAME: t[NAME] + 1e-3}, "1 of 1 wrong, the first at (0, 0, 0)"),
        (
            lambda t: {n: v for n, v in t.items() if n != NAME},
            f"{NAME} (q [1, 1, 1, 8], k [1, 1, 1, 8]): missing",
        ),
        (lambda t: t | {"attention_lse/0/lze": torch.ones(1)}, "no case: 'attention_lse/0/lze'"),
        (lambda t: t | {"lse": torch.ones(1)}, "no case: 'lse'"),
    ],
)
def test_wrong_results_are_named(results, capsys, change, words):
    changed(results, change)
    status, printed = verdict(results, capsys)
    assert status == 1 and words in printed


def test_an_infinity_that_is_expected_must_be_there(results, capsys):
    _, tensors = expectations()
    name = next(n for n, t in tensors.items() if n.endswith("/lse") and t.isinf().any())
    changed(results, lambda t: t | {name: t[name].nan_to_num(neginf=-1e30)})
    status, printed = verdict(results, capsys)
    assert status == 1 and f"{name} (" in printed and "in place of -inf" in printed


def test_folders_without_results(results, capsys):
    file = results / "results.safetensors"
    content = file.read_bytes()
    for damage, words in (
        (lambda: file.write_bytes(content[:-1]), "damaged"),
        (lambda: file.write_bytes(b""), "damaged"),
        (lambda: file.write_bytes(b"\xff" * 1000), "damaged"),
        (lambda: save_file({}, file), "hold no tensors"),
        (lambda: file.unlink(), "holds no .safetensors files"),
        (lambda: results.rmdir(), "no folder"),
    ):
        damage()
        status, printed = verdict(results, capsys)
        assert status == 1 and words in printed and str(results) in printed
        assert printed.count("\n") == 1


def test_a_tensor_in_two_files(results, capsys):
    content = (results / "results.safetensors").read_bytes()
    (results / "zweite.safetensors").write_bytes(content)
    status, printed = verdict(results, capsys)
    assert status == 1 and "zweite.safetensors: attention_lse/0/lse is in another file" in printed


def test_the_files_are_what_the_script_makes():
    """Inputs and whatever is exact to the bit; float64 sums may be added up in another order."""
    manifest, recorded = expectations()
    cases = list(vectors.all_cases())
    assert [case["operation"] for case in manifest] == [case.operation for case in cases]
    for written, case in zip(manifest, cases):
        assert written["inputs"].keys() == case.inputs.keys()
        for name, tensor in case.inputs.items():
            place = written["inputs"][name]
            got = recorded[place["tensor"]] if "tensor" in place else numbers(place)
            assert torch.equal(got.nan_to_num(), tensor.nan_to_num())
        for name, expected in case.outputs.items():
            place, (value, allowed) = written["outputs"][name], vectors.stored(expected)
            got = recorded[place["tensor"]]
            assert list(got.shape) == place["shape"] and str(got.dtype).endswith(place["dtype"])
            if allowed is None:
                assert place["tolerance"] == "exact" and torch.equal(bits(got), bits(value))
            else:
                off = (got.double() - value.double()).abs().nan_to_num(0)
                assert (off <= recorded[place["tolerance"]] / 100 + 1e-30).all()


def test_the_files_are_at_most_eight_megabytes():
    assert sum(file.stat().st_size for file in vectors.FOLDER.iterdir()) <= 8_000_000


def test_numbers_are_what_the_page_says():
    """With Python's integers, element by element."""

    def mixed(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    for seed in (0, 77, 2**27 + 1):
        for i, z in enumerate(bell(seed, (3, 5)).flatten().tolist()):
            w, low = (mixed((mixed(seed) + 2 * i + n) % 2**32) for n in (0, 1))
            total = sum(w.to_bytes(4, "big")) - 510
            assert z == (total + low / 2**32) / 128
    for values in VALUES:
        recipe = {"values": values, "seed": 5, "size": 2.0, "shape": [2, 4, 3], "dtype": "float32"}
        assert numbers(recipe).isfinite().all()


def test_a_case_is_made_as_simple_as_it_can_be():
    fields = {"n": range(1, 100), "kind": ("plain", "odd", "worse"), "other": (0, 1, 2)}
    tried = []

    def fails(case: dict) -> bool:
        tried.append(case)
        return case["n"] >= 17 and case["kind"] != "plain"

    case = simplified({"n": 80, "kind": "worse", "other": 2, "seed": 3}, fields, fails)
    assert case == {"n": 17, "kind": "odd", "other": 0, "seed": 3} and len(tried) < 200


def test_cases_are_the_same_in_every_run_and_show_every_option():
    for promises in PROMISES.values():
        for promise in promises:
            cases = promise.cases("float32", 1)
            assert cases == promise.cases("float32", 1)
            if promise.count >= 100:
                for name, options in promise.fields.items():
                    shown = {repr(case[name]) for case in cases}
                    assert len(options) > 15 or {*map(repr, options)} <= shown, (promise, name)


def test_every_operation_has_cases():
    manifest, _ = expectations()
    assert {case["operation"] for case in manifest} == PROMISES.keys()


def test_an_allowed_error_is_small_beside_what_it_belongs_to():
    """A tolerance that lets anything pass would be none: of the largest value at most a twentieth
    in float32, a tenth in 16 bits; of integers one in twenty is in doubt."""
    manifest, tensors = expectations()
    doubtful = integers = 0
    for case in manifest:
        for place in case["outputs"].values():
            expected = tensors[place["tensor"]].double().nan_to_num(0, 0, 0)
            extreme = any(
                word in case["about"] for word in ("far beyond", "weights tiny", "v tiny")
            )
            if place["tolerance"] != "exact" and expected.any() and not extreme:
                allowed = tensors[place["tolerance"]]
                limit = {"float32": 0.05, "int8": 1.01}.get(place["dtype"], 0.1)
                assert allowed.max() < limit * expected.abs().max(), place["tensor"]
                if place["dtype"] == "int8":
                    doubtful, integers = doubtful + int(allowed.sum()), integers + allowed.numel()
    assert doubtful < integers / 20


def test_a_pipe_is_not_waited_for(results, capsys):
    os.mkfifo(results / "pipe.safetensors")
    status, printed = verdict(results, capsys)
    assert status == 1 and "pipe.safetensors is no regular file" in printed


def test_a_refused_dtype_hides_no_mistake(tmp_path):
    """Float32 is wrong and the other dtypes are refused; and a file that refuses everything."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def attention_lse(q, k, **options):\n"
        "    if q.element_size() < 4:\n"
        "        raise NotImplementedError('float32 only')\n"
        "    return q.sum(-1)\n"
    )
    status, printed = run("pytest", "-q", "tests/conformance", "--impl", str(file))
    assert status == 1 and "4 failed" in printed
    file.write_text("def attention_lse(q, k, **options):\n    raise NotImplementedError('no')\n")
    status, printed = run("pytest", "-q", "tests/conformance", "--impl", str(file))
    assert status == 1 and " passed" not in printed


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemExit(0)", "def", "import nowhere"])
def test_files_that_cannot_be_imported_are_one_line(code, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match="mine.py' cannot be imported: "):
        load_implementation(str(tmp_path / "mine.py"))


@pytest.mark.skipif(not shutil.which("node"), reason="no node")
def test_a_program_in_another_language(tmp_path, capsys):
    example = ROOT / "tests" / "conformance" / "example.js"
    subprocess.run(["node", example, tmp_path / "results"], check=True)
    status, printed = verdict(tmp_path / "results", capsys)
    assert status == 0 and printed.count("right") == 3, printed


# --- --impl ---------------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


WRONG_OPTIONS = {
    ("--impl", "no_such_module"): "No module named 'no_such_module'",
    ("--impl", "no_such.py"): "--impl 'no_such.py' cannot be imported: FileNotFoundError",
    ("--impl", "."): "--impl '.' cannot be imported",
    ("--impl", "json"): "--impl json defines none of attention_lse, ",
    ("--impl-dtypes", "float32,int3"): "'int3' is none of float32, float16, bfloat16",
    ("--impl-device", "abacus"): "--impl-device: ",
}


def test_wrong_options_are_one_line():
    """In one process, for to start pytest takes seconds: a line and a status for each."""
    each = "print(int(pytest.main(['-q', 'tests/conformance', *options])), flush=True)"
    code = f"import pytest\nfor options in {list(WRONG_OPTIONS)}:\n    {each}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[1::2] == [str(int(pytest.ExitCode.USAGE_ERROR))] * len(WRONG_OPTIONS), lines
    assert all(words in line for words, line in zip(WRONG_OPTIONS.values(), lines[::2])), lines


def test_what_a_module_does_not_define_is_not_provided(tmp_path):
    """Also what it only imports from ours, and what it refuses in part."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from kernels import attention_colsum, attention_lse\n"
        "def keep_count(n, sparsity):\n"
        "    return n\n"
        "def select_tokens(scores, keep):\n"
        "    raise NotImplementedError('tomorrow')\n"
    )
    assert load_implementation(str(file)).keys() == {"keep_count", "select_tokens"}
    status, printed = run("pytest", "-q", "-rs", "tests/conformance", "--impl", str(file))
    assert status == 1 and "2 failed" in printed and " passed" not in printed
    assert "attention_lse not provided" in printed
    assert "select_tokens not provided in part: torch.float32: tomorrow" in printed
    folder = tmp_path / "results"
    status, printed = run("tests.conformance.run", str(folder), "--impl", str(file))
    assert status == 0, printed
    status, printed = run("tests.conformance.check", str(folder))
    assert status == 1 and "keep_count/1/count" in printed and "shape" not in printed


def test_a_changed_copy_of_our_files_meets_its_own_neighbours(tmp_path):
    """--impl copy/sparsevila.py imports copy/kernels.py, not ours."""
    for name in ("sparsevila.py", "model.py", "awq.py", "kernels.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    with (tmp_path / "kernels.py").open("a") as file:
        file.write("\ndef attention_colsum(q, k, **options):\n    raise AssertionError('mine')\n")
    ours = sys.modules["kernels"]
    theirs = load_implementation(str(tmp_path / "sparsevila.py"))
    assert sys.modules["kernels"] is ours
    with pytest.raises(AssertionError, match="mine"):
        promise = PROMISES["RetrievalCache"][0]
        promise.check(Lab(theirs), promise.cases("float32", 1)[0])


def test_the_documented_adapter(tmp_path):
    """The README's adapter around the published package, and what the README says of it."""
    text = (ROOT / "tests" / "conformance" / "README.md").read_text()
    adapter = text.split("```python\n")[1].split("```")[0]
    on_a_cpu = "from flash_colreduce import naive_colreduce as flash_colreduce  #"
    file = tmp_path / "adapter.py"
    file.write_text(adapter.replace("from flash_colreduce import flash_colreduce  #", on_a_cpu))
    suite = ("pytest", "-q", "tests/conformance", "--quick", "-k", "values")
    status, printed = run(*suite, "--impl", str(file))
    assert status == 1, printed
    assert "M 2, causal True, float32: colsum is 2 in place of 1" in printed, printed
    lab, faults = Lab(load_implementation(str(file))), []
    for promise in PROMISES["attention_colsum"]:
        for case in promise.cases("float32", 1) if promise.law in ("values", "memory") else ():
            with suppress(NotImplementedError):
                faults += [case] if wrong(promise, lab, case) else []
    late = [case for case in faults if case["causal"] and case["M"] > case["N"]]
    blind = [case for case in faults if case["scores"] == "blind"]
    assert late and blind and all(case in late + blind for case in faults)


WRONG = """
import torch


def attention_colsum(q, k, *, causal=False, scale=None, lse=None):  # masked from the first key on
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).float()
    scores = q.float() @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).sum(2)


def keep_count(n, sparsity):
    return n
"""


def test_what_is_wrong_is_said_in_the_order_of_computation(tmp_path):
    (tmp_path / "mine.py").write_text(WRONG)
    status, printed = run("pytest", "tests/conformance", "--impl", str(tmp_path / "mine.py"))
    end = printed.split("wrong, in the order of computation")[1].splitlines()[1:]
    named = [line.split(":")[0] for line in end if line.split(":")[0] in PROMISES]
    assert status == 1 and "Traceback" not in printed
    assert named[:1] == ["attention_colsum"] and "keep_count" in named
    assert named == sorted(named, key=list(PROMISES).index)
    assert any(
        re.search(r"wrong. The simplest found: N 2, causal True, float32: colsum is 1 in", line)
        for line in end
    )
    assert any(
        line.startswith("    the same number comes of: mask aligned top-left") for line in end
    )
    assert "Start with attention_colsum: what comes after it may build on it." in end


def test_an_lse_that_is_not_used_is_noted(tmp_path):
    """In Python; files, which give the right lse, cannot show it."""
    right = WRONG.split("def keep_count")[0].replace(".tril()", ".tril(k.shape[2] - q.shape[2])")
    right = right.replace(".softmax(-1)", ".softmax(-1).nan_to_num(0)")
    (tmp_path / "mine.py").write_text(right)
    arguments = ("--impl", str(tmp_path / "mine.py"), "-k", "not errors", "--quick")
    status, printed = run("pytest", "tests/conformance", *arguments)
    assert status == 0 and "are wrong" not in printed, printed
    assert (
        printed.count("note: attention_colsum does not use lse=: right, but it saves no pass") == 1
    )
    folder = tmp_path / "results"
    run("tests.conformance.run", str(folder), "--impl", str(tmp_path / "mine.py"))
    status, printed = run("tests.conformance.check", str(folder))
    assert status == 0 and "attention_colsum" in printed
