"""Stage 4: the same test questions to every variant -> eval/<variant>/ (predictions and metrics).

`base`, `stage2` and `stage3` are language models, asked about stored candidate lists; `oracle` and the models in
`outside_scores` are score files that rank whatever lists are asked for. CF models are evaluated by their own stage.
Killed and started again, it goes on behind the last whole batch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from twice_rec.artifacts import InputError, Work, read_records, write_json
from twice_rec.config import EvaluateRecipe, load_recipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.evaluation.baselines import OutsideScorer
from twice_rec.evaluation.predict import (
    METRICS_FILE, PREDICTIONS, AskSettings, CFQuestions, answer_rates, append_predictions, ask, metrics_of,
    whole_batches, write_evaluation,
)  # fmt: skip
from twice_rec.evaluation.tables import read_metrics, show_metrics
from twice_rec.progress import progress
from twice_rec.records import Example, Prediction
from twice_rec.stages.lifecycle import about, need, run_stage, say_finished, torch_device

logger = logging.getLogger("evaluate")

MODELS = {"stage2": ("sft/merged", "sft.sh"), "stage3": ("grpo/merged", "grpo_step2.sh")}
PARTIAL = "predictions.partial.jsonl"


def evaluate(recipe: EvaluateRecipe) -> None:
    """Evaluate every variant of the recipe that is not finished."""
    run, names = recipe.run_path, (dataset.CATALOG, dataset.SEQUENCES, dataset.PROMPT, "candidates.test.jsonl")
    files = [need(run / "data" / name, "prepare.sh") for name in names]
    data = PreparedData(run / "data")
    for variant in recipe.variants:
        if variant == "oracle" or variant in recipe.outside_scores:
            outside = Path(recipe.outside_scores.get(variant, run / "data" / dataset.ORACLE))
            if variant == "oracle" and not outside.exists():
                raise InputError(f"{outside}: no such file; only the world has an oracle, leave it out of variants")
            _score_file(recipe, data, variant, outside, files)
        else:
            model = Path(recipe.model_name_or_path or "") if variant == "base" else need(run / MODELS[variant][0], MODELS[variant][1])
            for ranking in recipe.rankings:
                name = variant if ranking == recipe.rankings[0] else f"{variant}_{ranking}"
                _language_model(recipe, data, name, model, ranking, files)
    show_metrics(read_metrics(run))


def _score_file(recipe: EvaluateRecipe, data: PreparedData, name: str, path: Path, files: list[Path]) -> None:
    work = Work(recipe.run_path, f"eval/{name}", "evaluate", {"lists": recipe.score_lists}, [*files, need(path, "you")])
    if work.is_finished():
        return say_finished(work.path)
    work.begin(recipe.overwrite)
    test = CFQuestions(data.sequences, data.candidates("test"), data.catalog, "test", recipe.score_lists)
    scorer = OutsideScorer(path, len(data.sequences), len(data.catalog))
    metrics = write_evaluation(work.path, test.predictions(test.ranks(scorer), recipe.seed))
    work.finish([work.path / PREDICTIONS, work.path / METRICS_FILE], metrics, about(recipe))


def _language_model(
    recipe: EvaluateRecipe, data: PreparedData, name: str, model: Path, ranking: str, files: list[Path]
) -> None:
    reads = ["num_users", "lists", "with_rationale", "max_new_tokens", "batch_size", "dtype", "seed"]
    reads += ["num_samples", "temperature", "top_p"] if ranking == "sampled" else []
    settings = {"ranking": ranking, **{key: getattr(recipe, key) for key in reads}}
    work = Work(recipe.run_path, f"eval/{name}", "evaluate", settings, [*files, *([model] if model.is_dir() else [])])
    if work.is_finished():
        return say_finished(work.path)
    work.begin(recipe.overwrite)

    from twice_rec.llm.generation import TransformersGenerator
    from twice_rec.llm.modeling import load_model, load_tokenizer

    llm = load_model(model, recipe.dtype, recipe.attn_implementation, device=torch_device(recipe.device))
    generator = TransformersGenerator(llm, load_tokenizer(model), recipe.max_new_tokens)
    batches = list(_batches(recipe, data))
    partial = work.path / PARTIAL
    done = whole_batches(partial, [len(examples) for _, examples in batches])
    if done:
        logger.info("%s: going on behind batch %d of %d", name, done, len(batches))
    for number in progress(range(done, len(batches)), desc=name, unit="batch", total=len(batches), initial=done):
        kind, examples = batches[number]
        asked = AskSettings(
            ranking=ranking,
            with_rationale=recipe.with_rationale,
            num_samples=recipe.num_samples,
            temperature=recipe.temperature,
            top_p=recipe.top_p,
            seed=int(np.random.SeedSequence([recipe.seed, number]).generate_state(1)[0]),
        )
        append_predictions(partial, ask(generator, examples, kind, data.catalog, data.prompt_format, asked))
    rows = list(read_records(partial, Prediction))
    partial.replace(work.path / PREDICTIONS)
    metrics = {**metrics_of(rows), **answer_rates(rows, data.catalog)}
    write_json(work.path / METRICS_FILE, metrics)
    work.finish([work.path / PREDICTIONS, work.path / METRICS_FILE], metrics, about(recipe))


def _batches(recipe: EvaluateRecipe, data: PreparedData) -> Iterator[tuple[str, list[Example]]]:
    """The drawn users' questions, list kind after list kind; users in the files' order."""
    for kind in recipe.lists:
        examples = list(data.examples("test", kind))
        drawn = np.sort(np.random.default_rng(recipe.seed).permutation(len(examples))[: recipe.num_users])
        for start in range(0, len(drawn), recipe.batch_size):
            yield kind, [examples[position] for position in drawn[start : start + recipe.batch_size]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage(
        "evaluate", EvaluateRecipe, lambda path, flags: load_recipe(path, EvaluateRecipe, flags), evaluate, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
