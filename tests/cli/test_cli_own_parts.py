"""Parts of one's own in real commands and the processes that they start; runs record them, and say what they lack."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml

from tests.cli.refusals import misuse, refuse
from tests.command_line import REPOSITORY
from tests.extract.small_sets import write_set, write_talks
from tests.store.conftest import make_content, make_store

TEMPLATE = REPOSITORY / "docs" / "own_encoder" / "running_mean.py"
HEAD = {"encoder": "running-mean", "projection": "hidden", "width": 8}
TRAIN = {"split": "grouped", "epochs": 2, "batch_size": 8, "device": "cpu"}
SMALL = [part for name, value in {**HEAD, **TRAIN}.items() for part in (f"--{name.replace('_', '-')}", value)]
OWN_LOSS = """
from agiqa.heads import LOSSES

@LOSSES.register("fourth-power")
def fourth_power(predicted, labels):
    return (predicted - labels).pow(4).mean()
"""
OWN_BACKBONE = """
from agiqa.extract import BACKBONES
from agiqa.extract.models.huggingface import TextBackbone

@BACKBONES.register("shouting")
class Shouting(TextBackbone):
    kind = "shouting"

    def prepare(self, conversation, image, *, answer=False):
        loud = [type(one)(role=one.role, content=one.content.upper()) for one in conversation]
        return super().prepare(loud, image, answer=answer)
"""


def stored(folder):
    """A store of 60 items with MOS of quality."""
    random = np.random.default_rng(5)
    content = make_content(random.integers(30, 60, 60).tolist(), seed=5)
    items = replace(content.items, labels={"quality": random.uniform(0, 5, 60)})
    return make_store(folder / "own.agiqa", replace(content, items=items)).path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The template of the docs and a loss, in a file of the user's."""
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(TEMPLATE.read_text() + OWN_LOSS)
    return file


@pytest.fixture(scope="module")
def run(agiqa, store, module, tmp_path_factory):
    """A run of the user's encoder."""
    made = tmp_path_factory.mktemp("runs") / "run"
    options = ("--set", "hidden=5", "--loss", "mse+0.1*fourth-power", "--import", module)
    assert agiqa("train", store, made, *SMALL, *options).code == 0
    return made


@pytest.fixture
def elsewhere(agiqa, tmp_path):
    """Commands run in another folder, and with an environment of their own."""
    agiqa.folder = tmp_path
    yield tmp_path
    agiqa.folder, agiqa.environment = REPOSITORY, {}


def predicted(agiqa, run, store, out, *options):
    outcome = agiqa("predict", run, store, out, "--device", "cpu", *options)
    assert outcome.code == 0, outcome.err
    with out.open(newline="") as file:
        return [row["predicted"] for row in csv.DictReader(file)], outcome.err


def test_a_run_records_its_parts_and_the_settings_of_its_encoder(run, module):
    config = json.loads((run / "config.json").read_text())
    assert config["head"]["own_settings"] == {"hidden": 5}
    parts = {part["name"]: part for part in config["own_parts"]}
    assert [(part["kind"], part["module"], part["file"]) for part in parts.values()] == [
        ("encoder", "mine", "mine.py"),
        ("loss", "mine", "mine.py"),
    ]
    digest = subprocess.run(["sha256sum", module], capture_output=True, text=True, check=True).stdout.split()[0]
    assert {part["sha256"] for part in parts.values()} == {digest}
    assert str(module.parent) not in json.dumps(config)


def test_a_run_without_its_module_says_which_one_and_how(agiqa, run, store, elsewhere):
    out = elsewhere / "scores.csv"
    for command in (("predict", run, store, out), ("evaluate", run, store), ("train", store, "new", "--start", run)):
        refuse(
            agiqa(*command, "--device", "cpu"),
            f"{run / 'config.json'}: The encoder 'running-mean' is registered by the module mine (file mine.py)",
            "--import mine",
            "AGIQA_IMPORT",
        )
    assert not out.exists()


def test_file_module_and_variable_lead_to_the_same_scores(agiqa, run, store, module, elsewhere):
    by_file, error = predicted(agiqa, run, store, elsewhere / "file.csv", "--import", module)
    assert "warning" not in error
    shutil.copy(module, elsewhere / "mine.py")
    assert predicted(agiqa, run, store, elsewhere / "name.csv", "--import", "mine")[0] == by_file
    options = elsewhere / "options.yaml"
    options.write_text(yaml.safe_dump({"import": ["mine.py"]}))
    assert predicted(agiqa, run, store, elsewhere / "options.csv", "--options", options)[0] == by_file
    agiqa.environment = {"AGIQA_IMPORT": "mine, ./mine.py"}
    assert predicted(agiqa, run, store, elsewhere / "variable.csv")[0] == by_file
    assert len(by_file) == 60


def test_another_version_of_the_module_is_announced(agiqa, run, store, module, elsewhere):
    other = elsewhere / "mine.py"
    other.write_text(module.read_text().replace("gelu", "relu"))
    scores, error = predicted(agiqa, run, store, elsewhere / "other.csv", "--import", other)
    assert f"warning: the encoder 'running-mean' of {run} was trained with another version of the module mine" in error
    assert scores != predicted(agiqa, run, store, elsewhere / "same.csv", "--import", module)[0]


def test_a_sweep_trains_them_in_its_processes_and_knows_their_code(agiqa, store, module, elsewhere):
    out, grid, file = elsewhere / "out", elsewhere / "grid.yaml", elsewhere / "mine.py"
    shutil.copy(module, file)
    settings = {"base": {**HEAD, **TRAIN}, "grid": {"own_settings": [{"hidden": 3}, {"hidden": 4}], "seed": [0, 1]}}
    grid.write_text(yaml.safe_dump(settings))
    sweep = ("ablate", store, out, "--grid", grid, "--train-workers", 2, "--json", "--import", file)
    first = agiqa(*sweep)
    assert "4 heads to train" in first.err
    assert "2 at a time" in first.err
    assert (first.json["trained"], first.json["failed"]) == (4, [])
    hidden = {json.loads(path.read_text())["head"]["own_settings"]["hidden"] for path in out.rglob("config.json")}
    assert hidden == {3, 4}
    assert agiqa(*sweep).json["trained"] == 0
    file.write_text(file.read_text() + "# changed\n")
    refuse(agiqa(*sweep[:-3], "--import", file), "code of the encoder running-mean is not that")


def test_a_model_of_ones_own_extracts_in_other_processes(agiqa, tiny_text_checkpoint, elsewhere):
    file = elsewhere / "shouting.py"
    file.write_text(OWN_BACKBONE)
    data = write_set(elsewhere / "set", 8)
    talks = write_talks(data)
    given = ("--model", tiny_text_checkpoint, "--conversations", talks, "--device", "cpu", "--json")
    processes = ("--devices", 2, "--prepare-workers", 1)
    ways = {"plain": (), "here": ("--import", file), "processes": ("--import", file, *processes)}
    made = {}
    for name, options in ways.items():
        assert agiqa("extract", data, elsewhere / name, *given, *options).json["state"] == "complete"
        made[name] = agiqa("store", "info", elsewhere / name, "--json").json
    kinds = {name: info["provenance"]["model"]["kind"] for name, info in made.items()}
    assert kinds == {"plain": "text", "here": "shouting", "processes": "shouting"}
    assert made["here"]["provenance"]["model"]["own_part"]["module"] == "shouting"
    assert made["here"]["id"] == made["processes"]["id"]
    assert made["plain"]["tokens"] != made["here"]["tokens"]


def test_a_model_of_ones_own_extracts_on_ray(agiqa, tiny_text_checkpoint, elsewhere):
    pytest.importorskip("ray", reason="ray is not installed")
    file = elsewhere / "shouting.py"
    file.write_text(OWN_BACKBONE)
    data = write_set(elsewhere / "set", 4)
    given = ("--model", tiny_text_checkpoint, "--conversations", write_talks(data), "--device", "cpu", "--json")
    outcome = agiqa("extract", data, elsewhere / "store", *given, "--import", file, "--ray", "--devices", 1)
    assert outcome.json["state"] == "complete"


def test_an_installed_package_needs_no_option(tmp_path):
    distribution = tmp_path / "mine-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (distribution / "entry_points.txt").write_text("[agiqa.parts]\nmine = mine_parts\n")
    (tmp_path / "mine_parts.py").write_text(OWN_LOSS)

    def parts():
        return subprocess.run(
            [sys.executable, "-m", "agiqa", "parts", "--json"],
            env={"PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    (found,) = [part for part in json.loads(parts().stdout)["parts"] if part["from"] != "agiqa"]
    assert (found["name"], found["from"]) == ("fourth-power", "mine_parts")
    (tmp_path / "mine_parts.py").write_text("import nothing_of_this_name\n")
    assert "error: the entry point mine of the package mine cannot be imported: ModuleNotFoundError" in parts().stderr


def test_modules_that_cannot_be_imported_are_refused_in_one_line(agiqa, elsewhere):
    files = {
        "broken.py": "x = (\n",
        "failing.py": "\n\n1 / 0\n",
        "random.py": "",
        "script.py": "import sys\nsys.exit(0)\n",
        "taken.py": "from agiqa.heads import LOSSES\nLOSSES.add('mse', lambda predicted, labels: predicted.sum())\n",
    }
    for name, text in files.items():
        (elsewhere / name).write_text(text)
    for given, said in {
        "broken.py": "--import broken.py cannot be imported: SyntaxError",
        "failing.py": f"ZeroDivisionError: division by zero ({elsewhere / 'failing.py'}, line 3)",
        "random.py": "another module is called random",
        "script.py": "--import script.py cannot be imported: it ends the program (exit code 0)",
        "taken.py": "The loss 'mse' is registered already, by agiqa.heads.model.losses.mse; choose another name.",
        "absent.py": f"--import absent.py: there is no file {elsewhere / 'absent.py'}",
        "absent": f"there is no module absent, neither in the folder {elsewhere} nor among",
        "absent.below": "there is no module absent.below",
    }.items():
        refuse(agiqa("parts", "--import", given), said)


def test_unknown_names_and_settings_point_to_the_options(agiqa, store, module, elsewhere):
    misuse(agiqa("train", store, "run", *SMALL), "No encoder is called 'running-mean'", "--import MODULE")
    mine = ("train", store, "run", *SMALL, "--import", module, "--set")
    refuse(agiqa(*mine, "hiden=3"), "No setting of its own is called 'hiden'. Did you mean 'hidden'")
    refuse(agiqa(*mine, "hidden=many"), "hidden is 'many'; it must be of the type int, as its default 64 is")
    misuse(agiqa(*mine, "hidden"), "'hidden' is not NAME=VALUE")
    assert not (elsewhere / "run").exists()


def test_a_script_whose_encoder_is_its_own_is_named(agiqa, store, elsewhere):
    script = elsewhere / "study.py"
    script.write_text(
        TEMPLATE.read_text() + f"\nimport agiqa\nagiqa.train({str(store)!r}, 'run', **{ ({**HEAD, **TRAIN})!r})\n"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=elsewhere, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    refuse(
        agiqa("evaluate", "run", store),
        "The encoder 'running-mean' was registered in the script study.py. Move it into a module of its own",
    )
