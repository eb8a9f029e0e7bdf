"""A real kernel: cells that register an encoder can run again, training shows a bar, and results show as tables."""

import pytest

from tests.cli.test_cli_own_parts import TEMPLATE, stored

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

SETTINGS = "encoder='running-mean', projection='hidden', width=8, epochs=2, split='grouped', device='cpu'"
IMPOSTOR = """
try:
    class Impostor(Encoder): pass
    ENCODERS.add("running-mean", Impostor)
except agiqa.AgiqaError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The outputs of the cells of a notebook."""
    folder = tmp_path_factory.mktemp("notebook")
    store = stored(folder)
    cells = [
        TEMPLATE.read_text(),
        f"import agiqa\nfirst = agiqa.train({str(store)!r}, 'first', {SETTINGS})\nfirst",
        TEMPLATE.read_text().replace("gelu", "relu").replace("64", "32"),
        f"agiqa.train({str(store)!r}, 'second', {SETTINGS}).head.own_settings",
        IMPOSTOR,
        f"agiqa.open_store({str(store)!r})",
        "agiqa.check_encoder('running-mean')\n[row['epoch'] for row in first.curves]",
        "import json; json.load(open('second/config.json'))['own_parts'][0]",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell.outputs for cell in notebook.cells]


def texts(outputs, kind):
    return [output.data[kind] for output in outputs if "data" in output and kind in output.data]


def test_training_shows_a_bar_with_its_epochs_and_the_run_as_a_table(outputs):
    pages = texts(outputs[1], "text/html")
    assert any("<progress" in page and "epoch 2/2: loss" in page and "epochs" in page for page in pages)
    assert "<b>Run first</b><table>" in pages[-1]
    assert not any("read: " in page for page in pages)  # a brief job leaves no bar
    printed = "".join(output.text for output in outputs[1] if output.output_type == "stream")
    assert "epoch 1/2: loss" not in printed


def test_a_cell_that_registers_runs_again_and_another_class_is_refused(outputs):
    assert texts(outputs[3], "text/plain")[-1] == "{'hidden': 32}"
    assert "The encoder 'running-mean' is registered already, by __main__.RunningMean" in outputs[4][0].text
    assert texts(outputs[6], "text/plain") == ["[1, 2]"]
    (recorded,) = texts(outputs[7], "text/plain")
    assert "'module': '__main__'" in recorded
    assert "'file': None" in recorded


def test_a_store_shows_as_a_table(outputs):
    assert "<b>Store " in texts(outputs[5], "text/html")[0]
