"""The shipped plan is whole: every row of the paper has its numbers and its heads, and shared work is planned once."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from agiqa.bench.ablation.grids import read_grid
from agiqa.bench.report.paper import paper
from agiqa.bench.reproducing.grids import merged_grid
from agiqa.bench.reproducing.plan import SHIPPED, read_plan
from agiqa.bench.reproducing.steps import KINDS, chosen, digests, plan_steps
from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.data.templates import prefixes_of
from agiqa.reproducing import missing_inputs

ROOT = Path(__file__).resolve().parents[3]
PLAN = read_plan()


def steps(*tables, out=Path("out")):
    return plan_steps(PLAN, tables or [*PLAN.tables], Path("root"), out)


def named(found):
    return [step.name for step in found]


def test_the_plan_has_every_row_of_the_paper():
    planned = {
        (table.number, head.data, head.label, head.paper) for table in PLAN.tables.values() for head in table.heads
    }
    full = {("IV", "agiqa-3k", "quality", "full model")}
    assert planned == {(row.table, row.data, row.label, row.name) for row in paper().rows} - full
    words = {(one.label, one.paper) for one in PLAN.tables["table-v"].words}
    assert words == {(row.label, row.name) for row in paper().words}
    ends = {tuple(PLAN.first(store).data for store in (one.source, one.target)) for one in PLAN.transfers.values()}
    assert ends == {(row.source, row.target) for row in paper().transfers}
    networks = {model for one in PLAN.networks.values() for model in one.models}
    assert networks <= {name for row in paper().cited for name in row.networks}
    labels = {(one.data, label) for one in PLAN.networks.values() for label in one.labels}
    assert labels == {(row.data, row.label) for row in paper().rows if row.table == "II"}


@pytest.mark.parametrize("name", [*PLAN.ablations])
def test_each_grid_has_the_rows_of_the_tables_on_views_that_its_stores_have(name):
    ablation = PLAN.ablations[name]
    stores = [*ablation.stores] if len(ablation.stores) > 1 else [""]
    with merged_grid(PLAN, name) as file:
        runs = read_grid(file, stores=stores, variant=ablation.variant)
    heads = [head for table in PLAN.tables.values() for head in table.heads if head.ablation == name]
    assert {head.row for head in heads} <= {run.row for run in runs}
    assert {run.train.label for run in runs} == {head.label for head in heads}
    for run in runs:
        store = PLAN.stores[ablation.stores[run.store or "main"]]
        aspect = PLAN.descriptions[store.descriptions[0]].aspect
        assert run.train.variant in {None, store.variant, *prefixes_of(store.variant, aspect)}


def test_the_adapters_are_those_of_the_documentation():
    page = (ROOT / "docs" / "how-to" / "published-checkpoints.md").read_text()
    rows = [line for line in page.splitlines() if "`strawhat/" in line]
    adapters = {name for line in rows for name in re.findall(r"`strawhat/[^`]*`", line)}
    base = next(name.strip("`") for name in adapters if name.endswith("aigciqa2023-ft`"))
    short = {
        f"{base.removesuffix('-ft')}{name.strip('`')}" for line in rows for name in re.findall(r"`-[\w-]+ft`", line)
    }
    assert {*PLAN.adapters} == {name.strip("`") for name in adapters} | short
    assert PLAN.model in page


def test_steps_come_after_what_they_need_and_once_for_all_tables():
    every = steps()
    before: set[str] = set()
    for step in every:
        assert {*step.needs} <= before
        assert step.kind in KINDS
        before.add(step.name)
    assert len(before) == len(every)
    shared = next(step for step in every if step.name == "extract/3k-quality")
    assert shared.tables == ("table-ii", "table-iv", "table-vi")
    alone = {step.name: vars(step) | {"tables": ()} for step in steps("table-iv")}
    assert alone == {step.name: vars(step) | {"tables": ()} for step in every if step.name in alone}
    assert named(steps("table-v")) == [
        *("fetch/MiniCPM-Llama3-V-2_5", "fetch/minicpm2.5-agiqa-3k-ft", "data/agiqa-3k"),
        *("describe/3k-quality", "describe/3k-untuned", "words/3k-untuned", "words/3k-quality"),
    ]


def test_table_iii_and_the_conversations_of_table_iv_need_three_extractions():
    found = [name for name in named(steps("table-iii", "table-iv")) if name.startswith("extract/")]
    assert found == ["extract/3k-quality", "extract/3k-three", "extract/3k-untuned"]


def test_only_names_kinds_and_steps_by_whole_words():
    every = steps()
    assert {step.kind for step in chosen(every, ["describe", "fetch"])} == {"describe", "fetch"}
    assert named(chosen(every, ["extract/3k-quality"])) == ["extract/3k-quality"]
    assert len(chosen(every, ["baseline/agiqa-3k"])) == 7
    assert chosen(every, []) == every
    with pytest.raises(
        UnknownName, match=r"step of these tables is called 'extract/3k-qualty'.*Did you mean 'extract/"
    ):
        chosen(every, ["extract/3k-qualty"])
    with pytest.raises(UnknownName, match="Did you mean 'table-iii'"):
        steps("table-iiii")


def test_weights_in_the_root_are_given_to_their_network(tmp_path):
    (tmp_path / "weights").mkdir()
    for name in ("vil.pth", "vil.txt", "vil_tiny.pth"):
        (tmp_path / "weights" / name).touch()
    found = {step.name: step.arguments for step in plan_steps(PLAN, ["table-ii"], tmp_path, Path("out"))}
    arguments = found["baseline/agiqa-3k/vil"]
    assert [arguments[place + 1] for place, word in enumerate(arguments) if word == "--weights"] == [
        str(tmp_path / "weights" / "vil.pth")
    ]
    assert "--weights" not in found["baseline/agiqa-3k/vgg16"]


def test_vil_needs_a_file_of_weights_unless_the_plan_says_otherwise(tmp_path):
    missing = missing_inputs(PLAN, steps("table-ii"), tmp_path)
    networks = {name for name in missing if name.startswith("baseline/")}
    assert networks == {f"baseline/{data}/vil" for data in ("agiqa-3k", "aigciqa2023", "aigciqa-20k")}
    assert f"{tmp_path}/weights/vil.*: no such file" in missing["baseline/agiqa-3k/vil"]
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "vil.th").touch()
    assert "baseline/agiqa-3k/vil" not in missing_inputs(
        PLAN, plan_steps(PLAN, ["table-ii"], tmp_path, Path("out")), tmp_path
    )
    random = PLAN.model_copy(update={"options": {"baseline": {"no-pretrained": True}}})
    found = plan_steps(random, ["table-ii"], Path("root"), Path("out"))
    assert {name for name in missing_inputs(random, found, Path("root")) if name.startswith("baseline/")} == set()


def test_a_step_changes_its_digest_with_what_it_needs(tmp_path):
    content = yaml.safe_load(SHIPPED.read_text())
    content["descriptions"]["3k-correspondence"]["aspect"] = "quality"
    content["ablations"]["ours-20k-quality"]["settings"] = {"width": 256}
    shutil.copytree(SHIPPED.parent / "grids", tmp_path / "grids")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    changed = digests(plan_steps(read_plan(tmp_path / "plan.yaml"), [*PLAN.tables], Path("root"), Path("out")))
    same = digests(steps())
    assert {name for name, digest in same.items() if digest != changed[name]} == {
        *("describe/3k-correspondence", "extract/3k-correspondence", "extract/3k-three"),
        *("ablate/ours-3k-correspondence", "ablate/released-3k-correspondence", "ablate/descriptions"),
        "ablate/ours-20k-quality",
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stores": {"x": {"descriptions": ["3k-qualty"]}}}, UnknownName, "Did you mean '3k-quality'"),
        ({"descriptions": {"x": {"data": "agiqa-3k", "aspect": "qualty"}}}, UnknownName, "Did you mean 'quality'"),
        ({"ablations": {"x": {"stores": {"main": "3k-three", "b": "3k"}, "grid": "g"}}}, UnknownName, "'3k'"),
        ({"data": {"agiqa-3k": {"importer": "agiqa-3", "images": 1, "side": 1}}}, UnknownName, "'agiqa-3k'"),
        ({"tabels": {}}, ConfigError, "`tabels`"),
        ({"data": {"x": {"importer": "agiqa-3k", "images": 0, "side": 1}}}, ConfigError, r"`data\.x\.images`"),
    ],
)
def test_what_is_wrong_in_a_plan_is_named_with_the_file(change, error, message, tmp_path):
    content = yaml.safe_load(SHIPPED.read_text())
    for section, values in change.items():
        content[section] = {**content.get(section, {}), **values}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(error, match=message) as caught:
        read_plan(path)
    assert "mine.yaml" in "".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
