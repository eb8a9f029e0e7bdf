"""The feature store: plan, fill, seal, read, verify and sketch. It knows nothing of models or heads.

The format is specified in `FORMAT.md` beside this file.
"""

from agiqa.store.arrays import create_whole_array
from agiqa.store.basis import Basis, make_basis, moments_of, save_basis
from agiqa.store.bits import from_float32, to_float32
from agiqa.store.filling import UnitWriter
from agiqa.store.items import Items
from agiqa.store.layout import ITEM_STATUS, TOKEN_ROLES
from agiqa.store.planning import StorePlan, create_store
from agiqa.store.reading import Store, TokenRows, is_planned, open_store
from agiqa.store.sealing import seal
from agiqa.store.sketching import SketchResult, basis_from, sketch_store
from agiqa.store.summary import store_summary
from agiqa.store.verification import Damage, Report, verify

__all__ = [
    "ITEM_STATUS",
    "TOKEN_ROLES",
    "Basis",
    "Damage",
    "Items",
    "Report",
    "SketchResult",
    "Store",
    "StorePlan",
    "TokenRows",
    "UnitWriter",
    "basis_from",
    "create_store",
    "create_whole_array",
    "from_float32",
    "is_planned",
    "make_basis",
    "moments_of",
    "open_store",
    "save_basis",
    "seal",
    "sketch_store",
    "store_summary",
    "to_float32",
    "verify",
]
