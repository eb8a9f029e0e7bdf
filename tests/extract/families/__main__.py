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

from tests.extract.families.sweep import KINDS, try_family, why_not_in_slots

HEAD = f"""# Model families

Tried with transformers {transformers.__version__}: a tiny random model of each family, in its official layout, is opened as `agiqa extract` does. A family works
if token ids, final hidden states and logits are those of transformers' own processor and model (relative error below 1e-5), alone and in a
batch of two, and, for models that read images, if the image changes the hidden states. Families that are not listed were not tried.
`python -m tests.extract.families` prints this file (with torchvision installed), and a test compares a sample of it with the code.
"""
SLOTS = """
## Answers in slots

`agiqa describe` keeps as many conversations as fit in work at the same time if the tiny model of the family passes a trial: its cache holds
every token in every layer, and prompts that go on and answer token by token give the logits of whole passes. The other families that work
answer in batches, as do models of these families with settings of another kind, such as a sliding window.
"""
TITLES = {"vision": "Models that read images", "text": "Models of text"}


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    print(HEAD, end="", flush=True)
    slots: dict[str, list[str]] = {}
    fresh = multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as folder, fresh:
        for kind, (families, _) in KINDS.items():
            print(f"\n## {TITLES[kind]}\n\n| family | outcome | why |\n|---|---|---|", flush=True)
            for family in sorted(families):
                print(family, file=sys.stderr)
                outcome = fresh.apply(try_family, (kind, family, Path(folder) / family / "model"))
                print(outcome.row, flush=True)
                if outcome.works and not fresh.apply(why_not_in_slots, (Path(folder) / family / "model",)):
                    slots.setdefault(TITLES[kind], []).append(family)
    print(SLOTS)
    for title, families in slots.items():
        print(f"- {title}: {', '.join(families)}.")


if __name__ == "__main__":
    main()
