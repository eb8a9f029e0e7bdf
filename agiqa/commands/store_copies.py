"""`agiqa store sketch | convert | export | import | push | pull`: a store in another encoding, format or place."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agiqa.commands.options import LocalStore, OneOf, StoreLocation, shared_options
from agiqa.commands.output import print_result, table

if TYPE_CHECKING:
    from agiqa.store.deriving.deriving import LayerSketch
    from agiqa.store.sharing.transfers import Transfer

_ANYWHERE = click.argument("store", type=StoreLocation())
_ENERGY_OF = {
    "second-moment": "of the tokens that the basis was calibrated on",
    "lm_head": "as if hidden states were isotropic",
}


@click.command("convert")
@_ANYWHERE
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--encoding",
    required=True,
    type=OneOf("encoding", ["int8", "logits"]),
    help="int8 (half the bytes, rounded) or raw logits (for tools without W_lm).",
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


@click.command("sketch")
@_ANYWHERE
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", type=click.IntRange(min=1), help="Coordinates per token.")
@click.option("--basis", type=StoreLocation(), help="Sketch store whose basis to use instead.")
@click.option(
    "--method",
    type=OneOf("basis method", ["second-moment", "lm_head"]),
    help="Make the basis from the training tokens, or from W_lm alone.  [default: second-moment]",
)
@shared_options
def sketch(
    store: str | Path, out: Path, rank: int | None, basis: str | Path | None, method: str | None, *, as_json: bool
) -> None:
    """Write a rank-R sketch of STORE to OUT, and print the energy that it keeps and its logit error.

    The basis is calibrated on the training split, or on all items of a store without splits. A head reads all stores
    that are sketched in its basis. To sketch a second store in the same basis, give --basis the first sketch. Every
    other layer of STORE gets a basis of its own, made from its states.
    """
    from agiqa.errors import ConfigError
    from agiqa.progress import track
    from agiqa.store import basis_from, open_store, sketch_store
    from agiqa.store.deriving.calibrating import bases_of
    from agiqa.store.writing.creating import check_writable

    if (rank is None) == (basis is None):
        message = "Give either --rank R, to make a basis, or --basis STORE, to use another sketch's."
        raise ConfigError(message)
    if basis is not None and method is not None:
        message = "--method chooses how to make a basis, and --basis STORE already has one. Leave out one of them."
        raise ConfigError(message)
    source = open_store(store)
    check_writable(out)
    if rank is not None:
        chosen, found = basis_from(source, rank, method=method or "second-moment"), None
    else:
        found = bases_of(open_store(basis or store), source.layers, tap=source.tap)
        chosen = found[source.layer_name]
    with track("sketch", int(source.n_tokens.sum()), "tokens") as advance:
        result = sketch_store(source, out, basis=chosen, layer_bases=found, advance=advance)
    measured = "of the states, since this store has no W_lm" if chosen.is_of_states else "of this store"
    report: dict[str, Any] = {
        "store": str(out),
        "rank": chosen.rank,
        "basis": chosen.id,
        "energy_kept": result.energy_kept,
        "logit_error": result.logit_error,
        "projection_error": result.projection_error,
    }
    if result.layers:
        report["layers"] = {layer: asdict(kept) for layer, kept in result.layers.items()}
    shown = {
        **{name: value for name, value in report.items() if name != "layers"},
        "energy_kept": f"{result.energy_kept:.5f} ({_ENERGY_OF[chosen.method]})",
        "logit_error": f"{result.logit_error:.5f} ({measured}, measured over 256 tokens)",
        "projection_error": f"{result.projection_error:.5f} (of a random W_proj on them)",
        **{f"layer {layer}": _kept(kept) for layer, kept in result.layers.items()},
    }
    print_result(report, table(shown), as_json=as_json)


def _kept(kept: "LayerSketch") -> str:
    return f"rank {kept.rank}, energy kept {kept.energy_kept:.5f}, error of the states {kept.state_error:.5f}"


@click.command("export")
@click.argument("store", type=LocalStore())
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--compression",
    type=OneOf("compression", ["auto", "zstd", "gzip", "none"]),
    default="auto",
    show_default=True,
    help="zstd needs `pip install 'agiqa[hdf5]'`; gzip is slow, but all HDF5 tools read it; auto is zstd if installed.",
)
@shared_options
def export_store(store: Path, out: Path, compression: str, *, as_json: bool) -> None:
    """Write the finished STORE to OUT, one HDF5 file with the same array names and attributes.

    The item table is in `items/`. An item's rows have the same positions as in the store. OUT appears only when it is
    complete; an interrupted export starts again.
    """
    from agiqa.progress import say, track
    from agiqa.store import open_store
    from agiqa.store.hdf5.export import export_hdf5

    opened = open_store(store)
    with track("export", int(opened.n_tokens.sum()), "tokens") as advance:
        written = export_hdf5(opened, out, compression=compression, advance=advance)
    if written.already_there:
        say(f"{out} already holds this store")
    print_result(written.as_dict(), table(written.as_dict()), as_json=as_json)


@click.command("import")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path, exists=True))
@click.argument("out", metavar="STORE", type=click.Path(path_type=Path))
@shared_options
def import_store(source: Path, out: Path, *, as_json: bool) -> None:
    """Make STORE from the HDF5 file IN that `agiqa store export` wrote, with the same id and the same bits.

    Run the same command again to resume a killed import.
    """
    from agiqa.progress import track
    from agiqa.store.hdf5.checking import check_store_file
    from agiqa.store.hdf5.files import open_hdf5
    from agiqa.store.hdf5.importing import import_checked

    with open_hdf5(source) as file:
        checked = check_store_file(source, file)
        tokens = int(checked.n_tokens.sum())
        with track("import", tokens, "tokens") as advance:
            made = import_checked(checked, out, advance=advance)
    result = {"store": str(made.path), "id": made.id, "state": "complete", "items": len(made.items), "tokens": tokens}
    print_result(result, table(result), as_json=as_json)


_JOBS = click.option(
    "--jobs", type=click.IntRange(1, 64), default=8, show_default=True, help="Objects to move at the same time."
)


@click.command("push")
@click.argument("store", type=LocalStore())
@click.argument("url")
@_JOBS
@shared_options
def push_store(store: Path, url: str, jobs: int, *, as_json: bool) -> None:
    """Copy the finished STORE to the folder URL: s3://, gs://, hf://datasets/OWNER/NAME or file://.

    Run it again after an interruption: it sends only what is missing. It sends MANIFEST.json last, so a
    folder with a manifest holds a complete store. A folder that holds another store is refused.
    """
    from agiqa.progress import track
    from agiqa.store import open_store
    from agiqa.store.sharing.pushing import push, push_bytes

    opened = open_store(store)
    with track("push", push_bytes(opened), "bytes") as advance:
        done = push(opened, url, jobs=jobs, advance=advance)
    _print({"store": str(store), "url": url, "id": opened.id, "state": "complete"}, done, as_json=as_json)


@click.command("pull")
@click.argument("url")
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--items",
    "named",
    multiple=True,
    metavar="NAME|@FILE",
    help="Fetch only the units that hold this item; repeatable. @FILE has one name per line.",
)
@_JOBS
@shared_options
def pull_store(url: str, store: Path, named: tuple[str, ...], jobs: int, *, as_json: bool) -> None:
    """Copy the store at URL to the folder STORE, and check the sha256 of every object.

    It reads s3://, gs://, hf://datasets/OWNER/NAME[@REVISION], https:// and file://. Run it again after an
    interruption, with other --items to add their units, or without --items to complete the store.
    """
    from agiqa.progress import track
    from agiqa.store.sharing.pulling import plan_pull, run_pull

    plan = plan_pull(url, store, items=_names(named) if named else None, jobs=jobs)
    with track("pull", plan.bytes, "bytes") as advance:
        done = run_pull(plan, jobs=jobs, advance=advance)
    _print({"store": str(store), "url": url, "id": plan.manifest.id, "state": plan.state}, done, as_json=as_json)


def _names(named: tuple[str, ...]) -> list[str]:
    names: list[str] = []
    for name in named:
        if name.startswith("@"):
            lines = Path(name[1:]).read_text(encoding="utf-8").splitlines()
            names += [line.strip() for line in lines if line.strip()]
        else:
            names.append(name)
    return names


def _print(what: dict[str, Any], done: "Transfer", *, as_json: bool) -> None:
    result = {**what, **done.as_dict()}
    print_result(result, table(result), as_json=as_json)
