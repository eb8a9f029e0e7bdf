"""Pulls into folders that hold something of the store: nothing there is given up before all that replaces it is here."""

import json
import shutil
from dataclasses import replace

import pytest

from agiqa.errors import BusyStore, DamagedStore, IncompleteStore, RemoteError, SettingsConflict
from agiqa.store import UnitWriter, collect_garbage, create_store, join_labels, open_store, repair, seal, verify
from agiqa.store.disk.locks import exclusive_lock
from agiqa.store.sharing.pulling import plan_pull, pull, run_pull
from tests.store.conftest import fill, make_content, make_store, plan_of, write_model
from tests.store.crash_points import states_after_kills
from tests.store.sharing.copies import assert_equal_stores, files_below, largest_object
from tests.store.sharing.movers import kill_after, start_mover


def other_bits(content):
    """The same items with other features, as another machine computes them."""
    return replace(content, hidden=[rows ^ 1 for rows in content.hidden])


@pytest.fixture
def unfinished(tmp_path, content):
    """The store of `stored`, planned here and filled with other bits but for its last unit."""
    mine = other_bits(content)
    store = create_store(tmp_path / "mine" / "store.agiqa", plan_of(mine))
    fill(store, mine, units=range(store.geometry.units - 1))
    return store


def bytes_below(path):
    """What the files of a store hold, without what a pull has fetched beside them."""
    return {
        name: (path / name).read_bytes()
        for name in files_below(path)
        if not name.startswith(("locks/", ".pulled/", ".PULLING.json."))
    }


def assert_still_filled(path, content):
    """Another run takes the store up, has to compute the last unit only, and the units before are those computed."""
    mine = other_bits(content)
    store = create_store(path, plan_of(mine))
    assert store.committed_units() == list(range(store.geometry.units - 1))
    fill(store, mine)
    assert verify(seal(store), "full").sound
    for unit in range(store.geometry.units):
        expected = [row for item in store.items_of(unit).tolist() for row in mine.hidden[item].tolist()]
        assert open_store(path).read_unit(unit).tolist() == expected
    collect_garbage(open_store(path))
    assert not (path / ".pulled").exists()


@pytest.mark.parametrize("failure", ["gone", "wrong", "missing"])
def test_a_failed_pull_leaves_every_filled_unit(stored, served, unfinished, content, failure, impatient):
    before = bytes_below(unfinished.path)
    plan = plan_pull(served.url, unfinished.path)
    served.behaviour.down = failure == "gone"
    served.behaviour.wrong = {largest_object(stored)} if failure == "wrong" else set()
    if failure == "missing":
        (stored.path / largest_object(stored)).unlink()
    with pytest.raises((DamagedStore, RemoteError)):
        run_pull(plan)
    assert bytes_below(unfinished.path) == before
    assert_still_filled(unfinished.path, content)


def test_a_pull_killed_anywhere_in_its_downloads_leaves_every_filled_unit(served, unfinished, content, stored):
    before = bytes_below(unfinished.path)
    for lines in (5, 30):
        assert kill_after(start_mover("pull", served.url, unfinished.path), lines)
        assert bytes_below(unfinished.path) == before
    shutil.copytree(unfinished.path, unfinished.path.with_name("copy.agiqa"))
    assert_still_filled(unfinished.path.with_name("copy.agiqa"), content)
    assert pull(served.url, unfinished.path).skipped > 0
    assert_equal_stores(unfinished.path, stored.path)
    assert not (unfinished.path / "commits").exists()


def test_a_pull_killed_at_any_change_on_disk_keeps_the_old_or_brings_the_new(tmp_path):
    content = make_content([5, 3, 4])
    there = make_store(tmp_path / "there.agiqa", content).path
    mine = create_store(tmp_path / "mine.agiqa", plan_of(content))
    fill(mine, other_bits(content), units=[0])
    imports = "from agiqa.store.sharing.pulling import pull"
    job = f"pull({there.as_uri()!r}, path, jobs=1)"
    states = states_after_kills(mine.path, tmp_path / "states", imports=imports, job=job, every=5)
    before, old, new, mixed = bytes_below(mine.path), 0, 0, 0
    for state in states:
        if bytes_below(state) == before:
            old += 1
            assert create_store(state, plan_of(content)).committed_units() == [0]
        else:  # all of it is here: only names change
            new += 1
            if not (state / "MANIFEST.json").exists():  # a mixture of both, which must not be read, sealed or repaired
                with pytest.raises(IncompleteStore, match="same `agiqa store pull` again"):
                    open_store(state, allow_partial=True)
                mixed += 1
            assert pull(there.as_uri(), state).bytes == 0
            assert_equal_stores(state, there)
    assert min(old, new, mixed) > 3


def test_a_run_at_work_and_a_pull_keep_out_of_each_other(served, unfinished, content):
    plan_pull(served.url, unfinished.path)
    with exclusive_lock(unfinished.layout.locks / "pull") as held:
        assert held
        with pytest.raises(SettingsConflict, match="pull into"):
            create_store(unfinished.path, plan_of(other_bits(content)))
    create_store(unfinished.path, plan_of(other_bits(content)))


def test_some_items_are_not_pulled_over_an_unfinished_store(served, unfinished):
    before = bytes_below(unfinished.path)
    with pytest.raises(SettingsConflict, match=r"unfinished.*--items"):
        pull(served.url, unfinished.path, items=unfinished.items.names[:1])
    assert bytes_below(unfinished.path) == before


def test_a_store_sealed_while_it_is_pulled_is_left_alone(served, unfinished, content):
    plan = plan_pull(served.url, unfinished.path)

    def meanwhile(_bytes):
        if not unfinished.layout.manifest.exists():
            fill(unfinished, other_bits(content))
            seal(unfinished)

    with pytest.raises(BusyStore, match="while it was pulled"):
        run_pull(plan, advance=meanwhile, jobs=1)
    assert verify(open_store(unfinished.path), "full").sound
    assert open_store(unfinished.path).read_unit(0).tolist() != []


def test_a_copy_stays_readable_until_the_new_store_is_here(stored, tmp_path, content, served, impatient):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy)
    before = bytes_below(copy)
    make = make_store(tmp_path / "new.agiqa", other_bits(content))
    shutil.rmtree(stored.path)
    shutil.copytree(make.path, stored.path)
    served.behaviour.wrong = {largest_object(stored)}
    with pytest.raises(DamagedStore):
        pull(served.url, copy)
    assert {name: text for name, text in bytes_below(copy).items() if name != "PULLING.json"} == before
    assert verify(open_store(copy), "full").sound
    served.behaviour.wrong = set()
    pull(served.url, copy)
    assert_equal_stores(copy, make.path)


def relabelled(path, quality):
    """Give one item of the store at `path` another label, as `agiqa store labels` does; the bytes of the new table."""
    table = path.with_name("labels.csv")
    table.write_text(f"name,mos_quality\nimage_0.png,{quality}\n")
    join_labels(open_store(path, allow_partial=True), table)
    return (path / "items.parquet").read_bytes()


def test_labels_that_were_edited_here_survive_every_pull(served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy)
    edited = []
    for quality in (1.5, 2.5, 3.5):
        edited.append(relabelled(copy, quality))
        pull(served.url, copy)
    kept = [copy / f"items.before-pull{number}.parquet" for number in ("", "-2", "-3")]
    assert [path.read_bytes() for path in kept] == edited
    assert open_store(copy).items.labels["quality"][0] not in (1.5, 2.5, 3.5)
    pull(served.url, copy)
    assert not (copy / "items.before-pull-4.parquet").exists()


@pytest.mark.parametrize("kind", ["complete", "unfinished"])
def test_a_table_that_was_edited_by_hand_is_set_aside(served, stored, tmp_path, content, kind, unfinished):
    copy = unfinished.path if kind == "unfinished" else tmp_path / "copy.agiqa"
    if kind == "complete":
        pull(served.url, copy)
    content.items.labels["quality"][0] = 1.25
    other = make_store(tmp_path / "other.agiqa", content)
    shutil.copy(other.layout.items, copy / "items.parquet")
    pull(served.url, copy)
    assert (copy / "items.before-pull.parquet").read_bytes() == other.layout.items.read_bytes()
    assert_equal_stores(copy, stored.path)


def test_words_added_to_the_card_are_set_aside(served, stored, tmp_path):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy)
    (copy / "README.md").write_text("my own words")
    pull(served.url, copy)
    assert (copy / "README.before-pull.md").read_text() == "my own words"
    assert (copy / "README.md").read_text() == (stored.path / "README.md").read_text()


def test_some_items_of_a_store_that_was_made_anew_are_not_mixed_with_old_ones(served, stored, tmp_path, content):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy, items=stored.items.names[:1])
    names = content.items.names
    anew = make_store(tmp_path / "anew.agiqa", make_content([20] * len(names)))
    assert anew.id == stored.id
    shutil.rmtree(stored.path)
    shutil.copytree(anew.path, stored.path)
    before = json.loads((copy / "MANIFEST.json").read_text())
    with pytest.raises(SettingsConflict, match="made anew"):
        pull(served.url, copy, items=names[-1:])
    assert json.loads((copy / "MANIFEST.json").read_text()) == before
    pull(served.url, copy)
    assert_equal_stores(copy, anew.path)


@pytest.mark.parametrize("inside", [True, False])
def test_records_that_are_a_link_are_not_followed_by_a_pull(served, stored, tmp_path, unfinished, inside):
    elsewhere = unfinished.path / "records" if inside else tmp_path / "elsewhere"
    shutil.move(unfinished.layout.commits, elsewhere)
    unfinished.layout.commits.symlink_to(elsewhere)
    before = files_below(elsewhere)
    pull(served.url, unfinished.path)
    assert files_below(elsewhere) == before
    assert not unfinished.layout.commits.is_symlink()
    assert verify(open_store(unfinished.path), "full").sound
    assert open_store(unfinished.path).content == stored.content


def test_a_pull_removes_only_records_from_commits(served, unfinished):
    (unfinished.layout.commits / "notes.txt").write_text("mine")
    pull(served.url, unfinished.path)
    assert files_below(unfinished.layout.commits) == {"notes.txt"}


def test_a_run_that_began_before_a_pull_writes_nothing_over_it(served, stored, unfinished, content):
    """A run holds no lock while it loads its model, and between two units."""
    writer, last = UnitWriter(unfinished), unfinished.geometry.units - 1
    model = UnitWriter(unfinished)
    pull(served.url, unfinished.path)
    for write in (lambda: write_model(model, other_bits(content)), lambda: writer.claim(last).__enter__()):
        with pytest.raises(BusyStore, match="A pull replaced"):
            write()
    assert verify(open_store(unfinished.path), "full").sound
    assert open_store(unfinished.path).content == stored.content


def test_nothing_is_written_while_a_pull_moves_its_objects(unfinished):
    """PULLING.json stands for that time, and for what is left of it after a kill."""
    writer = UnitWriter(unfinished)
    (unfinished.path / "PULLING.json").write_text("{}")
    with pytest.raises(BusyStore, match="A pull replaced"):
        writer.claim(unfinished.geometry.units - 1).__enter__()


def test_what_a_killed_pull_left_is_neither_sealed_nor_repaired_nor_labelled(unfinished, content):
    """The pull has moved some of its objects, whose sizes are those of the objects that they replace."""
    fill(unfinished, other_bits(content))
    (unfinished.path / "PULLING.json").write_text("{}")
    before = bytes_below(unfinished.path)
    for work in (seal, repair, lambda _store: relabelled(unfinished.path, 1.5)):
        with pytest.raises(IncompleteStore, match=r"pull into .* was cut off"):
            work(open_store(unfinished.path, allow_partial=True))
    assert bytes_below(unfinished.path) == before


def test_a_failed_pull_of_a_damaged_copy_does_not_lock_it(served, stored, tmp_path, impatient):
    """It is still the finished store: without a network one can still collect garbage in it."""
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy)
    (copy / largest_object(stored)).unlink()
    served.behaviour.down = True
    with pytest.raises(RemoteError):
        pull(served.url, copy)
    served.behaviour.down = False
    plan = plan_pull(served.url, copy)
    served.behaviour.down = True
    with pytest.raises(RemoteError):
        run_pull(plan)
    assert not (copy / "PULLING.json").exists()
    collect_garbage(open_store(copy))
