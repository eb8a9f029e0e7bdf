"""Protocols in a grid file: which trainings they make of a head, and which grids are refused."""

import re

import pytest
import yaml

from agiqa.bench.ablation.grids import find_grid, read_grid
from agiqa.errors import ConfigError, UnknownName

GENERATORS = ["glide", "sdxl"]


@pytest.fixture
def grid(tmp_path):
    def read(stores=("",), generators=GENERATORS, **sections):
        file = tmp_path / "grid.yaml"
        file.write_text(yaml.safe_dump(sections, sort_keys=False))
        return read_grid(file, stores=stores, generators=lambda: generators)

    return read


def test_a_head_is_trained_on_every_split_of_every_protocol_with_every_seed(grid):
    protocols = ["published", {"grouped": {"folds": 3, "split_seed": 7}}, "leave-one-generator-out"]
    plan = grid(grid={"encoder": ["gru", "none"]}, seeds=[4, 5], protocols=protocols)
    assert len(plan) == 2 * 2 * (1 + 3 + 2)
    assert [run.name for run in plan[:6]] == [
        "encoder=gru,seed=4,protocol=published",
        *(f"encoder=gru,seed=4,protocol=grouped,fold={fold}" for fold in range(3)),
        *(f"encoder=gru,seed=4,protocol=leave-one-generator-out,held_out={name}" for name in GENERATORS),
    ]
    assert {run.row for run in plan} == {"encoder=gru", "encoder=none"}
    first = [run.train for run in plan[:6]]
    assert [(one.split, one.fold, one.held_out) for one in first] == [
        ("published", 0, None),
        *(("folds", fold, None) for fold in range(3)),
        *(("generator", 0, name) for name in GENERATORS),
    ]
    assert {(one.folds, one.split_seed) for one in first if one.split == "folds"} == {(3, 7)}
    assert {run.answer for run in plan} == {4, 5}


def test_seeds_can_share_the_folds(grid):
    """Each seed trains every k-th fold; together they are one answer."""
    plan = grid(runs=[{"name": "deep"}], seeds=[8, 9], protocols=[{"grouped": {"folds": 5, "seed_per_fold": True}}])
    assert [(run.train.seed, run.train.fold) for run in plan] == [(8, 0), (8, 2), (8, 4), (9, 1), (9, 3)]
    assert {run.answer for run in plan} == {0}
    assert {run.row for run in plan} == {"deep"}
    assert plan[3].name == "deep,seed=9,protocol=grouped,fold=1"


def test_generators_that_differ_in_punctuation_or_case_have_runs_of_their_own(grid):
    """Their folders would have the same name, and users cannot rename a generator in a grid file."""
    generators = ["SD 1.5", "SD/1.5", "SD_1.5", "glide", "sd_1.5"]
    for sections in ({"protocols": ["leave-one-generator-out"]}, {"base": {"split": "generator"}}):
        varied = {"encoder": ["gru"], **({} if "protocols" in sections else {"held_out": generators})}
        plan = grid(generators=generators, grid=varied, **sections)
        assert [run.train.held_out for run in plan] == generators
        names = [run.name for run in plan]
        assert len({name.casefold() for name in names}) == len(generators)
        assert all(re.fullmatch(r"[\w.,=+@-]+", name) for name in names)
        assert names[3].endswith("held_out=glide")
        alone = grid(generators=["SD 1.5", "glide"], grid={"encoder": ["gru"]}, protocols=["leave-one-generator-out"])
        assert alone[0].name.endswith("held_out=SD_1.5")


def test_a_run_without_protocols_belongs_to_that_of_its_split(grid):
    runs = [
        {"split": "published"},
        {"split": "grouped"},
        {"split": "folds"},
        {"split": "generator", "held_out": "sdxl"},
    ]
    plan = grid(runs=runs)
    assert [run.protocol for run in plan] == ["published", "one group held out", "grouped", "leave-one-generator-out"]


def test_stores_are_a_setting(grid):
    plan = grid(stores=("main", "small"), grid={"store": ["main", "small"], "encoder": ["gru"]})
    assert [(run.store, run.row) for run in plan] == [("main", "store=main"), ("small", "store=small")]
    with pytest.raises(UnknownName, match="Did you mean 'small'"):
        grid(stores=("main", "small"), grid={"store": ["smal"]})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"protocols": []}, "`protocols` needs a list"),
        ({"protocols": "grouped"}, "`protocols` needs a list"),
        ({"protocols": None}, "`protocols` needs a list"),
        ({"protocols": ["published", "published"]}, "names one twice"),
        ({"protocols": [{"grouped": {"folds": 1}}]}, "whole number from 2"),
        ({"protocols": [{"grouped": {"folds": True}}]}, "whole number from 2"),
        ({"protocols": [{"grouped": {"seed_per_fold": "yes"}}]}, "true or false"),
        ({"protocols": [{"grouped": 5}]}, "is no protocol"),
        ({"protocols": [{"grouped": {"seed_per_fold": True}}]}, "deals the folds to `seeds`"),
        ({"protocols": ["grouped"], "base": {"split": "published"}}, "`split` is decided by `protocols`"),
        ({"protocols": ["grouped"], "runs": [{"fold": 1}]}, "`fold` is decided by `protocols`"),
        ({"seeds": [0], "grid": {"seed": [0, 1]}}, "`seed` is set beside `seeds`"),
        ({"seeds": []}, "`seeds` needs a list"),
    ],
)
def test_contradictions_are_refused(grid, sections, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        grid(**{"grid": {"encoder": ["gru"]}, **sections})


def test_seeds_that_get_no_fold_are_refused_by_name(grid):
    """They would silently train no head."""
    dealt = [{"grouped": {"folds": 2, "seed_per_fold": True}}]
    with pytest.raises(ConfigError, match=r"deals the 2 folds of grouped to 4 `seeds`, and none is left for 5, 3\."):
        grid(grid={"encoder": ["gru"]}, seeds=[9, 7, 5, 3], protocols=dealt)
    assert len(grid(grid={"encoder": ["gru"]}, seeds=[9, 7], protocols=dealt)) == 2


def test_a_store_that_no_run_uses_is_refused(grid):
    with pytest.raises(ConfigError, match="No run of this grid uses the store 'small' given by --store"):
        grid(stores=("main", "small"), grid={"encoder": ["gru"]})
    with pytest.raises(ConfigError, match="No run of this grid uses STORE, which is called main"):
        grid(stores=("main", "small"), base={"store": "small"}, grid={"encoder": ["gru"]})


def test_a_grid_of_several_stores_says_how_they_are_given(grid):
    with pytest.raises(ConfigError, match="compares the stores main, one, two: STORE is main, give the others by --s"):
        grid(grid={"store": ["main", "one"]}, runs=[{"store": "two"}])
    with pytest.raises(ConfigError, match="compares the stores one, two: call one of them main, which is STORE"):
        grid(grid={"store": ["one", "two"]})


def test_unknown_names_are_answered_with_the_nearest(grid):
    with pytest.raises(UnknownName, match="Did you mean 'grouped'"):
        grid(grid={"encoder": ["gru"]}, protocols=["groupd"])
    with pytest.raises(UnknownName, match="Did you mean 'folds'"):
        grid(grid={"encoder": ["gru"]}, protocols=[{"grouped": {"fold": 5}}])
    with pytest.raises(UnknownName, match="Did you mean 'heads'"):
        find_grid("head")


def test_leaving_a_generator_out_needs_two(grid):
    with pytest.raises(ConfigError, match="Join a column `generator`"):
        grid(generators=["glide"], grid={"encoder": ["gru"]}, protocols=["leave-one-generator-out"])


SHIPPED = {"quick": 12, "heads": 720, "table-iv": 300, "table-iii": 150, "losses": 270, "roles": 150, "ranks": 150}
SHIPPED |= {"table-iii-stores": 120, "table-iv-conversations": 180, "labels": 240, "layers": 60}
STORES = {
    "table-iii-stores": ("main", "one", "two", "three"),
    "table-iv-conversations": ("main", "untuned"),
    "ranks": ("main", "r16", "r32", "r64", "r128"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_grid_that_is_brought_can_be_read(name):
    plan = read_grid(find_grid(name), stores=STORES.get(name, ("",)), layers=lambda: ["8", "last"])
    assert len(plan) == SHIPPED[name]
    assert all(run.train.calibrate for run in plan)
    assert {run.protocol for run in plan} == {"published", "grouped"}


def test_no_grid_is_brought_that_is_not_tested():
    assert {file.stem for file in find_grid("quick").parent.glob("*.yaml")} == set(SHIPPED)
