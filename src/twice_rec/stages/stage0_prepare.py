"""Stage 0: a source of interactions -> data/ (catalogue, sequences, candidate lists, statistics).

Writes `catalog.jsonl`, `sequences.jsonl`, `candidates.{train,valid,test}.jsonl`, `prompt.json`, `statistics.json`,
and for the synthetic domain `oracle.npz` (the true logprobs of every user's next interaction), `ceiling_*.npz` (the
best rankings from a part of what is true; `data/ceilings.py`), `true_reasons.jsonl` (what speaks for and against it)
and the raw files under `data/raw/`, which are then read like those of any domain of Amazon Reviews 2023.

Deviations from the paper: candidate lists are drawn per user (the release's test lists share one pool of popular
distractors), and there are popularity-weighted and hard ones too. Training candidates are of the prompt's list only.
Limits: one process; the table of interactions (28 bytes each, and the ids), the items and their similarities must fit
in memory. The texts of raw reviews wait in files under `data/`, which go at the end: reading them again is quick.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.baselines import knn_similarity
from twice_rec.data import dataset
from twice_rec.data.candidates import CandidateDraw
from twice_rec.data.ceilings import known_scores
from twice_rec.data.estimate import check_room
from twice_rec.data.hard import SimilarItems, training_matrix
from twice_rec.data.recipe import PrepareRecipe
from twice_rec.data.sequences import SequenceTable, assemble, log_figures, statistics, write_sequences
from twice_rec.files import atomic_path, scratch_folder, write_json, write_records
from twice_rec.records import SPLITS
from twice_rec.run import StageRun
from twice_rec.stages.command_line import command


def prepare(recipe: PrepareRecipe) -> None:
    """Make `data/`."""
    recipe.fetch_source()
    source = recipe.open_source()
    with StageRun(recipe, "prepare", "data", source.files) as run:
        if run.is_finished():
            return
        check_room(source, recipe, run.path)
        run.begin(resumes=False)
        with scratch_folder(run.path) as source.scratch:
            source.generate(run.path / "raw")
            catalog, table, steps = assemble(source, recipe)
            catalog.save(run.path / dataset.CATALOG)
            write_sequences(run.path / dataset.SEQUENCES, table, catalog, source)
        figures = {**statistics(table, catalog), "problems": source.problems.counts}
        figures |= _write_candidates(recipe, run.path, catalog, table)
        figures["steps"] = [asdict(step) for step in steps]
        dataset.save_prompt_format(run.path / dataset.PROMPT, recipe)
        for name, scores in known_scores(source, table.records(catalog), catalog, recipe, recipe.seed):
            with atomic_path(run.path / dataset.score_file(name)) as temporary:
                np.savez_compressed(temporary, scores=scores)
        if (reasons := source.true_reasons(table.records(catalog))) is not None:
            write_records(run.path / dataset.TRUE_REASONS, reasons)
        write_json(run.path / dataset.STATISTICS, figures)
        log_figures(figures)
        run.finish(sorted(path for path in run.path.iterdir() if path.name[0] != "."), figures)


def _write_candidates(
    recipe: PrepareRecipe, folder: Path, catalog: ItemCatalog, table: SequenceTable
) -> dict[str, float]:
    """Write the lists of all splits; return the share of the hard negatives that a draw among equal scores chose."""
    similar = None
    if "hard" in recipe.candidate_lists:
        similar = SimilarItems(knn_similarity(training_matrix(table, len(catalog)), shrink=20.0), decay=0.9)
    draw = CandidateDraw(recipe, table, len(catalog), recipe.seed, similar)
    for split in SPLITS:
        draw.write(folder / dataset.candidates_file(split), split, catalog)
    return {"hard_negatives_tied": draw.tied["tied"] / draw.tied["drawn"]} if draw.tied["drawn"] else {}


main = command("prepare", PrepareRecipe, prepare)

if __name__ == "__main__":
    sys.exit(main())
