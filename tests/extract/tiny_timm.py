"""Image encoders of timm with random weights, in files as users have them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")


def random_encoder(name: str, **options: Any) -> Any:
    """timm's own model, with weights and statistics of batches drawn by a fixed seed."""
    from agiqa.extract.models.timm_models import import_timm

    torch.manual_seed(0)
    model = import_timm().create_model(name, **options).eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 2)
    return model


def write_weights(folder: Path, name: str, **options: Any) -> Path:
    """The file of `random_encoder`'s weights."""
    path = folder / f"{name}.pth"
    torch.save(random_encoder(name, **options).state_dict(), path)
    return path


def write_pictures(folder: Path, count: int = 3) -> list[Path]:
    """Noise of different shapes."""
    noise, paths = np.random.default_rng(0), []
    for index in range(count):
        paths.append(folder / f"{index}.png")
        shape = (64 + 9 * index, 80 + 5 * index, 3)
        Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8)).save(paths[-1])
    return paths
