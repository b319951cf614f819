"""The annotators behind one interface: a function from an example to its rationale, and perhaps a second look."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twice_rec.catalog import ItemCatalog
from twice_rec.config import RationalesRecipe
from twice_rec.prompts import PromptFormat, annotation_instructions
from twice_rec.rationales import batch, generate
from twice_rec.rationales.cache import AnswerCache
from twice_rec.rationales.client import ClientSettings, Sampling, Stopped
from twice_rec.rationales.curate import Annotate, Review, Rules, TitleCheck, first_reason
from twice_rec.rationales.exemplars import load_exemplars
from twice_rec.rationales.generate import Collected, Questions
from twice_rec.rationales.offline import OfflineAnnotator
from twice_rec.rationales.released import ReleasedRationales
from twice_rec.records import Example, Rationale

ANSWERS = "answers/rationales.jsonl"  # under run_dir, not under rationales/: other settings must not cost it
BATCHES = "answers/batch"


@dataclass(frozen=True, slots=True)
class Annotator:
    """Who writes the rationales of one run.

    Args:
        review: the self-check; None for none.
        figures: requests, tokens and cost, for the manifest.
    """

    annotate: Annotate
    review: Review | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


def rules_of(recipe: RationalesRecipe) -> Rules:
    """What passes curation."""
    return Rules(tuple(recipe.accepted_verdicts), recipe.min_words, recipe.max_words, recipe.max_similarity)


def label_of(recipe: RationalesRecipe) -> str:
    """What reports call the rationales of a recipe."""
    if recipe.annotator not in ("openai", "batch"):
        return recipe.annotator
    return f"{recipe.model}, {'looking forward' if recipe.forward_looking else 'looking back'}"


@contextlib.contextmanager
def open_annotator(
    recipe: RationalesRecipe,
    catalog: ItemCatalog,
    shown: PromptFormat,
    examples: Sequence[Example],
    released: ReleasedRationales | None,
) -> Iterator[Annotator]:
    """The recipe's annotator, with every answer it needs collected.

    Args:
        examples: what is to be annotated, in the order in which a model is asked.
        released: for annotator release.

    Raises:
        Stopped: where answers are missing and cannot be had now; what there is is stored.
    """
    if recipe.annotator == "offline":
        yield Annotator(OfflineAnnotator(catalog, shown.prompt_history_items).annotate)
    elif released is not None:
        yield Annotator(released.annotate)
    else:
        with _language_model(recipe, catalog, shown) as (questions, cache):
            worth = _worth_reviewing(recipe, catalog)
            if recipe.annotator == "batch":
                collected = _from_files(recipe, questions, cache, examples, worth)
                figures: Mapping[str, Any] = {"answers_stored": len(cache)}
            else:
                settings = ClientSettings.of(recipe)
                failures, figures = generate.collect(examples, questions, settings, cache, worth, len(examples))
                collected = Collected(questions, cache, failures)
            yield Annotator(collected.annotate, collected.review if worth else None, figures)


def estimate(recipe: RationalesRecipe, catalog: ItemCatalog, shown: PromptFormat, examples: Sequence[Example]) -> str:
    """What the recipe would ask of a model, in words, and what it would cost."""
    if recipe.annotator not in ("openai", "batch"):
        return f"annotator {recipe.annotator} asks no model; it costs nothing"
    with _language_model(recipe, catalog, shown) as (questions, cache):
        collected = Collected(questions, cache, {})
        worth = _worth_reviewing(recipe, catalog)
        return generate.estimate(examples, collected, worth, ClientSettings.of(recipe))


@contextlib.contextmanager
def _language_model(
    recipe: RationalesRecipe, catalog: ItemCatalog, shown: PromptFormat
) -> Iterator[tuple[Questions, AnswerCache]]:
    assert recipe.model is not None
    assert recipe.exemplars is not None
    sampling = Sampling(
        recipe.model, recipe.temperature, recipe.max_tokens, recipe.structured_outputs, recipe.extra_body
    )
    exemplars = load_exemplars(Path(recipe.exemplars))
    instructions = annotation_instructions(shown, exemplars, recipe.target_words, recipe.forward_looking)
    questions = Questions(catalog, shown, instructions, sampling, recipe.max_reasks)
    with AnswerCache(recipe.run_path / ANSWERS) as cache:
        yield questions, cache


def _worth_reviewing(recipe: RationalesRecipe, catalog: ItemCatalog) -> Callable[[Example, Rationale], bool] | None:
    """Only what passes everything else is checked: a check costs as much as an annotation."""
    if not recipe.self_check:
        return None
    rules, titles = rules_of(recipe), TitleCheck(catalog)
    return lambda example, rationale: first_reason(example, rationale, rules, titles, None) is None


def _from_files(
    recipe: RationalesRecipe,
    questions: Questions,
    cache: AnswerCache,
    examples: Sequence[Example],
    worth: Callable[[Example, Rationale], bool] | None,
) -> Collected:
    folder = recipe.run_path / BATCHES
    collected = Collected(questions, cache, batch.read_results(folder, cache, recipe.max_attempts))
    waiting = batch.outstanding(folder)
    if not waiting:
        missing = (request for _, request in generate.unanswered(examples, collected, worth))
        waiting = batch.write_requests(folder, missing)
    if waiting:
        raise Stopped(batch.instructions(waiting, str(recipe.model)))
    return collected
