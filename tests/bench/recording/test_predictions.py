"""Tables of predictions: which item each row belongs to, with and without (in old tables) the column `item`."""

import numpy as np

from agiqa.bench.recording.predictions import read_predictions, write_predictions


def test_items_are_read_as_they_were_written_and_old_tables_have_none(tmp_path):
    names, prompts, mos = ["a.png", "a.png"], ["a cat", "a cat"], np.array([[1.0], [2.0]])
    write_predictions(tmp_path / "new.csv", ["quality"], names, prompts, mos, mos + 1, items=[3, 43])
    assert (tmp_path / "new.csv").read_text().splitlines()[:2] == [
        "name,prompt,item,mos,predicted",
        "a.png,a cat,3,1.0,2.0",
    ]
    write_predictions(tmp_path / "old.csv", ["quality"], names, prompts, mos, mos + 1)
    new, old = (read_predictions(tmp_path / f"{name}.csv", ["quality"], "quality") for name in ("new", "old"))
    assert (new.items, old.items) == ([3, 43], None)
    assert (new.names, new.mos.tolist()) == (old.names, old.mos.tolist()) == (names, [1.0, 2.0])
