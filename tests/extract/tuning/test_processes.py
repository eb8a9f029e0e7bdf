"""Processes that train together: sums over them, and the end of all when one fails or is killed."""

import os
import signal
from dataclasses import dataclass

import pytest
import torch

from agiqa.errors import DataError, WorkerError
from agiqa.extract.tuning.group import Group
from agiqa.extract.tuning.processes import run_on_devices


@dataclass(frozen=True)
class Sums:
    """Adds up the ranks; then the last process ends as `end` says, while the others wait for it."""

    end: str

    def open_and_run(self, device: str, group: Group) -> None:
        """See `OnDevice`."""
        total = [torch.tensor(float(group.rank)), torch.ones(2)]
        group.add(total)
        assert (device, total[0].item(), total[1].tolist()) == ("cpu", 1.0, [2.0, 2.0])
        assert group.share(5) == list(range(group.rank, 5, 2))
        if group.first:
            group.add(total)  # the other never comes
        elif self.end == "error":
            message = "no such picture"
            raise DataError(message)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("end", "error", "expected"),
    [("error", DataError, "no such picture"), ("kill", WorkerError, "ended with exit code -9. The last checkpoint is")],
)
def test_one_that_ends_ends_all(tmp_path, end, error, expected):
    with pytest.raises(error, match=expected):
        run_on_devices(Sums(end), ["cpu", "cpu"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_process_adds_nothing():
    value = torch.tensor(3.0)
    Group().add([value])
    assert value.item() == 3.0
    assert Group().share(3) == [0, 1, 2]
