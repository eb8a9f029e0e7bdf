"""Scores by generator, by style of the prompt and by a table's column, each against scipy on the images of a group."""

import numpy as np
import pytest
from scipy import stats

from agiqa.bench.report.group_tables import group_tables, read_groupings
from agiqa.bench.report.reading import read_all
from agiqa.bench.report.sections import ReportSettings, compose
from agiqa.errors import DataError
from tests.bench.report import made
from tests.bench.report.made import cells_of


@pytest.fixture
def found(results):
    (one,) = read_all([results.ablation])
    return one


def by_seed(folder, row):
    """True and predicted quality of every image for each seed of a row, from its predictions of all folds."""
    seeds = {}
    for line in made.read_lines(folder / "results.jsonl"):
        if (line["row"], line["protocol"]) == (row, "grouped"):
            path = folder / "runs" / line["name"] / "predictions.csv"
            pairs = made.predictions_of(path, "quality").items()
            seeds.setdefault(line["seed"], {}).update({name: pair for (name, _), pair in pairs})
    return seeds


def test_scores_of_a_generator_are_means_over_seeds_on_its_images(results, found):
    table = group_tables(found, "quality", "grouped", {})["generator"]
    items = results.stores["ours"].items
    best = found.of("quality", "grouped")[0]
    seeds = by_seed(results.ablation, best.row)
    rows = cells_of(table)
    assert [row["group"] for row in rows] == ["generator 0", "generator 1", "generator 2"]
    for row in rows:
        names = [n for n, g in zip(items.names, items.generators, strict=True) if g == row["group"]]
        pairs = [np.array([seed[name] for name in names]).T for seed in seeds.values()]
        assert int(row["images"]) == len(names)
        assert float(row["srcc_1"]) == pytest.approx(np.mean([stats.spearmanr(*pair).statistic for pair in pairs]))
        assert float(row["plcc_1"]) == pytest.approx(np.mean([stats.pearsonr(*pair).statistic for pair in pairs]))
        assert float(row["error"]) == pytest.approx(np.mean([pair[1].mean() - pair[0].mean() for pair in pairs]))
        assert float(row["srcc_1_low"]) < float(row["srcc_1"]) < float(row["srcc_1_high"])


def test_the_columns_of_a_table_and_the_ends_of_prompts_are_groups(results, found, tmp_path):
    items = results.stores["ours"].items
    styles = ["anime" if k % 2 else "" for k in range(len(items))]
    lines = [f"{name},{style},{k / 7}" for k, (name, style) in enumerate(zip(items.names, styles, strict=True))]
    (tmp_path / "t.csv").write_text("\n".join(["filename,style,beauty", *lines]))
    groupings = read_groupings(tmp_path / "t.csv")
    assert list(groupings) == ["style"]
    tables = group_tables(found, "quality", "grouped", groupings)
    assert [table.title for table in tables.values()] == [
        "By generator, quality, grouped by prompt",
        "By style, quality, grouped by prompt",
    ]
    rows = cells_of(tables["style"])
    assert [(row["group"], row["images"]) for row in rows] == [("anime", "30"), ("none", "30")]


def test_prompts_that_end_with_a_style_are_grouped_by_it(results, copy):
    folder = copy(results.ablation)
    for path in (folder / "runs").glob("*/predictions.csv"):
        text = path.read_text()
        for k in range(0, 15, 2):
            text = text.replace(f"a | picture of ${k}$ & more", f'"a picture of {k}, anime style"')
        path.write_text(text)
    (one,) = read_all([folder])
    table = group_tables(one, "quality", "grouped", {})["style of the prompt"]
    assert [(row["group"], row["images"]) for row in cells_of(table)] == [("anime style", "28"), ("none", "32")]


def test_a_table_that_groups_nothing_is_told(results, found, tmp_path):
    (tmp_path / "numbers.csv").write_text("name,beauty\na.png,1\nb.png,2\n")
    with pytest.raises(DataError, match="has no text column"):
        read_groupings(tmp_path / "numbers.csv")
    (tmp_path / "named.csv").write_text("bild,style\na.png,anime\nb.png,baroque\n")
    with pytest.raises(DataError, match="--columns name=COLUMN"):
        read_groupings(tmp_path / "named.csv")
    assert read_groupings(tmp_path / "named.csv", {"name": "bild"}) == {"style": {"a.png": "anime", "b.png": "baroque"}}
    (tmp_path / "others.csv").write_text("name,style\nx.png,anime\ny.png,baroque\n")
    content = compose([found], ReportSettings(groups=tmp_path / "others.csv"))
    tables = [block.title for section in content.sections if section.name == "groups" for block in section.blocks]
    assert tables
    assert all("by style" not in title.lower() for title in tables)
    assert any("others.csv: none of its images" in problem for problem in content.problems)


def test_groups_of_few_images_have_no_scores(found):
    for table in group_tables(found, "quality", "published", {}).values():
        assert [row["srcc_1"] for row in cells_of(table)] == [""] * 3
        assert "SRCC" not in table.markdown().split("---")[0]
