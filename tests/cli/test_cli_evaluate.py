"""`agiqa evaluate` after a mapping: which one a run has, and what is said where there is none."""

import json

import pytest

from tests.cli.conftest import SMALL_HEAD


def test_a_run_with_too_few_validation_items_says_why_there_is_no_mapping(agiqa, example):
    scores = example.printed["evaluate"]
    assert {*scores} >= {"n", "srcc", "plcc", "krcc", "rmse", "ci"}
    assert "plcc_logistic4" not in scores
    assert "validation items, and there are" in scores["logistic"]["logistic4"]["absent"]
    assert scores["logistic"] == json.loads((example.run / "metrics.json").read_text())["logistic"]
    shown = agiqa("evaluate", example.run, example.store).out.splitlines()
    assert [line.split()[0] for line in shown] == ["test", "logistic", "intervals"]
    assert "needs 9 validation items or more" in shown[2]
    assert "none: a line needs 10 validation items" in shown[1]


def test_a_mapping_of_the_validation_part_is_applied_to_the_test_part(agiqa, example, tmp_path):
    run = tmp_path / "run"
    trained = agiqa(
        "train", example.store, run, *SMALL_HEAD, "--validation", 0.7, "--epochs", 25, "--lr", 0.01, "--json"
    ).json
    fit = trained["logistic"]["linear"]
    assert (fit["fitted_on"], fit["n"], len(fit["parameters"])) == ("validation", trained["validation"]["n"], 2)
    scores = agiqa("evaluate", run, example.store, "--json").json
    for name in ("plcc_linear", "rmse_linear"):
        assert scores[name] == pytest.approx(trained["test"][name], abs=1e-6)
    assert (len(scores["ci"]["plcc_linear"]), scores["ci"]["rmse_linear"]) == (2, None)  # RMSE takes 20 prompts
    shown = agiqa("evaluate", run, example.store).out.splitlines()
    assert f"PLCC {scores['plcc_linear']:.4f} [" in shown[1]
    assert shown[2].startswith("logistic4  none: a curve needs 100 validation items")
    inside = agiqa("evaluate", run, example.store, "--on", "validation").out.splitlines()
    assert [line.split(maxsplit=1)[0] for line in inside] == ["validation", "logistic", "intervals"]
    assert "which the mappings were fitted to" in inside[1]
