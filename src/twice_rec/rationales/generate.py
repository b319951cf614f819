"""What a language model is asked about a training example, and how its completions become rationales.

A dialogue is a generator: it yields requests, is sent completions, and returns its result. It does no input or output
itself, so the same code asks a server, fills batch files, estimates costs, and reads results back from the cache. All
rationales are read back from the cache, in the order of the examples: the files depend on the completions alone, not on
when they came or how often the stage was killed on the way.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from twice_rec import prompts
from twice_rec.catalog import ItemCatalog
from twice_rec.errors import Unfinished
from twice_rec.progress import progress
from twice_rec.prompts import Message, PromptFormat
from twice_rec.rationales import answers
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.client import ChatClient
from twice_rec.rationales.completions import Completion, Request
from twice_rec.rationales.curate import Checks, NotAnnotated
from twice_rec.rationales.faults import NoCompletion, Stopped
from twice_rec.rationales.recipe import ClientConfig, SamplingConfig
from twice_rec.records import Example, Interaction, Item, Rationale

logger = logging.getLogger(__name__)

T = TypeVar("T")
Dialogue = Generator[Request, Completion, T]

_SHOWN_OF_CUT_OFF = 200  # characters of a cut-off completion that the model is shown again
CHARS_PER_TOKEN = 4  # for estimates


class Asks(Protocol):
    """What a model is asked about rows of some kind: training examples here, recommendations in `evaluation.judge`."""

    @property
    def config(self) -> SamplingConfig:
        """What its requests say besides their messages."""

    @property
    def more(self) -> str:
        """What may be asked beyond the first request of a row, for estimates; empty if nothing."""

    def everything(self, row: Any) -> Dialogue[None]:
        """Ask all there is about a row; raises NotAnnotated if no completion can be used."""


def talk(
    config: SamplingConfig, messages: list[Message], schema: Mapping[str, Any], name: str, parse: Callable[[str], T]
) -> Dialogue[T]:
    """Ask, and ask again with the fault named, up to `max_reasks` times.

    Raises:
        NotAnnotated: if the model refuses, or none of its completions can be used.
    """
    for _ in range(1 + config.max_reasks):
        completion = yield Request.of(messages, config, schema, name)
        if completion.refusal or completion.finish == "content_filter":
            raise NotAnnotated(f"refused by the model: {completion.refusal[:200] or 'content filter'}")
        try:
            return parse(completion.text)
        except answers.Malformed as error:
            text, kind, fault = completion.text.strip() or "(nothing)", "malformed answer", str(error)
        if completion.finish == "length":
            kind, fault = "cut off", f"it was cut off at {config.max_tokens} tokens; be much shorter"
            text = f"{text[:_SHOWN_OF_CUT_OFF]} ..."
        messages = prompts.ask_again(messages, text, fault)
    raise NotAnnotated(f"{kind}: {fault}")


def shown_history(
    example: Example, catalog: ItemCatalog, shown: PromptFormat
) -> tuple[list[tuple[Interaction, Item]], int]:
    """Return the interactions that are shown, and the position of the first of them in the whole history."""
    most = shown.prompt_history_items or len(example.history)
    first = max(0, len(example.history) - most)
    return [(entry, catalog[entry.item_id]) for entry in example.history[first:]], first


@dataclass(frozen=True, slots=True)
class Questions:
    """How examples are asked about.

    Args:
        shown: how much of items and reviews the prompts show.
        instructions: how every request for a rationale begins; `prompts.annotation_instructions` makes them.
        checks: what passes them gets a self-check; None for no self-checks.
        picks: the self-check hides the target and asks which candidate it is, instead of showing it with a rubric.
    """

    catalog: ItemCatalog
    shown: PromptFormat
    instructions: Sequence[Message]
    config: SamplingConfig
    checks: Checks | None = None
    picks: bool = False

    @property
    def more(self) -> str:
        """See `Asks`."""
        return "up to as many self-checks, which are shorter" if self.checks else ""

    def everything(self, example: Example) -> Dialogue[None]:
        """Ask for a rationale and, if it passes the checks, for its self-check; raises like `annotate`."""
        rationale = yield from self.annotate(example)
        if self.checks and self.checks.reason(example, rationale) is None:
            yield from self.review(example, rationale)

    def annotate(self, example: Example) -> Dialogue[Rationale]:
        """Ask for rationale and verdict.

        Raises:
            NotAnnotated: if the model refuses, or none of its completions can be used.
        """
        past, first = shown_history(example, self.catalog, self.shown)
        question = prompts.annotation_question(past, self.catalog[example.target], self.shown)
        messages = [*self.instructions, question]
        parse = lambda text: answers.parse_annotation(text, len(past))
        found = yield from talk(self.config, messages, answers.annotation_schema(len(past)), "annotation", parse)
        evidence = tuple(first + number - 1 for number in found.evidence)  # prompts count from 1 what they show
        judged = (found.rationale, found.verdict, evidence, found.confidence)
        return Rationale(example.user_id, example.target, *judged, annotator=str(self.config.model))

    def review(self, example: Example, rationale: Rationale) -> Dialogue[str | None]:
        """Ask for the self-check; returns a reason to reject the rationale, or None. Raises like `annotate`."""
        past, _ = shown_history(example, self.catalog, self.shown)
        if self.picks:
            candidates = [self.catalog[item_id] for item_id in example.candidates]
            messages = prompts.self_pick(past, candidates, self.shown, rationale.text)
            parse = lambda text: answers.parse_pick(text, len(candidates))
            picked = yield from talk(self.config, messages, answers.pick_schema(len(candidates)), "pick", parse)
            return None if example.candidates[picked] == example.target else "self-check: another candidate is picked"
        messages = prompts.self_check(past, self.catalog[example.target], self.shown, rationale.text)
        failed = yield from talk(self.config, messages, answers.CHECK_SCHEMA, "check", answers.parse_check)
        return f"self-check: not {', '.join(failed)}" if failed else None


class NotCollected(NotAnnotated):
    """A completion is missing; `request` asks for it."""

    def __init__(self, request: Request, why: str):
        super().__init__(f"no answer: {why}")
        self.request = request


@dataclass(frozen=True, slots=True)
class Collected:
    """What the stored completions give: rationales and their reviews, if it is they that `questions` ask for.

    Args:
        failures: request key -> why it has no completion, for requests that are not sent again.
    """

    questions: Asks
    cache: CompletionCache
    failures: dict[str, str] = field(default_factory=dict)

    def annotate(self, example: Example) -> Rationale:
        """Return the rationale; raises NotAnnotated if there is none."""
        return self.result(self.questions.annotate(example))

    def review(self, example: Example, rationale: Rationale) -> str | None:
        """Return a reason to reject the rationale, or None; a check without result is a reason."""
        try:
            return self.result(self.questions.review(example, rationale))
        except NotAnnotated as nothing:
            return f"self-check without result: {nothing}"

    def result(self, dialogue: Dialogue[T]) -> T:
        """Run a dialogue on stored completions; raises NotCollected at the first that is missing."""
        try:
            request = next(dialogue)
            while (completion := self.cache.get(request.key)) is not None:
                request = dialogue.send(completion)
        except StopIteration as end:
            return end.value
        raise NotCollected(request, self.failures.get(request.key, "never asked"))

    def next_request(self, example: Example) -> Request | None:
        """Return the first request about an example that has no completion; None if it has all it needs."""
        return self.state(example)[0]

    def state(self, example: Example) -> tuple[Request | None, str]:
        """Return the next request as `next_request` does, and why the completions so far cannot be used, if so."""
        try:
            self.result(self.questions.everything(example))
        except NotCollected as missing:
            return missing.request, ""
        except NotAnnotated as nothing:
            return None, str(nothing)
        return None, ""

    def missing(self, examples: Iterable[Example]) -> Iterator[Request]:
        """Return the next request of every example that needs one, but for requests that have failed for good."""
        requests = map(self.next_request, examples)
        return (request for request in requests if request is not None and request.key not in self.failures)


class _Outcomes:
    """What became of the rows of one run."""

    def __init__(self, most_in_a_row: int):
        self._most_in_a_row = most_in_a_row
        self._unusable_in_a_row = 0
        self.complete = 0
        self.without: list[tuple[Request, NoCompletion]] = []

    def count(self, fault: str, was_asked: bool) -> str | None:
        """Count a row with all its completions; return a reason to stop the run, or None."""
        self.complete += 1
        if was_asked:
            self._unusable_in_a_row = self._unusable_in_a_row + 1 if fault else 0
        if self._unusable_in_a_row < self._most_in_a_row:
            return None
        return f"{self._unusable_in_a_row} rows in a row got no answer that can be used; the last: {fault}"

    def close(self, collected: Collected, config: ClientConfig, total: int | None) -> None:
        """Give `collected` the rows that the server refuses; raise Unfinished if others are without an answer.

        If no row got through, the server refuses all of them, and not these rows.
        """
        open_rows = [nothing for _, nothing in self.without if not (nothing.refused and self.complete)]
        if len(open_rows) > config.max_unanswered:
            why, count = Counter(map(str, open_rows)).most_common(1)[0]
            raise Unfinished(
                f"{len(open_rows):,} of {total or len(open_rows) + self.complete:,} rows have no usable answer of the "
                f"API; {count:,} of them: {why}. They stay open: everything else is stored in {collected.cache.path}, "
                "and the same command asks for them again (max_unanswered lets the stage finish without them)"
            )
        collected.failures.update({request.key: str(nothing) for request, nothing in self.without})


async def collect(
    examples: Iterable[Example],
    collected: Collected,
    config: ClientConfig,
    total: int | None = None,
    what: str = "rationales",
    limited_by: str = "max_rationales",
) -> dict[str, Any]:
    """Ask the server about every example, `concurrency` at a time, until the cache has all completions.

    Returns figures for the manifest. `collected` gets the failures; `total`, the number of examples, is for the bar,
    and so is `what`. `limited_by` is the key by which there are fewer examples.

    Raises:
        Stopped: if the run cannot go on; what is under way is let finish and stored first.
        Unfinished: if rows got no usable answer, and not because the server refuses these rows.
    """
    client, model = ChatClient(config, collected.cache, limited_by), str(collected.questions.config.model)
    bar = progress(desc=what, unit="row", total=total)
    waiting, outcomes = iter(examples), _Outcomes(config.max_failures_in_a_row)  # shared by all workers

    async def complete(example: Example) -> None:
        was_asked = False
        while (state := collected.state(example))[0]:
            was_asked = True
            try:
                await client.ask(state[0])
            except NoCompletion as nothing:
                outcomes.without.append((state[0], nothing))
                return
        if reason := outcomes.count(state[1], was_asked):
            raise client.stop(reason)

    async def work() -> None:
        for example in waiting:
            try:
                await complete(example)
            except Stopped:
                return
            bar.update()
            bar.set_postfix(cost=f"{client.cost:.2f}", refresh=False)

    try:
        if config.preflight:
            await client.preflight(model)
        await asyncio.gather(*(work() for _ in range(config.concurrency)))
    finally:
        bar.close()
        await client.close()
        logger.info("%s", "; ".join(f"{name} {value}" for name, value in client.figures().items()))
    if client.stopped:
        raise client.stopped
    outcomes.close(collected, config, total)
    return client.figures()


def estimate(examples: Sequence[Example], collected: Collected, config: ClientConfig) -> str:
    """Return what a run would ask for, in words: calls, tokens, cost, one whole prompt. It sends and stores nothing."""
    chars = calls = most = 0
    first: Request | None = None
    for request in collected.missing(examples):
        first = first or request
        calls, chars, most = calls + 1, chars + request.prompt_chars, most + request.max_tokens
    tokens, cache = chars // CHARS_PER_TOKEN, collected.cache
    more = f", and {collected.questions.more}" if collected.questions.more else ""
    lines = [
        f"examples: {len(examples):,}; completions stored already: {len(cache):,}, which cost "
        f"{config.cost(cache.prompt_tokens, cache.completion_tokens):.2f}",
        f"calls to make: {calls:,}{more}",
        f"tokens: about {tokens:,} in (at {CHARS_PER_TOKEN} characters per token), at most {most:,} out",
        f"cost: about {config.cost(tokens, 0):.2f} in, at most {config.cost(0, most):.2f} out",
    ]
    if first is not None:
        messages = json.loads(first.body)["messages"]
        lines += ["one whole prompt:", *(f"[{message['role']}]\n{message['content']}" for message in messages)]
    return "\n".join(lines)
