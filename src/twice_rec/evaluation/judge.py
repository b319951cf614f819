"""What judges are asked about the answers of a language model, and what becomes of their replies.

Of each drawn user the first completion is judged: its rationale, and the item that stands beside it. A question is one
condition of one user:

- `item_shown`: history, recommended item and rationale; a score from 0 to 3 (`prompts.LEVELS`).
- `counterfactual`, a control: the same with the rationale that the model gave another user.
- `item_hidden`: history, candidates and the rationale without the item's title and id; which candidate is it about?

Some answers are settled without a judge, the same for all judges: an answer that is malformed or whose item is not in
the catalogue scores 0, one without a rationale 1, and neither points to a candidate; an item that is in the catalogue
and not in the list cannot be pointed to. A reply that holds no verdict, after it was asked for again, is no verdict:
such rows are counted, and no average has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from twice_rec import prompts
from twice_rec.answer_format import parse
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.evaluation.rule_judge import RuleJudge
from twice_rec.prompts import PromptFormat
from twice_rec.random_streams import random_stream
from twice_rec.rationales import answers
from twice_rec.rationales.curate import NotAnnotated
from twice_rec.rationales.generate import Collected, Dialogue, shown_history, talk
from twice_rec.rationales.leaks import hide_item
from twice_rec.rationales.recipe import SamplingConfig
from twice_rec.records import Condition, Example, Item, Prediction

SCORED: tuple[Condition, ...] = ("item_shown", "counterfactual")  # the others ask for a choice


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered one user: the item of the catalogue that it recommends, None if none, and its rationale."""

    example: Example
    item: Item | None
    rationale: str

    @classmethod
    def of(cls, prediction: Prediction, example: Example, catalog: ItemCatalog) -> Answer:
        """Read the first completion of a prediction."""
        parsed = parse(prediction.answers[0])
        is_item = catalog.outcome(parsed, catalog.ids, example.target) in (Outcome.HIT, Outcome.MISS)
        return cls(example, catalog[parsed.item_id or ""] if is_item else None, parsed.rationale or "")


@dataclass(frozen=True, slots=True)
class Question:
    """One condition of one user.

    Args:
        rationale: the text as the judge is shown it.
        donor: the user whose rationale it is, if it is another's.
        is_settled: there is a verdict without a judge: `score`, or in `item_hidden` no candidate.
    """

    condition: Condition
    example: Example
    item: Item | None
    rationale: str
    donor: str = ""
    is_settled: bool = False
    score: int | None = None


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """One line of `verdicts.jsonl`: a user, a judge, a condition and the verdict."""

    user_id: str
    judge: str
    condition: Condition
    item_id: str  # recommended; empty if it is no item of the catalogue
    rationale: str  # as the judge was shown it
    score: int | None = None  # of item_shown and counterfactual
    choice: str | None = None  # of item_hidden: the candidate that the judge named
    why: str = ""
    no_verdict: str = ""  # why there is none
    is_settled: bool = False  # without a judge
    donor: str = ""  # counterfactual: the user whose rationale it is

    @property
    def has_verdict(self) -> bool:
        """Whether it may be averaged."""
        return not self.no_verdict


def questions_of(given: Sequence[Answer], conditions: Sequence[Condition], seed: int) -> list[Question]:
    """Return all questions about the answers of one model, condition after condition, users in their order."""
    donors = _donors(given, seed)
    asked: list[Question] = []
    for condition in conditions:
        for answer in given:
            user, item, text, donor = answer.example.user_id, answer.item, answer.rationale, ""
            if condition == "counterfactual" and user in donors:
                donor, text = donors[user].example.user_id, donors[user].rationale
            elif condition == "item_hidden" and item:
                text = hide_item(text, item, prompts.HIDDEN_ITEM)
            is_named = item is not None and item.item_id in answer.example.candidates
            can_ask = bool(item and answer.rationale) and (condition != "item_hidden" or is_named)
            score = (0 if item is None else 1) if condition in SCORED and not can_ask else None
            if can_ask and condition == "counterfactual" and not donor:
                continue  # nobody else gave a rationale
            asked.append(Question(condition, answer.example, item, text, donor, not can_ask, score))
    return asked


def _donors(given: Sequence[Answer], seed: int) -> Mapping[str, Answer]:
    """Return user -> the answer whose rationale takes the place of the user's own: each is another's, and used once."""
    usable = [answer for answer in given if answer.item and answer.rationale]
    order = random_stream(seed, "counterfactual rationales").permutation(len(usable)).tolist()
    following = zip(order, order[1:] + order[:1], strict=True)
    return {usable[a].example.user_id: usable[b] for a, b in following if a != b}


@dataclass(frozen=True, slots=True)
class JudgeQuestions:
    """How a language model is asked; see `generate.Asks`."""

    catalog: ItemCatalog
    shown: PromptFormat
    config: SamplingConfig
    more: str = ""

    def everything(self, question: Question) -> Dialogue[None]:
        """Ask for the verdict; raises like `verdict`."""
        yield from self.verdict(question)

    def verdict(self, question: Question) -> Dialogue[tuple[int | str, str]]:
        """Ask for a score or a candidate, and why.

        Raises:
            NotAnnotated: if the model refuses, or none of its completions can be used.
        """
        past, _ = shown_history(question.example, self.catalog, self.shown)
        if question.condition in SCORED:
            assert question.item is not None
            messages = prompts.judge_score(past, question.item, self.shown, question.rationale)
            return (yield from talk(self.config, messages, answers.SCORE_SCHEMA, "verdict", answers.parse_score))
        candidates = question.example.candidates
        items = [self.catalog[item_id] for item_id in candidates]
        messages = prompts.judge_choice(past, items, self.shown, question.rationale)
        schema, read = answers.choice_schema(len(items)), partial(answers.parse_choice, num_candidates=len(items))
        number, why = yield from talk(self.config, messages, schema, "choice", read)
        return candidates[number - 1], why


def verdict_by_rule(judge: RuleJudge, question: Question) -> tuple[int | str, str]:
    """Return what a rule judge says."""
    if question.condition in SCORED:
        assert question.item is not None
        return judge.score(question.rationale, question.example, question.item)
    return judge.choose(question.rationale, question.example)


def verdict_of_model(collected: Collected, question: Question) -> tuple[int | str, str]:
    """Return what a language model said; raises NotAnnotated if it gave no verdict."""
    return collected.result(collected.questions.verdict(question))


def judged(name: str, question: Question, verdict: object) -> JudgedRow:
    """Return the row of one judge and one question.

    Args:
        verdict: a function of the question that returns a score or a candidate, and why; or raises NotAnnotated.
    """
    item_id = question.item.item_id if question.item else ""
    row = partial(
        JudgedRow, question.example.user_id, name, question.condition, item_id, question.rationale, donor=question.donor
    )
    if question.is_settled:
        return row(score=question.score, is_settled=True)
    try:
        said, why = verdict(question)  # type: ignore[operator]
    except NotAnnotated as nothing:
        return row(no_verdict=str(nothing))
    return row(score=said, why=why) if question.condition in SCORED else row(choice=said, why=why)
