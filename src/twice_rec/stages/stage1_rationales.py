"""Stage 1: training examples -> rationales/ (accepted and rejected rationales, and a report).

Every drawn training user gets one post-hoc rationale for the training target, with the annotator's own verdict on
whether history and item are connected; rows it does not find connected are dropped (self-annotated curation), and so is
what breaks the recipe's limits. A language model's answers are kept in answers/, whatever becomes of the rationales.

Deviations from the paper: prompts, exemplars and limits are ours, since the release has none; verdicts have three
values, not two; the annotator sees what the trained model will see, cut as stage 0 cuts it. Resumes where it stopped.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.data.sources.release import ReleaseSource
from twice_rec.errors import InputError
from twice_rec.rationales import annotators, curate, report
from twice_rec.rationales.exemplars import load_exemplars
from twice_rec.rationales.recipe import RationalesRecipe
from twice_rec.rationales.released import ReleasedRationales
from twice_rec.recipe_reader import load_recipe
from twice_rec.run import Work
from twice_rec.stages.command_line import run_stage
from twice_rec.stages.lifecycle import need, say_finished

logger = logging.getLogger("rationales")


def rationales(recipe: RationalesRecipe) -> None:
    """Annotate, curate, report."""
    run, names = recipe.run_path, (dataset.CATALOG, dataset.SEQUENCES, dataset.PROMPT, "candidates.train.jsonl")
    files = [need(run / "data" / name, "prepare.sh") for name in names]
    if recipe.exemplars and recipe.asks_a_model:
        load_exemplars(Path(recipe.exemplars))  # wrong ones are an error before anything is begun
        files.append(Path(recipe.exemplars))
    other = report.load_report(Path(recipe.compare_with)) if recipe.compare_with else None
    work = Work(run, "rationales", "rationales", recipe.settings(), files)
    if not recipe.dry_run:
        if work.is_finished():
            say_finished(work.path)
            return
        work.begin(recipe.overwrite)
    data = PreparedData(run / "data")
    released = _released(recipe, data)
    examples = [example for example in data.training_examples() if released is None or example in released]
    if not examples:
        raise InputError(f"no released rationale in {recipe.source_dir} is about a training target in {run / 'data'}")
    drawn = np.random.default_rng(recipe.seed).permutation(len(examples))[: recipe.max_rationales]
    asked = [examples[position] for position in drawn]
    if recipe.dry_run:
        logger.info("%s", annotators.estimate(recipe, data.catalog, data.prompt_format, asked))
        return
    with annotators.open_annotator(recipe, data.catalog, data.prompt_format, asked, released) as annotator:
        found = curate.curate(
            (examples[position] for position in np.sort(drawn).tolist()), annotator, recipe, data.catalog, work.path
        )
    reports = report.save_report(found, other, work.path)
    logger.info("%s", report.to_markdown(found, other))
    logger.info("%s of %s rationales accepted; %s", f"{found.accepted:,}", f"{found.rows:,}", work.path)
    figures = {"accepted": found.accepted, "rejected": found.rows - found.accepted, "reasons": found.reasons}
    outputs = [work.path / curate.ACCEPTED, work.path / curate.REJECTED, *reports]
    about = {"command": sys.argv, "recipe": recipe.everything()}
    work.finish(outputs, {**figures, **annotator.figures}, about)


def _released(recipe: RationalesRecipe, data: PreparedData) -> ReleasedRationales | None:
    if recipe.annotator != "release":
        return None
    assert recipe.source_dir is not None
    return ReleasedRationales(ReleaseSource(Path(recipe.source_dir), recipe.domain).rationales(), data.catalog)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage(
        "rationales",
        RationalesRecipe,
        lambda path, flags: load_recipe(path, RationalesRecipe, flags),
        rationales,
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
