"""What a report could show and has no data for, and the command that makes them."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Missing:
    """One thing that is not in the report."""

    what: str
    command: str
    how: str = ""
    """What the command needs to make it."""

    def line(self) -> str:
        """All of it on one line."""
        return f"{self.what}: {self.command}{', ' if self.how else ''}{self.how}"


_ABLATE = "agiqa ablate STORE OUT --grid GRID.yaml"
_WANTED = {
    "rows": Missing(what="Heads and baselines", command=_ABLATE),
    "baselines": Missing(what="Baselines", command=_ABLATE, how="which writes them beside the heads"),
    "transfer": Missing(what="Results across data sets, few-shot curve", command="agiqa transfer SOURCE TARGET OUT"),
    "optimism": Missing(
        what="Optimism of the published split",
        command=_ABLATE,
        how="with `protocols: [published, {grouped: {folds: 5}}]` in the grid",
    ),
    "paper": Missing(
        what="The paper's numbers beside ours",
        command=_ABLATE,
        how="on a data set of the paper, with its encoders and poolings; `agiqa report --data NAME` says which it is",
    ),
    "radar": Missing(
        what="Radar over the aspects",
        command=_ABLATE,
        how="with `label: quality+correspondence` in the base of the grid",
    ),
    "scatter": Missing(
        what="Scatter, best and worst items",
        command=_ABLATE,
        how="whose OUT/runs hold the predictions; they are needed beside the result lines",
    ),
    "images": Missing(what="Images of the best and worst items", command="agiqa report OUT --images FOLDER"),
    "rank": Missing(
        what="SRCC against rank",
        command="agiqa store sketch STORE SKETCH --rank R",
        how="for some ranks, then `agiqa ablate` with `--store NAME=SKETCH` for each",
    ),
    "bias": Missing(
        what="Best epoch on test beside the honest number",
        command=_ABLATE,
        how="with `paper_compatible: true` in the base of the grid",
    ),
    "curves": Missing(
        what="Training curves", command=_ABLATE, how="whose OUT/runs hold the curves of more than one epoch"
    ),
}
KEYS = frozenset(_WANTED)
"""The names of what a report can have."""


def missing(present: AbstractSet[str]) -> list[Missing]:
    """All that is not `present`, by its key."""
    return [one for key, one in _WANTED.items() if key not in present]
