"""Modules with parts of one's own: in processes of every start method, and what counts as the same part."""

import ast
import multiprocessing
from dataclasses import replace
from functools import partial

import pytest

from agiqa import parts
from agiqa.commands.parts import REGISTRIES
from agiqa.errors import ConfigError
from agiqa.extract import IMPORTERS, load_data_set
from agiqa.parts import Origin, OwnPart, import_parts
from agiqa.registry import Registry
from agiqa.store import TABLE_FORMATS, table_rows
from agiqa.workers import new_process
from tests.command_line import REPOSITORY

MODULE = "from agiqa.heads.settings.presets import PRESETS\nPRESETS.add('tiny', lambda chosen: {'width': 8})\n"


def known(pipe):
    from agiqa.heads.settings.presets import PRESETS

    pipe.send(PRESETS.names())


@pytest.fixture
def presets(monkeypatch):
    """The registry of presets and the imports of this process, as they were afterwards."""
    from agiqa.heads.settings.presets import PRESETS

    monkeypatch.setattr(PRESETS, "_parts", dict(PRESETS._parts))
    monkeypatch.setattr(parts, "_imports", parts._Imports())
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    return PRESETS


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_process_of_any_kind_has_the_parts_of_its_parent(presets, tmp_path, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    file = tmp_path / f"tiny_{method}.py"
    file.write_text(MODULE)
    import_parts(file)
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = new_process(context, known, (theirs,))
    process.start()
    theirs.close()
    assert ours.recv() == ["paper", "published", "tiny"]
    process.join()
    assert process.exitcode == 0


def of_this_module(predicted, labels):
    """The first line.

    And another one.
    """


def test_where_a_part_comes_from():
    for part in (of_this_module, partial(of_this_module, 1)):
        origin = Origin.of(part)
        assert (origin.module, origin.name, origin.summary) == (__name__, "of_this_module", "The first line.")
        assert not origin.is_built_in
    record = OwnPart.of("loss", "mine", of_this_module)
    assert record is not None
    assert (record.module, record.file) == (__name__, "test_parts.py")
    assert OwnPart.of("registry", "registry", Registry) is None


def test_a_published_set_comes_from_where_it_is_read():
    known = IMPORTERS.get("agiqa-3k")
    assert Origin.of(known).module == "agiqa.extract.data.importers.agiqa_3k"
    assert Origin.of(known).summary.startswith("AGIQA-3K, https://")
    own = replace(known, title="Mine", read=lambda download: known.read(download))
    assert not Origin.of(own).is_built_in
    with pytest.raises(ConfigError, match="'agiqa-3k' is registered already"):
        IMPORTERS.add("agiqa-3k", own)


@pytest.mark.usefixtures("presets")
def test_what_a_module_prints_does_not_mix_with_results(tmp_path, capsys):
    (tmp_path / "talkative_parts.py").write_text("print('hello')\n")
    import_parts(tmp_path / "talkative_parts.py")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "hello\n")


def test_a_name_is_taken_by_another_part_and_free_for_the_same_one():
    registry = Registry("thing")

    def first():
        """One."""

    def second():
        """Two."""

    registry.add("a", first)
    registry.add("a", first)
    with pytest.raises(ConfigError, match=rf"The thing 'a' is registered already, by {__name__}\..*first; choose"):
        registry.add("a", second)
    assert registry.get("a") is first
    again = registry.register("b")(second)
    assert again is second
    assert registry.names() == ["a", "b"]
    assert "b" in registry
    assert "c" not in registry
    assert repr(registry) == "<thing registry: a, b>"


def test_a_module_that_failed_can_be_mended_and_imported_again(presets, tmp_path):
    file = tmp_path / "mended.py"
    file.write_text("x = \n")
    with pytest.raises(ConfigError, match="SyntaxError"):
        import_parts(file)
    file.write_text(MODULE)
    import_parts(str(file))
    assert "tiny" in presets
    assert parts.modules_to_import() == (str(file),)


def test_a_table_format_of_ones_own_is_read_as_data(monkeypatch, tmp_path):
    monkeypatch.setattr(TABLE_FORMATS, "_parts", dict(TABLE_FORMATS._parts))

    @TABLE_FORMATS.register(".pairs")
    def read_pairs(path):
        pairs = [line.split(" = ") for line in path.read_text().splitlines()]
        return table_rows(path, [{"name": name, "mos_quality": mos, "prompt": "a cat"} for name, mos in pairs])

    file = tmp_path / "set.pairs"
    file.write_text("a.png = 3.5\nb.png = 1\n")
    items = load_data_set(str(file), variant="no_id", images=False).items
    assert [(item.name, item.prompt, item.labels["quality"]) for item in items] == [
        ("a.png", "a cat", 3.5),
        ("b.png", "a cat", 1.0),
    ]


def test_every_registry_is_listed():
    found = set()
    for room in ("agiqa", "bench", "extract", "heads", "store"):
        for path in (REPOSITORY / room).rglob("*.py"):
            module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            for node in ast.parse(path.read_text()).body:
                call = getattr(node, "value", None)
                if isinstance(call, ast.Call) and getattr(call.func, "id", "").endswith("Registry"):
                    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                    found.add(f"{module if room == 'agiqa' else f'agiqa.{module}'}:{target.id}")
    packages = {
        "encoders:ENCODERS": "encoders.base:ENCODERS",
        "closed.choosing:FORMS": "closed.forms:FORMS",
        "importers.sets:IMPORTERS": "importers.contract:IMPORTERS",
    }
    listed = set(REGISTRIES)  # some name the module that imports all parts
    for there, defined in packages.items():
        listed = {place.replace(there, defined) for place in listed}
    assert found == listed
