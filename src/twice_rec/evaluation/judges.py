"""The judges of a recipe, each behind one function of a question; and the answers that they judge."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from twice_rec.catalog import ItemCatalog
from twice_rec.data.dataset import TRUE_REASONS, PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation import rule_judge
from twice_rec.evaluation.equals import Terms
from twice_rec.evaluation.human_labels import Labels
from twice_rec.evaluation.judge import Answer, JudgedRow, JudgeQuestions, Question, judged, verdict_by_rule
from twice_rec.evaluation.judge_scores import SCORES, VERDICTS, scores_of
from twice_rec.evaluation.predictions import PREDICTIONS
from twice_rec.evaluation.recipe import JudgeConfig, JudgeRecipe
from twice_rec.evaluation.rule_judge import RuleJudge
from twice_rec.files import MANIFEST, hash_file, read_records, write_json, write_records
from twice_rec.prompts import PromptFormat
from twice_rec.random_streams import random_stream
from twice_rec.rationales import annotators, generate
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.completions import Completion
from twice_rec.rationales.connection import read_api_key
from twice_rec.rationales.generate import Collected
from twice_rec.rationales.recipe import SamplingConfig
from twice_rec.records import Prediction, TrueReasons
from twice_rec.run import StageRun, require

logger = logging.getLogger(__name__)

LIMITED_BY = "num_judged"  # the key by which there are fewer questions


def evaluated(recipe: JudgeRecipe, variant: str) -> Path:
    """Return the predictions of a variant, with rationales in them.

    Raises:
        InputError: if it was not evaluated, or writes no rationales; says what to do.
    """
    folder = recipe.run_path / "eval" / variant
    path = require(folder / PREDICTIONS, f"evaluate.sh with {variant} among its variants")
    asked = Terms.of(folder).asked
    if not asked:
        raise InputError(
            f"{folder}: this model scores the catalogue and writes no rationales; leave it out of variants"
        )
    if not asked.get("with_rationale", True):
        raise InputError(
            f"{folder}: the model was asked for the item alone (with_rationale false), so there are no rationales to "
            "judge; leave it out of variants"
        )
    if asked.get("item_first") and asked["ranking"] == "likelihood":
        raise InputError(
            f"{folder}: with item_first, the ranking by likelihood needs no completion, so there are no rationales to "
            "judge; evaluate it with rankings sampled"
        )
    return path


def true_reasons_file(recipe: JudgeRecipe) -> Path:
    """Return the file that a rule judge reads; InputError without it."""
    path = recipe.run_path / "data" / TRUE_REASONS
    if not path.exists():
        raise InputError(
            f"{path}: no such file; only the synthetic domain knows what truly speaks for an item. For other data set "
            "judged_by to openai or batch. If this is the synthetic domain, prepared by an earlier version, remove "
            f"{path.with_name(MANIFEST)} and prepare it again: bash prepare.sh RECIPE --overwrite true (the other "
            "files will be the same)"
        )
    return path


def read_answers(recipe: JudgeRecipe, data: PreparedData, files: Mapping[str, Path]) -> dict[str, list[Answer]]:
    """Return variant -> the answers that are judged, of the same users in the files' order.

    Args:
        files: variant -> its predictions.

    Raises:
        InputError: if the variants share no user, if predictions are not about the stored lists, or a user is twice.
    """
    kind = recipe.judged_list
    examples = {example.user_id: example for example in data.examples("test", kind)}
    found: dict[str, dict[str, Prediction]] = {}
    for variant, path in files.items():
        rows: dict[str, Prediction] = {}
        for row in read_records(path, Prediction):
            if kind in row.ranks and rows.setdefault(row.user_id, row) is not row:
                raise InputError(f"{path}: user {row.user_id} is there twice; evaluate it again")
        for user, row in rows.items():
            example = examples.get(user)
            if example is None or row.target != example.target or set(row.ranking) != set(example.candidates):
                raise InputError(f"{path}: user {user} was asked about another list than data/ has; evaluate it again")
            if not row.answers:
                raise InputError(f"{path}: user {user} has no completion to judge; evaluate it again")
        if not rows:
            raise InputError(f"{path}: no answers about {kind} lists; choose a judged_list that evaluate.yaml has")
        found[variant] = rows
    users = _drawn(recipe, list(examples), found)
    return {v: [Answer.of(rows[u], examples[u], data.catalog) for u in users] for v, rows in found.items()}


def _drawn(recipe: JudgeRecipe, users: Sequence[str], found: Mapping[str, Mapping[str, Prediction]]) -> list[str]:
    """Return the drawn users, of those who are in all predictions; each has a place in one order of all users."""
    shared = set.intersection(*(set(rows) for rows in found.values()))
    if not shared:
        raise InputError(f"no user was asked of all of {', '.join(found)}; evaluate them with the same seed and users")
    for variant, rows in found.items():
        if len(rows) > len(shared):
            logger.warning("%s: %s of its %s users are in all variants", variant, f"{len(shared):,}", f"{len(rows):,}")
    order = random_stream(recipe.seed, "judged users").permutation(len(users)).tolist()
    drawn = [place for place in order if users[place] in shared][: recipe.num_judged]
    if len(drawn) < recipe.num_judged:
        logger.warning("num_judged is %s, but there are %s users: all are judged", recipe.num_judged, len(drawn))
    return [users[place] for place in np.sort(drawn).tolist()]


def require_keys(recipe: JudgeRecipe) -> None:
    """Raise an InputError if a judge's API key is not in the environment."""
    for config in recipe.configs.values():
        if config.judged_by == "openai" and config.api_key_env is not None:
            read_api_key(config.api_key_env)


@dataclass
class _Counting:
    """Reads from a cache, and counts what the completions have cost."""

    cache: CompletionCache
    tokens: list[int] = field(default_factory=lambda: [0, 0, 0])  # completions, prompt tokens, completion tokens

    def get(self, key: str) -> Completion | None:
        """See `CompletionCache`."""
        if completion := self.cache.get(key):
            found = (1, completion.prompt_tokens, completion.completion_tokens)
            self.tokens = [a + b for a, b in zip(self.tokens, found, strict=True)]
        return completion


def rubric_of(config: SamplingConfig, asked: Sequence[Question], catalog: ItemCatalog, shown: PromptFormat) -> str:
    """Return a digest of what a judge goes by: of all that a model is asked first, or of the rule's own text."""
    if isinstance(config, JudgeConfig) and not config.asks_a_model:
        return hash_file(Path(rule_judge.__file__))
    questions = JudgeQuestions(catalog, shown, config)
    keys = [next(questions.verdict(question)).key for question in asked if not question.is_settled]
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


Verdicts = tuple[list[JudgedRow], dict[str, Any], dict[str, Any]]


def verdicts_of(
    recipe: JudgeRecipe, name: str, config: JudgeConfig, questions: Sequence[Question], data: PreparedData
) -> Verdicts:
    """Ask one judge all questions about one variant.

    Returns the rows; what the completions that they rest on have cost; and figures of the requests for the manifest.

    Raises:
        Stopped: if completions are missing and cannot be had now; those that came are stored.
        Unfinished: if questions got no answer of the API.
    """
    if not config.asks_a_model:
        reasons = {row.user_id: row for row in read_records(true_reasons_file(recipe), TrueReasons)}
        judge = RuleJudge(data.catalog, reasons, recipe.seed)
        return [judged(name, q, lambda q: verdict_by_rule(judge, q)) for q in questions], {}, {}
    open_questions = [question for question in questions if not question.is_settled]
    with _opened(recipe, name, config, data.catalog, data.prompt_format) as collected:
        if config.judged_by == "batch":
            folder = recipe.run_path / "answers" / f"judge_{name}_batch"
            figures = annotators.take_batches(folder, collected, open_questions, config, LIMITED_BY)
        else:
            total = len(open_questions)
            run = generate.collect(open_questions, collected, config, total, f"judge {name}", LIMITED_BY)
            figures = asyncio.run(run)
        counting = _Counting(collected.cache)
        reading = Collected(collected.questions, counting, collected.failures)  # type: ignore[arg-type]
        rows = [judged(name, q, lambda q: reading.result(reading.questions.verdict(q))) for q in questions]
        completions, prompt, written = counting.tokens
    cost = {"completions": completions, "prompt_tokens": prompt, "completion_tokens": written}
    return rows, {"model": config.model, **cost, "cost": round(config.cost(prompt, written), 4)}, figures


@contextlib.contextmanager
def _opened(
    recipe: JudgeRecipe, name: str, config: JudgeConfig, catalog: ItemCatalog, shown: PromptFormat
) -> Iterator[Collected]:
    """Open what a judge has said in this run_dir; not below judge/, since other settings must not delete it."""
    with CompletionCache(recipe.run_path / "answers" / f"judge_{name}.jsonl") as cache:
        yield Collected(JudgeQuestions(catalog, shown, config), cache)


def estimate(recipe: JudgeRecipe, questions: Mapping[str, Sequence[Question]], data: PreparedData) -> str:
    """Return what the recipe would ask of each judge, in words, and what that would cost."""
    asked = [question for of in questions.values() for question in of if not question.is_settled]
    lines: list[str] = []
    for name, config in recipe.configs.items():
        lines.append(f"judge {name}:")
        if config.asks_a_model:
            with _opened(recipe, name, config, data.catalog, data.prompt_format) as collected:
                lines.append(generate.estimate(asked, collected, config))
        else:
            lines.append("a rule, which costs nothing")
    return "\n".join(lines)


def judge_variant(
    recipe: JudgeRecipe,
    data: PreparedData,
    variant: str,
    asked: Sequence[Question],
    labels: Mapping[str, Labels],
    inputs: list[Path],
) -> None:
    """Write judge/<variant>/ unless it is there already.

    Args:
        asked: all questions about the variant.
        labels: human -> scores.
    """
    users = list(dict.fromkeys(question.example.user_id for question in asked))
    settings = {name: getattr(recipe, name) for name in ("num_judged", "judged_list", "conditions", "seed")}
    settings["judges"] = {name: config.what_decides() for name, config in recipe.configs.items()}
    settings["rubrics"] = {
        name: rubric_of(config, asked, data.catalog, data.prompt_format) for name, config in recipe.configs.items()
    }
    settings["users"] = hashlib.sha256("\n".join(users).encode()).hexdigest()  # of those that the variants share
    with StageRun(recipe, "judge", f"judge/{variant}", inputs, settings) as run:
        if run.is_finished():
            return
        run.begin()
        rows, costs, figures = [], {}, {}
        for name, config in recipe.configs.items():
            own, costs[name], figures[name] = verdicts_of(recipe, name, config, asked, data)
            rows += own
        write_records(run.path / VERDICTS, rows)
        chances = {question.example.user_id: len(question.example.candidates) for question in asked}
        scores = {**scores_of(rows, chances, labels, recipe.seed), "costs": costs}
        write_json(run.path / SCORES, scores)
        run.finish([run.path / VERDICTS, run.path / SCORES], {"users": len(users), "requests": figures})
