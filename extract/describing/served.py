"""Stage 2 on a server: a model that vLLM, SGLang or another server of OpenAI's format runs describes the images.

The questions are those of `asking`, the lines those of `describing`. The server reads the image file and renders the
conversation by its own chat template; it does not tell which weights it runs, and the provenance says so.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agiqa.errors import DataError
from agiqa.extract.data.images import ImageFile, ImageSource, read_image_file
from agiqa.extract.data.items import DataSet, Item, Message
from agiqa.extract.describing.asking import Describer
from agiqa.extract.describing.describing import DescriptionResult, RatingOf, write_descriptions
from agiqa.extract.describing.rounds import Described, DescriptionSettings
from agiqa.extract.models import Answer, GenerationSettings, Prepared
from agiqa.extract.models.rendering import THOUGHT_MARKS
from agiqa.extract.teaching.chats import ChatRequest, Fault, Turn
from agiqa.extract.teaching.client import Client
from agiqa.extract.teaching.pictures import picture_of
from agiqa.store.sharing.transfers import Halted

JOBS = 8
"""Images in work at the same time by default."""

_CLOSING = 5.0
"""Seconds that answers on their way have after an error elsewhere, before their connections are closed."""
_SEEDS = 1 << 31
"""Seeds below this are taken by every server."""


@dataclass(frozen=True, kw_only=True)
class ServedQuestion(Prepared):
    """A conversation with its image, as it is sent. Its tokens are unknown: only the server has the tokenizer."""

    turns: tuple[Turn, ...]


class ServedModel:
    """An `AnsweringModel` behind a client."""

    max_positions: int | None = None
    reads_images = True

    def __init__(self, client: Client) -> None:
        """Sends nothing yet."""
        self.client = client

    def provenance(self) -> dict[str, Any]:
        """Server and name. Which weights, adapter, chat template and dtype the server uses is not known."""
        return {
            "name": self.client.model,
            "kind": "server",
            "server": self.client.api.base_url,
            "api": self.client.api.name,
            "weights": "not known",
        }

    def prepare(
        self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False
    ) -> ServedQuestion:
        """See `AnsweringModel.prepare`."""
        del answer  # a server always prompts for the next answer
        file = image if isinstance(image, ImageFile | None) else read_image_file(image)
        first, *others = conversation
        turns = [Turn(role=first.role, text=first.content, picture=None if file is None else picture_of(file))]
        turns += [Turn(role=turn.role, text=turn.content) for turn in others]
        nothing = np.zeros(0)
        return ServedQuestion(token_ids=nothing.astype(np.int32), roles=nothing.astype(np.uint8), turns=tuple(turns))

    def outline(
        self,
        conversation: Sequence[Message],
        image: ImageSource | None,
        *,
        size: tuple[int, int] | None = None,
        answer: bool = False,
    ) -> ServedQuestion:
        """As `prepare`: there are no tokens to outline."""
        del size
        return self.prepare(conversation, image, answer=answer)

    def generate(
        self, batch: Sequence[Prepared], settings: GenerationSettings, *, seeds: Sequence[int] | None = None
    ) -> list[str]:
        """See `AnsweringModel.generate`; one request after the other.

        Raises DataError for a question that the server refuses or cannot answer, RemoteError if it can answer none.
        """
        chosen = seeds or [settings.seed] * len(batch)
        return [self._ask(one, replace(settings, seed=seed)) for one, seed in zip(batch, chosen, strict=True)]

    def _ask(self, question: Prepared, settings: GenerationSettings) -> Answer:
        assert isinstance(question, ServedQuestion)  # by `prepare`
        reply = self.client.ask(_request(question.turns, settings)).reply
        if isinstance(reply, Fault):
            message = f"no answer of the server: {reply.reason}"
            raise DataError(message)
        if reply.refusal is not None:
            message = f"the server refuses to answer: {reply.refusal}"
            raise DataError(message)
        said, generated = _without_thoughts(reply.text)
        if reply.thoughts is not None:
            generated = f"{reply.thoughts}\n{reply.text}"
        return Answer(
            said,
            tokens=reply.output_tokens,
            complete=not reply.cut,
            generated=generated,
            prompt_tokens=reply.input_tokens,
        )


class ServedDescriber(Describer):
    """A `Describer` that asks about several images at the same time, each in requests of its own."""

    decoder = None

    def __init__(self, model: ServedModel, settings: DescriptionSettings, *, jobs: int = JOBS) -> None:
        """`settings` as `sent` makes them. Raises UnknownName for the aspect."""
        super().__init__(model, replace(settings, batch_size=1))
        self._jobs = jobs
        self._halt = model.client.halt

    def batches(self, batches: Sequence[Sequence[Item]]) -> Iterator[list[Described | str]]:
        """`describe` each batch, and yield its outcomes when they are there, in any order.

        The first error ends the run after the answers that are on their way.
        """
        waiting, lock = iter(batches), threading.Lock()
        done: queue.Queue[list[Described | str] | BaseException | None] = queue.Queue()

        def serve() -> None:
            try:
                while not self._halt.is_set():
                    with lock:
                        batch = next(waiting, None)
                    if batch is None:
                        break
                    done.put(self._describe(batch))
            except Halted:
                pass  # the run ends, by the error of another thread that is raised below, or because nobody reads on
            except BaseException as error:  # noqa: BLE001 - raised again below
                done.put(error)
            finally:
                done.put(None)

        running, failure = min(self._jobs, len(batches)), None
        threads = [threading.Thread(target=serve, daemon=True) for _ in range(running)]
        for thread in threads:
            thread.start()
        try:
            while running:
                outcome = done.get()
                if outcome is None:
                    running -= 1
                elif isinstance(outcome, BaseException):
                    self._halt.set()
                    failure = failure or outcome
                else:
                    yield outcome
        except BaseException as error:
            self._halt.set()
            if isinstance(error, GeneratorExit):  # not Ctrl-C, which ends at once
                until = time.monotonic() + _CLOSING
                for thread in threads:
                    thread.join(max(0.0, until - time.monotonic()))
            raise
        if failure is not None:
            raise failure

    def _describe(self, batch: Sequence[Item]) -> list[Described | str]:
        try:
            return next(super().batches([batch]))
        except DataError as error:
            return [f"{item.name}: {error}" for item in batch]


def sent(settings: DescriptionSettings) -> DescriptionSettings:
    """`settings` without what OpenAI's format does not have: `top_k` and `repetition_penalty`."""
    describe = replace(settings.describe, top_k=0, repetition_penalty=1.0)
    rate = None if settings.rate is None else replace(settings.rate, top_k=0, repetition_penalty=1.0)
    return replace(settings, describe=describe, rate=rate)


def run_served_descriptions(
    data_set: DataSet,
    client: Client,
    out: Path,
    settings: DescriptionSettings,
    *,
    rating_of: RatingOf,
    jobs: int = JOBS,
) -> DescriptionResult:
    """As `run_descriptions`, by the model of `client`, about `jobs` images at the same time.

    An item that the server refuses, or for which it has no answer, is a bad item (`settings.on_bad_item`); the next run
    asks again. Raises RemoteError if the server can answer nothing: no connection, a wrong key, an unknown model.
    """
    describer = ServedDescriber(ServedModel(client), sent(settings), jobs=jobs)
    return write_descriptions(data_set, describer, out, rating_of=rating_of)


def _request(turns: tuple[Turn, ...], settings: GenerationSettings) -> ChatRequest:
    """Greedy decoding is temperature 0."""
    if not settings.sample:
        return ChatRequest(turns=turns, max_tokens=settings.max_new_tokens, temperature=0.0)
    return ChatRequest(
        turns=turns,
        max_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed % _SEEDS,
    )


def _without_thoughts(text: str) -> tuple[str, str | None]:
    """(the answer without thoughts; the whole text, None if it has no thoughts), as `split_thoughts`.

    Most servers send thoughts beside the text, or not at all; those that are not told the family of the model do not.
    """
    for begin, end in THOUGHT_MARKS:
        if end in text:
            return text.rpartition(end)[2].strip(), text
        if text.lstrip().startswith(begin):
            return "", text
    return text.strip(), None
