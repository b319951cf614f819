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
        by_rule = OfflineAnnotator(catalog, shown.prompt_history_items)
        yield Annotator(recipe.annotator, by_rule.annotate, by_rule.review if recipe.self_check else None)
    elif released is not None:
        yield Annotator(recipe.annotator, released.annotate)
    else:
        with _collected(recipe, catalog, shown) as collected:
            if recipe.annotator == "batch":
                _take_batches(recipe, collected, examples)
                figures = {"answers_stored": len(collected.cache), "unusable_responses": collected.cache.unusable}
            else:
                figures = asyncio.run(generate.collect(examples, collected, recipe, len(examples)))
            label = f"{recipe.model}, {'looking forward' if recipe.forward_looking else 'looking back'}"
            yield Annotator(label, collected.annotate, collected.review if recipe.self_check else None, figures)


def _take_batches(recipe: RationalesRecipe, collected: Collected, examples: Sequence[Example]) -> None:
    """Read the result files there are, and write what is still missing; raise Stopped while something is."""
    folder, cache = recipe.run_path / BATCHES, collected.cache
    refused = batch.read_results(folder, cache)
    if any(collected.next_request(example) is None for example in examples):  # else all are refused, and not these
        collected.failures.update(refused)
    if not batch.outstanding(folder, cache):
        if recipe.max_cost is not None:
            _require_budget(recipe, collected, examples, recipe.max_cost)
        batch.write_requests(folder, collected.missing(examples))
    if waiting := batch.outstanding(folder, cache):
        raise Stopped(batch.instructions(waiting, str(recipe.model)))


def _require_budget(
    recipe: RationalesRecipe, collected: Collected, examples: Sequence[Example], max_cost: float
) -> None:
    """Raise Stopped if the next request files may cost more than is left of the budget."""
    cache, chars_per_token = collected.cache, generate.CHARS_PER_TOKEN
    spent = recipe.cost(cache.prompt_tokens, cache.completion_tokens)
    missing = collected.missing(examples)
    needed = sum(recipe.cost(request.prompt_chars / chars_per_token, request.max_tokens) for request in missing)
    if needed and spent + needed > max_cost:
        raise Stopped(
            f"the budget is used up: {spent:.4f} of max_cost {max_cost:g} spent, and the next request files may cost "
            f"{needed:.4f}; raise max_cost, or lower max_rationales"
        )


def estimate(recipe: RationalesRecipe, catalog: ItemCatalog, shown: PromptFormat, examples: Sequence[Example]) -> str:
    """Return what the recipe would ask of a model, in words, and what that would cost."""
    if not recipe.asks_a_model:
        return f"annotator {recipe.annotator} asks no model; it costs nothing"
    with _collected(recipe, catalog, shown) as collected:
        return generate.estimate(examples, collected, recipe)


@contextlib.contextmanager
def _collected(recipe: RationalesRecipe, catalog: ItemCatalog, shown: PromptFormat) -> Iterator[Collected]:
    """Open the completions that are stored for this run_dir, with the recipe's questions."""
    exemplars = load_exemplars(Path(str(recipe.exemplars)))
    instructions = annotation_instructions(shown, exemplars, recipe.target_words, recipe.forward_looking)
    # Only what passes every other check is reviewed: a review costs as much as an annotation.
    checks = Checks(recipe, catalog) if recipe.self_check else None
    with CompletionCache(recipe.run_path / COMPLETIONS) as cache:
        questions = Questions(catalog, shown, instructions, recipe, checks, recipe.self_check == "pick")
        yield Collected(questions, cache)
