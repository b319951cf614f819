"""Stage 1: training examples -> rationales/ (accepted and rejected rationales).

Every drawn training user gets one post-hoc rationale for the training target, with the annotator's own verdict on
whether history and item are connected; rows it does not find connected are dropped (self-annotated curation).

Deviation from the paper: the annotator here works by rule, from the items' texts and the user's reviews.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

from twice_rec.artifacts import Work, write_jsonl, write_records
from twice_rec.config import RationalesRecipe, load_recipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.progress import progress
from twice_rec.rationales.curate import rejection
from twice_rec.rationales.offline import OfflineAnnotator
from twice_rec.stages.lifecycle import about, need, run_stage, say_finished

logger = logging.getLogger("rationales")


def rationales(recipe: RationalesRecipe) -> None:
    """Annotate and curate."""
    run, names = recipe.run_path, (dataset.CATALOG, dataset.SEQUENCES, dataset.PROMPT, "candidates.train.jsonl")
    files = [need(run / "data" / name, "prepare.sh") for name in names]
    work = Work(run, "rationales", "rationales", recipe.settings(), files)
    if work.is_finished():
        say_finished(work.path)
        return
    work.begin(recipe.overwrite)
    data = PreparedData(run / "data")
    examples = list(data.training_examples())
    drawn = np.random.default_rng(recipe.seed).permutation(len(examples))[: recipe.max_rationales]
    annotator = OfflineAnnotator(data.catalog)
    accepted, rejected, reasons = [], [], Counter[str]()
    for position in progress(np.sort(drawn).tolist(), desc="rationales", unit="row"):
        rationale = annotator.annotate(examples[position])
        history = len(examples[position].history)
        reason = rejection(rationale, history, recipe.accepted_verdicts, recipe.min_words, recipe.max_words)
        if reason is None:
            accepted.append(rationale)
        else:
            reasons[reason] += 1
            rejected.append(
                {"reason": reason, "user_id": rationale.user_id, "target": rationale.target, "text": rationale.text}
            )
    write_records(work.path / "accepted.jsonl", accepted)
    write_jsonl(work.path / "rejected.jsonl", rejected)
    figures = {"accepted": len(accepted), "rejected": len(rejected), "reasons": dict(reasons)}
    logger.info("%s", ", ".join(f"{name} {value}" for name, value in figures.items()))
    work.finish([work.path / "accepted.jsonl", work.path / "rejected.jsonl"], figures, about(recipe))


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
