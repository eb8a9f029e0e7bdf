"""The store's benchmark: every format gives back the same bits, and a tiny run makes lines and tables of their form."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from agiqa.bench.measurements import codecs
from agiqa.bench.measurements.peers import PEERS, Source, save_source, touch
from agiqa.bench.measurements.store import (
    COLUMNS,
    GOALS,
    first_seen,
    main,
    some_rows,
    source_from_store,
    synthetic_source,
    tables,
)
from agiqa.bench.recording.tables import read_results
from agiqa.store import open_store

LOG_LINES = Path(__file__).resolve().parents[3] / "bench" / "results" / "store"
LENGTHS = np.array([7, 1, 0, 60, 33, 128, 5])


@pytest.fixture(scope="module")
def every_bit_pattern(tmp_path_factory) -> tuple[Source, np.ndarray]:
    """A source with all finite bfloat16 bits in some order, and its rows."""
    bits = np.random.default_rng(0).permutation(np.arange(1 << 16, dtype=np.uint16))
    bits = bits[(bits & 0x7F80) != 0x7F80]
    rows = np.resize(bits, (LENGTHS.sum(), 300))
    folder = tmp_path_factory.mktemp("source") / "rows"
    return save_source(folder, LENGTHS, iter([rows[:50], rows[50:]]), width=300, logical_dtype="bfloat16"), rows


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_gives_back_the_same_bits(name, every_bit_pattern, tmp_path):
    for module in PEERS[name].modules:
        pytest.importorskip(module.split(".")[0], reason=f"{name} is an optional extra: pip install 'agiqa[hdf5]'")
    source, rows = every_bit_pattern
    PEERS[name].write(source, tmp_path)
    ends = np.cumsum(LENGTHS)
    order = [3, 0, 6, 2, 3, 5, 1, 4]
    with PEERS[name].open(tmp_path) as read:
        found = read(order)
        for item, block in zip(order, found, strict=True):
            assert block.dtype == np.uint16
            assert np.array_equal(block, rows[ends[item] - LENGTHS[item] : ends[item]]), item
    assert sum(path.stat().st_size for path in PEERS[name].row_files(tmp_path)) > rows.nbytes / 2


def test_touch_is_the_sum_of_little_endian_words_and_the_bytes_left_over():
    rows = np.random.default_rng(0).integers(0, 1 << 16, (3, 7), np.uint16)
    data = rows.tobytes()
    words = [int.from_bytes(data[start : start + 8], "little") for start in range(0, 40, 8)]
    assert touch(rows) == (sum(words) + sum(data[40:])) % 2**64
    assert touch(rows[:0]) == 0


def test_synthetic_rows_are_heavy_tailed_and_the_same_for_the_same_seed(tmp_path):
    one = synthetic_source(tmp_path / "one", width=256, rows=3000)
    other = synthetic_source(tmp_path / "other", width=256, rows=3000)
    rows = one.rows(0, int(one.offsets[-1]))
    assert np.array_equal(rows, other.rows(0, len(rows)))
    assert abs(len(rows) - 3000) < 500
    values = (rows.astype(np.uint32) << 16).view(np.float32)
    deviation = np.sort(values.std(axis=0))
    assert deviation[-2] > 8 * np.median(deviation)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Lines of a run on synthetic rows and one on a store's, what the runs printed, and the file of the lines."""
    work = tmp_path_factory.mktemp("bench")
    PEERS["agiqa"].write(synthetic_source(work / "base", width=64, rows=3000), work)
    out = work / "lines.jsonl"
    common = ["--out", out, "--repeats", "1", "--work", work]
    runs = [
        ["--synthetic", "64", "--rows", "2000", "--peers", "agiqa", "--items", "40", "--fill-units", "1", *common],
        [
            "--from",
            work / "rows.agiqa",
            "--rows",
            "1500",
            "--distinct",
            "--peers",
            "memmap",
            "--cold",
            "--extras",
            "none",
            *common,
        ],
    ]
    printed = [bench(*arguments).stdout for arguments in runs]
    return [json.loads(line) for line in out.read_text().splitlines()], printed, out


def bench(*arguments, code=0):
    """The command, in this process; what it measures runs in processes of its own."""
    outcome = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert outcome.exit_code == code, outcome.output
    return outcome


def test_a_run_has_a_line_per_peer_and_extra(tiny_run):
    lines, _, out = tiny_run
    assert [line["name"] for line in lines] == ["agiqa", "plan", "open", "fill", "epoch", "memmap"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["base", "lines.jsonl", "rows.agiqa"]
    for line in lines:
        assert line["versions"]["zarr"]
        assert line["cpus"] >= 1
        assert "commit" in line
        assert line["runs"]
    for line in (line for line in lines if line["stage"] == "peers"):
        assert set(COLUMNS) <= set(line["measured"])
        assert all(line["measured"][key] > 0 for key in ("ratio", "write_mb_s", "sequential_mb_s", "random_mb_s"))
    ratios = {line["name"]: line["measured"]["ratio"] for line in lines if line["stage"] == "peers"}
    assert ratios["memmap"] == pytest.approx(1, abs=0.01)
    assert 0.4 < ratios["agiqa"] < 0.9


def test_lines_say_what_they_were_measured_on(tiny_run):
    lines, _, _ = tiny_run
    synthetic, stored = lines[0]["config"], lines[-1]["config"]
    assert (synthetic["data"], synthetic["width"], synthetic["page_cache"]) == ("synthetic", 64, "warm")
    assert (stored["data"], stored["width"], stored["page_cache"]) == ("rows.agiqa", 64, "cold")
    assert 1000 < stored["rows"] <= 1500
    assert stored["repeated_rows"] == 0


def test_whole_items_of_a_store_become_the_source(tiny_run, tmp_path):
    store = open_store(tiny_run[2].parent / "rows.agiqa")
    source = source_from_store(tmp_path / "source", store, rows=1500)
    assert np.diff(source.offsets).tolist() == store.n_tokens[: len(source.offsets) - 1].tolist()
    assert np.array_equal(source.item(1), store.read([1]).rows)


def test_repeated_rows_are_counted_and_left_out(tmp_path):
    rows = np.arange(60, dtype=np.uint16).reshape(10, 6)
    rows[[3, 7, 9]] = rows[[0, 6, 0]]
    lengths = np.array([4, 0, 5, 1])
    source = save_source(tmp_path / "source", lengths, iter([rows]), width=6, logical_dtype="bfloat16")
    fresh = first_seen(source)
    assert np.flatnonzero(~fresh).tolist() == [3, 7, 9]
    distinct = some_rows(tmp_path / "distinct", source, fresh)
    assert distinct.offsets.tolist() == [0, 3, 3, 7, 7]
    assert np.array_equal(distinct.rows(0, 7), np.delete(rows, [3, 7, 9], axis=0))


def test_a_filled_unit_is_part_of_the_peak(tiny_run):
    fill = next(line for line in tiny_run[0] if line["name"] == "fill")
    assert fill["measured"]["peak_mb"] > 67


def test_tables_are_computed_from_the_lines(tiny_run):
    lines, printed, out = tiny_run
    again = bench("--table", out).stdout.strip()
    assert again == tables(lines)
    assert f"| memmap | {lines[-1]['measured']['ratio']:.3f} |" in again
    assert f"| memmap | {lines[-1]['measured']['ratio']:.3f} |" in printed[1]
    for goal in GOALS:
        assert (f"| {goal.text} | " in again) == (goal.key != "ratio"), goal  # made-up rows say nothing of that goal


def test_the_goal_of_the_ratio_is_for_a_models_own_bfloat16():
    config = {"data": "s.agiqa", "logical_dtype": "bfloat16"}
    measured = {"write_mb_s": 400, "sequential_mb_s": 1000, **dict.fromkeys(COLUMNS[3:], 1)}
    lines = [
        {"stage": "peers", "name": "agiqa", "config": config, "measured": {"ratio": 0.7, **measured}},
        {"stage": "peers", "name": "h5py-gzip", "config": config, "measured": {"ratio": 0.5, **measured}},
    ]
    found = tables(lines).splitlines()
    assert [row for row in found if row.startswith("| bytes / raw of real bf16")] == [
        "| bytes / raw of real bf16 | data s.agiqa | at most 0.67 | 0.700 | no |"
    ]
    assert "| write, MB/s | data s.agiqa | at least 500 | 400 | no |" in found
    assert "| sequential read, MB/s | data s.agiqa | at least 1000 | 1,000 | yes |" in found


def test_an_unknown_peer_is_refused_with_the_nearest_name():
    assert "Did you mean 'memmap'?" in bench("--peers", "memap", code=1).stderr


def test_rows_too_few_for_one_item_are_refused(tiny_run):
    assert "fits in 3 rows" in bench("--from", tiny_run[2].parent / "rows.agiqa", "--rows", "3", code=1).stderr


def test_every_store_table_in_the_log_is_computed_from_the_lines():
    log = (LOG_LINES.parents[1] / "LOG.md").read_text()
    for path in LOG_LINES.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row for row in tables(lines).splitlines() if row.startswith("| ")]
        assert rows
        assert [row for row in rows if row not in log] == []


def test_the_codec_table_of_the_log_comes_from_its_lines_and_a_tiny_run_has_its_form(tmp_path):
    log = (LOG_LINES.parents[1] / "LOG.md").read_text()
    path = LOG_LINES.parent / "codecs" / "agiqa-3k.jsonl"
    known = [row for row in codecs.tables(read_results(path)).splitlines() if row]
    assert [row for row in known if row not in log] == []
    PEERS["agiqa"].write(synthetic_source(tmp_path / "base", width=64, rows=3000), tmp_path)
    outcome = CliRunner().invoke(codecs.main, [str(tmp_path / "rows.agiqa")], catch_exceptions=False)
    assert [row.split("|")[1] for row in outcome.stdout.splitlines() if row] == [row.split("|")[1] for row in known]
    again = CliRunner().invoke(codecs.main, ["--table", str(path)])
    assert again.stdout.strip() == codecs.tables(read_results(path))


def test_codecs_need_a_store_or_a_table():
    outcome = CliRunner().invoke(codecs.main, [])
    assert (outcome.exit_code, "Give a STORE" in outcome.stderr) == (2, True)
