"""Compiled layers against plain ones, on a GPU: compiling for a CPU takes minutes."""

import pytest
import torch

from agiqa.extract.models.compiling import compile_layers
from agiqa.extract.tuning.adapting import adapt, recompute
from agiqa.extract.tuning.examples import example_of
from agiqa.extract.tuning.group import Group
from agiqa.extract.tuning.learner import Learner
from tests.extract.tuning.talks import load_talks, opener_for, quick

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, for which layers are compiled"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns of its own code, and of float32 without TF32
]


def learner_of(checkpoint, *, which, compiled):
    """In float32, where little is rounded; without dropout, since compiled code draws other masks."""
    backbone = opener_for(checkpoint, max_slices=2)(device="cuda", dtype="float32")
    backbone.load()
    trained = adapt(backbone, quick("published"), seed=0)
    recompute(trained, which)
    if compiled:
        compile_layers(trained.model)
    return Learner(backbone, trained, quick("published"), Group())


@pytest.mark.parametrize("which", ["none", "all"])
def test_compiled_layers_give_the_same_gradients(minicpm, talks, which):
    """For batches of several lengths, one of a single item."""
    items = load_talks(talks).items
    learners = [learner_of(minicpm, which="none", compiled=False), learner_of(minicpm, which=which, compiled=True)]
    for part in (items[:3], items[2:4], items[4:5]):
        found = []
        for learner in learners:
            examples = [example_of(learner.backbone, item) for item in part]
            labels = sum(len(example.labels) for example in examples)
            step = learner.gradient([(7, examples)], labels=labels)
            found.append((step, [weight.grad.clone() for weight in learner.weights]))
            for weight in learner.weights:
                weight.grad = None
        (plain, expected), (compiled, gradients) = found
        assert compiled.loss == pytest.approx(plain.loss, rel=1e-5)
        assert compiled.norm == pytest.approx(plain.norm, rel=1e-4)
        for name, one, other in zip(learners[0].trained.parameters, gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * plain.norm, msg=lambda m, n=name: f"{n}: {m}")
