"""Campaigns of harm, too long for a test: what is broken on purpose, how often, and with which result. Figures are in bench/LOG.md.

python -m tests.campaigns flips            every byte of what an unfinished store does not hash elsewhere, then `seal`
python -m tests.campaigns races --times 60 a reader opens a store, `repair` drops one of its units, the reader reads
python -m tests.campaigns cache --times 60 bytes changed in the cache of a store that is read in place
python -m tests.campaigns pulls            a pull into an unfinished store, killed before every change that it makes on disk
python -m tests.campaigns pool --times 500 random signals to the processes that prepare items
"""

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from agiqa import workers
from agiqa.errors import AgiqaError
from agiqa.store import create_store, open_store, seal, verify
from agiqa.store.care.repairing import repair
from agiqa.store.sharing.in_place import open_remote
from agiqa.store.sharing.pulling import pull
from tests.store.conftest import fill, make_content, make_store, plan_of
from tests.store.crash_points import states_after_kills
from tests.store.damage import contents, harm, refill
from tests.store.sharing_servers import web_server


def flips(folder, random_bits, _times):
    """Each byte of items.parquet and of the root zarr.json of an unfinished store, and each eighth of plan.json."""
    content = make_content([3, 5, 2, 4])
    store = create_store(folder / "s.agiqa", plan_of(content))
    fill(store, content)
    copy = shutil.copytree(store.path, folder / "whole" / "s.agiqa")
    whole, told = contents(seal(open_store(copy, allow_partial=True))), {}
    for name, step, bits in (("items.parquet", 1, 1), ("store.zarr/zarr.json", 1, 3), ("commits/plan.json", 8, 1)):
        path, found = store.path / name, Counter()
        raw = path.read_bytes()
        for position in range(0, len(raw), step):
            for bit in random_bits.sample(range(8), bits):
                changed = bytearray(raw)
                changed[position] ^= 1 << bit
                path.write_bytes(changed)
                found[_sealed(store, whole)] += 1
                for made in (store.layout.manifest, store.layout.card):
                    made.unlink(missing_ok=True)
                path.write_bytes(raw)
        told[name] = dict(found)
    return told


def _sealed(store, whole):
    try:
        again = seal(open_store(store.path, allow_partial=True))
    except AgiqaError:
        return "refused"
    return "sealed as before" if contents(again) == whole else "SEALED OTHERWISE"


def races(folder, rng, times):
    """Half of the readers ask for the unit that is dropped, half for the others; each waits up to 10 ms."""
    content = make_content([37] * 30)
    store = make_store(folder / "s.agiqa", content)
    units, found = store.geometry.units, Counter()
    for race in range(times):
        everything, unit = race % 2 == 0, rng.randrange(units // 2, units)
        harm(store.layout.features_object(unit), rng.choice(["flip", "truncate", "remove"]))
        opened, child = os.pipe(), os.fork()
        if child == 0:
            _read_and_exit(store.path, content, None if everything else unit, opened[1], rng.uniform(0, 0.01))
        os.read(opened[0], 1)
        for end in opened:
            os.close(end)
        time.sleep(rng.uniform(0, 0.25))
        repair(open_store(store.path))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        asked = "all items" if everything else "items of sound units"
        found[f"{asked}: {('right', 'WRONG', 'refused', 'TRACEBACK')[code]}"] += 1
        refill(store, content)
    return dict(found)


def _read_and_exit(path, content, without, opened, wait):
    """End this process: 0 for right rows, 1 for wrong ones, 2 for a refusal, 3 for anything else."""
    code = 3
    try:
        store = open_store(path)
        items = [item for item in range(len(content.hidden)) if int(store.units[item]) != without]
        os.write(opened, b".")
        time.sleep(wait)
        rows = store.read(items).rows
        code = 0 if np.array_equal(rows, np.concatenate([content.hidden[item] for item in items])) else 1
    except AgiqaError:
        code = 2
    finally:
        os._exit(code)


def cache(folder, rng, times):
    """One bit, an end that is cut off, another object's bytes or random ones; half while the store is open."""
    os.environ["AGIQA_CACHE"] = str(folder / "cache")
    stored, found = make_store(folder / "s.agiqa", make_content([9] * 12)), Counter()
    expected = _all_of(stored)
    with web_server(stored.path) as server:
        _all_of(open_remote(server.url))
        kept = [path for path in (folder / "cache").rglob("*") if path.is_file() and path.stat().st_size]
        for trial in range(times):
            held = open_remote(server.url) if trial % 2 else None
            path = rng.choice([path for path in kept if path.exists()])
            _spoil(path, kept, rng)
            try:
                same = _all_of(held or open_remote(server.url)) == expected
            except AgiqaError:
                found["refused"] += 1
            else:
                found["right" if same else "WRONG"] += 1
    return dict(found)


def _all_of(store):
    read = store.read(range(12))
    return (read.rows.tobytes(), read.roles.tobytes(), store.lm_head().tobytes(), str(store.items.table().to_pydict()))


def _spoil(path, kept, rng):
    raw = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    if kind == 0:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        raw = raw[: rng.randrange(len(raw))]
    elif kind == 2:
        raw = bytearray(rng.choice([other for other in kept if other.exists()]).read_bytes())
    else:
        raw = bytearray(rng.randbytes(len(raw)))
    path.write_bytes(raw)


def pulls(folder, _rng, _times):
    """The folder after each kill: still the unfinished store with its two units, or finished by the next pull."""
    content, found = make_content([5, 3, 4]), Counter()
    there = make_store(folder / "there.agiqa", content).path
    mine = create_store(folder / "mine.agiqa", plan_of(content))
    fill(mine, replace(content, hidden=[rows ^ 1 for rows in content.hidden]), units=[0, 1])
    job = f"pull({there.as_uri()!r}, path, jobs=1)"
    imports = "from agiqa.store.sharing.pulling import pull"
    for state in states_after_kills(mine.path, folder / "states", imports=imports, job=job):
        if (state / "PULLING.json").exists() or (state / "MANIFEST.json").exists():
            whole = pull(there.as_uri(), state).bytes == 0 and verify(open_store(state), "full").sound
            found["finished without a byte more" if whole else "LOST"] += 1
        else:
            whole = create_store(state, plan_of(content)).committed_units() == [0, 1]
            found["the unfinished store is whole" if whole else "LOST"] += 1
    return dict(found)


def pool(_folder, rng, times):
    """SIGSTOP, SIGKILL, SIGSEGV and SIGTERM to random processes; at the end all are stopped, then the pool is closed."""
    workers.SECONDS_TO_ANSWER = 3.0
    asked = workers.Workers(multiprocessing.get_context("fork"), _squares)
    found, done = Counter(), threading.Event()
    hostile = threading.Thread(target=_send_signals, args=(rng, done, found))
    hostile.start()
    with ThreadPoolExecutor(6) as threads:
        found.update(threads.map(lambda number: _ask(asked, number), range(times)))
    done.set()
    hostile.join()
    for child in _children():
        os.kill(child, signal.SIGSTOP)
    began = time.monotonic()
    asked.close()
    return {**found, "left after close": len(_children()), "seconds to close": round(time.monotonic() - began, 2)}


def _squares():
    return lambda function, argument: function(argument)


def _square(number):
    time.sleep(number % 20 / 1000)
    return number * number


def _ask(asked, number):
    try:
        return "right" if asked.ask(_square, number) == number * number else "WRONG"
    except (workers.LostAnswer, workers.WorkerError):
        return "hit twice, told by name"


def _send_signals(rng, done, found):
    while not done.wait(rng.uniform(0.05, 0.4)):
        if children := _children():
            number = rng.choice([signal.SIGSTOP, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
            os.kill(rng.choice(children), number)
            found["signals"] += 1


def _children():
    """This process's children that have not ended, without the resource tracker of Python's multiprocessing."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = place.read_text().rpartition(")")[2].split()[:2]
            command = place.with_name("cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid() and state != "Z" and b"resource_tracker" not in command:
            found.append(int(place.parent.name))
    return found


CAMPAIGNS = {campaign.__name__: campaign for campaign in (flips, races, cache, pulls, pool)}


@click.command()
@click.argument("campaign", type=click.Choice(list(CAMPAIGNS)))
@click.option("--times", default=60, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(campaign, times, seed):
    """Run a CAMPAIGN and print what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        print(campaign, CAMPAIGNS[campaign](Path(folder), random.Random(seed), times))


if __name__ == "__main__":
    main()
