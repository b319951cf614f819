"""Ranks of the targets, for every kind of model: from scores, from likelihoods, from sampled answers.

All rankings are deterministic. Ties count against the target where scores are compared (CF models), and are broken by
the candidates' order where a full ranking is needed (LLM votes).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from twice_rec.answer_format import closing, opening, parse, without_tags
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.cf.baselines import CFScorer
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.files import atomic_path, read_records, to_row, write_json, write_records
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.metrics import per_user, ranks_from_scores, summarise
from twice_rec.progress import progress
from twice_rec.prompts import Message, item_answer, rationale_answer
from twice_rec.records import CandidateLists, Example, Prediction, Split, UserSequence

logger = logging.getLogger(__name__)


class CFQuestions:
    """The questions of one split as a CF model sees them: histories, targets and candidates as indices.

    Args:
        sequences: all users, in the files' order.
        candidates: the stored lists of the split.
        split: `valid` or `test`.
        lists: kinds to rank: `uniform`, `popularity`, `hard`, and `full` for the catalogue without the seen items.
    """

    def __init__(
        self,
        sequences: Sequence[UserSequence],
        candidates: Sequence[CandidateLists],
        catalog: ItemCatalog,
        split: Split,
        lists: Sequence[str],
    ):
        by_user = {entry.user_id: entry for entry in candidates}
        rows = [(i, s) for i, s in enumerate(sequences) if s.target_position(split) is not None]
        if not rows:
            raise InputError(f"no user has a {split} target")
        self.users = np.array([position for position, _ in rows])
        self.user_ids = [sequence.user_id for _, sequence in rows]
        self.target_ids = [sequence.target(split).item_id for _, sequence in rows]
        self.targets = np.array(catalog.indices(self.target_ids))
        self.histories = [catalog.indices(entry.item_id for entry in s.history(split)) for _, s in rows]
        self.lists = tuple(lists)
        self.candidates: dict[str, NDArray[np.int64]] = {}
        for kind in self.lists:
            if kind != "full":
                self.candidates[kind] = np.array(
                    [catalog.indices(_list_of(by_user, user_id, kind)) for user_id in self.user_ids]
                )

    @classmethod
    def of(cls, data: PreparedData, split: Split, lists: Sequence[str]) -> CFQuestions:
        """The questions of prepared data."""
        return cls(data.sequences, data.candidates(split), data.catalog, split, lists)

    def __len__(self) -> int:
        return len(self.user_ids)

    def ranks(self, scorer: CFScorer, batch_size: int = 512) -> dict[str, NDArray[np.int64]]:
        """Rank of every user's target per kind of list: int64 [users]. Ties count against the target."""
        parts: dict[str, list[NDArray[np.int64]]] = {kind: [] for kind in self.lists}
        steps = range(0, len(self), batch_size)
        for start in progress(steps, desc="ranking", unit="batch"):
            rows = slice(start, start + batch_size)
            scores = np.asarray(scorer.scores(self.users[rows], self.histories[rows]))
            targets = self.targets[rows]
            for kind in self.lists:
                if kind == "full":
                    parts[kind].append(ranks_from_scores(_without_seen(scores, self.histories[rows]), targets - 1))
                else:
                    shown = self.candidates[kind][rows]
                    column = (shown == targets[:, None]).argmax(axis=1)
                    parts[kind].append(ranks_from_scores(np.take_along_axis(scores, shown - 1, axis=1), column))
        return {kind: np.concatenate(ranks) for kind, ranks in parts.items()}

    def mean(self, scorer: CFScorer, metric: str) -> float:
        """One metric such as `full/ndcg@10`, averaged over users: what models are chosen by on validation."""
        kind, _, name = metric.partition("/")
        return float(per_user(name, self.ranks(scorer)[kind]).mean())

    def predictions(self, ranks: Mapping[str, NDArray[np.int64]], seed: int) -> Iterator[Prediction]:
        """The ranks as records, in the files' order of users."""
        for row, (user_id, target) in enumerate(zip(self.user_ids, self.target_ids, strict=True)):
            yield Prediction(user_id, target, {kind: int(ranks[kind][row]) for kind in self.lists}, seed)


def _list_of(by_user: Mapping[str, CandidateLists], user_id: str, kind: str) -> tuple[str, ...]:
    if user_id not in by_user:
        raise InputError(f"user {user_id} has no stored candidates; run prepare.sh again")
    if kind not in by_user[user_id].lists:
        raise InputError(
            f"the stored candidates have the lists {', '.join(by_user[user_id].lists)}, not {kind}; add it to "
            "candidate_lists in prepare.yaml and run prepare.sh again, or leave it out of lists"
        )
    return by_user[user_id].lists[kind]


def _without_seen(scores: NDArray[np.floating], histories: Sequence[Sequence[int]]) -> NDArray[np.floating]:
    masked = np.array(scores, dtype=np.float32)
    for row, history in enumerate(histories):
        masked[row, np.array(history) - 1] = -np.inf
    return masked


PREDICTIONS = "predictions.jsonl"
METRICS_FILE = "metrics.json"


def evaluate_scorers(
    folder: Path, questions: CFQuestions, scorers: Iterable[CFScorer], seed: int
) -> tuple[list[Path], dict[str, float]]:
    """Rank all targets with one model, or one a training run, and write `predictions.jsonl` and `metrics.json`.

    Args:
        seed: of the first run; the others count on from it.

    Returns:
        The files, and the metrics: means over users and runs.
    """
    rows = [row for i, scorer in enumerate(scorers) for row in questions.predictions(questions.ranks(scorer), seed + i)]
    write_records(folder / PREDICTIONS, rows)
    metrics = metrics_of(rows)
    write_json(folder / METRICS_FILE, metrics)
    return [folder / PREDICTIONS, folder / METRICS_FILE], metrics


def metrics_of(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The flat map `<lists>/<metric>@<k>` -> mean, and `n`, the number of users."""
    ranks: dict[str, list[int]] = {}
    for prediction in predictions:
        for kind, rank in prediction.ranks.items():
            ranks.setdefault(kind, []).append(rank)
    metrics = {f"{kind}/{name}": value for kind, of in ranks.items() for name, value in summarise(of).items()}
    return {**metrics, "n": len({prediction.user_id for prediction in predictions})}


def export_scores(path: Path, scorer: CFScorer, data: PreparedData) -> None:
    """Write a model's test scores as `.npz` with `scores`, float32 [users, items] in the files' order.

    A user without a test target gets zeros.
    """
    test = CFQuestions.of(data, "test", [])
    scores = np.zeros((len(data.sequences), len(data.catalog)), dtype=np.float32)
    scores[test.users] = scorer.scores(test.users, test.histories)
    with atomic_path(path) as temporary:
        np.savez(temporary, scores=scores)


def _append(path: Path, predictions: Iterable[Prediction]) -> None:
    """Append a batch, on disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(to_row(prediction), ensure_ascii=False) + "\n" for prediction in predictions))
        file.flush()
        os.fsync(file.fileno())


def _whole_batches(path: Path, sizes: Sequence[int]) -> int:
    """How many batches an interrupted run has written whole; what stands behind them in the file is cut off."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    rows = sum(line.endswith(b"\n") for line in lines)
    done = int(np.searchsorted(np.cumsum(sizes), rows, side="right"))
    with open(path, "r+b") as file:
        file.truncate(sum(len(line) for line in lines[: sum(sizes[:done])]))
    return done


class Generator(Protocol):
    """What evaluation needs of a language model; `llm.generation.TransformersGenerator` has it."""

    def generate(
        self,
        prompts: Sequence[Sequence[Message]],
        num_samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Sequence[Sequence[Answer]]:
        """Answers to every prompt; greedy without a seed."""
        ...

    def score(self, prompt: Sequence[Message], answers: Sequence[str]) -> Sequence[float]:
        """Log-probability of each answer to one prompt, up to a constant they share."""
        ...


class Answer(Protocol):
    """One generated answer; `llm.generation.TextCompletion` has it."""

    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def mean_logprob(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class AskSettings:
    """How a language model is asked and its answers ranked; see `config.EvaluateRecipe`."""

    ranking: Literal["likelihood", "sampled"]
    with_rationale: bool
    num_samples: int
    temperature: float
    top_p: float
    seed: int


def evaluate_language_model(
    folder: Path,
    generator: Generator,
    batches: Sequence[tuple[str, Sequence[Example]]],
    writer: PromptBuilder,
    settings: AskSettings,
) -> tuple[list[Path], dict[str, float]]:
    """Ask all questions and write `predictions.jsonl` and `metrics.json`; goes on behind what a killed run has written.

    Args:
        batches: (kind of list, questions), asked together in this order.
        writer: of the prompts.

    Returns:
        The files, and the metrics with the rates of the answers' outcomes.
    """
    partial = folder / "predictions.partial.jsonl"
    done = _whole_batches(partial, [len(examples) for _, examples in batches])
    if done:
        logger.info("%s: going on behind batch %d of %d", folder, done, len(batches))
    for number in progress(range(done, len(batches)), desc=folder.name, unit="batch", total=len(batches), initial=done):
        kind, examples = batches[number]
        seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
        _append(partial, ask(generator, examples, kind, writer, settings, seed))
    rows = list(read_records(partial, Prediction))
    metrics = {**metrics_of(rows), **answer_rates(rows, writer.catalog)}
    write_json(folder / METRICS_FILE, metrics)
    partial.replace(folder / PREDICTIONS)
    return [folder / PREDICTIONS, folder / METRICS_FILE], metrics


def ask(
    generator: Generator,
    examples: Sequence[Example],
    kind: str,
    writer: PromptBuilder,
    settings: AskSettings,
    sampling_seed: int,
) -> list[Prediction]:
    """Ask a language model one batch of questions and rank each list by its answers.

    `likelihood`: the model writes its rationale greedily, then every candidate is scored as the answer that follows it;
    where the item comes first or alone, the candidates are scored at once.
    `sampled`: several answers are sampled; candidates are ordered by votes, then by the mean log-probability of the
    answers that voted for them, then as listed.

    Args:
        kind: of the candidate lists, for the records.
        sampling_seed: of this batch.
    """
    catalog = writer.catalog
    prompts = [writer.recommend(example, settings.with_rationale) for example in examples]
    if settings.ranking == "sampled":
        sampling = (settings.num_samples, settings.temperature, settings.top_p, sampling_seed)
        answers = generator.generate(prompts, *sampling)
    elif settings.with_rationale and not writer.item_first:
        answers = generator.generate(prompts)
    else:
        answers = [[] for _ in prompts]
    predictions = []
    for example, prompt, given in zip(examples, prompts, answers, strict=True):
        if settings.ranking == "sampled":
            ranking = rank_by_votes(given, example, catalog)
            rank = 1 + ranking.index(example.target)
        else:
            items = [catalog[item_id] for item_id in example.candidates]
            texts = [rationale_answer(rationale_of(given[0].text), i) if given else item_answer(i) for i in items]
            scores = np.array([generator.score(prompt, texts)])
            ranking = [example.candidates[position] for position in np.argsort(-scores[0], kind="stable")]
            rank = int(ranks_from_scores(scores, [example.candidates.index(example.target)])[0])
        predictions.append(
            Prediction(
                user_id=example.user_id,
                target=example.target,
                ranks={kind: rank},
                seed=settings.seed,
                ranking=tuple(ranking),
                answers=tuple(answer.text for answer in given),
            )
        )
    return predictions


def rank_by_votes(answers: Sequence[Answer], example: Example, catalog: ItemCatalog) -> list[str]:
    """All candidates: by votes, then mean log-probability of the answers that voted for them, then as listed.

    Answers that are malformed or name no candidate vote for nothing.
    """
    votes: dict[str, list[float]] = {item_id: [] for item_id in example.candidates}
    for answer in answers:
        parsed = parse(answer.text)
        if catalog.outcome(parsed, example.candidates, example.target) in (Outcome.HIT, Outcome.MISS):
            votes[parsed.item_id or ""].append(answer.mean_logprob)
    mean = {item_id: sum(values) / len(values) if values else 0.0 for item_id, values in votes.items()}
    return sorted(example.candidates, key=lambda item_id: (-len(votes[item_id]), -mean[item_id]))  # sorting is stable


def rationale_of(text: str) -> str:
    """The rationale in a generated answer; where its element is not complete, what was written of it, without tags."""
    rationale = parse(text).rationale
    if rationale is None:
        rationale = text.partition(closing("think"))[0].partition(opening("item_nm"))[0]
    return without_tags(rationale)


def answer_rates(predictions: Sequence[Prediction], catalog: ItemCatalog) -> dict[str, float]:
    """Share of the generated answers that hit, miss, leave the candidates or are malformed, as `answers/<outcome>`."""
    outcomes = [
        catalog.outcome(parse(text), prediction.ranking, prediction.target)
        for prediction in predictions
        for text in prediction.answers
    ]
    return {f"answers/{o.value}": outcomes.count(o) / len(outcomes) for o in Outcome} if outcomes else {}
