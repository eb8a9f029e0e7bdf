"""The commands of README and how-tos run as they stand on the demo's data; only what a CPU cannot do is made smaller."""

import json
import re

import pytest

from agiqa.store import open_store
from tests.command_line import REPOSITORY
from tests.docs.pages import blocks, overridden, programs, run_script, write_demo
from tests.extract.data.published_folders import agiqa_3k
from tests.extract.tiny_minicpm import write_minicpm_checkpoint

DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
SMALL_GRID = "{base: {projection: sketch, width: 8, epochs: 1}, grid: {encoder: [gru, none]}}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder)
    return folder


@pytest.fixture
def shell(agiqa, demo, tmp_path):
    """Runs the blocks of a page in a folder with the demo: `shell(page, NAME=value)`."""
    (tmp_path / "demo").symlink_to(demo)
    with programs(agiqa, tmp_path / "bin") as environment:

        def run(page, **values):
            return run_script(overridden("".join(blocks(page)), values), tmp_path, environment)

        yield run


@pytest.fixture
def small(demo, tmp_path):
    """Sixty images of the demo in a folder `set` beside it."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(demo / "data" / "images")
    lines = (demo / "data" / "data.csv").read_text().splitlines(keepends=True)
    (tmp_path / "set" / "data.csv").write_text("".join(lines[:61]))
    return "set"


def scores(run):
    return json.loads((run / "metrics.json").read_text())["test"]


def test_readme_and_the_five_minutes_have_the_same_commands_and_run(shell, tmp_path):
    assert blocks(REPOSITORY / "README.md") == ["".join(blocks(DOCS / "start.md"))]
    printed = shell(REPOSITORY / "README.md").stdout
    assert (tmp_path / "scores.csv").read_text().count("\n") == 401
    assert scores(tmp_path / "runs" / "gru")["n"] == 80
    assert re.search(r"^demo/data/images/\S+: MOS \d", printed, re.MULTILINE)


def test_bring_your_data(shell, small, tmp_path):
    agiqa_3k(tmp_path / "down")
    printed = shell(DOCS / "how-to" / "data.md", DATA=small, DOWNLOAD="down")
    assert "reading columns 'picture' as name, 'words' as prompt, 'rated' as quality" in printed.stderr
    assert json.loads((tmp_path / "AGIQA-3k" / "source.json").read_text())["mos_range"] == [0.0, 5.0]
    assert [len(open_store(tmp_path / f"{name}.agiqa").items) for name in ("new", "grows")] == [3, 12]


def test_extract_features(shell, small, tmp_path):
    shell(DOCS / "how-to" / "features.md", DATA=small)
    assert (tmp_path / "int8.agiqa" / "MANIFEST.json").is_file()


def test_train_one_head(shell, small, tmp_path):
    shell(DOCS / "how-to" / "train-one-head.md", SMALL="--width 8 --epochs 1", DATA=small)
    assert json.loads((tmp_path / "runs" / "layer1" / "metrics.json").read_text())["layer"] == "1"
    assert set(scores(tmp_path / "runs" / "both")) == {"quality", "correspondence"}


def test_ablation(shell, small, tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL_GRID)
    shell(DOCS / "how-to" / "ablation.md", GRID="small.yaml", DATA=small)
    assert (tmp_path / "by-layer" / "report" / "pictures" / "layers-quality-published.png").is_file()
    assert (tmp_path / "heads" / "report" / "index.html").is_file()
    protocols = {json.loads(line)["protocol"] for line in (tmp_path / "mine" / "rows.jsonl").read_text().splitlines()}
    assert protocols == {"published", "grouped"}


def test_results(shell, tmp_path):
    printed = shell(DOCS / "how-to" / "results.md", SMALL="--width 8 --epochs 1")
    listed = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert {run["run"] for run in listed} == {f"runs/{name}-{seed}" for name in ("gru", "none") for seed in (0, 1)}
    assert (tmp_path / "page" / "index.html").is_file()
    tables = [path.read_text() for path in (tmp_path / "paper" / "tables").glob("*.tex")]
    assert tables
    assert all(r"\toprule" in table for table in tables)
    assert all(f"paper/pictures/{path.name}" in printed.stdout for path in (tmp_path / "paper").glob("pictures/*.pdf"))


def test_search(shell, tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    shell(DOCS / "how-to" / "tune-head.md", SEARCH="--trials 2 --epochs 1 --seeds 1 --jobs 1")
    assert len((tmp_path / "search" / "trials.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "search" / "final" / "report" / "index.html").is_file()
    best = json.loads((tmp_path / "search" / "search.json").read_text())
    assert json.loads((tmp_path / "runs" / "best" / "config.json").read_text())["head"]["encoder"] in str(best)


def test_from_python(shell, small):
    printed = shell(DOCS / "how-to" / "from-python.md", DATA=small).stdout
    assert re.search(r"^<Run runs/gru: encoder gru", printed, re.MULTILINE)
    assert re.search(r"^ImageScore\(image='set/images/oldgan_0000.jpg'", printed, re.MULTILINE)
    assert re.search(r"^\(\d+, \d+\) float32$", printed, re.MULTILINE)


def test_table_ii(shell, small, tmp_path):
    network = "--model test_resnet --image-size 32 --no-pretrained --epochs 1"
    printed = shell(DOCS / "how-to" / "table-ii.md", DATA=small, NETWORKS=network, SEEDS="2")
    assert "| my-tool | published |" in printed.stdout
    (table,) = (tmp_path / "heads" / "report" / "tables").glob("networks-networks-quality-published.csv")
    head, *others = (line.split(",")[0] for line in table.read_text().splitlines()[1:])
    assert head.startswith("no encoder")
    assert others == ["test_resnet", "my-tool"]


def test_transfer(shell, tmp_path):
    shell(DOCS / "how-to" / "transfer.md", SEEDS="1")
    assert (tmp_path / "carried" / "report" / "index.html").is_file()
    assert (tmp_path / "scores.csv").read_text().count("\n") == 71


def test_sharing(shell, tmp_path):
    url = f"file://{tmp_path}/there/demo.agiqa"
    printed = shell(DOCS / "how-to" / "sharing.md", URL=url).stdout
    assert "hidden (" in printed
    assert (tmp_path / "BACK.agiqa" / "MANIFEST.json").is_file()


def test_cluster(shell, small, tmp_path):
    shell(DOCS / "how-to" / "cluster.md", DATA=small)
    assert (tmp_path / "features.agiqa" / "MANIFEST.json").is_file()
    assert len((tmp_path / "heads" / "results.jsonl").read_text().splitlines()) == 2


def test_published_checkpoints(shell, small, tmp_path):
    write_minicpm_checkpoint(tmp_path / "tiny")
    printed = shell(
        DOCS / "how-to" / "published-checkpoints.md",
        DATA=small,
        MODEL="--model tiny --device cpu --aspect agiqa3k_quality_v0",
        HEAD="--encoder gru --width 8 --epochs 1",
        WORDS="8",
        NEW="set/images/oldgan_0000.jpg",
    )
    assert "MOS" in printed.stdout


def headings(page):
    """The anchors of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", *PAGES], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page):
    """In the repository as it stands; the site's own links are checked by its build."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            assert heading in headings(target), link


def test_every_page_is_in_the_table_of_contents():
    listed = set()
    for index in (DOCS / "index.md", DOCS / "reference" / "python.md"):
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```$", index.read_text(), re.MULTILINE | re.DOTALL):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(index.parent / f"{entry}.md").resolve() for entry in entries}
    assert {page.resolve() for page in PAGES} - {DOCS / "index.md"} == listed
