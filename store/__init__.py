"""The feature store: plan, fill, seal, read, verify and sketch. It knows nothing of models or heads.

The format is specified in `FORMAT.md` beside this file.
"""

from agiqa.store.arrays import create_whole_array
from agiqa.store.basis import Basis, Moments, make_basis, moments_of, save_basis
from agiqa.store.bits import from_float32, to_float32
from agiqa.store.converting import convert_store
from agiqa.store.creating import create_store
from agiqa.store.filling import UnitWriter
from agiqa.store.garbage import GcReport, collect_garbage
from agiqa.store.items import Items
from agiqa.store.labelling import LabelReport, join_labels
from agiqa.store.layout import ENCODINGS, ITEM_STATUS, TOKEN_ROLES
from agiqa.store.opening import open_store
from agiqa.store.planning import StorePlan
from agiqa.store.reading import Store, TokenRows, is_planned
from agiqa.store.repairing import RepairReport, repair
from agiqa.store.scaling import LOGICAL_DTYPE as SCALED_DTYPE
from agiqa.store.scaling import Scale, save_scale
from agiqa.store.sealing import seal
from agiqa.store.sketching import SketchResult, basis_from, sketch_store
from agiqa.store.summary import store_summary
from agiqa.store.union import StoreUnion, union
from agiqa.store.verification import Damage, Report, verify
from agiqa.store.views import VIEWS, View, view

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
