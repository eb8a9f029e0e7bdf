"""A small data set, and runs of a teacher on it: what the tests of whole runs share."""

import json
from dataclasses import replace

from agiqa.extract import load_data_set
from agiqa.extract.teaching.apis import api_of
from agiqa.extract.teaching.client import ClientSettings, Key
from agiqa.extract.teaching.job import Splits, TeachingSettings
from agiqa.extract.teaching.questions import QuestionSettings
from agiqa.extract.teaching.teacher import TeacherModel
from agiqa.extract.teaching.teaching import run_teaching
from agiqa.extract.teaching.wording_and_prices import Price
from tests.extract.small_sets import read_table, write_set, write_table
from tests.extract.teaching.providers import MODEL

ITEMS = 12
QUICK = ClientSettings(tries=3, first_wait=0.01, patience=0.0, timeout=10.0)
PRICE = Price(input=100.0, output=1000.0)
"""High, so that small requests cost visible sums."""
QUALITY = QuestionSettings(aspects=("quality",), max_tokens=100)
SETTINGS = TeachingSettings(question=QUALITY, client=QUICK, jobs=4)


def make_data(folder):
    """Items with a prompt each: `picture-0-`, `picture-1-`, ..."""
    write_set(folder, ITEMS, images=True)
    rows = [row | {"prompt": prompt_of(number)} for number, row in enumerate(read_table(folder))]
    write_table(folder, [list(row.values()) for row in rows], list(rows[0]))
    return load_data_set(folder, variant="no_id", images=True)


def teacher(server, model=MODEL, price=None):
    return TeacherModel(
        api=api_of(server.API, server.base_url), model=model, key=Key(variable="A_KEY", value=server.key), price=price
    )


def run(data, out, *models, splits=None, **changes):
    rule = Splits(of=splits or {item.name: item.split for item in data.items}, rule={"by": "table"})
    return run_teaching(data, out, models, replace(SETTINGS, **changes), splits=rule)


def lines_of(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["name"]: line for line in lines}


def prompt_of(number):
    return f"picture-{number}-"


def name_of(number):
    return f"{number:03d}.png"
