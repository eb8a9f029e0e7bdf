"""Who wrote the text that an item reads: a teacher that was told its MOS, a blind one, or the model itself.

A teacher's rating word is its MOS in other words. Test items that read it are scored too well.
"""

from collections import Counter
from collections.abc import Iterable

TEACHER, TEACHER_BLIND, MODEL = "teacher", "teacher-blind", "model"
TEXT_AUTHORS = (TEACHER, TEACHER_BLIND, MODEL)
"""An online model that was told the MOS, one that was not, and the model that the features are of."""
TEXT_AUTHOR = "text_author"
"""What the column of an item table and the field of a conversation are called."""
UNKNOWN = "unknown"

_BY_WEIGHT = (TEACHER, None, TEACHER_BLIND, MODEL)


def author_of(writers: Iterable[str | None]) -> str | None:
    """The author to record for texts of several writers: the one whose text tells most of the MOS.

    None, which is unknown, comes after the teacher that was told the MOS. No texts have no author, None too.
    """
    return min(writers, key=_BY_WEIGHT.index, default=None)


def count_authors(authors: Iterable[str | None]) -> dict[str, int]:
    """How many items have a text by each author, `unknown` for None; in the order of their names."""
    return dict(sorted(Counter(author or UNKNOWN for author in authors).items()))


def teacher_warning(part: str, count: int, total: int, *, rating_words: bool) -> str:
    """What a reader must know where `count` of the `total` items of `part` read a teacher's text.

    `rating_words` says whether the conversations hold the rating word too.
    """
    told = f"{count} of {total} {part} items read the text of a teacher that was told their MOS"
    remedy = "Use the model's own answers: `agiqa describe` makes them, `response_0` and `response_1` hold them."
    if rating_words:
        return f"{told}, its rating word included: the features hold the answer, and scores are too high. {remedy}"
    return f"{told}, without its rating word; a model that does not know the MOS may describe otherwise. {remedy}"
