"""`agiqa store push` and `agiqa store pull`: copy feature stores to URLs and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agiqa.commands.common import LocalStore, print_result, shared_options, table

if TYPE_CHECKING:
    from agiqa.store.sharing.transfers import Transfer

_JOBS = click.option(
    "--jobs", type=click.IntRange(1, 64), default=8, show_default=True, help="Objects moved at the same time."
)


@click.command("push")
@click.argument("store", type=LocalStore())
@click.argument("url")
@_JOBS
@shared_options
def push_store(store: Path, url: str, jobs: int, *, as_json: bool) -> None:
    """Copy the finished STORE to the folder URL: s3://, gs://, hf://datasets/OWNER/NAME or file://.

    Objects that are there already are not sent again, so run it again after an interruption. MANIFEST.json goes
    last: nobody finds half a store. A folder that holds another store is refused.
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
    help="Fetch only the units that hold this item; give it again for more, or @FILE with one name per line.",
)
@_JOBS
@shared_options
def pull_store(url: str, store: Path, named: tuple[str, ...], jobs: int, *, as_json: bool) -> None:
    """Copy the store at URL to the folder STORE, every object checked by its sha256.

    Reads s3://, gs://, hf://datasets/OWNER/NAME[@REVISION], https:// and file://. Run it again after an interruption,
    or with other --items to add their units; without --items it completes the store.
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
