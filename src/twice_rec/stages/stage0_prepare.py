"""Stage 0: a source of interactions -> data/ (catalogue, sequences, candidate lists, statistics).

Writes `catalog.jsonl`, `sequences.jsonl`, `candidates.{train,valid,test}.jsonl`, `prompt.json`, `statistics.json`,
and for the synthetic domain `oracle.npz` (the true logprobs of every user's next interaction) and the raw files under
`data/raw/`, which are then read like those of any domain of Amazon Reviews 2023.

Deviations from the paper: candidate lists are drawn per user (the release's test lists share one pool of popular
distractors), and there are popularity-weighted and hard ones too. Training candidates are of the prompt's list only.
Limits: one process; the table of interactions (28 bytes each, and the ids) and the kept reviews must fit in memory.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.baselines import ItemSimilarityScorer, interaction_matrix, knn_similarity
from twice_rec.data import dataset
from twice_rec.data.candidates import draw_candidates
from twice_rec.data.recipe import PrepareRecipe
from twice_rec.data.sequences import assemble, statistics
from twice_rec.files import atomic_path, write_json, write_records
from twice_rec.progress import progress
from twice_rec.records import SPLITS, UserSequence
from twice_rec.run import StageRun
from twice_rec.stages.command_line import command

logger = logging.getLogger("prepare")


def prepare(recipe: PrepareRecipe) -> None:
    """Make `data/`."""
    recipe.fetch_source()
    source = recipe.open_source()
    with StageRun(recipe, "prepare", "data", source.files) as run:
        if run.is_finished():
            return
        run.begin(resumes=False)
        source.generate(run.path / "raw")
        catalog, sequences = assemble(source, recipe)
        for line in source.problems.lines():
            logger.warning("%s", line)
        catalog.save(run.path / dataset.CATALOG)
        write_records(run.path / dataset.SEQUENCES, sequences)
        hard = _write_candidates(recipe, run.path, catalog, sequences)
        dataset.save_prompt_format(run.path / dataset.PROMPT, recipe)
        oracle = source.oracle_scores(sequences, catalog)
        if oracle is not None:
            with atomic_path(run.path / dataset.ORACLE) as temporary:
                np.savez_compressed(temporary, scores=oracle)
        figures = {**statistics(sequences, catalog), "problems": source.problems.counts}
        if hard["drawn"]:
            figures["hard_negatives_tied"] = hard["tied"] / hard["drawn"]  # at the edge of the pool, so drawn at random
        write_json(run.path / dataset.STATISTICS, figures)
        for name, value in figures.items():
            logger.info("  %-20s %s", name, f"{value:,.6g}" if isinstance(value, float) else value)
        run.finish(sorted(path for path in run.path.iterdir() if path.name[0] != "."), figures)


def _write_candidates(
    recipe: PrepareRecipe, folder: Path, catalog: ItemCatalog, sequences: list[UserSequence]
) -> Counter[str]:
    """Write the lists of all splits, and return how many hard negatives were drawn, and how many of them tied."""
    score, tied = None, Counter[str]()
    if "hard" in recipe.candidate_lists:
        training = [catalog.indices(e.item_id for e in s.interactions[: s.num_train]) for s in sequences]
        knn = ItemSimilarityScorer(knn_similarity(interaction_matrix(training, len(catalog)), shrink=20.0), decay=0.9)
        score = lambda histories: knn.scores(np.arange(len(histories)), histories)
    for split in SPLITS:
        drawn = draw_candidates(recipe, sequences, catalog, split, recipe.seed, score, tied)
        bar = progress(drawn, desc=f"candidates ({split})", unit="user", total=len(sequences))
        write_records(folder / dataset.candidates_file(split), bar)
    return tied


main = command("prepare", PrepareRecipe, prepare)

if __name__ == "__main__":
    sys.exit(main())
