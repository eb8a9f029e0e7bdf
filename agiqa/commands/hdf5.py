"""`agiqa store export` and `agiqa store import`: stores as single HDF5 files, and back."""

from pathlib import Path

import click

from agiqa.commands.common import LocalStore, print_result, shared_options, table


@click.command("export")
@click.argument("store", type=LocalStore())
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--compression",
    default="auto",
    show_default=True,
    help="zstd (needs `pip install 'agiqa[hdf5]'`), gzip (slow; any HDF5 reads it), none, or auto: zstd if there.",
)
@shared_options
def export_store(store: Path, out: Path, compression: str, *, as_json: bool) -> None:
    """Write the finished STORE to OUT, one HDF5 file with the same array names and attributes.

    The item table is in `items/`; an item's rows are at the same addresses as in the store. OUT appears when it is
    whole; an interrupted export begins anew.
    """
    from agiqa.progress import say, track
    from agiqa.store import open_store
    from agiqa.store.hdf5.export import export_hdf5

    opened = open_store(store)
    with track("export", int(opened.n_tokens.sum()), "tokens") as advance:
        written = export_hdf5(opened, out, compression=compression, advance=advance)
    if written.already_there:
        say(f"{out} holds this store already")
    print_result(written.as_dict(), table(written.as_dict()), as_json=as_json)


@click.command("import")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path, exists=True))
@click.argument("out", metavar="STORE", type=click.Path(path_type=Path))
@shared_options
def import_store(source: Path, out: Path, *, as_json: bool) -> None:
    """Make STORE of the HDF5 file IN that a store was exported to; it has the same id and the same bits.

    A killed import goes on when it is run again.
    """
    from agiqa.progress import track
    from agiqa.store.hdf5.files import open_hdf5
    from agiqa.store.hdf5.importing import check_store_file, import_checked

    with open_hdf5(source) as file:
        checked = check_store_file(source, file)
        tokens = int(checked.n_tokens.sum())
        with track("import", tokens, "tokens") as advance:
            made = import_checked(checked, out, advance=advance)
    result = {"store": str(made.path), "id": made.id, "state": "complete", "items": len(made.items), "tokens": tokens}
    print_result(result, table(result), as_json=as_json)
