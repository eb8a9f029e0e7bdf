"""The laws of encoders, applied to your own: python -m pytest test_running_mean.py."""

from pathlib import Path

import agiqa

agiqa.import_parts(Path(__file__).with_name("running_mean.py"))


def test_running_mean():
    agiqa.check_encoder("running-mean")
