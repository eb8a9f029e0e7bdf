"""`python -m tests.extract.families`: tries every family, and prints extract/FAMILIES.md.

Run it with torchvision installed. A family whose tiny checkpoint cannot be written ends it with the error. Each family
has a process of its own, as each model of a user has: processors leave traces in classes of transformers.
"""

import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from tests.extract.families.sweep import KINDS, try_family

HEAD = f"""# Model families

Tried with transformers {transformers.__version__}: a tiny random model of each family, in its official layout, is opened as `agiqa extract` does. A family works
if token ids, final hidden states and logits are those of transformers' own processor and model (relative error below 1e-5), alone and in a
batch of two, and, for models that read images, if the image changes the hidden states. Families that are not listed were not tried.
`python -m tests.extract.families` prints this file (with torchvision installed), and a test compares a sample of it with the code.
"""
TITLES = {"vision": "Models that read images", "text": "Models of text"}


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    print(HEAD, end="", flush=True)
    fresh = multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as folder, fresh:
        for kind, (families, _) in KINDS.items():
            print(f"\n## {TITLES[kind]}\n\n| family | outcome | why |\n|---|---|---|", flush=True)
            for family in sorted(families):
                print(family, file=sys.stderr)
                outcome = fresh.apply(try_family, (kind, family, Path(folder) / family / "model"))
                print(outcome.row, flush=True)


if __name__ == "__main__":
    main()
