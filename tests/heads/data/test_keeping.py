"""Where features are kept changes no number; budgets hold; decoded copies are whole, or not there, or refused."""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from agiqa.errors import ConfigError, DamagedStore, DataError
from agiqa.heads import HeadConfig, TrainConfig, train_head
from agiqa.heads.data import decoded, features
from agiqa.heads.data.batches import BatchLoader, LabelledItems
from agiqa.heads.data.decoded import mapped_features
from agiqa.heads.data.features import FeatureSet
from agiqa.heads.data.keeping import available_memory, cgroup_rooms, keep_features
from agiqa.store import open_store
from tests.store.conftest import make_content
from tests.store.conftest import make_store as write_store

KEEPS = ("ram", "device", "memmap", "stream", "auto")
QUICK = TrainConfig(split="grouped", epochs=2, lr=1e-2, batch_size=4, device="cpu")
GRU = HeadConfig(projection="vocabulary", encoder="gru", width=8, pooling="attention")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Decoded copies of these tests."""
    monkeypatch.setenv("AGIQA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


def labelled(content):
    """The content with a MOS for every item."""
    mos = np.random.default_rng(1).uniform(0, 5, len(content.items))
    return replace(content, items=replace(content.items, labels={"quality": mos}))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A real store of 60 items, 1,000 to 2,000 tokens in many units."""
    lengths = np.random.default_rng(5).integers(4, 50, 60).tolist()
    return write_store(tmp_path_factory.mktemp("feeding") / "small.agiqa", labelled(make_content(lengths)))


@dataclass(frozen=True, kw_only=True)
class Told:
    """A source that records which items are read, and can fail."""

    of: Any
    asked: list[list[int]] = field(default_factory=list)
    fail_at: int | None = None
    failure: Any = None

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "of"), name)

    def read(self, items):
        self.asked.append(np.asarray(items).tolist())
        if self.fail_at is not None and len(self.asked) > self.fail_at:
            self.failure()
        return self.of.read(items)


def row_size(source):
    return source.width * (4 if source.logical_dtype == "float32" else 2)


def set_of(source, keep, *, items=None, memory=None, batch_size=4):
    chosen = np.arange(len(source.items.names)) if items is None else items
    config = TrainConfig(keep=keep, memory=memory, batch_size=batch_size)
    return keep_features(source, chosen, config, device=CPU)


def half_of(source):
    return int(source.n_tokens.sum()) * row_size(source) // 2


@pytest.mark.parametrize("kind", ["real", "memory"])
def test_training_gives_the_same_numbers_wherever_rows_are_kept(stored, make_store, tmp_path, kind):
    source = stored if kind == "real" else make_store(60, logical_dtype="float16", encoding="hidden")
    memory = {"stream": half_of(source), "auto": half_of(source)}
    results = {}
    for keep in (*KEEPS, "memmap again"):
        config = QUICK.model_copy(update={"keep": keep.split()[0], "memory": memory.get(keep), "refit": True})
        run = train_head(source, tmp_path / keep, head=GRU, train=config)
        names = ("predictions.csv", "head.safetensors")
        results[keep] = tuple((run.path / name).read_bytes() for name in names)
        held = run.metrics["features"]
        assert held["keep"] == {"device": "ram", "memmap again": "memmap", "auto": "memmap"}.get(keep, keep)
        assert (held["streamed_bytes"] > 0) == (keep == "stream")
        assert held["kept_bytes"] + held["streamed_bytes"] > half_of(source)
        assert (held["copy"] is not None) == (held["keep"] == "memmap")
    assert len(set(results.values())) == 1


@pytest.mark.parametrize("keep", ["memmap", "stream"])
def test_batches_and_statistics_are_those_of_ram(stored, monkeypatch, keep):
    monkeypatch.setattr(features, "_ROWS_PER_CHUNK", 90)
    items = np.random.default_rng(0).permutation(60)[:50]
    expected = FeatureSet.from_store(stored, items)
    fed = set_of(stored, keep, items=items, memory=half_of(stored))
    positions = np.random.default_rng(1).permutation(50)[:40]
    order = {"batch_size": 4, "order": (3, 2), "smallest": 2}
    labelled = [LabelledItems.at(each, positions, "quality") for each in (fed.features, expected)]
    pairs = zip(
        BatchLoader(fed.features, labelled[0], **order), BatchLoader(expected, labelled[1], **order), strict=True
    )
    for found, wanted in pairs:
        for name in vars(wanted):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    ours, theirs = (each.statistics(positions, sample=100) for each in (fed.features, expected))
    for name in ("mean", "std", "sample"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    rows = torch.cat([expected.rows[expected.offsets[k] : expected.offsets[k + 1]] for k in positions]).double()
    torch.testing.assert_close(ours.mean, rows.mean(0))
    torch.testing.assert_close(ours.std, rows.std(0, correction=0))


@pytest.mark.parametrize("keep", ["ram", "memmap", "stream"])
def test_a_pass_that_was_broken_off_goes_on_where_it_was(stored, keep):
    fed = set_of(stored, keep, memory=half_of(stored) if keep == "stream" else None)
    whole = list(BatchLoader(fed.features, np.arange(60), batch_size=4, order=(0, 3)))
    rest = BatchLoader(fed.features, np.arange(60), batch_size=4, order=(0, 3), skip=11)
    assert len(rest) == 4
    for found, wanted in zip(rest, whole[11:], strict=True):
        assert torch.equal(found.features, wanted.features)
        assert torch.equal(found.positions, wanted.positions)


@pytest.mark.parametrize("keep", ["ram", "memmap", "stream"])
def test_decoding_reads_each_item_once_in_the_order_of_the_store(stored, monkeypatch, keep):
    monkeypatch.setattr(features, "_BYTES_PER_READ", 3000)
    source = Told(of=stored)
    set_of(source, keep, items=np.random.default_rng(0).permutation(60), memory=half_of(stored) * 4)
    calls = source.asked if keep != "memmap" else source.asked[:-1]  # the last compares the copy with the store
    assert len(calls) > 5
    assert [item for call in calls for item in call] == list(range(60))


def test_the_first_items_that_fit_are_kept_and_the_rest_is_streamed(stored):
    source = Told(of=stored)
    budget = half_of(stored)
    fed = set_of(source, "stream", memory=budget)
    kept = int((fed.features.starts >= 0).sum())
    sizes = stored.n_tokens.astype(int) * row_size(stored)
    in_flight = 3 * np.sort(sizes)[-5:].sum()
    assert (fed.features.starts[:kept] >= 0).all()
    assert fed.features.rows.nbytes == fed.kept_bytes == sizes[:kept].sum()
    assert sizes[:kept].sum() + in_flight <= budget < sizes[: kept + 1].sum() + in_flight
    source.asked.clear()
    list(BatchLoader(fed.features, np.arange(60), batch_size=4, order=(0, 0)))
    assert sorted(item for call in source.asked for item in call) == list(range(kept, 60))
    assert "read from the store in every epoch" in fed.line()


def test_streaming_can_be_left_at_any_time(stored):
    fed = set_of(stored, "stream", memory=half_of(stored))
    batches = iter(BatchLoader(fed.features, np.arange(60), batch_size=4))
    next(batches)
    assert any(thread.name.startswith("agiqa-batches") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("agiqa-batches") for thread in threading.enumerate())


def test_an_error_while_reading_ahead_reaches_the_loop_unchanged(stored):
    def fail():
        message = "unit 3 is damaged"
        raise DamagedStore(message)

    fed = set_of(stored, "stream", memory=half_of(stored))
    broken = replace(fed.features, source=Told(of=stored, fail_at=2, failure=fail))
    batches = iter(BatchLoader(broken, np.arange(60), batch_size=4))
    assert len(next(batches).positions) == len(next(batches).positions) == 4
    with pytest.raises(DamagedStore, match="unit 3 is damaged"):
        list(batches)


def test_a_budget_that_is_too_small_is_told_with_the_numbers(stored):
    with pytest.raises(ConfigError, match=r"60 items take \d.* and keep 'ram' may take 20.0 KB") as caught:
        set_of(stored, "ram", memory="20KB")
    assert "'auto', 'memmap' or 'stream'" in str(caught.value)
    with pytest.raises(ConfigError, match=r"3 batches at once.*5.0 KB are allowed.*lower batch_size \(now 4\)"):
        set_of(stored, "stream", memory="5KB")
    assert set_of(stored, "stream", memory="10KB", batch_size=1).streamed_bytes > 0


def test_auto_takes_ram_where_all_fits_there(stored):
    fed = set_of(stored, "auto")
    assert (fed.keep, fed.streamed_bytes, fed.copy) == ("ram", 0, None)
    assert fed.budget < available_memory(CPU)
    assert "kept (ram)" in fed.line()


def test_auto_streams_where_no_copy_can_be_written_and_says_why(stored, cache, capsys):
    cache.parent.write_text("a file where the folder should be")
    fed = set_of(stored, "auto", memory=half_of(stored))
    assert fed.keep == "stream"
    said = capsys.readouterr().err
    assert str(cache) in said
    assert "AGIQA_CACHE" in said
    assert "Going on with keep 'stream'" in said
    with pytest.raises(ConfigError, match="cannot be written"):
        set_of(stored, "memmap")


def test_a_disk_that_is_full_in_mid_copy_leaves_nothing(stored, cache, monkeypatch):
    monkeypatch.setattr(features, "_BYTES_PER_READ", 3000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot be written.*AGIQA_CACHE"):
            set_of(stored, "memmap")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert set_of(stored, "memmap").keep == "memmap"


def test_a_disk_without_room_is_told_before_anything_is_written(stored, cache, monkeypatch):
    monkeypatch.setattr(decoded, "_SHARE_OF_DISK", 1e-12)
    with pytest.raises(ConfigError, match=r"takes [\d,]+ bytes, and .* has [\d,]+ free"):
        set_of(stored, "memmap")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_copy_serves_every_order_of_its_items_and_no_others(stored, cache, capsys):
    first = set_of(stored, "memmap", items=np.arange(40))
    again = set_of(stored, "memmap", items=np.arange(40)[::-1].copy())
    other = set_of(stored, "memmap", items=np.arange(41))
    assert first.copy == again.copy != other.copy
    assert str(first.copy) in first.line()
    assert capsys.readouterr().err.count("once for all runs") == 2
    assert torch.equal(again.features.take(np.array([39]))[0].rows, first.features.take(np.array([0]))[0].rows)


def test_a_copy_of_other_items_is_refused(stored):
    ours, theirs = (set_of(stored, "memmap", items=np.arange(count)).copy for count in (40, 41))
    shutil.rmtree(ours)
    theirs.rename(ours)
    with pytest.raises(DataError, match=rf"{ours} is the decoded copy of other items \(items, shape differ\)"):
        set_of(stored, "memmap", items=np.arange(40))


@pytest.mark.parametrize("name", ["rows.bin", "roles.bin", "decoded.json"])
def test_a_damaged_copy_is_refused_by_name(stored, name):
    folder = set_of(stored, "memmap").copy
    with (folder / name).open("r+b") as file:
        file.truncate((folder / name).stat().st_size - 2)
    with pytest.raises(DataError, match=str(folder)):
        set_of(stored, "memmap")
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{folder} is no decoded copy"):
        set_of(stored, "memmap")


@pytest.mark.parametrize("name", ["rows.bin", "roles.bin"])
def test_a_flipped_bit_of_a_copy_is_refused(stored, name):
    folder = set_of(stored, "memmap").copy
    flip(folder / name, (folder / name).stat().st_size // 3)
    with pytest.raises(DataError, match=f"{folder} is damaged: its bytes are not those that were written"):
        set_of(stored, "memmap")


def test_a_copy_of_an_earlier_fill_of_the_store_is_refused(stored):
    folder = set_of(stored, "memmap").copy
    flip(folder / "rows.bin", 0)
    about = json.loads((folder / "decoded.json").read_text())
    about["sha256"]["rows.bin"] = hashlib.sha256((folder / "rows.bin").read_bytes()).hexdigest()
    (folder / "decoded.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="holds other rows than the store"):
        set_of(stored, "memmap")


@pytest.mark.parametrize("content", ["[]", "3", '{"format": 1}'])
def test_another_json_file_in_a_copy_is_refused(stored, content):
    folder = set_of(stored, "memmap").copy
    (folder / "decoded.json").write_text(content)
    with pytest.raises(DataError, match=f"{folder} is the decoded copy of other items"):
        set_of(stored, "memmap")


def flip(path, place):
    values = np.memmap(path, mode="r+")
    values[place] ^= 1
    values.flush()


def test_a_store_of_the_same_id_has_a_copy_of_its_own(tmp_path):
    content = labelled(make_content([10] * 40))
    other = replace(content, hidden=[rows ^ (place == 7) for place, rows in enumerate(content.hidden)])
    mine, yours = (write_store(tmp_path / f"{k}.agiqa", what) for k, what in enumerate((content, other)))
    assert mine.id == yours.id
    for store in (mine, yours, mine):
        kept = set_of(store, "memmap", items=np.arange(40)).features
        rows = np.asarray(kept.take(np.array([7]))[0].rows.view(torch.uint8))
        np.testing.assert_array_equal(rows, store.read([7]).rows.view(np.uint8))
    assert mine.content != yours.content == open_store(yours.path).content


def test_non_finite_rows_are_named_before_training_and_leave_no_copy(make_store, cache):
    source = make_store(30)
    source.features[21][-1, 1] = np.nan
    source.features[4][0, 0] = np.inf
    for keep in ("ram", "memmap", "stream"):
        with pytest.raises(DataError, match=r"2 problems\n.*'0004\.png' holds NaN or inf.*\n.*'0021\.png'"):
            set_of(source, keep)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def in_processes(work, count):
    """Exit codes of `count` forked processes that do `work` at the same time."""
    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.filterwarnings("ignore:.*may lead to deadlocks in the child:DeprecationWarning")
def test_a_run_that_is_killed_in_mid_copy_leaves_no_copy_and_no_lock(make_store, cache, monkeypatch):
    monkeypatch.setattr(features, "_BYTES_PER_READ", 300)
    source = make_store(40)
    dying = Told(of=source, fail_at=3, failure=lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert in_processes(lambda: mapped_features(dying, np.arange(40)), 1) == [-signal.SIGKILL]
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".partial"]
    found, folder = mapped_features(source, np.arange(40))
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert torch.equal(found.rows, FeatureSet.from_store(source, np.arange(40)).rows)


@pytest.mark.filterwarnings("ignore:.*may lead to deadlocks in the child:DeprecationWarning")
def test_runs_that_want_the_same_copy_at_once_write_it_once(make_store, cache):
    source = make_store(40)
    wanted = FeatureSet.from_store(source, np.arange(40)).rows

    def work():
        assert torch.equal(mapped_features(source, np.arange(40))[0].rows, wanted)

    assert in_processes(work, 3) == [0, 0, 0]
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_free_memory_respects_the_limits_of_every_group(tmp_path):
    def group(name, limit, *, used, inactive):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")

    group("job", 1000, used=700, inactive=100)
    group("job/step", "max", used=600, inactive=0)
    group("job/step/task", 500, used=900, inactive=0)
    membership = tmp_path / "cgroup"
    membership.write_text("1:memory:/elsewhere\n0::/job/step/task\n")
    assert cgroup_rooms(membership, tmp_path) == [0, 400]
    membership.write_text("0::/\n")
    assert cgroup_rooms(membership, tmp_path) == []
    assert cgroup_rooms(tmp_path / "absent", tmp_path) == []
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory(CPU) < total


def test_memory_is_read_as_people_write_it():
    assert TrainConfig(memory="8GB").memory == 8 * 10**9
    assert TrainConfig(memory="1.5 GiB").memory == 3 << 29
    assert TrainConfig(**json.loads(json.dumps(TrainConfig(memory="8GB").model_dump()))).memory == 8 * 10**9
    for wrong in ("much", "0", "-3GB", "8 parsecs"):
        with pytest.raises(ConfigError, match="memory"):
            TrainConfig(memory=wrong)
    with pytest.raises(ConfigError, match=r"keep: Input should be 'auto', 'device', 'ram', 'memmap' or 'stream'"):
        TrainConfig(keep="disk")


def test_the_command_line_says_what_it_kept(stored, tmp_path, agiqa):
    options = ("--epochs", 1, "--batch-size", 4, "--width", 8, "--encoder", "gru", "--split", "grouped")
    kept = ("--keep", "stream", "--memory", half_of(stored), "--device", "cpu")
    done = agiqa("train", stored.path, tmp_path / "run", *options, *kept, "--json")
    assert done.json["features"]["keep"] == "stream"
    assert done.json["features"]["streamed_bytes"] > 0
    assert "read from the store in every epoch" in done.err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["features"] == done.json["features"]
    assert open_store(stored.path).id == json.loads((tmp_path / "run" / "config.json").read_text())["features"]["store"]
