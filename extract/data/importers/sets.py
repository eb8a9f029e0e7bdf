"""The published sets that agiqa imports, in the registry `IMPORTERS`. A user's own module adds further ones."""

from agiqa.extract.data.importers.agiqa_1k import AGIQA_1K
from agiqa.extract.data.importers.agiqa_3k import AGIQA_3K
from agiqa.extract.data.importers.aigciqa2023 import AIGCIQA2023
from agiqa.extract.data.importers.aigiqa_20k import AIGIQA_20K
from agiqa.extract.data.importers.contract import IMPORTERS as IMPORTERS
from agiqa.extract.data.importers.evalmi_50k import EVALMI_50K
from agiqa.extract.data.importers.pku_i2iqa import PKU_I2IQA
from agiqa.extract.data.importers.q_eval_100k import Q_EVAL_100K

for _set in (AGIQA_3K, AIGCIQA2023, AIGIQA_20K, AGIQA_1K, PKU_I2IQA, EVALMI_50K, Q_EVAL_100K):
    IMPORTERS.add(_set.name, _set)
