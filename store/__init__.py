"""The feature store: plan, fill, seal, read, verify and sketch. It knows nothing of models or heads.

The format is specified in `FORMAT.md` beside this file.
"""

from typing import TYPE_CHECKING

from agiqa.lazy import lazy_names

if TYPE_CHECKING:
    from agiqa.store.care.garbage import GcReport as GcReport
    from agiqa.store.care.garbage import collect_garbage as collect_garbage
    from agiqa.store.care.repairing import RepairReport as RepairReport
    from agiqa.store.care.repairing import repair as repair
    from agiqa.store.care.verification import Damage as Damage
    from agiqa.store.care.verification import Report as Report
    from agiqa.store.care.verification import verify as verify
    from agiqa.store.deriving.calibrating import basis_from as basis_from
    from agiqa.store.deriving.calibrating import layer_bases_from as layer_bases_from
    from agiqa.store.deriving.deriving import SketchResult as SketchResult
    from agiqa.store.deriving.deriving import convert_store as convert_store
    from agiqa.store.deriving.deriving import sketch_store as sketch_store
    from agiqa.store.deriving.labelling import LabelReport as LabelReport
    from agiqa.store.deriving.labelling import join_labels as join_labels
    from agiqa.store.format.arrays import create_whole_array as create_whole_array
    from agiqa.store.format.arrays import from_float32 as from_float32
    from agiqa.store.format.arrays import to_float32 as to_float32
    from agiqa.store.format.artefacts import SCALED_DTYPE as SCALED_DTYPE
    from agiqa.store.format.artefacts import Basis as Basis
    from agiqa.store.format.artefacts import Moments as Moments
    from agiqa.store.format.artefacts import Scale as Scale
    from agiqa.store.format.artefacts import make_basis as make_basis
    from agiqa.store.format.artefacts import make_states_basis as make_states_basis
    from agiqa.store.format.artefacts import moments_of as moments_of
    from agiqa.store.format.artefacts import save_basis as save_basis
    from agiqa.store.format.artefacts import save_scale as save_scale
    from agiqa.store.format.items import Items as Items
    from agiqa.store.format.layout import ENCODINGS as ENCODINGS
    from agiqa.store.format.layout import ITEM_STATUS as ITEM_STATUS
    from agiqa.store.format.layout import TOKEN_ROLES as TOKEN_ROLES
    from agiqa.store.format.prefixes import Prefixes as Prefixes
    from agiqa.store.format.tables import TABLE_FORMATS as TABLE_FORMATS
    from agiqa.store.format.tables import table_rows as table_rows
    from agiqa.store.reading.layers import LayerSource as LayerSource
    from agiqa.store.reading.prefixes import VariantView as VariantView
    from agiqa.store.reading.store import AnyStore as AnyStore
    from agiqa.store.reading.store import Store as Store
    from agiqa.store.reading.store import is_planned as is_planned
    from agiqa.store.reading.summary import store_summary as store_summary
    from agiqa.store.reading.token_rows import TokenRows as TokenRows
    from agiqa.store.reading.union import StoreUnion as StoreUnion
    from agiqa.store.reading.union import union as union
    from agiqa.store.reading.views import VIEWS as VIEWS
    from agiqa.store.reading.views import View as View
    from agiqa.store.reading.views import view as view
    from agiqa.store.sharing.in_place import open_store as open_store
    from agiqa.store.writing.creating import create_store as create_store
    from agiqa.store.writing.filling import UnitWriter as UnitWriter
    from agiqa.store.writing.planning import StorePlan as StorePlan
    from agiqa.store.writing.sealing import seal as seal

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "care.garbage": ["GcReport", "collect_garbage"],
        "care.repairing": ["RepairReport", "repair"],
        "care.verification": ["Damage", "Report", "verify"],
        "deriving.calibrating": ["basis_from", "layer_bases_from"],
        "deriving.deriving": ["SketchResult", "convert_store", "sketch_store"],
        "deriving.labelling": ["LabelReport", "join_labels"],
        "format.arrays": ["create_whole_array", "from_float32", "to_float32"],
        "format.artefacts": [
            "Basis",
            "Moments",
            "SCALED_DTYPE",
            "Scale",
            "make_basis",
            "make_states_basis",
            "moments_of",
            "save_basis",
            "save_scale",
        ],
        "format.items": ["Items"],
        "format.layout": ["ENCODINGS", "ITEM_STATUS", "TOKEN_ROLES"],
        "format.prefixes": ["Prefixes"],
        "format.tables": ["TABLE_FORMATS", "table_rows"],
        "reading.layers": ["LayerSource"],
        "reading.prefixes": ["VariantView"],
        "reading.store": ["AnyStore", "Store", "is_planned"],
        "reading.summary": ["store_summary"],
        "reading.token_rows": ["TokenRows"],
        "reading.union": ["StoreUnion", "union"],
        "reading.views": ["VIEWS", "View", "view"],
        "sharing.in_place": ["open_store"],
        "writing.creating": ["create_store"],
        "writing.filling": ["UnitWriter"],
        "writing.planning": ["StorePlan"],
        "writing.sealing": ["seal"],
    },
)
