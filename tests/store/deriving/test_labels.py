"""Labels apart from features: what a table sets, what it leaves, and what kills and bad tables cannot break."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from agiqa.errors import DamagedStore, DataError
from agiqa.progress import said_to
from agiqa.store import create_store, open_store, seal, verify
from agiqa.store.deriving.labelling import join_labels
from agiqa.store.writing.sealing import seal_lock
from tests.store.conftest import fill, plan_of
from tests.store.crash_points import REPOSITORY, states_after_kills


def write_table(path, header, *rows) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def full_table(path, aspect, value) -> Path:
    """A MOS for every item of the store of these tests."""
    return write_table(path, f"name,{aspect}", *(f"image_{item}.png,{value}" for item in range(40)))


def test_a_table_sets_what_it_names_and_leaves_the_rest(stored, content, tmp_path):
    arrays = snapshot(stored.layout.zarr)
    table = write_table(
        tmp_path / "t.csv",
        "name,mos_align,mos_quality,split,generator,mos_var",
        "image_3.png,2.5,,,sdxl,.1",
        "image_1.png,,4.25,val,,.1",
        "image_4.png,1,3,test,sdxl,.1",
    )
    report = join_labels(stored, table)
    items = open_store(stored.path).items
    expected = content.items.labels["quality"].copy()
    assert np.isnan(expected[4])
    expected[[1, 4]] = 4.25, 3.0
    np.testing.assert_array_equal(items.labels["quality"], expected)
    assert {item: mos for item, mos in enumerate(items.labels["correspondence"]) if not np.isnan(mos)} == {3: 2.5, 4: 1}
    assert items.splits == [*content.items.splits[:1], "val", *content.items.splits[2:4], "test", *items.splits[5:]]
    assert items.splits[5:] == content.items.splits[5:]
    assert [item for item, generator in enumerate(items.generators) if generator == "sdxl"] == [3, 4]
    assert (items.names, items.prompts) == (content.items.names, content.items.prompts)
    assert (report.rows, report.matched, report.kept, report.unmatched_rows) == (3, 3, 37, ())
    assert report.filled == {"mos_correspondence": 2, "mos_quality": 1, "generator": 2}
    assert report.replaced == {"mos_quality": 1, "split": 1}
    assert report.ignored_columns == ("mos_var",)
    assert snapshot(stored.layout.zarr) == arrays
    assert verify(open_store(stored.path), "numeric").sound
    assert "correspondence, quality" in stored.layout.card.read_text()
    assert not stored.layout.locks.exists()


def test_labels_of_an_unfinished_store_are_sealed_with_it(content, tmp_path):
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    join_labels(store, full_table(tmp_path / "t.csv", "mos_authenticity", 1.5))
    store = open_store(store.path, allow_partial=True)
    fill(store, content)
    assert set(seal(store).items.labels["authenticity"]) == {1.5}
    assert verify(open_store(store.path), "full").sound


def test_the_same_table_twice_changes_nothing(stored, tmp_path):
    table = full_table(tmp_path / "t.csv", "mos", 3.5)
    assert join_labels(stored, table).changed
    before = snapshot(stored.path)
    again = join_labels(stored, table)
    assert not again.changed
    assert snapshot(stored.path) == before


def numpy_calls(work) -> int:
    """How often `work` enters a function of NumPy's that is written in Python."""
    entered = []

    def note(frame, event, _arg):
        if event == "call" and "/numpy/" in frame.f_code.co_filename:
            entered.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len(entered)


def test_a_row_costs_no_work_on_a_whole_column(stored, tmp_path):
    """One operation on all items for each row took ten minutes for a million of them."""
    tables = [
        write_table(tmp_path / f"{rows}.csv", "name,mos", *(f"image_{item}.png,{rows / 10}" for item in range(rows)))
        for rows in (20, 40)
    ]
    join_labels(stored, tables[1])  # what is imported or made once is not counted
    few, many = (numpy_calls(lambda table=table: join_labels(stored, table)) for table in tables)
    assert many <= few + 5


def test_rows_of_other_images_are_counted(stored, tmp_path):
    table = write_table(tmp_path / "t.csv", "name,mos", "image_0.png,1", "image_99.png,2", "image_98.png,2")
    report = join_labels(stored, table)
    assert (report.matched, report.unmatched_rows) == (1, ("image_99.png", "image_98.png"))


def test_a_prompt_column_must_agree_with_the_store(stored, tmp_path):
    sound = write_table(tmp_path / "a.csv", "name,prompt,mos", "image_2.png,prompt 1,1", "image_0.png,,1")
    assert join_labels(stored, sound).matched == 2
    other = write_table(tmp_path / "b.csv", "name,prompt,mos", "image_2.png,prompt 2,1")
    with pytest.raises(DataError, match=r"line 2, 'image_2.png': the prompt is 'prompt 2', in the store 'prompt 1'"):
        join_labels(stored, other)


@pytest.mark.parametrize(
    ("header", "rows", "complaint"),
    [
        ("mos_quality", ["1"], "no column 'name'"),
        ("name,mos_qualty", ["image_0.png,1"], "no label column"),
        ("name,mos,mos_quality", ["image_0.png,1,1"], "two columns mean the same"),
        (
            "name,mos,split",
            ["image_0.png,1,train", "image_0.png,2,train"],
            "line 3, 'image_0.png': duplicate of line 2",
        ),
        (
            "name,mos",
            ["image_0.png,good", "image_1.png,7"],
            r"(?s)mos is 'good', not a number.*mos is 7, outside 0 to 5",
        ),
        ("name,mos", ["image_0.png,nan"], "mos is nan, outside 0 to 5"),
        ("name,split", ["image_0.png,rest"], "split 'rest' is none of train, val, test"),
        ("name,mos", ["image_0.png,1,2"], "has 3 fields where the header has 2"),
        ("name,mos", [",1", "image_0.png,2"], "line 2: the name is empty"),
        ("name,mos", ["a.png,1", "b.png,2"], r"none of its 2 rows names an item.*a\.png, b\.png.*image_0\.png"),
        ("name,mos", [], "but no rows"),
    ],
)
def test_a_bad_table_is_refused_whole(stored, tmp_path, header, rows, complaint):
    before = snapshot(stored.path)
    with pytest.raises(DataError, match=complaint):
        join_labels(stored, write_table(tmp_path / "t.csv", header, *rows))
    assert snapshot(stored.path) == before


def test_another_range_of_mos_can_be_asked_for(stored, tmp_path):
    join_labels(stored, full_table(tmp_path / "t.csv", "mos", 73), mos_range=(0, 100))
    assert set(open_store(stored.path).items.labels["quality"]) == {73.0}


def test_a_table_that_no_manifest_lists_is_refused(stored, tmp_path):
    stored.layout.items.write_bytes(stored.layout.items.read_bytes() + b"x")
    with pytest.raises(DamagedStore, match="not the item table"):
        join_labels(stored, full_table(tmp_path / "t.csv", "mos", 1))


@pytest.mark.parametrize("sealed", [True, False])
def test_killed_before_any_change_on_disk_the_labels_are_the_old_or_the_new(stored, content, tmp_path, sealed):
    table = full_table(tmp_path / "t.csv", "mos", 3.5)
    if not sealed:
        stored = create_store(tmp_path / "unfinished.agiqa", plan_of(content))
    listing = (stored.layout.manifest if sealed else stored.layout.plan_commit).relative_to(stored.path)
    states = states_after_kills(
        stored.path,
        tmp_path / "states",
        imports="from agiqa.store import open_store\nfrom agiqa.store.deriving.labelling import join_labels",
        job=f"join_labels(open_store(path, allow_partial=True), Path({str(table)!r}))",
    )
    seen = []
    for state in states:
        store = open_store(state, allow_partial=not sealed)
        quality = store.items.labels["quality"]
        is_new = bool((quality == 3.5).all())
        assert is_new or np.array_equal(quality, content.items.labels["quality"], equal_nan=True)
        assert not verify(store, "full").damage
        announced = "labels_next" in json.loads((state / listing).read_text())
        seen.append((is_new, announced))
        join_labels(store, table)
        assert (open_store(state, allow_partial=not sealed).items.labels["quality"] == 3.5).all()
        assert set(json.loads((state / listing).read_text())) == set(json.loads((stored.path / listing).read_text()))
        assert not (sealed and store.layout.locks.exists())
    assert {(False, False), (False, True), (True, True), (True, False)} <= set(seen)
    assert seen == sorted(seen, key=lambda step: step[0])


FLIPPER = """
    import os, random, signal, sys, time
    from pathlib import Path
    from agiqa.store import open_store
    from agiqa.store.deriving.labelling import join_labels
    path, *tables = map(Path, sys.argv[1:])
    moments = random.Random(0)
    for _ in range(10):
        at_work, tell = os.pipe()
        child = os.fork()
        if child == 0:
            while True:
                for table in tables:
                    join_labels(open_store(path), table)
                os.write(tell, b".")
        os.read(at_work, 1)
        time.sleep(moments.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""


def test_a_reader_beside_killed_writers_sees_whole_tables_only(stored, tmp_path):
    tables = [full_table(tmp_path / f"{value}.csv", "mos", value) for value in (1.5, 3.5)]
    join_labels(stored, tables[0])
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FLIPPER), str(stored.path), *map(str, tables)], cwd=REPOSITORY
    )
    seen = set()
    while writer.poll() is None:
        quality = set(open_store(stored.path).items.labels["quality"])
        assert quality in ({1.5}, {3.5})
        seen |= quality
    assert writer.returncode == 0
    assert seen == {1.5, 3.5}
    join_labels(stored, tables[0])
    assert verify(open_store(stored.path), "full").sound


REPLACED = """
    import sys
    from pathlib import Path
    from agiqa.store import join_labels, open_store
    path, *tables = map(Path, sys.argv[1:])
    left = []

    def replace_it(event, arguments):
        if event == "open" and left and str(arguments[0]).endswith("items.parquet"):
            step = left.pop()
            if step is not None:
                coming, left[:] = list(left), []
                join_labels(open_store(path), step)
                left[:] = coming

    sys.addaudithook(replace_it)
    for skipped in range(4):
        for table in tables:
            store = open_store(path)
            left[:] = [table, *[None] * skipped]
            labels = store.items.labels["quality"]
            assert not left, "read without opening the table so often"
            assert labels.tolist() == open_store(path).items.labels["quality"].tolist()
"""


def test_a_table_replaced_at_any_step_of_its_reading_is_read_whole(stored, tmp_path):
    """The footer was read of one table and the pages of the next, which was called damage."""
    rows = (f"image_{item}.png,{item / 8}" for item in range(40))
    tables = [full_table(tmp_path / "a.csv", "mos", 1.5), write_table(tmp_path / "b.csv", "name,mos", *rows)]
    join_labels(stored, tables[1])
    code = [sys.executable, "-c", textwrap.dedent(REPLACED), str(stored.path), *map(str, tables)]
    subprocess.run(code, cwd=REPOSITORY, check=True)


def test_a_verify_beside_relabelling_raises_no_false_alarm(stored, tmp_path, workers):
    """Which table the manifest lists was looked at once, and the table that it had become was found damaged."""
    tables = [full_table(tmp_path / f"{value}.csv", "mos", value) for value in (1.5, 3.5)]
    verifier = workers.start("verify_until", stored.path, tmp_path / "stop", 1, 0.01)
    verifier.wait_for("verified once")
    for _ in range(8):
        for table in tables:
            join_labels(stored, table)
    (tmp_path / "stop").touch()
    outcome = verifier.ended()
    assert (outcome.code, outcome.message) == (0, "")
    assert outcome.result["damage"] == []
    assert outcome.result["runs"] > 1


JOINERS = """
    import os, sys
    from pathlib import Path
    from agiqa.store import open_store
    from agiqa.store.deriving.labelling import join_labels
    for table in sys.argv[2:]:
        if os.fork() == 0:
            join_labels(open_store(sys.argv[1]), Path(table))
            os._exit(0)
    print("started", flush=True)
    sys.exit(sum(os.wait()[1] for _ in sys.argv[2:]))
"""


def test_tables_joined_at_once_are_all_joined(stored, tmp_path):
    """Each process reads the table, changes its column and writes the whole: without the lock one would be lost."""
    columns = ["mos_quality", "mos_correspondence", "mos_authenticity"]
    tables = [full_table(tmp_path / f"{column}.csv", column, 2) for column in columns]
    code = [sys.executable, "-c", textwrap.dedent(JOINERS), str(stored.path), *map(str, tables)]
    with seal_lock(stored.layout):
        joiners = subprocess.Popen(code, cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert joiners.stdout is not None
        joiners.stdout.readline()
    joiners.communicate()
    assert joiners.returncode == 0
    labels = open_store(stored.path).items.labels
    assert set(labels) == {"quality", "correspondence", "authenticity"}
    assert all((mos == 2).all() for mos in labels.values())
    assert not stored.layout.locks.exists()


def test_the_table_between_two_entries_is_told_from_damage(stored, tmp_path):
    """Both entries name another table: neither the reader nor the next run takes what is there for sound."""
    manifest = json.loads(stored.layout.manifest.read_text())
    manifest["labels_next"] = {**manifest["labels"], "sha256": "0" * 64}
    stored.layout.manifest.write_text(json.dumps(manifest))
    copy = tmp_path / "copy.agiqa"
    shutil.copytree(stored.path, copy)
    assert len(open_store(copy).items) == 40
    raw = bytearray(stored.layout.items.read_bytes())
    raw[10] ^= 1
    stored.layout.items.write_bytes(raw)
    with pytest.raises(DamagedStore, match="not the item table"):
        _ = open_store(stored.path).items
    with pytest.raises(DamagedStore, match="not the item table"):
        join_labels(stored, full_table(tmp_path / "t.csv", "mos", 1))


def test_a_table_of_other_columns_and_names(stored, tmp_path):
    rows = ["x\\IMAGE_0.PNG;1;nobody", "data/image_1.png;2;sd", "image_2;3;sd", "image_2;3;sd"]
    table = write_table(tmp_path / "t.csv", "File Name;MOS;Model", *rows)
    said = []
    with said_to(said.append):
        report = join_labels(stored, table)
    items = open_store(stored.path).items
    found = dict(zip(items.names, items.labels["quality"], strict=True))
    assert [found[f"image_{k}.png"] for k in range(3)] == [1.0, 2.0, 3.0]
    assert (report.matched, report.unmatched_rows) == (3, ())
    assert "reading columns 'File Name' as name, 'MOS' as quality, 'Model' as generator" in said[1]
    assert any("first line 5" in line for line in said)
    assert any("differ in folder: 1" in line for line in said)


def test_the_columns_of_the_user_and_another_scale(stored, tmp_path):
    rows = (f"{name},2,{k}" for k, name in enumerate(stored.items.names, start=6))
    table = write_table(tmp_path / "t.csv", "name,mos,mean", *rows)
    with pytest.raises(DataError, match=r"values of mean are outside 0 to 5.*add --mos-range 0 100"):
        join_labels(stored, table, columns={"quality": "mean"})
    join_labels(stored, table, columns={"quality": "mean"}, mos_range=(0, 100))
    assert list(open_store(stored.path).items.labels["quality"][:3]) == [6.0, 7.0, 8.0]
