"""The measurement of recipes runs at a tiny shape, and counts the products that torch counts."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from agiqa.bench.measurements.random_models import minicpm
from agiqa.bench.measurements.tuning import counted_flop, made_up, main, tables
from agiqa.bench.recording.tables import read_results
from agiqa.extract.tuning.adapting import adapt, recompute
from agiqa.extract.tuning.group import Group
from agiqa.extract.tuning.learner import Learner
from agiqa.extract.tuning.recipes import recipe_of

LANGUAGE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_a_case_gives_a_line_and_tables(tmp_path):
    path = tmp_path / "lines.jsonl"
    arguments = ["--shape", "tiny", "--recipe", "light", "--tokens", "1100", "--micro-batch", "1", "--steps", "1"]
    outcome = CliRunner().invoke(main, [*arguments, "--checkpointing", "all", "--compile", "never", "--out", str(path)])
    assert outcome.exit_code == 0, outcome.output
    line = json.loads(path.read_text())
    assert (line["stage"], line["name"], line["config"]["tokens"]) == ("tune", "light", 1100)
    assert line["measured"]["tokens_per_second"] > 0
    assert 0 < line["measured"]["of_matmul_rate"] < 1
    assert "| light | 1100 | 1 | all | never |" in outcome.output
    assert "goal" not in outcome.output  # they are for GPUs
    line["config"]["device"] = "NVIDIA H100"
    assert "| light, 1100 tokens x 1, recomputed: all, compiled: never: GB | at most 24 |" in tables([line])
    again = CliRunner().invoke(main, ["--table", str(path)])
    assert again.output.splitlines()[0] in outcome.output


@pytest.mark.parametrize("name", ["published", "no-embeddings", "light"])
def test_flop_are_those_of_the_matrix_products(tmp_path: Path, name):
    """But for products with attention weights, and gradients that the first layers and the pixels do not need."""
    backbone = minicpm(tmp_path, language=LANGUAGE, vision=VISION, resolution=448, device="cpu")
    backbone.load()
    recipe = recipe_of(name, {"rank": 8})
    trained = adapt(backbone, recipe, seed=0)
    recompute(trained, "none")
    example = made_up(backbone, 600, 0)
    learner = Learner(backbone, trained, recipe, Group())
    with FlopCounterMode(display=False) as counter:
        learner.gradient([(0, [example])], labels=len(example.labels))
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts[kind] for kind in (torch.ops.aten.mm, torch.ops.aten.addmm))
    layout = example.prepared.layout
    assert layout is not None
    counted = counted_flop(trained.model, trained, example, len(layout))
    assert products <= counted * 1.02
    assert counted <= products * (1.02 if name != "light" else 1.25)


def test_the_tables_of_the_log_are_those_of_the_lines():
    bench = Path(__file__).resolve().parents[3] / "bench"
    log = (bench / "LOG.md").read_text(encoding="utf-8")
    rows = tables(read_results(bench / "results" / "tuning" / "h100.jsonl")).splitlines()
    assert len(rows) > 30
    assert [row for row in rows if row not in log] == []
