"""All families of image-text-to-text models that are tried."""

from tests.extract.families.family import Family
from tests.extract.families.grids import GRIDS
from tests.extract.families.squares import SQUARES

FAMILIES: dict[str, Family] = {**SQUARES, **GRIDS}
