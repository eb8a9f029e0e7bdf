"""One item made from its row, its conversation and its image, or the line that says why it cannot be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agiqa.errors import DataError
from agiqa.extract.data.images import checked_image
from agiqa.extract.data.items import Item, Message
from agiqa.extract.data.joining import Pair
from agiqa.extract.data.sources import Sources
from agiqa.extract.data.templates import fill, template_of


@dataclass(frozen=True, kw_only=True)
class ItemBuilder:
    """Builds the items of one data set under one conversation variant."""

    sources: Sources
    aspects: Sequence[str]
    """Whose descriptions the conversations hold, first the one that is rated."""
    variant: str
    images: bool
    check: Callable[[Path], str] = checked_image
    """Decodes the image at a path: its SHA-256."""

    def build(self, pair: Pair) -> Item | str:
        """The item of `pair`, its image decoded once for the check, or one line naming item, file and reasons."""
        row, talk = pair
        problems = [*row.problems, *self._missing_words(pair)]
        image, sha256 = None, None
        if self.images and not row.problems:
            try:
                image, sha256 = self._image_of(row.name)
            except DataError as error:
                problems.append(str(error))
        if problems:
            label = row.name if row.name.strip() else "a row without a name"
            return f"{label} ({self.sources.table.name}, line {row.number}): {'; '.join(problems)}"
        turns = self._conversation(pair)
        return Item(
            name=row.name,
            prompt=row.prompt,
            conversation=turns,
            image=image,
            labels=dict(row.labels),
            split=talk.split if talk is not None and talk.split is not None else row.split,
            generator=row.generator,
            description=turns[1].content if len(turns) > 1 else None,
            image_sha256=sha256,
            text_author=self._text_author(pair),
        )

    def _text_author(self, pair: Pair) -> str | None:
        """Who wrote what the model reads beside the questions; None without such a text, too."""
        row, talk = pair
        if self.variant == "no_id":
            return None
        return row.text_author if talk is None else talk.text_author(self.variant)

    def _image_of(self, name: str) -> tuple[Path, str]:
        """The image file called `name` and its SHA-256. Raises DataError for one that is missing or cannot be read."""
        image = self.sources.image_of(name)
        if image is None:
            message = f"no image of that name in {' or '.join(str(folder) for folder in self.sources.folders)}"
            raise DataError(message)
        return image, self.check(image)

    def _missing_words(self, pair: Pair) -> list[str]:
        row, talk = pair
        problems: list[str] = []
        lacking = [aspect for aspect in self.aspects if aspect not in row.descriptions]
        if self.variant != "no_id" and talk is None and lacking:
            which = f" of {' and '.join(lacking)}" if len(self.aspects) > 1 else ""
            problems.append(f"no description{which}; give --conversations or use --variant no_id")
        if self.variant == "full" and (row.rating if talk is None else talk.rating) is None:
            problems.append("no rating word, which the variant full needs; use --variant id")
        if talk is not None and talk.split and row.split and talk.split != row.split:
            problems.append(f"in split {row.split} by the table but {talk.split} by {talk.where}")
        return problems

    def _conversation(self, pair: Pair) -> tuple[Message, ...]:
        row, talk = pair
        rated = template_of(self.aspects[0])
        if self.variant == "no_id":
            return (Message(role="user", content=fill(rated.one_round, row.prompt)),)
        if talk is not None:
            return talk.messages(self.variant)
        turns: list[Message] = []
        for aspect in self.aspects:
            turns.append(Message(role="user", content=fill(template_of(aspect).describe, row.prompt)))
            turns.append(Message(role="assistant", content=row.descriptions[aspect]))
        turns.append(Message(role="user", content=rated.rate))
        if self.variant == "full":
            turns.append(Message(role="assistant", content=row.rating or ""))
        return tuple(turns)
