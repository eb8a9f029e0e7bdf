"""Rows of a table, held to scipy and to `agiqa.heads.paired` over the predictions of made-up run folders."""

import csv

import numpy as np
import pytest
import yaml
from scipy import stats

from agiqa.bench.ablation.grids import read_grid
from agiqa.bench.ablation.rows import rows_parts, table_rows
from agiqa.bench.recording.predictions import write_predictions
from agiqa.bench.recording.rows import validation_summary
from agiqa.bench.recording.tables import as_markdown
from agiqa.errors import DataError
from agiqa.heads.evaluation.metrics import paired
from agiqa.heads.evaluation.significance import holm

ITEMS, FOLDS = 60, 3
PROMPTS = [f"prompt {k // 4}" for k in range(ITEMS)]
NAMES = [f"{k:02d}.png" for k in range(ITEMS)]
MOS = np.random.default_rng(0).uniform(0, 5, ITEMS)


def shown_as_text(rows):
    return as_markdown(rows_parts(rows))


@pytest.fixture
def plan(tmp_path):
    file = tmp_path / "grid.yaml"
    grid = {"grid": {"encoder": ["gru", "none"]}, "seeds": [0, 1], "protocols": [{"grouped": {"folds": FOLDS}}]}
    file.write_text(yaml.safe_dump(grid))
    return read_grid(file)


@pytest.fixture
def told(tmp_path, plan):
    """Run folders with predictions of every fold, in an order of their own, and their result lines."""
    lines = {}
    for number, run in enumerate(plan):
        noise = np.random.default_rng([run.train.seed, run.head.encoder == "none"]).normal(size=ITEMS)
        predicted = MOS + noise * (1 if run.head.encoder == "gru" else 2)
        folder = tmp_path / "runs" / run.name
        folder.mkdir(parents=True)
        with (folder / "predictions.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["name", "prompt", "split", "mos", "predicted"])
            table.writerow(["other.png", "else", "validation", 1.0, 2.0])
            for item in reversed(range(run.train.fold, ITEMS, FOLDS)):
                table.writerow([NAMES[item], PROMPTS[item], "test", MOS[item], predicted[item]])
        scores = {"srcc": 0.9 if run.head.encoder == "gru" else 0.5, "plcc": 0.4}
        shared = {"config": run.config, "seed": run.train.seed, "seconds": float(number)}
        lines[run.name] = {"name": run.name, **shared, "validation": scores, "test": scores, "predicted": predicted}
    return lines


def together(plan, lines, encoder):
    """(seeds, items): each item's prediction by the head that was tested on it."""
    found = np.empty((2, ITEMS))
    for run in plan:
        if run.head.encoder == encoder:
            fold = slice(run.train.fold, ITEMS, FOLDS)
            found[run.train.seed, fold] = lines[run.name]["predicted"][fold]
    return found


def test_folds_are_put_together_and_seeds_averaged(tmp_path, plan, told):
    rows = table_rows(plan, told, tmp_path)
    assert [(row["row"], row["protocol"], row["runs"], row["seeds"], row["failed"]) for row in rows] == [
        ("encoder=gru", "grouped", 6, 2, 0),
        ("encoder=none", "grouped", 6, 2, 0),
    ]
    for row in rows:
        predicted = together(plan, told, row["settings"]["encoder"])
        expected = [stats.spearmanr(one, MOS).statistic for one in predicted]
        assert row["test"]["srcc"] == pytest.approx(np.mean(expected))
        assert row["test"]["sd"]["srcc"] == pytest.approx(np.std(expected, ddof=1))
        assert row["test"]["n"] == ITEMS


def test_rows_are_compared_with_the_best_by_validation(tmp_path, plan, told):
    gru, none = table_rows(plan, told, tmp_path)
    assert gru["against"] is None
    against = none["against"]
    assert against["row"] == "encoder=gru"
    first, second = (together(plan, told, encoder) for encoder in ("none", "gru"))
    means = [np.mean([stats.pearsonr(one, MOS).statistic for one in each]) for each in (first, second)]
    assert against["difference"]["plcc"] == pytest.approx(means[0] - means[1])
    expected = paired(first, second, MOS, PROMPTS)
    assert {name: against[name] for name in expected} == expected
    assert against["p_holm"] == against["p"]


def write_published(tmp_path, run, told, items, predicted):
    """A run folder of the published split, and its result line."""
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    names, prompts = ([column[item] for item in items] for column in (NAMES, PROMPTS))
    write_predictions(folder / "predictions.csv", ["quality"], names, prompts, MOS[items, None], predicted[:, None])
    shared = {"config": run.config, "seed": run.train.seed, "seconds": 1.0}
    told[run.name] = {"name": run.name, **shared, "validation": {"srcc": 0.5}, "test": {"srcc": 0.5}}


@pytest.mark.parametrize("tested", ["known", "unknown"])
def test_the_published_split_is_compared_with_the_folds_on_the_same_items(tmp_path, told, tested):
    file, items = tmp_path / "both.yaml", np.arange(3, ITEMS, 2)
    protocols = ["published", {"grouped": {"folds": FOLDS}}]
    file.write_text(yaml.safe_dump({"grid": {"encoder": ["gru", "none"]}, "seeds": [0, 1], "protocols": protocols}))
    both, published = read_grid(file), {}
    for run in both:
        if run.protocol == "published":
            noise = np.random.default_rng(run.train.seed + 7).normal(size=len(items))
            published[run.head.encoder, run.train.seed] = MOS[items] + noise / 3
            write_published(tmp_path, run, told, items, published[run.head.encoder, run.train.seed])
    if tested == "unknown":  # the folds lack an item of the published test part
        for path in (tmp_path / "runs").glob("*grouped*/predictions.csv"):
            path.write_text(path.read_text().replace(NAMES[items[0]], "gone.png"))
    rows = {(row["row"], row["protocol"]): row for row in table_rows(both, told, tmp_path)}
    for encoder in ("gru", "none"):
        row = rows[f"encoder={encoder}", "published"]
        assert "beside_grouped" not in rows[f"encoder={encoder}", "grouped"]
        if tested == "unknown":
            assert "beside_grouped" not in row
            continue
        folds = together([run for run in both if run.protocol == "grouped"], told, encoder)[:, items]
        here = np.stack([published[encoder, seed] for seed in (0, 1)])
        means = [np.mean([stats.spearmanr(one, MOS[items]).statistic for one in each]) for each in (here, folds)]
        found = row["beside_grouped"]
        assert found["difference"]["srcc"] == pytest.approx(means[0] - means[1])
        expected = paired(here, folds, MOS[items], [PROMPTS[item] for item in items])
        assert {name: expected[name] for name in found} == found
        assert found["n"] == len(items)


def test_a_seed_with_a_failed_fold_does_not_count(tmp_path, plan, told):
    broken = next(run for run in plan if (run.head.encoder, run.train.seed, run.train.fold) == ("gru", 1, 2))
    told[broken.name] = {"error": "out of memory"}
    gru, none = table_rows(plan, told, tmp_path)
    assert (gru["failed"], gru["test"]["seeds"], none["test"]["seeds"]) == (1, 1, 2)
    predicted = together(plan, {**told, broken.name: {"predicted": np.zeros(ITEMS)}}, "gru")[0]
    assert "| encoder=gru | 1 of 2 |" in shown_as_text([gru])
    assert "| encoder=none | 2 |" in shown_as_text([none])
    assert "| encoder=gru | 2, one a part |" in shown_as_text([{**gru, "failed": 0}])
    assert gru["test"]["srcc"] == pytest.approx(stats.spearmanr(predicted, MOS).statistic)
    nothing = table_rows(plan, {}, tmp_path)
    assert [(row["test"], row["against"], row["failed"]) for row in nothing] == [(None, None, 6)] * 2
    assert "| encoder=gru | 0 | - | - | - | - |" in shown_as_text(nothing)


@pytest.mark.parametrize(("end", "said"), [("nan", "x.png has a MOS that is not finite"), ("", "could not convert")])
def test_predictions_that_are_no_numbers_are_named(tmp_path, plan, told, end, said):
    path = tmp_path / "runs" / plan[0].name / "predictions.csv"
    path.write_text(path.read_text() + f"x.png,prompt,test,2.5,{end}\n")
    with pytest.raises(DataError, match=rf"predictions\.csv cannot be read as predictions .*{said}"):
        table_rows(plan, told, tmp_path)


def test_predictions_that_are_gone_are_named(tmp_path, plan, told):
    (tmp_path / "runs" / plan[0].name / "predictions.csv").unlink()
    with pytest.raises(DataError, match=r"predictions\.csv"):
        table_rows(plan, told, tmp_path)


def baseline_of(out, name, predicted, **changes):
    """The line of a baseline, whose predictions are written in an order of their own."""
    order = np.random.default_rng(7).permutation(ITEMS)
    path = out / "baselines" / f"{name}.csv"
    names, prompts = ([column[k] for k in order] for column in (NAMES, PROMPTS))
    write_predictions(path, ["quality"], names, prompts, MOS[order][:, None], predicted[order][:, None])
    shared = {"kind": "baseline", "row": name, "protocol": "grouped", "label": "quality"}
    shared |= {"store_name": "", "validation": None, "against": None}
    test = {"srcc": 0.1, "plcc": 0.1, "krcc": 0.1, "rmse": 1.0, "ci": {}}
    return {**shared, "test": test, "predictions": f"baselines/{name}.csv", **changes}


def test_baselines_are_compared_with_the_best_head_in_one_family_with_the_others(tmp_path, plan, told):
    random = np.random.default_rng(11)
    guesses = {"near": MOS + random.normal(size=ITEMS) * 1.1, "far": random.normal(size=ITEMS), "flat": MOS * 0.5}
    lines = [baseline_of(tmp_path, name, guess) for name, guess in guesses.items()]
    nothing = {"srcc": None, "plcc": None, "krcc": None, "rmse": 1.0}
    lines[2]["test"] = nothing
    lost = {"kind": "baseline", "row": "lost", "protocol": "grouped", "label": "quality", "left_out": "no words"}
    gru, none, near, far, flat, last = table_rows(plan, told, tmp_path, [*lines, lost])
    assert (gru["against"], last) == (None, lost)
    best = together(plan, told, "gru")
    heads = {"none": together(plan, told, "none"), **{name: guess[None] for name, guess in guesses.items()}}
    order = sorted(range(ITEMS), key=lambda k: (NAMES[k], PROMPTS[k]))
    assert order == list(range(ITEMS))
    expected = {
        name: paired(each, best, MOS, PROMPTS, seedless=(len(each) == 1, False)) for name, each in heads.items()
    }
    rows = {"none": none, "near": near, "far": far}
    for name, row in rows.items():
        against = row["against"]
        assert against["row"] == "encoder=gru"
        for metric in ("srcc", "plcc", "krcc", "rmse"):
            assert against["difference"][metric] == pytest.approx(expected[name]["difference"][metric])
            assert against["p"][metric] == expected[name]["p"][metric]
            assert against["ci"][metric] == pytest.approx(expected[name]["ci"][metric])
    adjusted = holm([expected[name]["p"]["srcc"] for name in rows])
    assert [row["against"]["p_holm"]["srcc"] for row in rows.values()] == adjusted
    adjusted = holm([expected[name]["p"]["rmse"] for name in (*rows, "flat")])
    assert [row["against"]["p_holm"]["rmse"] for row in (*rows.values(), flat)] == adjusted
    for what in ("difference", "ci", "p", "p_holm"):
        assert flat["against"][what]["srcc"] is None
    (shown,) = [line for line in shown_as_text([gru, far]).splitlines() if line.startswith("| far ")]
    difference, p = far["against"]["difference"]["srcc"], far["against"]["p_holm"]["srcc"]
    assert shown.endswith(f"| {difference:+.4f} ({p:.3g}) |")


def test_a_baseline_of_other_items_is_compared_with_nothing(tmp_path, plan, told):
    other = baseline_of(tmp_path, "elsewhere", MOS, protocol="published")
    path = tmp_path / "baselines" / "short.csv"
    line = baseline_of(tmp_path, "short", MOS)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    rows = table_rows(plan, told, tmp_path, [other, line])
    assert [row["against"] for row in rows[2:]] == [None, None]


def test_the_table_has_intervals_differences_and_what_is_left_out(tmp_path, plan, told):
    rows = table_rows(plan, told, tmp_path)
    baseline = {**rows[1], "kind": "baseline", "row": "generator", "against": None, "validation": None}
    lost = {"kind": "baseline", "row": "rating word", "protocol": "grouped", "label": "quality", "left_out": "no words"}
    lines = shown_as_text([baseline, lost, *rows]).splitlines()
    assert lines[0].startswith("| run | seeds | validation SRCC | test SRCC | test PLCC | SRCC against")
    low, high = rows[0]["test"]["ci"]["srcc"]
    assert lines[2].startswith(
        f"| encoder=gru | 2 | 0.9000 ± 0.0000 | {rows[0]['test']['srcc']:.4f} [{low:.3f}, {high:.3f}]"
    )
    assert [line.split(" |")[0] for line in lines[2:5]] == ["| encoder=gru", "| encoder=none", "| generator"]
    assert lines[-1] == "rating word (grouped, quality): no words"


def test_settings_of_a_split_that_differ_are_rows_of_their_own(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"base": {"split": "grouped"}, "grid": {"test_share": [0.2, 0.4]}}))
    rows = table_rows(read_grid(file), {}, tmp_path)
    assert [row["row"] for row in rows] == ["test_share=0.2", "test_share=0.4"]


def test_rows_of_other_mos_are_not_compared(tmp_path, plan, told):
    """As two stores of the same images may have."""
    for run in plan:
        if run.head.encoder == "none":
            path = tmp_path / "runs" / run.name / "predictions.csv"
            with path.open(newline="") as file:
                head, *table = list(csv.reader(file))
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([head, *([*row[:3], float(row[3]) / 2, row[4]] for row in table)])
    rows = table_rows(plan, told, tmp_path)
    assert [row["against"] for row in rows] == [None, None]


def test_the_slope_of_a_calibrated_head_is_that_before_its_line(tmp_path, plan, told):
    """On validation items it is 1 after the line, whatever the head does."""
    for run in plan:
        line = told[run.name]
        line["validation"] = {**line["validation"], "slope": 1.0}
        if run.head.encoder == "gru":
            fitted = run.train.fold > 0
            line["calibration"] = {"slope": 1.5 if fitted else None, "intercept": 0.1 if fitted else None, "n": 40}
    gru, none = table_rows(plan, told, tmp_path)
    assert gru["validation"]["slope"][0] == pytest.approx((1.0 + 1.5 * (FOLDS - 1)) / FOLDS)
    assert (gru["calibrated"], none["calibrated"]) == (2 * (FOLDS - 1), 0)
    assert none["validation"]["slope"] == [1.0, 0.0]


def test_each_label_of_a_calibrated_head_has_the_slope_of_its_own_line():
    line = {
        "config": {"label": "quality+correspondence"},
        "validation": {"quality": {"srcc": 0.5, "slope": 1.0}, "correspondence": {"srcc": 0.4, "slope": 1.0}},
        "calibration": {"quality": {"slope": 0.7}, "correspondence": {"slope": None, "not_fitted": "too few"}},
    }
    assert [validation_summary([line], label)["slope"][0] for label in ("quality", "correspondence")] == [0.7, 1.0]


def test_an_item_that_is_tested_twice_is_refused(tmp_path, plan, told):
    first, second = (run for run in plan if (run.head.encoder, run.train.seed) == ("gru", 0) and run.train.fold < 2)
    content = (tmp_path / "runs" / first.name / "predictions.csv").read_text()
    (tmp_path / "runs" / second.name / "predictions.csv").write_text(content)
    with pytest.raises(DataError, match="tested an item twice"):
        table_rows(plan, told, tmp_path)


def test_a_name_and_prompt_that_a_store_holds_twice_are_two_items(tmp_path, plan, told):
    """Each run tests its own of them; without numbers it would be one item that was tested twice."""
    for number, run in enumerate(plan):
        path = tmp_path / "runs" / run.name / "predictions.csv"
        head, *rows = path.read_text().splitlines()
        before, after = head.split(",mos")
        numbered = [f"{before},item,mos{after}"]
        for k, row in enumerate([*rows, f"twin.png,prompt,test,{2.0 + run.train.fold},3.0"]):
            about, mos, predicted = row.rsplit(",", 2)
            numbered.append(f"{about},{10 * number + k},{mos},{predicted}")
        path.write_text("\n".join(numbered) + "\n")
    rows = table_rows(plan, told, tmp_path)
    folds = len({run.train.fold for run in plan})
    assert [row["test"]["n"] for row in rows] == [ITEMS + folds] * len(rows)
