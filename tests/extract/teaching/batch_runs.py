"""Runs of a teacher in batches on a small data set: what the tests of batches share."""

import json

from agiqa.extract import load_data_set
from agiqa.extract.teaching.answers import KEYS
from agiqa.extract.teaching.apis import api_of
from agiqa.extract.teaching.batch_steps import BatchSettings
from agiqa.extract.teaching.batches import run_batches
from agiqa.extract.teaching.client import ClientSettings, Key
from agiqa.extract.teaching.job import Splits, TeachingSettings
from agiqa.extract.teaching.questions import QuestionSettings
from agiqa.extract.teaching.teacher import TeacherModel
from agiqa.extract.teaching.wording_and_prices import Price
from tests.extract.teaching.providers import (
    FALLBACK,
    KEY,
    MODEL,
    answer_of,
)

PRICE = Price(input=1.0, output=4.0)
QUICK = ClientSettings(timeout=20.0, first_wait=0.01, patience=5.0)
SOON = BatchSettings(interval=0.01)


class Taught:
    """A data set, a server, and the files of one journal."""

    def __init__(self, server, folder, out):
        self.server, self.folder, self.out = server, folder, out
        self.fallback = False
        self.others: list[TeacherModel] = []

    def run(self, batches=SOON, **settings):
        data_set = load_data_set(self.folder, variant="no_id", images=True, mos_range=(0.0, 5.0), on_bad_item="fail")
        api, key = api_of(self.server.API, self.server.base_url), Key(variable="K", value=KEY)
        names = (MODEL, FALLBACK) if self.fallback else (MODEL,)
        models = [TeacherModel(api=api, model=name, key=key, price=PRICE) for name in names] + self.others
        chosen = {"question": QuestionSettings(aspects=("quality",)), "client": QUICK, "retries": 1} | settings
        splits = Splits(of={item.name: item.split for item in data_set.items}, rule={"by": "table"})
        return run_batches(data_set, self.out, models, TeachingSettings(**chosen), batches, splits=splits)

    def lines(self):
        return {line["name"]: line for line in map(json.loads, self.out.read_text().splitlines())}

    def files(self):
        return sorted(path.name for path in self.out.parent.iterdir())

    def expected(self):
        """The explanations by image, as the server would give them for the request with this image."""
        images = {path.name: path.read_bytes() for path in (self.folder / "images").iterdir()}
        answers = {request.images[0]: answer_of(request) for request in self.server.paid}
        return {
            name: {"quality": answers[content][KEYS["quality"]]}
            for name, content in images.items()
            if content in answers
        }


DONE = ["teacher.jsonl", "teacher.provenance.json", "teacher.quality.jsonl"]
"""The files beside the journal when nothing is open."""
