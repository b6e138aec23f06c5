"""The compiled search: one graph for all sizes of a batch, the same logits, and a clear word where it does not work.

The compiler itself takes a minute on a CPU; what robench does around it is tested with backends that take no time.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from robench import compilation
from robench.classifier import Classifier, search_copy
from robench.compilation import CompiledSearch, compiled
from robench.errors import UserError
from robench.evaluation.shards import Shard
from robench.evaluation.worker import Worker
from tests.models import SmallNet, numbers

CPU = torch.device("cpu")


@pytest.fixture
def search():
    torch._dynamo.reset()
    classifier = Classifier(SmallNet().eval(), input_shape=(1, 4, 4), num_classes=5)
    return search_copy(classifier, precision="fp32", device="cpu", cheap_layers=False)


def test_one_graph_serves_batches_that_shrink(search):
    counter = CompileCounterWithBackend("aot_eager")
    model = CompiledSearch(search, backend=counter)
    for count in (37, 36, 12, 5, 3, 2, 64, 1, 0):
        start = numbers(count, 1, 4, 4).float().requires_grad_()
        logits, expected = model(start), search(start)
        assert torch.allclose(logits, expected, atol=1e-6)
        (gradient,) = torch.autograd.grad(logits.sum(), start)
        (wanted,) = torch.autograd.grad(expected.sum(), start)
        assert torch.allclose(gradient, wanted, atol=1e-6)
    graphs = counter.frame_count
    assert graphs <= 2, "oneDNN has a kernel for batches below 16"
    with torch.no_grad():
        for count in (39, 20, 17):
            model(numbers(count, 1, 4, 4).float())
    assert counter.frame_count == graphs + 1, "one more without gradients"


def test_what_does_not_compile_is_one_line_that_says_what_is_missing(search):
    def no_compiler(graph, inputs):
        raise RuntimeError("No working C++ compiler found\nand more lines")

    with pytest.raises(UserError, match=r"--compile does not work here .*No working C\+\+ compiler") as caught:
        compiled(search, input_shape=(1, 4, 4), device=CPU, backend=no_compiler)
    assert "leave --compile out" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_logits_are_refused(search):
    def wrong(graph, inputs):
        return lambda *values: tuple(1.01 * value for value in graph(*values))

    with pytest.raises(UserError, match="--compile changes this model's logits"):
        compiled(search, input_shape=(1, 4, 4), device=CPU, backend=wrong)


def test_a_worker_that_compiles_gives_the_same_outcomes(monkeypatch):
    from robench import planning
    from robench.datasets import ArrayImages, select_examples
    from robench.records import Configured, ModelIdentity
    from robench.threat_model import ThreatModel

    torch._dynamo.reset()
    model = Classifier(SmallNet().eval(), input_shape=(1, 4, 4), num_classes=5)
    pixels = (numbers(40, 1, 4, 4) * 60 + 128).clamp(0, 255).to(torch.uint8)
    labels = model(pixels.float() / 255).argmax(1)
    images = ArrayImages(images=pixels.numpy(), labels=labels.numpy(), classes=tuple("abcde"), origin="test")
    examples, ids = select_examples(images, dataset="digits", split="test", count=None)
    identity = ModelIdentity(id="m", weights_sha256="0" * 64, architecture=Configured(name="small"))
    threat = ThreatModel.parse("Linf@0.05")
    (spec,) = planning.plan(planning.Request(identity, examples, [threat], ["pgd-10"], precision="fp64"))

    def answer(compile_search):
        worker = Worker(model, images, device=CPU, precision="fp64")
        if compile_search:
            worker.compile_search()
        return worker, worker(Shard(spec, ids)).rows

    _, expected = answer(False)
    monkeypatch.setattr(compilation.torch, "compile", _by("aot_eager", torch.compile))
    worker, found = answer(True)
    assert isinstance(worker.search, CompiledSearch)
    assert 0 < expected["robust"].sum() < len(ids)
    assert np.array_equal(found["robust"], expected["robust"])
    assert np.allclose(found["linf"], expected["linf"])
    assert np.array_equal(found["forward_passes"], expected["forward_passes"])


def _by(backend, compile_):
    return lambda function, **options: compile_(function, **{**options, "backend": backend})
