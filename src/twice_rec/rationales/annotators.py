"""The annotators behind one interface, `curate.Annotator`: by rule, released texts, a server, batch files."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from twice_rec.catalog import ItemCatalog
from twice_rec.prompts import PromptFormat, annotation_instructions
from twice_rec.rationales import batch, generate
from twice_rec.rationales.cache import CompletionCache
from twice_rec.rationales.curate import Annotator, Checks
from twice_rec.rationales.exemplars import load_exemplars
from twice_rec.rationales.faults import Stopped
from twice_rec.rationales.generate import Collected, Questions
from twice_rec.rationales.offline import OfflineAnnotator
from twice_rec.rationales.recipe import ClientConfig, RationalesRecipe
from twice_rec.rationales.released import ReleasedRationales
from twice_rec.rationales.themes import ThemesAnnotator
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
    if recipe.annotator in ("offline", "themes"):
        is_real = recipe.annotator == "themes"
        by_rule = ThemesAnnotator(catalog, shown) if is_real else OfflineAnnotator(catalog, shown.prompt_history_items)
        yield Annotator(recipe.annotator, by_rule.annotate, by_rule.review if recipe.self_check else None)
    elif released is not None:
        yield Annotator(recipe.annotator, released.annotate)
    else:
        with _collected(recipe, catalog, shown) as collected:
            if recipe.annotator == "batch":
                figures = take_batches(recipe.run_path / BATCHES, collected, examples, recipe)
            else:
                figures = asyncio.run(generate.collect(examples, collected, recipe, len(examples)))
            label = f"{recipe.model}, {'looking forward' if recipe.forward_looking else 'looking back'}"
            yield Annotator(label, collected.annotate, collected.review if recipe.self_check else None, figures)


def take_batches(
    folder: Path,
    collected: Collected,
    examples: Sequence[Example],
    config: ClientConfig,
    limited_by: str = "max_rationales",
) -> dict[str, Any]:
    """Read the result files of a folder, and write what is still missing; return figures for the manifest.

    Raises:
        Stopped: while something is missing, or if the next request files may cost more than is left.
    """
    cache = collected.cache
    refused = batch.read_results(folder, cache)
    if any(collected.next_request(example) is None for example in examples):  # else all are refused, and not these
        collected.failures.update(refused)
    if not batch.outstanding(folder, cache):
        if config.max_cost is not None:
            _require_budget(config, collected, examples, config.max_cost, limited_by)
        batch.write_requests(folder, collected.missing(examples))
    if waiting := batch.outstanding(folder, cache):
        raise Stopped(batch.instructions(waiting, str(collected.questions.config.model)))
    return {"answers_stored": len(cache), "unusable_responses": cache.unusable}


def _require_budget(
    config: ClientConfig, collected: Collected, examples: Sequence[Example], max_cost: float, limited_by: str
) -> None:
    """Raise Stopped if the next request files may cost more than is left of the budget."""
    cache, chars_per_token = collected.cache, generate.CHARS_PER_TOKEN
    spent = config.cost(cache.prompt_tokens, cache.completion_tokens)
    missing = collected.missing(examples)
    needed = sum(config.cost(request.prompt_chars / chars_per_token, request.max_tokens) for request in missing)
    if needed and spent + needed > max_cost:
        raise Stopped(
            f"the budget is used up: {spent:.4f} of max_cost {max_cost:g} spent, and the next request files may cost "
            f"{needed:.4f}; raise max_cost, or lower {limited_by}"
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
