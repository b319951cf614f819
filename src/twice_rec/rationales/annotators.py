"""The annotators behind one interface, `curate.Annotator`: by rule, released texts, a server, batch files."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from twice_rec.catalog import ItemCatalog
from twice_rec.prompts import PromptFormat, annotation_instructions
from twice_rec.rationales import batch, generate
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.curate import Annotator, Checks
from twice_rec.rationales.exemplars import load_exemplars
from twice_rec.rationales.faults import Stopped
from twice_rec.rationales.generate import Collected, Questions
from twice_rec.rationales.offline import OfflineAnnotator
from twice_rec.rationales.recipe import RationalesRecipe
from twice_rec.rationales.released import ReleasedRationales
from twice_rec.records import Example

COMPLETIONS = "answers/rationales.jsonl"  # under run_dir, not under rationales/: other settings must not delete it
BATCHES = "answers/batch"


@contextlib.contextmanager
def open_annotator(
    recipe: RationalesRecipe,
    catalog: ItemCatalog,
    shown: PromptFormat,
    examples: Sequence[Example],
    released: ReleasedRationales | None,
) -> Iterator[Annotator]:
    """Open the recipe's annotator, with every completion it needs collected.

    Args:
        examples: what is to be annotated, in the order in which a model is asked.
        released: for annotator release.

    Raises:
        Stopped: if completions are missing and cannot be had now; those that came are stored.
    """
    if recipe.annotator == "offline":
        yield Annotator(recipe.annotator, OfflineAnnotator(catalog, shown.history_items).annotate)
    elif released is not None:
        yield Annotator(recipe.annotator, released.annotate)
    else:
        with _language_model(recipe, catalog, shown) as (questions, cache):
            if recipe.annotator == "batch":
                collected, figures = _from_files(recipe, questions, cache, examples), {"answers_stored": len(cache)}
            else:
                failures, figures = asyncio.run(generate.collect(examples, questions, recipe, cache, len(examples)))
                collected = Collected(questions, cache, failures)
            label = f"{recipe.model}, {'looking forward' if recipe.forward_looking else 'looking back'}"
            review = collected.review if recipe.self_check else None
            yield Annotator(label, collected.annotate, review, figures)


def estimate(recipe: RationalesRecipe, catalog: ItemCatalog, shown: PromptFormat, examples: Sequence[Example]) -> str:
    """Return what the recipe would ask of a model, in words, and what that would cost."""
    if not recipe.asks_a_model:
        return f"annotator {recipe.annotator} asks no model; it costs nothing"
    with _language_model(recipe, catalog, shown) as (questions, cache):
        return generate.estimate(examples, Collected(questions, cache, {}), recipe)


@contextlib.contextmanager
def _language_model(
    recipe: RationalesRecipe, catalog: ItemCatalog, shown: PromptFormat
) -> Iterator[tuple[Questions, CompletionCache]]:
    exemplars = load_exemplars(Path(str(recipe.exemplars)))
    instructions = annotation_instructions(shown, exemplars, recipe.target_words, recipe.forward_looking)
    # Only what passes every other check is reviewed: a review costs as much as an annotation.
    worth_reviewing = Checks(recipe, catalog).passes if recipe.self_check else None
    with CompletionCache(recipe.run_path / COMPLETIONS) as cache:
        yield Questions(catalog, shown, instructions, recipe, worth_reviewing), cache


def _from_files(
    recipe: RationalesRecipe, questions: Questions, cache: CompletionCache, examples: Sequence[Example]
) -> Collected:
    folder = recipe.run_path / BATCHES
    collected = Collected(questions, cache, batch.read_results(folder, cache, recipe.max_attempts))
    waiting = batch.outstanding(folder) or batch.write_requests(folder, collected.missing(examples))
    if waiting:
        raise Stopped(batch.instructions(waiting, str(recipe.model)))
    return collected
