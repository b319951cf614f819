"""What a language model is asked about a training example, and how the answers become rationales.

A dialogue is a generator: it yields requests, is sent answers, and returns its result. It does no input or output
itself, so the same code asks a server, fills batch files, estimates costs, and reads results back from the cache. All
rationales are read back from the cache, in the rows' order: the files depend on the answers alone, not on when they
came or how often the stage was killed on the way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from twice_rec import prompts
from twice_rec.progress import progress
from twice_rec.prompts import ItemLookup, Message, PromptFormat
from twice_rec.rationales.answers import (
    CHECK_SCHEMA,
    Annotation,
    Malformed,
    annotation_schema,
    parse_annotation,
    parse_check,
)
from twice_rec.rationales.cache import Answer, AnswerCache
from twice_rec.rationales.client import ChatClient, ClientSettings, NoAnswer, Request, Sampling, Stopped
from twice_rec.rationales.curate import NotAnnotated
from twice_rec.records import Example, Interaction, Item, Rationale

logger = logging.getLogger(__name__)

T = TypeVar("T")
Dialogue = Generator[Request, Answer, T]

_SHOWN_OF_CUT_OFF = 200  # characters of a cut-off answer that the model is shown again


class Unanswered(Exception):
    """The cache has no answer to this request."""

    def __init__(self, request: Request):
        super().__init__(request.key)
        self.request = request


@dataclass(frozen=True, slots=True)
class Questions:
    """How examples are asked about; `instructions` as `prompts.annotation_instructions` makes them."""

    catalog: ItemLookup
    shown: PromptFormat
    instructions: Sequence[Message]
    sampling: Sampling
    max_reasks: int

    def annotate(self, example: Example) -> Dialogue[Rationale]:
        """Ask for rationale and verdict; raises NotAnnotated where no answer can be used."""
        past, first = self._history(example)
        question = prompts.annotation_question(past, self.catalog[example.target], self.shown)
        messages = [*self.instructions, question]
        found: Annotation = yield from self._talk(
            messages, annotation_schema(len(past)), "annotation", lambda text: parse_annotation(text, len(past))
        )
        return Rationale(
            user_id=example.user_id,
            target=example.target,
            text=found.rationale,
            verdict=found.verdict,  # type: ignore[arg-type]
            evidence=tuple(first + number - 1 for number in found.evidence),
            confidence=found.confidence,
            annotator=self.sampling.model,
        )

    def review(self, example: Example, rationale: Rationale) -> Dialogue[str | None]:
        """Ask for the self-check; returns a reason to drop the rationale, or None."""
        past, _ = self._history(example)
        messages = prompts.self_check(past, self.catalog[example.target], self.shown, rationale.text)
        try:
            failed: tuple[str, ...] = yield from self._talk(messages, CHECK_SCHEMA, "check", parse_check)
        except NotAnnotated as nothing:
            return f"self-check without result: {nothing}"
        return f"self-check: not {', '.join(failed)}" if failed else None

    def _history(self, example: Example) -> tuple[list[tuple[Interaction, Item]], int]:
        """The purchases that are shown, and the position of the first of them in the whole history."""
        first = max(0, len(example.history) - self.shown.prompt_history_items) if self.shown.prompt_history_items else 0
        return [(entry, self.catalog[entry.item_id]) for entry in example.history[first:]], first

    def _talk(
        self, messages: list[Message], schema: Mapping[str, Any], name: str, parse: Callable[[str], T]
    ) -> Dialogue[T]:
        """Ask, and ask again with the fault named, up to `max_reasks` times."""
        asked = messages
        for _ in range(1 + self.max_reasks):
            answer = yield Request.of(asked, self.sampling, schema, name)
            if answer.refusal or answer.finish == "content_filter":
                raise NotAnnotated(f"refused by the model: {answer.refusal[:200] or 'content filter'}")
            try:
                return parse(answer.text)
            except Malformed as error:
                text, kind, fault = answer.text.strip() or "(nothing)", "malformed answer", str(error)
            if answer.finish == "length":
                kind, fault = "cut off", f"it was cut off at {self.sampling.max_tokens} tokens; be much shorter"
                text = f"{text[:_SHOWN_OF_CUT_OFF]} ..."
            asked = prompts.ask_again(asked, text, fault)
        raise NotAnnotated(f"{kind}: {fault}")


def from_cache(dialogue: Dialogue[T], cache: AnswerCache) -> T:
    """Run a dialogue on stored answers; raises Unanswered at the first that is missing."""
    try:
        request = next(dialogue)
        while True:
            answer = cache.get(request.key)
            if answer is None:
                raise Unanswered(request)
            request = dialogue.send(answer)
    except StopIteration as end:
        return end.value


async def from_server(dialogue: Dialogue[T], client: ChatClient) -> T:
    """Run a dialogue against the server; raises Unanswered where a request gets no answer."""
    try:
        request = next(dialogue)
        while True:
            try:
                answer = await client.ask(request)
            except NoAnswer as nothing:
                raise Unanswered(request) from nothing
            request = dialogue.send(answer)
    except StopIteration as end:
        return end.value


Worth = Callable[[Example, Rationale], bool]


@dataclass(frozen=True, slots=True)
class Collected:
    """What the stored answers give: a row's rationale and its review, and why requests have none."""

    questions: Questions
    cache: AnswerCache
    failures: Mapping[str, str]

    def annotate(self, example: Example) -> Rationale:
        """The rationale; raises NotAnnotated."""
        return self._of(self.questions.annotate(example))

    def review(self, example: Example, rationale: Rationale) -> str | None:
        """A reason to drop it, or None."""
        try:
            return self._of(self.questions.review(example, rationale))
        except NotAnnotated as nothing:
            return f"self-check without result: {nothing}"

    def _of(self, dialogue: Dialogue[T]) -> T:
        try:
            return from_cache(dialogue, self.cache)
        except Unanswered as missing:
            raise NotAnnotated(f"no answer: {self.failures.get(missing.request.key, 'never asked')}") from None


def collect(
    examples: Iterable[Example],
    questions: Questions,
    settings: ClientSettings,
    cache: AnswerCache,
    worth_reviewing: Worth | None,
    total: int | None = None,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Ask the server about every example, `concurrency` at a time, until the cache has all answers.

    Args:
        worth_reviewing: which rationales get a self-check; None for none.
        total: number of examples, for the progress bar.

    Returns:
        (request key -> why it has no answer; figures of this run).

    Raises:
        Stopped: where the run cannot go on; what is under way is let finish and stored first.
    """
    return asyncio.run(_collect(iter(examples), questions, settings, cache, worth_reviewing, total))


async def _collect(
    examples: Iterator[Example],
    questions: Questions,
    settings: ClientSettings,
    cache: AnswerCache,
    worth_reviewing: Worth | None,
    total: int | None,
) -> tuple[dict[str, str], dict[str, Any]]:
    client = ChatClient(settings, cache)
    failures: dict[str, str] = {}
    bar = progress(desc="rationales", unit="row", total=total)

    async def work() -> None:
        for example in examples:
            try:
                rationale = await from_server(questions.annotate(example), client)
                if worth_reviewing and worth_reviewing(example, rationale):
                    await from_server(questions.review(example, rationale), client)
            except NotAnnotated:
                pass
            except Unanswered as missing:
                failures[missing.request.key] = str(missing.__cause__)
            except Stopped:
                return
            bar.update()
            bar.set_postfix(cost=f"{client.cost:.2f}", refresh=False)

    try:
        await client.preflight(questions.sampling.model)
        await asyncio.gather(*(work() for _ in range(settings.concurrency)))
        if client.in_doubt and not client.stopped:
            await client.preflight(questions.sampling.model)
    finally:
        bar.close()
        await client.close()
        logger.info("%s", "; ".join(f"{name} {value}" for name, value in client.figures().items()))
    if client.stopped:
        raise client.stopped
    return failures, client.figures()


def unanswered(
    examples: Iterable[Example], collected: Collected, worth_reviewing: Worth | None
) -> Iterator[tuple[Example, Request]]:
    """The next request of every row that still needs one; rows whose request has failed for good need none."""
    for example in examples:
        try:
            rationale = from_cache(collected.questions.annotate(example), collected.cache)
            if worth_reviewing and worth_reviewing(example, rationale):
                from_cache(collected.questions.review(example, rationale), collected.cache)
        except NotAnnotated:
            continue
        except Unanswered as missing:
            if missing.request.key not in collected.failures:
                yield example, missing.request


def estimate(
    examples: Sequence[Example], collected: Collected, worth_reviewing: Worth | None, settings: ClientSettings
) -> str:
    """What a run would ask for, in words: calls, tokens, cost, and one whole prompt. Sends and stores nothing."""
    chars = calls = most = 0
    first: Request | None = None
    for _, request in unanswered(examples, collected, worth_reviewing):
        first = first or request
        calls, chars, most = calls + 1, chars + request.prompt_chars, most + request.max_tokens
    tokens = chars // _CHARS_PER_TOKEN
    cache = collected.cache
    lines = [
        f"rows: {len(examples):,}; answers stored already: {len(cache):,}, which cost "
        f"{settings.cost(cache.prompt_tokens, cache.completion_tokens):.2f}",
        f"calls to make: {calls:,}" + (", and up to as many self-checks, which are shorter" if worth_reviewing else ""),
        f"tokens: about {tokens:,} in (at {_CHARS_PER_TOKEN} characters a token), at most {most:,} out",
        f"cost: about {settings.cost(tokens, 0):.2f} in, at most {settings.cost(0, most):.2f} out",
    ]
    if first is not None:
        lines += ["one whole prompt:", first.readable()]
    return "\n".join(lines)


_CHARS_PER_TOKEN = 4
