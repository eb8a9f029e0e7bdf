"""Stores read as shorter conversations: rows and items, copies of every kind, unions, and numbers that cannot be."""

from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import ConfigError, DamagedStore, DataError, SchemaError, UnknownName, ViewRefused
from agiqa.store import Prefixes, StorePlan, UnitWriter, create_store, create_whole_array, open_store, union
from agiqa.store.format.metadata import check_attributes, store_id
from agiqa.store.hdf5.export import export_hdf5
from agiqa.store.hdf5.importing import import_hdf5
from agiqa.store.sharing.pulling import pull
from agiqa.store.sharing.pushing import push
from tests.store import golden

ITEMS = [0, 1, 3, 4, 2, 1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return golden.write("view-keys", tmp_path_factory.mktemp("views") / "views.agiqa")


def assert_views(store):
    """`store` has the views of the golden one, made here by cutting each item."""
    for name, rows in golden.SHORTER.items():
        view, whole = store.variant(name), store.read(ITEMS)
        pieces = [whole.rows[start : start + rows[item]] for start, item in zip(whole.offsets, ITEMS, strict=False)]
        found = view.read(ITEMS)
        np.testing.assert_array_equal(found.rows, np.concatenate(pieces))
        np.testing.assert_array_equal(np.diff(found.offsets), [rows[item] for item in ITEMS])
        np.testing.assert_array_equal(found.roles, np.concatenate([golden.roles(item)[: rows[item]] for item in ITEMS]))
        authors = [(None, "teacher", "teacher-blind", "model")[number] for number in golden.AUTHORS[name]]
        assert view.items.text_authors == (authors if any(authors) else [])
        assert [key.tobytes() for key in view.item_keys] == [golden.item_key(item, name) for item in range(5)]
        assert view.provenance["conversation"] == {"variant": name, "aspect": "quality"}


def test_a_view_has_the_first_rows_of_every_item(store):
    assert_views(store)
    view = store.variant("id")
    assert view.variant("question").id == store.variant("question").id != view.id
    assert view.variant("full") is store.variant("full") is store
    assert view.provenance["view"] == {"store": store.id, "variant": "full"}
    assert view.provenance["prefixes"] == ["question"]
    assert len(view.read([]).rows) == 0
    tokens = [golden.token_ids(item)[: golden.SHORTER["id"][item]] for item in ITEMS]
    for source in (view, union([view])):
        for (ids, roles), item, expected in zip(source.tokens(ITEMS), ITEMS, tokens, strict=True):
            np.testing.assert_array_equal(ids, expected)
            np.testing.assert_array_equal(roles, golden.roles(item)[: len(expected)])
    with pytest.raises(DataError, match="read by their positions"):
        view.tokens([9])
    np.testing.assert_array_equal(view.features(view.items.names[1]), store.features(view.items.names[1])[:8])


def test_copies_keep_the_views(store, tmp_path):
    export_hdf5(store, tmp_path / "store.h5", compression="none")
    assert_views(import_hdf5(tmp_path / "store.h5", tmp_path / "imported.agiqa"))
    push(store, f"file://{tmp_path}/pushed.agiqa")
    pull(f"file://{tmp_path}/pushed.agiqa", tmp_path / "pulled.agiqa")
    assert_views(open_store(tmp_path / "pulled.agiqa"))


def test_a_union_is_read_as_the_views_of_its_stores(store):
    view = union([store]).variant("id")
    assert view.id == union([store.variant("id")]).id != union([store]).id
    np.testing.assert_array_equal(view.n_tokens, golden.SHORTER["id"])
    assert view.provenance["conversation"]["variant"] == "id"
    assert [part.id for part, _ in view.parts] == [store.variant("id").id]
    np.testing.assert_array_equal(view.read(ITEMS).rows, store.variant("id").read(ITEMS).rows)


@pytest.mark.parametrize(
    "wrong", [np.zeros((5, 32), np.uint8), np.zeros((5, 64), np.int32), np.zeros((4, 64), np.uint8)]
)
def test_keys_of_another_form_are_damage(wrong, tmp_path):
    prefixes = replace(golden.prefixes("views"), keys=wrong)
    made = create_store(tmp_path / "s.agiqa", _plan(prefixes))
    with pytest.raises(DamagedStore, match=r"index/prefix_keys is .* say(s \(5, | uint8 \(any, )64\)"):
        made.variant("id")


def test_a_view_and_a_store_of_the_same_items_are_not_read_as_one(store, tmp_path):
    keys = [golden.item_key(item, "id") for item in range(5)]
    separate = create_store(tmp_path / "id.agiqa", _plan(None, {"conversation": {"variant": "id"}}, keys=keys))
    weight = golden.lm_head()
    attributes = {"logical_dtype": "float32", "lm_head_sha256": store.lm_head_sha256}
    UnitWriter(separate).write_model_arrays(
        lambda group: create_whole_array(group, "lm_head/weight", weight, attributes=attributes)
    )
    both = union([store, separate])
    assert len(both.n_tokens) == 10
    with pytest.raises(DataError, match=r"The stores hold the same image and conversation[\s\S]*5 problems"):
        both.variant("id")


def test_names_that_are_no_view_are_refused(store, tmp_path):
    with pytest.raises(UnknownName, match=r"No conversation variant is called 'ful'\. Did you mean 'full'"):
        store.variant("ful")
    with pytest.raises(ViewRefused, match="do not begin with those of 'described', only with question, id"):
        store.variant("described")
    with pytest.raises(ViewRefused, match="`no_id` asks one question in other words"):
        store.variant("no_id")
    old = golden.write("hidden", tmp_path / "old.agiqa")
    with pytest.raises(ViewRefused, match=r"does not record which conversations it holds\. Extract with --variant id"):
        old.variant("id")


def _plan(prefixes, changes=None, *, keys=None, rows=None):
    kind = "view-keys"
    return StorePlan(
        encoding="hidden",
        logical_dtype="bfloat16",
        width=golden.WIDTH,
        provenance={"model": {"name": "other"}, "conversation": golden.FULL, **(changes or {})},
        items=golden.items(kind),
        token_ids=[golden.token_ids(item, kind) for item in range(5)],
        roles=[golden.roles(item, kind) for item in range(5)],
        item_keys=keys or [bytes([item + 10]) * 32 for item in range(5)],
        truncated=[False] * 5,
        prefixes=prefixes,
        **({} if rows is None else rows),
    )


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([(1, 4, 0, 2, 0), (3, 10, 0, 4, 1)], r"says \[4, 10\] of item 1, which has 9 rows"),
        ([(1, 4, 0, 2, 0), (3, 3, 0, 4, 1)], r"says \[4, 3\] of item 1"),
        ([(-1, 4, 0, 2, 0), (3, 8, 0, 4, 1)], r"says \[-1, 3\] of item 0"),
    ],
)
def test_numbers_that_cannot_be_are_damage(rows, problem, tmp_path):
    right = golden.prefixes("views")
    wrong = Prefixes(names=right.names, rows=np.array(rows, np.int32).T.copy(), authors=right.authors)
    made = create_store(tmp_path / "s.agiqa", _plan(wrong))
    with pytest.raises(DamagedStore, match=problem):
        made.variant("id")


@pytest.mark.parametrize("rows", [{"pooled": ["mean"]}, {"tap": "timm"}])
def test_rows_that_are_no_tokens_have_no_shorter_conversations(store, rows):
    with pytest.raises(ConfigError, match="this store's rows are not tokens"):
        _plan(golden.prefixes("views"), rows=rows)
    provenance = {**store.provenance, **rows}
    attributes = {**store.attributes, **rows, "version": 2, "provenance": provenance, "id": store_id(provenance)}
    with pytest.raises(DamagedStore, match="records shorter conversations, and its rows are not those of tokens"):
        check_attributes(store.path, attributes)


def test_names_of_another_kind_are_damage(tmp_path):
    with pytest.raises((DamagedStore, SchemaError), match="its provenance has prefixes 3"):
        create_store(tmp_path / "s.agiqa", _plan(None, {"prefixes": 3}))
