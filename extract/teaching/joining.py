"""Whose answer is it? Results of a batch find their items by the ids that answers repeat, not by the provider's keys.

Providers have returned results out of order, and answers under the keys of other requests. The ids are made so that no
model can guess one: an answer that repeats an id was made for the request that holds it.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from agiqa.extract.teaching.batch_apis import BatchResult
from agiqa.extract.teaching.chats import Fault, Reply

MIXED_UP = "the provider mixed up its answers, and whose this one is cannot be told"


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The results of a batch by the ids of its requests; an id without any was not worked on."""

    replies: Mapping[str, Reply | Fault]
    """What certainly belongs to this id: answers that repeat it; refusals and faults where no key was wrong."""
    doubts: Mapping[str, str]
    """Why an id has no reply, although the provider worked on it."""
    doubtful: Mapping[str, Reply | Fault]
    """By the id of a doubt, what came under its key; nothing if that belongs to another id."""
    misplaced: int
    """Answers under the key of another request."""


def join(ids: Collection[str], results: Sequence[BatchResult], echoed: Callable[[str], str | None]) -> Joined:
    """The replies among `results` to the requests `ids`; `echoed` finds the id that the text of an answer repeats.

    An answer belongs to the id that it repeats if key and id agree, or if no other answer repeats this id. Where an
    answer without an id (a refusal, an error, broken JSON) belongs, only the key says: none is believed once a key of
    the batch has been wrong.
    """
    claims, unsigned, doubts = defaultdict[str, list[BatchResult]](list), list[BatchResult](), dict[str, str]()
    for result in results:
        said = _said(result, echoed)
        if said in ids:
            claims[str(said)].append(result)
        elif said is None:
            unsigned.append(result)
        else:
            doubts[result.key] = f"the answer repeats the id {said!r}, which no request of the batch has"
    replies, misplaced = dict[str, Reply | Fault](), list[str]()
    for name, found in claims.items():
        agreeing = [one for one in found if one.key == name]
        sure = (agreeing or (found if len(found) == 1 else []))[:1]
        replies.update((name, one.reply) for one in sure if one.reply is not None)
        misplaced += [one.key for one in found if one.key != name]
    keys = [one.key for one in results]
    unsure = bool(misplaced) or len(set(keys)) < len(keys) or not set(keys) <= set(ids)
    for result in unsigned:
        if result.reply is not None and unsure:
            doubts.setdefault(result.key, MIXED_UP)
        elif result.reply is not None:
            replies.setdefault(result.key, result.reply)
    doubts = dict.fromkeys(misplaced, MIXED_UP) | doubts
    doubts = {name: reason for name, reason in doubts.items() if name in ids and name not in replies}
    used = {id(reply) for reply in replies.values()}
    doubtful = {one.key: one.reply for one in results if one.key in doubts and one.reply and id(one.reply) not in used}
    return Joined(replies=replies, doubts=doubts, doubtful=doubtful, misplaced=len(misplaced))


def _said(result: BatchResult, echoed: Callable[[str], str | None]) -> str | None:
    """The id that an answer repeats; None for a refusal, a fault, and an answer that cannot be read."""
    reply = result.reply
    return echoed(reply.text) if isinstance(reply, Reply) and reply.refusal is None else None
