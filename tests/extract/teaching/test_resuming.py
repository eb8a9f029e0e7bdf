"""Runs of a teacher that stop and go on: budgets, journals of earlier runs, estimates, and the key."""

from dataclasses import replace

import pytest

from agiqa.errors import BusyStore, ConfigError, DataError, RemoteError, SettingsConflict
from agiqa.extract import load_data_set
from agiqa.extract.teaching.answers import KEYS
from agiqa.extract.teaching.job import Splits, TeachingJob, TeachingSettings
from agiqa.extract.teaching.questions import QuestionSettings
from agiqa.extract.teaching.teaching import run_teaching
from tests.extract.small_sets import write_set
from tests.extract.teaching.providers import (
    FALLBACK,
    KEY,
    MODEL,
    bad_image,
    explains,
    loses,
    refuses,
    says,
    slow,
    wrong_key,
)
from tests.extract.teaching.runs import (
    ITEMS,
    PRICE,
    QUALITY,
    QUICK,
    SETTINGS,
    lines_of,
    name_of,
    prompt_of,
    run,
    teacher,
)


def test_the_budget_is_never_exceeded_and_a_larger_one_goes_on(server, data, tmp_path):
    out = tmp_path / "t.jsonl"
    result = run(data, out, teacher(server, price=PRICE), budget=0.7).as_dict()
    assert result["stopped"] == "budget"
    assert 0 < result["explained"] < ITEMS
    assert result["explained"] == len(server.requests)  # also what was in flight is there
    most = (100 * 1.5 * 1000 + 1000 * 100) / 1e6
    assert 0.7 - most < result["counted_usd"] <= 0.7
    more = run(data, out, teacher(server, price=PRICE), budget=0.7).as_dict()
    assert (more["asked"], more["stopped"]) == (0, "budget")
    rest = run(data, out, teacher(server, price=PRICE), budget=100.0).as_dict()
    assert (rest["explained"], rest["stopped"], len(server.requests)) == (ITEMS, None, ITEMS)


@pytest.mark.parametrize("behaviour", [says("no JSON"), refuses("refusal")], ids=["broken", "refused"])
def test_items_that_the_budget_left_half_asked_are_asked_again(openai, data, tmp_path, behaviour):
    """Not kept as failed or refused: the user pays more to have them answered."""
    openai.always(behaviour)
    out, models = tmp_path / "t.jsonl", (teacher(openai, price=PRICE), teacher(openai, FALLBACK, price=PRICE))
    first = run(data, out, *models, budget=0.25, jobs=1).as_dict()
    (line,) = lines_of(out).values()
    assert line["status"] == "open"
    assert (first["stopped"], first["failed"], first["refused"]) == ("budget", 0, 0)
    assert (first["items"], first["missing"]) == (ITEMS, ITEMS)
    assert 0 < first["counted_usd"] == line["counted_usd"] < 0.25
    openai.calm()
    second = run(data, out, *models, budget=100.0).as_dict()
    assert (second["asked"], second["explained"]) == (ITEMS, ITEMS)
    assert second["counted_usd"] == pytest.approx(first["counted_usd"] + second["cost_usd"])


def test_an_answer_that_was_paid_for_before_an_error_is_counted(openai, data, tmp_path):
    openai.script(says("no JSON"), wrong_key, about=prompt_of(0))
    out = tmp_path / "t.jsonl"
    with pytest.raises(RemoteError, match="Check the key"):
        run(data, out, teacher(openai, price=PRICE), jobs=1)
    (line,) = lines_of(out).values()
    assert (line["status"], line["attempts"]) == ("open", 1)
    result = run(data, out, teacher(openai, price=PRICE)).as_dict()
    assert (result["asked"], result["explained"]) == (ITEMS, ITEMS)
    assert result["counted_usd"] == pytest.approx(line["cost_usd"] + result["cost_usd"])


def test_answers_that_were_cut_off_may_be_longer_in_the_next_run(openai, data, tmp_path):
    """As the reason of the failure says."""
    openai.always(says("{", cut=True), about=prompt_of(1))
    out = tmp_path / "t.jsonl"
    run(data, out, teacher(openai))
    assert "--max-new-tokens" in lines_of(out)[name_of(1)]["reason"]
    openai.calm()
    longer = replace(QUALITY, max_tokens=200)
    assert run(data, out, teacher(openai), question=longer, retry_failed=True).as_dict()["explained"] == ITEMS


def test_items_that_are_rejected_again_hold_up_no_others(openai, data, tmp_path):
    out = tmp_path / "t.jsonl"
    openai.script(explains, about=prompt_of(11))
    openai.always(bad_image)
    run(replace(data, items=data.items[::-1]), out, teacher(openai), jobs=1)
    openai.calm()
    openai.script(*[bad_image] * 10)
    result = run(data, out, teacher(openai), retry_failed=True, jobs=1).as_dict()
    assert (result["failed"], result["explained"]) == (10, 2)


def test_money_for_lines_that_were_replaced_stays_counted(openai, data, tmp_path):
    openai.always(says("no JSON"), about=prompt_of(1))
    out = tmp_path / "t.jsonl"
    first = run(data, out, teacher(openai, price=PRICE)).as_dict()
    openai.calm()
    again = run(data, out, teacher(openai, price=PRICE), retry_failed=True).as_dict()
    assert (again["asked"], again["explained"]) == (1, ITEMS)
    assert again["counted_usd"] == pytest.approx(first["counted_usd"] + again["cost_usd"])


def test_a_lost_answer_counts_as_much_as_it_can_cost(openai, data, tmp_path):
    """Its own cost is unknown: whether the provider bills it, nobody tells."""
    openai.script(loses(), about=prompt_of(1))
    out = tmp_path / "t.jsonl"
    run(data, out, teacher(openai, price=PRICE))
    line = lines_of(out)[name_of(1)]
    assert line["lost"] == 1
    assert line["counted_usd"] > line["cost_usd"] + 100 * PRICE.output / 1e6


def test_lost_answers_do_not_exceed_the_budget(openai, data, tmp_path):
    """Whether the provider bills them, nobody tells: each one counts as much as it can cost."""
    openai.always(loses())
    out = tmp_path / "t.jsonl"
    client = replace(QUICK, tries=8)
    result = run(data, out, teacher(openai, price=PRICE), budget=0.5, client=client, jobs=1).as_dict()
    (line,) = lines_of(out).values()
    assert (result["stopped"], result["missing"], line["status"]) == ("budget", ITEMS, "open")
    assert line["lost"] == len(openai.requests) == 2  # a third one could cost more than is left
    assert 0.3 < result["counted_usd"] <= 0.5
    openai.calm()
    assert run(data, out, teacher(openai, price=PRICE), budget=100.0).as_dict()["explained"] == ITEMS


def test_a_budget_needs_prices(openai, data, tmp_path):
    with pytest.raises(ConfigError, match=r"price of teacher-1.*--prices: `servers: \[\{url: "):
        run(data, tmp_path / "t.jsonl", teacher(openai), budget=1.0)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_cost_is_null(openai, data, tmp_path):
    result = run(data, tmp_path / "t.jsonl", teacher(openai)).as_dict()
    assert (result["cost_usd"], result["counted_usd"]) == (None, None)
    assert {line["cost_usd"] for line in lines_of(tmp_path / "t.jsonl").values()} == {None}


def test_a_second_run_sends_nothing(server, data, tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    run(data, out, teacher(server))
    before = out.read_bytes()
    result = run(data, out, teacher(server)).as_dict()
    assert (result["asked"], result["explained"], len(server.requests)) == (0, ITEMS, ITEMS)
    assert out.read_bytes() == before
    assert f"resume: {ITEMS} of {ITEMS} items are done already" in capsys.readouterr().err


def test_a_torn_line_is_asked_about_again(openai, data, tmp_path):
    out = tmp_path / "t.jsonl"
    run(data, out, teacher(openai))
    whole = out.read_bytes()
    out.write_bytes(whole[:-20])
    assert run(data, out, teacher(openai)).as_dict()["asked"] == 1
    assert len(lines_of(out)) == ITEMS


@pytest.mark.parametrize(
    ("changes", "model", "said"),
    [
        ({"question": replace(QUALITY, blind=True)}, MODEL, "blind was False, and is True now"),
        ({"question": replace(QUALITY, temperature=0.5)}, MODEL, "temperature was None"),
        ({}, FALLBACK, "teacher.model was 'teacher-1'"),
    ],
)
def test_a_journal_of_other_settings_is_refused(openai, data, tmp_path, changes, model, said):
    out = tmp_path / "t.jsonl"
    run(data, out, teacher(openai))
    with pytest.raises(SettingsConflict, match=said):
        run(data, out, teacher(openai, model), **changes)
    assert len(openai.requests) == ITEMS


def test_a_journal_of_other_items_is_refused(openai, data, tmp_path):
    out = tmp_path / "t.jsonl"
    run(data, out, teacher(openai))
    fewer = replace(data, items=data.items[1:])
    with pytest.raises(SettingsConflict, match=r"explains '000\.png', which is not in this data set"):
        run(fewer, out, teacher(openai))
    changed = replace(data, items=(replace(data.items[0], prompt="other"), *data.items[1:]))
    with pytest.raises(SettingsConflict, match=r"'000\.png', which has another image or prompt now"):
        run(changed, out, teacher(openai))
    out.write_text("{}\n")
    with pytest.raises(DataError, match="line 1 is no line of `agiqa teach`"):
        run(data, out, teacher(openai))


def test_conversations_of_somebody_else_are_not_overwritten(openai, data, tmp_path):
    """Such as the published file that the data set is read from."""
    published = tmp_path / "t.quality.jsonl"
    published.write_text("published")
    with pytest.raises(SettingsConflict, match=r"t\.quality\.jsonl exists.*Choose another OUT"):
        run(data, tmp_path / "t.jsonl", teacher(openai))
    assert (openai.requests, published.read_text()) == ([], "published")
    published.unlink()
    run(data, tmp_path / "t.jsonl", teacher(openai))
    assert run(data, tmp_path / "t.jsonl", teacher(openai)).as_dict()["asked"] == 0


def test_two_runs_do_not_write_to_one_journal(openai, data, tmp_path):
    out = tmp_path / "t.jsonl"
    job = TeachingJob(data, out, [teacher(openai)], SETTINGS, Splits(of={}, rule={}))
    with job.journal.writing(), pytest.raises(BusyStore, match="Another run is writing"):
        run(data, out, teacher(openai), splits={})
    assert openai.requests == []


def test_a_dry_run_sends_and_writes_nothing(openai, data, tmp_path):
    out = tmp_path / "t.jsonl"
    job = TeachingJob(data, out, [teacher(openai, price=PRICE)], SETTINGS, Splits(of={}, rule={}))
    estimate = job.dry_run(job.pending())
    assert (openai.requests, list(tmp_path.iterdir())) == ([], [])
    sent, received = estimate["tokens"]["input"], estimate["tokens"]["output"]
    assert (estimate["requests"], received) == (ITEMS, ITEMS * 750)
    assert estimate["cost_usd"] == pytest.approx((100 * sent + 1000 * received) / 1e6)
    run(data, out, teacher(openai))
    real = sum(line["tokens"]["input"] for line in lines_of(out).values())
    assert 0.5 * real < sent < 2 * real


def test_an_estimate_learns_from_the_journal(openai, data, tmp_path):
    out = tmp_path / "t.jsonl"
    openai.always(refuses("refusal"), about=prompt_of(1))
    run(data, out, teacher(openai))
    settings = replace(SETTINGS, retry_failed=True)
    rule = Splits(of={}, rule={"by": "table"})
    job = TeachingJob(data, out, [teacher(openai)], settings, rule)
    estimate = job.dry_run(job.pending())
    usual = [line["tokens"]["output"] for line in lines_of(out).values() if line["status"] == "ok"]
    assert (estimate["requests"], estimate["cost_usd"]) == (1, None)
    assert estimate["tokens"]["output"] == round(sum(usual) / len(usual))


def test_the_progress_tells_what_is_spent_and_expected(openai, data, tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    result = run(data, out, teacher(openai, price=PRICE)).as_dict()
    spent = f"{result['cost_usd']:.2f}"
    assert f"teach: {ITEMS}/{ITEMS} items in" in capsys.readouterr().err.replace(
        f", {spent} of about {spent} USD", " $"
    )
    run(data, out, teacher(openai))
    assert "price of teacher-1 is not known" not in capsys.readouterr().err  # nothing was left to ask


def test_the_key_is_in_no_file(server, data, tmp_path):
    server.script(says(f"key: {KEY}"), about=prompt_of(1))
    server.script(lambda one, _: one.error(400, "x", f"bad key {KEY}"), about=prompt_of(2))
    run(data, tmp_path / "t.jsonl", teacher(server), teacher(server, FALLBACK))
    assert len(list(tmp_path.iterdir())) == 3
    for path in tmp_path.iterdir():
        assert KEY not in path.read_text()


def test_the_answers_of_aspects_are_not_mixed_up(openai, tmp_path):
    folder = write_set(tmp_path / "set", 4, images=True)
    rows = [line.split(",") for line in (folder / "data.csv").read_text().splitlines()]
    rows = [[*row, "mos_align" if number == 0 else str(number)] for number, row in enumerate(rows)]
    (folder / "data.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    loaded = load_data_set(folder, variant="no_id", images=True)
    both = TeachingSettings(question=QuestionSettings(aspects=("quality", "correspondence")), client=QUICK)
    run_teaching(loaded, tmp_path / "t.jsonl", [teacher(openai)], both, splits=Splits(of={}, rule={}))
    for line in lines_of(tmp_path / "t.jsonl").values():
        for aspect, text in line["explanations"].items():
            assert text.startswith(f"The {KEYS[aspect].removesuffix('_explanation')} of this image")
    assert sorted(path.name for path in tmp_path.glob("t.*.jsonl")) == ["t.correspondence.jsonl", "t.quality.jsonl"]


def test_a_slow_answer_holds_up_no_other(openai, data, tmp_path):
    openai.script(slow(), about=prompt_of(0))
    seen = []
    openai.always(
        lambda one, request: (seen.append(request), one.release(), explains(one, request))[2], about=prompt_of(11)
    )
    assert run(data, tmp_path / "t.jsonl", teacher(openai)).as_dict()["explained"] == ITEMS
    assert len(seen) == 1
