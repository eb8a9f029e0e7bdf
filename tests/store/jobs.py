"""Jobs on a store for separate processes; the first argument of each is its `Progress`."""

import os
import random
import sys
import time
from pathlib import Path

import numpy as np

from agiqa.errors import AgiqaError
from agiqa.store import UnitWriter, create_store, join_labels, open_store, repair, seal, verify
from agiqa.store.care.garbage import collect_garbage
from agiqa.store.disk.files import put_text_if_absent
from agiqa.store.disk.locks import waiting_lock
from agiqa.store.hdf5.importing import import_hdf5
from tests.store.conftest import fill as fill_units
from tests.store.conftest import make_content, plan_of, unit_features, write_model

NOBODY = 65534
CHANGES = ("open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir")


def dawdle(seed: int, longest: float) -> None:
    """From now on wait up to `longest` seconds before each step on disk, so that other processes get in between."""
    moments = random.Random(seed)

    def wait(event: str, _arguments: tuple[object, ...]) -> None:
        if event in CHANGES:
            time.sleep(moments.uniform(0.0, longest))

    sys.addaudithook(wait)


def make(progress, path, lengths, seed, longest, revision="a", dawdling_from="fill"):
    """Plan, fill and, unless other processes hold units, seal the store at `path`; returns whether this process did."""
    content = make_content(lengths)
    progress.at("plan")
    if dawdling_from == "plan":
        dawdle(seed, longest)
    store = create_store(Path(path), plan_of(content, model={"name": "made up", "revision": revision}))
    if dawdling_from == "fill":
        dawdle(seed, longest)
    progress.at("fill")
    writer = UnitWriter(store)
    write_model(writer, content)
    for unit in writer.pending():
        with writer.claim(unit) as mine:
            if mine:
                writer.write_unit(unit, unit_features(store, content, unit), seconds=0.0)
    progress.at("seal")
    if writer.pending():
        return False
    return seal(store).is_sealed


def seal_and_pause(progress, path):
    """Seal the store; when MANIFEST.json is about to get its name, give others half a second."""

    def pause(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith("MANIFEST.json"):
            progress.at("listing")
            time.sleep(0.5)

    sys.addaudithook(pause)
    seal(open_store(path, allow_partial=True))


def relabel(_progress, path, lengths):
    """Plan the store that is there with another label."""
    content = make_content(lengths)
    content.items.labels["quality"][0] = 1.25
    create_store(Path(path), plan_of(content))


def read_everything(_progress, path):
    """All that readers ask of a store, step by step: what each step gave, or the error that it raised."""
    found: dict[str, list[str]] = {}

    def step(name, ask):
        try:
            found[name] = ["", repr(ask())]
        except AgiqaError as error:
            found[name] = [type(error).__name__, str(error)]

    step("open", lambda: open_store(path).id)
    step("verify", lambda: verify(open_store(path), "numeric").damage)
    if found["open"][0]:
        return found
    store = open_store(path)
    step("items", lambda: len(store.items))
    step("index", lambda: [part.tolist() for part in (store.n_tokens, store.item_keys, store.status)])
    step("units", lambda: len(store.committed_units()))
    step("rows", lambda: float(np.abs(store.read(np.arange(len(store.n_tokens))).float32()).sum()))
    step("tokens", lambda: store.read_unit(0, "tokens/ids").tolist())
    step("head", lambda: store.lm_head_sha256)
    step("model", lambda: (store.basis().q if store.encoding == "sketch" else store.lm_head()).sum())
    if store.keeps_logits:
        step("logits", lambda: store.rows_of(0, 0, int(store.n_tokens[0]), array="logits").tolist())
    return found


def read_chunks(_progress, path, chunks):
    """Read the roles of all items with each of `chunks` (hex) as the object of unit 0: the error, or that it is right."""
    place = Path(path) / "store.zarr" / "tokens" / "roles" / "c" / "0"
    right = open_store(path).read_unit(0, "tokens/roles")
    found = []
    for chunk in chunks:
        place.write_bytes(bytes.fromhex(chunk))
        try:
            found.append(["", open_store(path).read_unit(0, "tokens/roles").shape == right.shape])
        except AgiqaError as error:
            found.append([type(error).__name__, str(error)])
    return found


def fill(_progress, path, lengths):
    """Fill the units of the store at `path` that have no record; returns how many there were."""
    content, store = make_content(lengths), open_store(path, allow_partial=True)
    writer = UnitWriter(store)
    write_model(writer, content)
    pending = writer.pending()
    for unit in pending:
        with writer.claim(unit):
            writer.write_unit(unit, unit_features(store, content, unit), seconds=0.0)
    return len(pending)


def be_nobody(_progress, folder, lengths):
    """As another user: read the store `finished`, fill `unfinished`, plan `new`; returns the result of each.

    All of it is done once before, since a process that has become another user may not import what is still missing.
    """
    folder, content = Path(folder), make_content(lengths)
    unfinished = open_store(folder / "unfinished", allow_partial=True)
    read_everything(_progress, folder / "finished")
    create_store(folder / "warm", plan_of(content))
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    found = {"read": ["", read_everything(_progress, folder / "finished")]}

    def attempt(name, run):
        try:
            run()
            found[name] = ["", ""]
        except OSError as error:
            found[name] = [type(error).__name__, "\n".join([str(error), *error.__notes__])]

    attempt("model", lambda: write_model(UnitWriter(unfinished), content))
    attempt("claim", lambda: UnitWriter(unfinished).claim(1).__enter__())
    rows = unit_features(unfinished, content, 1)
    attempt("write", lambda: UnitWriter(unfinished).write_unit(1, rows, seconds=0.0))
    attempt("plan", lambda: create_store(folder / "new", plan_of(content)))
    return found


def read_until(progress, path, stop, lengths, seed, longest):
    """Open the store and read all its items, until `stop` is there or a read is wrong: how many were what."""
    right = np.concatenate(make_content(lengths).hidden)
    found = {"right": 0, "wrong": 0, "refused": 0}
    dawdle(seed, longest)
    while not Path(stop).exists() and not found["wrong"]:
        try:
            rows = open_store(path).read(range(len(lengths)))
            outcome = "right" if np.array_equal(rows.rows, right) else "wrong"
        except AgiqaError:
            outcome = "refused"
        found[outcome] += 1
        progress.at(outcome)
    return found


def verify_until(progress, path, stop, seed, longest):
    """Open and verify the store in full, until `stop` is there: how often, and all the damage that was found."""
    damage, runs = [], 0
    dawdle(seed, longest)
    while not Path(stop).exists():
        damage += [found.problem for found in verify(open_store(path), "full").damage]
        runs += 1
        progress.at("verified once")
    return {"damage": damage, "runs": runs}


def import_file(_progress, source, out):
    """Make the store `out` of an HDF5 file."""
    import_hdf5(Path(source), Path(out))


def on_odd_disk(progress, oddities, job, *arguments):
    """The job called `job`, in a process that was started with `odd_disks.c` preloaded, on a disk with these oddities."""
    os.environ.update(oddities)
    return globals()[job](progress, *arguments)


def upkeep(_progress, path, what):
    """Seal, label, repair or collect the garbage of the store at `path`."""
    store = open_store(path, allow_partial=True)
    if what == "label":
        table = Path(path).with_name("labels.csv")
        return join_labels(store, table).changed
    return {"seal": seal, "repair": repair, "collect": collect_garbage}[what](store) is not None


def put(_progress, path, text, lock):
    """Put the record at `path` unless there is one; returns whether this call put it."""
    return put_text_if_absent(Path(path), text, lock=Path(lock))


def lock_as_nobody(_progress, path):
    """Wait for the lock file `path` as another user."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    with waiting_lock(Path(path)):
        return True


def as_member(progress, user, group, warm, job, *arguments):
    """The job called `job`, as a user with this id and group whose files the group may write.

    All is done once before in `warm`, since a process that has become another user may not import what is missing.
    """
    store = make(progress, str(Path(warm) / "s.agiqa"), [9, 30], 0, 0.0) and open_store(Path(warm) / "s.agiqa")
    (Path(warm) / "labels.csv").write_text(f"name,mos_quality\n{store.items.names[0]},2.5\n")
    for what in ("label", "repair", "collect"):
        upkeep(progress, store.path, what)
    os.umask(0o002)
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    return globals()[job](progress, *arguments)


def plan(_progress, path, lengths, units):
    """Plan the store at `path` and fill its first `units` units."""
    content = make_content(lengths)
    store = create_store(Path(path), plan_of(content))
    fill_units(store, content, units=range(units))
