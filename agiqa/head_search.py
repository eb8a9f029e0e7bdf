"""`agiqa tune-head`: a search over settings, then heads with the best settings, tested on items that it never read.

OUT         the search, see heads/searching/search.py
OUT/final.yaml  the grid of the heads trained at the end
OUT/final   these heads, as of `agiqa ablate STORE OUT/final --grid OUT/final.yaml`
OUT/search.json  the result
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agiqa.bench.ablation.ablation import Ablation, run_ablation
from agiqa.bench.ablation.grids import read_grid, unread_settings
from agiqa.heads.searching.folder import changed, configs_of
from agiqa.heads.searching.search import SearchResult, SearchSettings, run_search
from agiqa.heads.searching.study import FEWEST_FOR_IMPORTANCE
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.store import Store
from agiqa.store.disk.files import write_text_atomically

FINAL, FINAL_GRID, RESULT = "final", "final.yaml", "search.json"
TUNED, UNTUNED = "tuned", "untuned"


@dataclass(frozen=True, kw_only=True)
class TunedHead:
    """The outcome of `tune_head`."""

    search: SearchResult
    final: Ablation
    seeds: int
    record: Mapping[str, Any]
    """search.json."""


def tune_head(
    store: Store, out: Path, settings: SearchSettings, *, seeds: int, workers: int | None = None
) -> TunedHead:
    """Search on the training and validation items of `store`, then train `seeds` heads with the best settings, and as
    many with those of the first trial, and test them once on the test items.

    Run it again to resume. Raises as `run_search` and `run_ablation`.
    """
    found = run_search(store, out, settings)
    grid = out / FINAL_GRID
    write_text_atomically(grid, _grid(found, settings, seeds))
    final = run_ablation({"": store}, read_grid(grid), out / FINAL, grid=grid, workers=workers)
    record = _record(found, final, settings, seeds)
    write_text_atomically(out / RESULT, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return TunedHead(search=found, final=final, seeds=seeds, record=record)


def _grid(found: SearchResult, settings: SearchSettings, seeds: int) -> str:
    """The grid of the final heads: the best settings, those of the first trial if they differ, each with all seeds."""
    runs = [{"name": TUNED, **_flat(found.head, found.train)}]
    first = configs_of(settings.space.at_first(settings.head, settings.train), settings.head, settings.train)
    if not _same(found, *first):
        runs.append({"name": UNTUNED, **_flat(*first)})
    text = yaml.safe_dump({"runs": runs, "seeds": list(range(seeds))}, sort_keys=False, allow_unicode=True)
    return f"# Written by agiqa tune-head: the best settings of the search, and those of its first trial.\n{text}"


def _flat(head: HeadConfig, train: TrainConfig) -> dict[str, Any]:
    settings = {**changed(head), "projection": head.projection, **changed(train)}
    settings.pop("seed", None)
    return settings


def _same(found: SearchResult, head: HeadConfig, train: TrainConfig) -> bool:
    """Whether both heads have the same settings, but for those that they do not read."""
    unread = unread_settings(found.head, found.train)
    pairs = ((found.head, head), (found.train, train))
    return all(
        getattr(best, name) == getattr(first, name)
        for best, first in pairs
        for name in type(best).model_fields
        if name not in unread
    )


def _record(found: SearchResult, final: Ablation, settings: SearchSettings, seeds: int) -> dict[str, Any]:
    best = found.best
    return {
        "kind": "search",
        "trials": {"asked": settings.trials, "ended": len(found.lines)}
        | {state: found.count(state) for state in ("complete", "pruned", "failed")},
        "timed_out": found.timed_out,
        "best": {
            "number": best["number"],
            "settings": best["settings"],
            "validation_srcc": best["validation_srcc"],
            "optimistic": caution(found),
        },
        "importance": {
            "method": "PED-ANOVA",
            "shares": found.importance,
            "caution": importance_caution(found),
        },
        "seeds": seeds,
        "rows": final.rows,
        "failed": dict(final.failed),
    }


def caution(found: SearchResult) -> str:
    """Why the validation score of the best trial is no estimate."""
    judged = sum(line["validation_srcc"] is not None for line in found.lines)
    return (
        f"This is the highest of {judged} values on the same validation items, so it is too high as an estimate. "
        "Report the test scores of the final heads: the search never read the test items."
    )


def importance_caution(found: SearchResult) -> str | None:
    """What limits the importance of settings; None for many trials."""
    complete = found.count("complete")
    if complete < FEWEST_FOR_IMPORTANCE:
        return f"{complete} complete trials are too few to tell which settings matter ({FEWEST_FOR_IMPORTANCE} needed)"
    if complete < 50:
        return f"from {complete} complete trials: a rough guide"
    return None


def search_text(done: TunedHead, out: Path) -> Sequence[str]:
    """The lines of the result above the table of the final heads."""
    found = done.search
    counts = ", ".join(f"{found.count(state)} {state}" for state in ("complete", "pruned", "failed"))
    best = found.best
    chosen = ", ".join(f"{name} {_plain(value)}" for name, value in best["settings"].items())
    lines = [
        f"{len(found.lines)} trials: {counts}{'; the time was up' if found.timed_out else ''}",
        f"best: trial {best['number']}, validation SRCC {best['validation_srcc']:.4f} (optimistic)",
        f"  {chosen}",
        f"  {caution(found)}",
    ]
    if found.importance:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in found.importance.items())
        lines.append(f"what matters (PED-ANOVA): {shares}")
    if (limit := importance_caution(found)) is not None:
        lines.append(f"  {limit}")
    lines.append(f"settings for `agiqa train --config`: {out / 'best.yaml'}")
    several = any(row["row"] == UNTUNED for row in done.final.rows)
    beside = f"{UNTUNED} those of the first trial" if several else "which are those of the first trial"
    lines.append(
        f"final heads, {done.seeds} seed{'s' * (done.seeds > 1)}, tested once: {TUNED} has the best settings, {beside}"
    )
    return lines


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
