"""Lack of memory, in the errors of torch and of the libraries below it: smaller batches, or a refusal."""

from dataclasses import replace

import pytest
import torch

from agiqa.errors import DataError, ModelError, WorkerError
from agiqa.extract.data.items import Message
from agiqa.extract.filling.live import LiveFeatures
from agiqa.extract.filling.staging import Transfers
from agiqa.extract.filling.targets import Target
from agiqa.extract.models import huggingface
from agiqa.extract.models.batches import BatchRunner, is_out_of_memory
from tests.extract.filling.test_pipeline import small_device
from tests.extract.jobs import inputs
from tests.extract.small_sets import write_set, write_talks

TOO_MUCH = 1 << 50
"""More bytes than any machine has."""


def allocate():
    return torch.empty(TOO_MUCH, dtype=torch.uint8)


def test_the_allocator_of_the_cpu_is_understood():
    with pytest.raises(RuntimeError) as caught:
        allocate()
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
    ],
)
def test_a_batch_is_halved_whoever_says_that_it_is_too_large(words, capsys):
    """Libraries on a GPU allocate without torch's allocator, and word their errors differently."""
    seen = []

    def compute(batch):
        if len(batch) > 2:
            raise RuntimeError(words)
        seen.extend(batch)

    runner = BatchRunner(8)
    runner.run(compute, list(range(8)), name=str)
    assert (seen, runner.size) == (list(range(8)), 2)
    assert "going on with 2" in capsys.readouterr().err


def test_other_errors_travel_on():
    def compute(_batch):
        message = "an illegal memory access was encountered"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        BatchRunner(8).run(compute, [1, 2], name=str)


def test_weights_that_do_not_fit_are_told_with_a_remedy(tiny_text_checkpoint, tmp_path, monkeypatch):
    backbone = small_device(tiny_text_checkpoint, 8)
    monkeypatch.setattr(huggingface, "load_model", lambda *_, **_settings: allocate())
    with pytest.raises(ModelError, match=r"weights do not fit into the free memory of the device cpu .*--dtype"):
        backbone.load()


def test_live_features_of_a_batch_that_does_not_fit(tiny_text_checkpoint, tmp_path):
    folder = write_set(tmp_path / "set", 6)
    write_talks(folder)
    items = [replace(item, image=None) for item in inputs(folder, tiny_text_checkpoint)[0].items]
    found = {}
    for most in (2, 6):
        features = LiveFeatures(small_device(tiny_text_checkpoint, most), Target(encoding="hidden"), name="live")
        features.replace(items)
        found[most] = features.read(range(6))
    assert found[2].offsets.tolist() == found[6].offsets.tolist()
    assert abs(found[2].rows - found[6].rows).max() < 1e-4
    features = LiveFeatures(small_device(tiny_text_checkpoint, 0), Target(encoding="hidden"), name="live")
    with pytest.raises(
        WorkerError, match=r"not enough memory for item '00\d\.png', even alone\. Leave it out"
    ) as alone:
        features.replace(items)
    long = replace(items[0], conversation=(Message(role="user", content="very " * 600),))
    with pytest.raises(DataError, match=r"tokens, the limit is 512\. .*a shorter prompt") as too_long:
        features.replace([long])
    assert not any("--" in str(caught.value) for caught in (alone, too_long))  # agiqa score has none of these options


class CrowdedTransfers(Transfers):
    """To a device without memory left, whose error has the text `said`."""

    def __init__(self, said):
        super().__init__(torch.device("cpu"))
        self._up, self.said = object(), said

    def _send(self, items):
        raise RuntimeError(self.said)


def test_inputs_that_pinned_memory_has_no_room_for_come_as_they_are():
    groups = [("first", []), ("second", []), ("third", [])]
    assert list(CrowdedTransfers("CUDA error: out of memory").sent(groups)) == groups
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(CrowdedTransfers("an illegal memory access was encountered").sent(groups))


def test_a_probe_that_does_not_fit_names_its_item(tiny_text_checkpoint, tmp_path):
    from agiqa.extract import ExtractionSettings, run_extraction

    folder = write_set(tmp_path / "set", 4)
    write_talks(folder)
    backbone = small_device(tiny_text_checkpoint, 8)
    backbone.logits = lambda _item: allocate()
    data_set = inputs(folder, tiny_text_checkpoint)[0]
    with pytest.raises(WorkerError, match=r"not enough memory for the logits of item '00\d\.png', even alone"):
        run_extraction(data_set, backbone, tmp_path / "s.agiqa", ExtractionSettings())
