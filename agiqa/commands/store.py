"""`agiqa store ...`: look at, check, mend, convert and share feature stores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from agiqa.commands.common import LocalStore, StoreLocation, one_of, print_result, shared_options, table
from agiqa.commands.hdf5 import export_store, import_store
from agiqa.commands.sharing import pull_store, push_store
from agiqa.commands.upkeep import gc, labels, repair
from agiqa.errors import listed

_ASKED = ("variant", "aspect")
_STORE = click.argument("store", type=LocalStore())
_ANYWHERE = click.argument("store", type=StoreLocation())


@click.group("store")
def command() -> None:
    """Look at, check, mend, convert and share feature stores."""


@command.command("info")
@_ANYWHERE
@shared_options
def info(store: str | Path, *, as_json: bool) -> None:
    """Encoding, items, tokens, bytes, provenance, state and labels of STORE; what is not known has no line."""
    from agiqa.store import open_store, store_summary
    from agiqa.store.format.labels import range_text

    summary = store_summary(open_store(store, allow_partial=True))
    shown = {name: value for name, value in summary.items() if name != "provenance"}
    scales = shown.pop("mos_ranges")
    shown["labels"] = ", ".join(f"{aspect} ({count})" for aspect, count in summary["labels"].items()) or "none"
    shown["MOS from"] = ", ".join(f"{range_text(scale)} ({aspect})" for aspect, scale in scales.items()) or None
    shown["splits"] = ", ".join(f"{split} ({count})" for split, count in summary["splits"].items())
    if summary["text_authors"] is not None:
        shown["text authors"] = "; ".join(_authors(*one) for one in shown.pop("text_authors").items())
    made = summary["provenance"]
    shown["model"] = made.get("model", {}).get("name", "unknown")
    shown |= {name: value for name, value in made.get("conversation", {}).items() if name in _ASKED}
    known = {name: value for name, value in shown.items() if value is not None}
    print_result(summary, table(known), as_json=as_json)


@command.command("verify")
@_STORE
@click.option(
    "--level",
    type=one_of("verification level", ["quick", "full", "numeric"]),
    default="quick",
    show_default=True,
    help="quick (sizes), full (sha256) or numeric (logits too).",
)
@shared_options
def check(store: Path, level: str, *, as_json: bool) -> None:
    """Check STORE and name every damaged unit and its items; exit 1 if there is any, or if it is unfinished."""
    from agiqa.store import open_store, verify

    opened = open_store(store, allow_partial=True)
    report = verify(opened, level)
    lines = [f"{store}: {report.state}, {report.objects} objects checked at level {level}"]
    if report.missing_units:
        lines.append(f"  {len(report.missing_units)} units are not filled. {opened.remedy}")
    for damage in report.damage:
        unit = "" if damage.unit is None else f" (unit {damage.unit})"
        lines.append(f"  {damage.problem}{unit}{_named(damage.items)}")
    if report.probe_error is not None:
        lines.append(f"  probe logits: relative error {report.probe_error:.2e}")
    lines.append("sound" if report.sound else "NOT sound")
    print_result(report.as_dict(), "\n".join(lines), as_json=as_json)
    if not report.sound:
        raise SystemExit(1)


def _authors(split: str, counts: Mapping[str, int]) -> str:
    """Who wrote the texts of a split."""
    return f"{split}: " + ", ".join(f"{author} ({count})" for author, count in counts.items())


def _named(items: tuple[str, ...]) -> str:
    if not items:
        return ""
    return f": items {listed(items)}"


@command.command("seal")
@_STORE
@shared_options
def seal_store(store: Path, *, as_json: bool) -> None:
    """Finish STORE by hand once all its units are filled."""
    from agiqa.store import open_store, seal

    sealed = seal(open_store(store, allow_partial=True))
    print_result({"store": str(store), "id": sealed.id, "state": "complete"}, f"{store} is complete", as_json=as_json)


_ENERGY_OF = {
    "second-moment": "of the tokens that the basis was calibrated on",
    "lm_head": "as if hidden states were isotropic",
}


@command.command("convert")
@_ANYWHERE
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--encoding", required=True, help="int8 (half the bytes, rounded) or logits (raw, for tools without W_lm)."
)
@shared_options
def convert(store: str | Path, out: Path, encoding: str, *, as_json: bool) -> None:
    """Write the hidden states of STORE to OUT in another encoding."""
    from agiqa.progress import track
    from agiqa.store import convert_store, open_store, store_summary

    source = open_store(store)
    with track("convert", int(source.n_tokens.sum()), "tokens") as advance:
        made = store_summary(convert_store(source, out, encoding, advance=advance))
    report = {name: made[name] for name in ("path", "id", "encoding", "items", "tokens", "bytes_on_disk")}
    print_result(report, table(report), as_json=as_json)


@command.command("sketch")
@_ANYWHERE
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", type=click.IntRange(min=1), help="Coordinates per token.")
@click.option("--basis", type=StoreLocation(), help="Sketch store whose basis is used instead.")
@click.option(
    "--method",
    type=one_of("basis method", ["second-moment", "lm_head"]),
    help="second-moment of the training tokens, or lm_head: of W_lm alone, in float32.  [default: second-moment]",
)
@shared_options
def sketch(
    store: str | Path, out: Path, rank: int | None, basis: str | Path | None, method: str | None, *, as_json: bool
) -> None:
    """Write a rank-R sketch of STORE to OUT; prints the energy kept and the measured logit error.

    The basis is calibrated on the training split (on all items if there are no splits). Stores sketched in one
    basis are interchangeable for a head: give --basis the first sketch to make the second.
    """
    from agiqa.errors import ConfigError
    from agiqa.progress import track
    from agiqa.store import basis_from, open_store, sketch_store
    from agiqa.store.writing.creating import check_writable

    if (rank is None) == (basis is None):
        message = "Give either --rank R, to make a basis, or --basis STORE, to use another sketch's."
        raise ConfigError(message)
    if basis is not None and method is not None:
        message = "--method is how a basis is made; the one of --basis STORE is made already."
        raise ConfigError(message)
    source = open_store(store)
    check_writable(out)
    made = None if rank is None else basis_from(source, rank, method=method or "second-moment")
    chosen = made or open_store(basis or store).basis()
    with track("sketch", int(source.n_tokens.sum()), "tokens") as advance:
        result = sketch_store(source, out, basis=chosen, advance=advance)
    report: dict[str, Any] = {
        "store": str(out),
        "rank": chosen.rank,
        "basis": chosen.id,
        "energy_kept": result.energy_kept,
        "logit_error": result.logit_error,
        "projection_error": result.projection_error,
    }
    shown = {
        **report,
        "energy_kept": f"{result.energy_kept:.5f} ({_ENERGY_OF[chosen.method]})",
        "logit_error": f"{result.logit_error:.5f} (of this store, measured over 256 tokens)",
        "projection_error": f"{result.projection_error:.5f} (of a random W_proj on them)",
    }
    print_result(report, table(shown), as_json=as_json)


for _further in (labels, repair, gc, export_store, import_store, push_store, pull_store):
    command.add_command(_further)
