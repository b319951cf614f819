"""Stage 1: training examples -> rationales/ (accepted and rejected rationales, and a report), or to `variant`.

Every drawn training user gets one post-hoc rationale for the training target, with the annotator's own verdict on
whether history and item are connected; rows it does not find connected are dropped (self-annotated curation), and so is
what breaks the recipe's limits. Completions of a language model are kept in answers/, whatever becomes of them.

Deviations from the paper: prompts, exemplars and limits are ours, since the release has none; verdicts have three
values, not two; the annotator sees what the trained model will see, cut as stage 0 cuts it. Resumes where it stopped.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np

from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.data.sources.release import ReleaseSource
from twice_rec.errors import InputError
from twice_rec.random_streams import random_stream
from twice_rec.rationales import annotators, curate, report
from twice_rec.rationales.exemplars import load_exemplars
from twice_rec.rationales.recipe import RationalesRecipe
from twice_rec.rationales.released import ReleasedRationales
from twice_rec.run import StageRun
from twice_rec.stages.command_line import command

logger = logging.getLogger("rationales")


def rationales(recipe: RationalesRecipe) -> None:
    """Annotate, curate, report."""
    inputs = dataset.training_files(recipe.run_path)
    if recipe.exemplars and recipe.asks_a_model:
        load_exemplars(Path(recipe.exemplars))  # wrong ones are an error before anything is begun
        inputs.append(Path(recipe.exemplars))
    if recipe.annotator == "release":
        inputs += ReleaseSource(Path(recipe.source_dir or ""), recipe.domain).files
    other = report.load_report(Path(recipe.compare_with)) if recipe.compare_with else None
    data = PreparedData(recipe.run_path / "data")
    if recipe.dry_run:
        asked, _, _ = _drawn(recipe, data)
        logger.info("%s", annotators.estimate(recipe, data.catalog, data.prompt_format, asked))
        return
    with StageRun(recipe, "rationales", recipe.variant, inputs) as run:
        if run.is_finished():
            return
        run.begin()
        asked, in_file_order, released = _drawn(recipe, data)
        with annotators.open_annotator(recipe, data.catalog, data.prompt_format, asked, released) as annotator:
            found = curate.curate(in_file_order, annotator, recipe, data.catalog, run.path)
        reports = report.save_report(found, other, run.path)
        logger.info("%s", report.to_markdown(found, other))
        logger.info("%s of %s rationales accepted; %s", f"{found.accepted:,}", f"{found.rows:,}", run.path)
        figures = {"accepted": found.accepted, "rejected": found.rows - found.accepted, "reasons": found.reasons}
        run.finish([run.path / curate.ACCEPTED, run.path / curate.REJECTED, *reports], {**figures, **annotator.figures})


def _drawn(recipe: RationalesRecipe, data: PreparedData) -> tuple[list, list, ReleasedRationales | None]:
    """The drawn examples in the order in which they are asked, the same in the files' order, and released texts."""
    released = None
    if recipe.annotator == "release":
        source = ReleaseSource(Path(recipe.source_dir or ""), recipe.domain)
        released = ReleasedRationales(source.rationales(), data.catalog)
    examples = [example for example in data.training_examples() if released is None or example in released]
    if not examples:
        raise InputError(f"no released rationale in {recipe.source_dir} is about a training target in {data.folder}")
    drawn = random_stream(recipe.seed, "annotated users").permutation(len(examples))[: recipe.max_rationales]
    return [examples[i] for i in drawn], [examples[i] for i in np.sort(drawn)], released


main = command("rationales", RationalesRecipe, rationales)

if __name__ == "__main__":
    sys.exit(main())
