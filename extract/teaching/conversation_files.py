"""The teacher's explanations as M3-AGIQA conversations, one file per aspect, for `agiqa tune` and `agiqa extract`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agiqa.extract.data.items import Item
from agiqa.extract.data.journals import Line
from agiqa.extract.data.templates import fill, template_of
from agiqa.extract.teaching.questions import QuestionSettings
from agiqa.store.disk.files import write_text_atomically
from agiqa.store.format.items import TEACHER, TEACHER_BLIND, TEXT_AUTHOR
from agiqa.store.format.labels import RATING_WORDS, MosRange, rating_numbers


def write_conversations(
    journal: Path,
    items: Sequence[Item],
    lines: Mapping[str, Line],
    settings: QuestionSettings,
    splits: Mapping[str, str | None],
) -> dict[str, Path]:
    """Write the conversations of each aspect to `NAME.ASPECT.jsonl` beside `journal`; the files by aspect.

    `splits` is train, val, test or None by item name. The questions are those of the published adapters. The rating
    word is that of the MOS, also after a text whose author did not know the MOS; an item without a MOS has none.
    Without explanations nothing is written.
    """
    explained = [(item, lines[item.name]) for item in items if lines.get(item.name, {}).get("status") == "ok"]
    written: dict[str, Path] = {}
    if explained:
        for aspect in settings.aspects:
            entries = [_entry(item, line, aspect, settings, splits.get(item.name)) for item, line in explained]
            path = conversations_path(journal, aspect)
            write_text_atomically(path, "".join(json.dumps(entry) + "\n" for entry in entries))
            written[aspect] = path
    return written


def conversations_path(journal: Path, aspect: str) -> Path:
    """The file of conversations on `aspect` beside `journal`."""
    return journal.with_name(f"{journal.stem}.{aspect}.jsonl")


def _entry(item: Item, line: Line, aspect: str, settings: QuestionSettings, split: str | None) -> dict[str, Any]:
    wording = template_of(aspect)
    texts = [f"<image>\n{fill(wording.describe, item.prompt)}", line["explanations"][aspect], wording.rate]
    if aspect in item.labels:
        texts.append(_word(item.labels[aspect], settings.mos_range))
    return {
        "id": item.name,
        "image": item.name,
        "prompt": item.prompt,
        "conversations": [
            {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)
        ],
        TEXT_AUTHOR: TEACHER_BLIND if settings.blind else TEACHER,
        "rating_author": TEACHER,
        "split": split,
    }


def _word(mos: float, mos_range: MosRange) -> str:
    return RATING_WORDS[rating_numbers(np.array([mos]), mos_range)[0]]
