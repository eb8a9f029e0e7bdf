"""The feature store: plan, fill, seal, read, verify and sketch. It knows nothing of models or heads.

The format is specified in `FORMAT.md` beside this file.
"""

from agiqa.store.care.garbage import GcReport, collect_garbage
from agiqa.store.care.repairing import RepairReport, repair
from agiqa.store.care.verification import Damage, Report, verify
from agiqa.store.deriving.deriving import SketchResult, basis_from, convert_store, sketch_store
from agiqa.store.deriving.labelling import LabelReport, join_labels
from agiqa.store.format.arrays import create_whole_array
from agiqa.store.format.basis import Basis, Moments, make_basis, moments_of, save_basis
from agiqa.store.format.bits import from_float32, to_float32
from agiqa.store.format.items import Items
from agiqa.store.format.layout import ENCODINGS, ITEM_STATUS, TOKEN_ROLES
from agiqa.store.format.scaling import LOGICAL_DTYPE as SCALED_DTYPE
from agiqa.store.format.scaling import Scale, save_scale
from agiqa.store.reading.store import Store, TokenRows, is_planned
from agiqa.store.reading.summary import store_summary
from agiqa.store.reading.union import StoreUnion, union
from agiqa.store.reading.views import VIEWS, View, view
from agiqa.store.sharing.in_place import open_store
from agiqa.store.writing.creating import create_store
from agiqa.store.writing.filling import UnitWriter
from agiqa.store.writing.planning import StorePlan
from agiqa.store.writing.sealing import seal

__all__ = [
    "ENCODINGS",
    "ITEM_STATUS",
    "SCALED_DTYPE",
    "TOKEN_ROLES",
    "VIEWS",
    "Basis",
    "Damage",
    "GcReport",
    "Items",
    "LabelReport",
    "Moments",
    "RepairReport",
    "Report",
    "Scale",
    "SketchResult",
    "Store",
    "StorePlan",
    "StoreUnion",
    "TokenRows",
    "UnitWriter",
    "View",
    "basis_from",
    "collect_garbage",
    "convert_store",
    "create_store",
    "create_whole_array",
    "from_float32",
    "is_planned",
    "join_labels",
    "make_basis",
    "moments_of",
    "open_store",
    "repair",
    "save_basis",
    "save_scale",
    "seal",
    "sketch_store",
    "store_summary",
    "to_float32",
    "union",
    "verify",
    "view",
]
