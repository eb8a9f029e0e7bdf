"""Files of result lines: the last line of a name counts, and what is refused is left as it was."""

import json

import pytest

from agiqa.bench.recording.result_folders import LineFile, warning_lines
from agiqa.errors import DataError


def refuse_odd(line, where):
    if line.get("value", 0) % 2:
        message = f"{where}: {line['value']} is odd."
        raise DataError(message)


def opened(path):
    return LineFile(path, kind="a test", keys={"store": str}, kept="all", planned={"one", "two"}, check=refuse_odd)


def test_a_result_replaces_an_error_and_both_lines_stay(tmp_path):
    path = tmp_path / "results.jsonl"
    lines = opened(path)
    assert not path.exists()
    for facts, done in (({"error": "broken\u2028here"}, False), ({"value": 2}, True)):
        lines.append({"name": "one", "store": "s", **facts})
        for now in (lines, opened(path)):
            assert now.is_done("one") == done
            assert now.lines == {"one": {"name": "one", "store": "s", **facts}}
    assert len(path.read_bytes().split(b"\n")) == 3
    assert not lines.is_done("two")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"name": "two", "store": "s", "value": 3}, "line 2: 3 is odd"),
        ({"name": "two"}, "line 2 is no result line of a test"),
        ({"name": ["two"], "store": "s"}, "line 2 is no result line of a test"),
        ({"name": "two", "store": None}, "line 2 is no result line of a test"),
        ("two", "line 2 is no result line of a test"),
    ],
)
def test_a_file_that_is_refused_keeps_its_torn_line_too(tmp_path, bad, said):
    path = tmp_path / "results.jsonl"
    opened(path).append({"name": "one", "store": "s"})
    with path.open("a") as file:
        file.write(json.dumps(bad) + '\n{"name": "thr')
    before = path.read_bytes()
    with pytest.raises(DataError) as caught:
        opened(path)
    assert f"{path}, {said}" in str(caught.value)
    assert path.read_bytes() == before


def test_each_kind_of_warning_is_told_once_with_the_heads_that_have_it():
    lines = [
        {"name": f"head-{k}", "warnings": [f"Only {k} items of 1,000.5.", "All alike."][: 1 + k % 2]} for k in range(4)
    ]
    lines.append({"name": "failed", "error": "broken"})
    assert warning_lines(lines) == [
        "warning: 4 of 4 heads (head-0, ...): Only 0 items of 1,000.5.",
        "warning: 2 of 4 heads (head-1, ...): All alike.",
    ]
    assert warning_lines(lines, printed=["warning: main: Only 80 items of 20."])[0].endswith(
        "(head-1, ...): All alike."
    )
