"""`VLM.compile_decoding`: an answer read by torch.compile is the answer, in every cache."""

import copy
import os
import shutil
from functools import partial

import pytest
import torch
from conftest import Recorder, random_model, random_pictures
from torch._dynamo.utils import counters

from awq import W4A16Linear, replace_linears
from model import KVCache
from sparsevila import Dense, RetrievalCache, SparseVILA

needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler"
)
check_close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def pair():
    """A model, and its compiled copy; one for all tests, to compile only once."""
    vlm, processor = random_model(3, layers=2)
    compiled = copy.deepcopy(vlm)
    compiled.compile_decoding()
    return vlm, compiled, processor


@needs_compiler
@pytest.mark.parametrize("kind", [Dense, SparseVILA])
def test_compiled_sessions_give_the_same_answers(pair, kind):
    """Logits to float rounding, tokens, retrieved sets and caches; three turns, in which the
    buffers of 320 rows, and 256 more than was packed, overflow."""
    *models, processor = pair
    turns, runs = (("a", 3), ("b", 300), ("c", 9)), []
    for vlm in models:
        session = kind(vlm, processor, prefill_sparsity=0.5, decode_sparsity=0.6)
        session.see(random_pictures(3, 2))
        with Recorder(vlm) as recorder:
            answers = [session.ask(question, max_new_tokens=n) for question, n in turns]
        runs.append((session, answers, recorder.logits))
    (eager, expected, logits), (compiled, got, others) = runs
    assert [a.token_ids for a in got] == [a.token_ids for a in expected]
    assert len(expected[1].token_ids) == 300  # beyond every buffer's first capacity
    for a, b in zip(logits, others, strict=True):
        check_close(a, b)
    assert compiled.cache.filled == eager.cache.filled
    assert compiled.cache.next_position == eager.cache.next_position
    for layer, N in enumerate(eager.cache.filled):
        for a, b in ((eager.cache.k, compiled.cache.k), (eager.cache.v, compiled.cache.v)):
            check_close(a[layer][:, :, :N], b[layer][:, :, :N])
    if kind is SparseVILA:
        for a, b in zip(expected, got, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.retrieved, b.retrieved, strict=True))


@needs_compiler
def test_four_bit_products_are_compiled_with_the_rest():
    """Each as one operation: nothing looks into what is kept of the weights, or compiles anew when
    it changes."""
    torch.compiler.reset()  # what other tests compiled counts towards PyTorch's limit
    vlm, processor = random_model(3, layers=2)
    replace_linears(vlm.decoder.layers, lambda linear: W4A16Linear.from_linear(linear, 16))
    session, runs = SparseVILA(vlm, processor), []
    session.see(random_pictures(3, 1))
    for compiling in (False, True):
        if compiling:
            vlm.compile_decoding()
            counters.clear()
        session.forget()
        with Recorder(vlm) as recorder:
            answer = session.ask("a", max_new_tokens=5)
        runs.append((answer.token_ids, torch.cat(recorder.logits[1:])))
    assert runs[0][0] == runs[1][0] and len(runs[0][0]) == 5
    check_close(runs[0][1], runs[1][1])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@needs_compiler
def test_decoding_is_what_is_compiled_and_prompts_are_not(pair, monkeypatch):
    _, vlm, _ = pair
    calls = []
    original = vlm.compiled
    monkeypatch.setattr(vlm, "compiled", lambda *inputs: calls.append(inputs) or original(*inputs))
    cache = KVCache(2)
    vlm.read(vlm.embed([5, 6, 7]), cache)
    assert not calls
    tokens = vlm.generate(vlm.embed([5, 6]), cache=cache, max_new_tokens=4, stop_ids=())
    assert len(calls) == 3 and len(tokens) == 4
    vlm(vlm.embed([5]))  # no cache, so that gradients may flow
    assert len(calls) == 3


@needs_compiler
def test_a_copy_decodes_with_its_own_weights(pair):
    """The compiled function belongs to the class, not to the model that was copied."""
    vlm, compiled, _ = pair
    plain, other = copy.deepcopy(vlm), copy.deepcopy(compiled)
    for each in (plain, other):
        for parameter in each.decoder.parameters():
            parameter *= 1.5
    logits = []
    for each in (vlm, plain, other):
        cache = KVCache(2)
        each(each.embed([5, 6, 7]), cache)
        logits.append(each(each.embed([8]), cache))
    check_close(logits[1], logits[2])
    assert (logits[0] - logits[2]).abs().max() > 0.1


@needs_compiler
@pytest.mark.parametrize("failing", [0, 1])
def test_a_compiled_step_that_fails_leaves_the_cache_as_it_was(pair, failing):
    """In the first layer, or when the first has its row already."""
    _, vlm, _ = pair

    class Broken(RetrievalCache):
        def attend(self, layer, q, k, v):
            if self.packed is not None and layer == failing:
                raise ZeroDivisionError
            return super().attend(layer, q, k, v)

    cache = Broken(2)
    cache.start_question()
    vlm.read(vlm.embed([5, 6, 7]), cache)
    cache.start_answer()
    with pytest.raises(ZeroDivisionError):
        vlm.read(vlm.embed([8]), cache)
    assert cache.filled == [3, 3] and cache.next_position == 3 and cache.packed is None


def test_where_nothing_can_be_compiled_it_says_so(monkeypatch):
    def no_compiler(function, **options):
        def fail(*inputs):
            raise OSError("no working C++ compiler\nfound\n\nSet TORCH_LOGS for more")

        return fail

    vlm, _ = random_model(4)
    monkeypatch.setattr(torch, "compile", no_compiler)
    message = "torch.compile does not work here: no working C[+][+] compiler found$"
    with pytest.raises(RuntimeError, match=message):
        vlm.compile_decoding()
    assert vlm.compiled is None
    cache = KVCache(2)
    assert vlm(vlm.embed([8]), cache).isfinite().all() and cache.length == 1
