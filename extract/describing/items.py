"""The items of a describing run with their new conversations, as `agiqa extract --conversations` reads them."""

from dataclasses import replace
from pathlib import Path

from agiqa.errors import DataError
from agiqa.extract.data.conversations import Conversation, parse_source, read_conversations
from agiqa.extract.data.items import DataSet, Item, OnBadItem
from agiqa.extract.data.templates import prefixes_of, reads_rating_word


def described_items(
    data_set: DataSet, path: Path, *, variant: str, aspect: str, on_bad_item: OnBadItem = "fail"
) -> DataSet:
    """The items of `data_set` that the file `path` of `agiqa describe` has lines about, as conversations of `variant`.

    Neither the table nor an image is read again. Raises DataError that lists the items whose line makes no such
    conversation; with `on_bad_item="skip"` they are left out, unless no item would be left. Only those are `skipped`
    then: a store counts them, and `agiqa extract` meets no other bad items.
    """
    found = {one.image: one for one in read_conversations(path, parse_source(str(path)).split)}
    pairs = [(item, found[item.name]) for item in data_set.items if item.name in found]
    problems = [
        f"{item.name} ({one.where}): {'; '.join(faults)}" for item, one in pairs if (faults := _faults(one, variant))
    ]
    if problems and (on_bad_item == "fail" or len(problems) == len(pairs)):
        raise DataError.from_problems(str(path), problems)
    items = tuple(_item(item, one, variant, aspect) for item, one in pairs if not _faults(one, variant))
    return replace(data_set, items=items, skipped=tuple(problems), notes=())


def _faults(conversation: Conversation, variant: str) -> list[str]:
    """Why `conversation` cannot be read as `variant`."""
    faults = list(conversation.problems)
    if reads_rating_word(variant) and conversation.rating is None:
        faults.append("no rating word, which the variant full needs; give --on-bad-item skip, or use --variant id")
    return faults


def _item(item: Item, conversation: Conversation, variant: str, aspect: str) -> Item:
    turns = conversation.messages(variant)
    return replace(
        item,
        conversation=turns,
        split=item.split if conversation.split is None else conversation.split,
        description=turns[1].content if len(turns) > 1 else None,
        text_author=conversation.text_author(variant),
        prefix_authors={name: conversation.text_author(name) for name in prefixes_of(variant, aspect)},
    )
