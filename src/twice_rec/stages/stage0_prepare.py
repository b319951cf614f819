"""Stage 0: a source of purchases -> data/ (catalogue, sequences, candidate lists, statistics).

Writes `data/catalog.jsonl`, `sequences.jsonl`, `candidates.{train,valid,test}.jsonl`, `prompt.json`, `statistics.json`,
and for the synthetic world `oracle.npz` (the true log-probabilities of every user's next purchase) and the raw files
under `data/raw/`, which then go the way of any Amazon Reviews 2023 domain.

Deviations from the paper: candidate lists are drawn per user (the release's test lists share one pool of popular
distractors), and also popularity-weighted and hard ones can be had. Training candidates use the prompt's kind only.
Limits: one process; the table of purchases must fit in memory (28 bytes each, and the ids), and the kept reviews.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.baselines import ItemSimilarityScorer, interaction_matrix, knn_similarity
from twice_rec.config import PrepareRecipe, load_recipe
from twice_rec.data import dataset
from twice_rec.data.candidates import draw_candidates
from twice_rec.data.sequences import assemble, statistics
from twice_rec.data.sources.amazon import SCHEMA_2014, SCHEMA_2023, AmazonSource
from twice_rec.data.sources.base import Source
from twice_rec.data.sources.recbole import AtomicSource
from twice_rec.data.sources.release import ReleaseSource
from twice_rec.data.sources.synthetic import World, WorldSettings
from twice_rec.files import atomic_path, write_json, write_records
from twice_rec.progress import progress
from twice_rec.prompts import PromptFormat
from twice_rec.records import SPLITS, UserSequence
from twice_rec.run import Work
from twice_rec.stages.command_line import run_stage
from twice_rec.stages.lifecycle import about, say_finished

logger = logging.getLogger("prepare")
WORLD_KEYS = ("users", "items", "taste", "complement", "cohort", "popularity", "brand")


def prepare(recipe: PrepareRecipe) -> None:
    """Make `data/`."""
    source = None if recipe.source == "world" else _open(recipe, Path(recipe.source_dir or "."))
    work = Work(recipe.run_path, "data", "prepare", recipe.settings(), source.files if source else ())
    if work.is_finished():
        say_finished(work.path)
        return
    work.begin(recipe.overwrite)
    world = None
    if source is None:
        strengths = {name: getattr(recipe, f"world_{name}") for name in WORLD_KEYS}
        world = World(WorldSettings(**strengths, seed=recipe.seed))
        world.write(work.path / "raw", recipe.domain)
        source = AmazonSource(work.path / "raw", recipe.domain, SCHEMA_2023)
    shares = (recipe.temporal_valid, recipe.temporal_test) if recipe.split == "temporal" else None
    catalog, sequences = assemble(
        source, recipe.untitled_items, recipe.k_core, recipe.min_history, recipe.max_history, shares
    )
    for line in source.problems.lines():
        logger.warning("%s", line)
    catalog.save(work.path / dataset.CATALOG)
    write_records(work.path / dataset.SEQUENCES, sequences)
    _write_candidates(recipe, work.path, catalog, sequences)
    dataset.save_prompt_format(work.path / dataset.PROMPT, PromptFormat.of(recipe))
    if world:
        _write_oracle(work.path / dataset.ORACLE, world, catalog, sequences)
    figures = {**statistics(sequences, catalog), "problems": source.problems.counts}
    write_json(work.path / dataset.STATISTICS, figures)
    for name, value in figures.items():
        logger.info("  %-20s %s", name, f"{value:,.6g}" if isinstance(value, float) else value)
    outputs = sorted(path for path in work.path.iterdir() if path.name[0] != ".")
    work.finish(outputs, figures, about(recipe))


def _open(recipe: PrepareRecipe, folder: Path) -> Source:
    if recipe.source == "release":
        return ReleaseSource(folder, recipe.domain)
    if recipe.source == "atomic":
        return AtomicSource(folder, recipe.domain, recipe.reviews_file, recipe.metadata_file)
    schema = SCHEMA_2023 if recipe.source == "amazon2023" else SCHEMA_2014
    required = recipe.untitled_items == "drop"
    return AmazonSource(folder, recipe.domain, schema, recipe.reviews_file, recipe.metadata_file, required)


def _write_candidates(
    recipe: PrepareRecipe, folder: Path, catalog: ItemCatalog, sequences: Sequence[UserSequence]
) -> None:
    training = [catalog.indices(e.item_id for e in s.interactions[: s.num_train]) for s in sequences]
    score = None
    if "hard" in recipe.candidate_lists:
        knn = ItemSimilarityScorer(knn_similarity(interaction_matrix(training, len(catalog)), shrink=20.0), decay=0.9)
        score = lambda histories: knn.scores(np.arange(len(histories)), histories)
    for split in SPLITS:
        kinds = [recipe.prompt_list] if split == "train" else recipe.candidate_lists
        drawn = draw_candidates(
            sequences, catalog, split, kinds, recipe.num_candidates, recipe.seed, recipe.hard_pool, score
        )
        bar = progress(drawn, desc=f"candidates ({split})", unit="user", total=len(sequences))
        write_records(folder / dataset.candidates_file(split), bar)


def _write_oracle(path: Path, world: World, catalog: ItemCatalog, sequences: Sequence[UserSequence]) -> None:
    """Scores [users, items] of the best possible ranking of the test targets, as `evaluate` takes outside scores."""
    scores = world.test_log_probabilities(sequences, catalog)
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, scores=scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage(
        "prepare", PrepareRecipe, lambda path, flags: load_recipe(path, PrepareRecipe, flags), prepare, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
