"""Stage 4: the same test questions to every variant -> eval/<variant>/ (predictions and metrics).

`base`, `stage2`, `stage3` and `stage3_NAME` are language models, asked about stored candidate lists; `oracle` and the
models in `outside_scores` are score files that rank whatever lists are asked for. CF models are evaluated by their own
stage. Killed and started again, it goes on behind the last whole batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from twice_rec.cf.baselines import PrecomputedScorer
from twice_rec.config import EvaluateRecipe, grpo_folder, load_recipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.llm_ranking import evaluate_language_model
from twice_rec.evaluation.tables import read_metrics, show_metrics
from twice_rec.records import Example
from twice_rec.run import Work
from twice_rec.stages.command_line import run_stage
from twice_rec.stages.lifecycle import about, evaluate_variant, need, prompt_writer, say_finished, torch_device


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
            inputs = [*files, need(outside, "whoever scored")]
            scorer = partial(_read_scores, outside, data)
            evaluate_variant(recipe, "evaluate", variant, data, recipe.score_lists, scorer, inputs)
        else:
            if variant == "base":
                model = Path(recipe.model_name_or_path or "")
            elif variant == "stage2":
                model = need(run / "sft" / "merged", "sft.sh")
            else:
                model = need(run / grpo_folder(variant) / "merged", f"grpo_step2.sh with --variant {variant}")
            for ranking in recipe.rankings:
                name = variant if ranking == recipe.rankings[0] else f"{variant}_{ranking}"
                _language_model(recipe, data, name, model, ranking, files)
    show_metrics(read_metrics(run))


def _read_scores(path: Path, data: PreparedData) -> list[PrecomputedScorer]:
    return [PrecomputedScorer(path, len(data.sequences), len(data.catalog))]


def _language_model(
    recipe: EvaluateRecipe, data: PreparedData, name: str, model: Path, ranking: str, files: list[Path]
) -> None:
    reads = ["num_users", "lists", "with_rationale", "max_prompt_tokens", "max_new_tokens", "batch_size", "dtype"]
    reads += ["item_first", "seed", *(["num_samples", "temperature", "top_p"] if ranking == "sampled" else [])]
    settings = {"ranking": ranking, **{key: getattr(recipe, key) for key in reads}}
    work = Work(recipe.run_path, f"eval/{name}", "evaluate", settings, [*files, *([model] if model.is_dir() else [])])
    if work.is_finished():
        say_finished(work.path)
        return
    work.begin(recipe.overwrite)

    from twice_rec.llm.generation import TransformersGenerator
    from twice_rec.llm.models import load_model, load_tokenizer

    llm = load_model(model, recipe.dtype, recipe.attn_implementation, device=torch_device(recipe.device))
    tokenizer = load_tokenizer(model)
    generator = TransformersGenerator(llm, tokenizer, recipe.max_new_tokens)
    writer = prompt_writer(data, recipe, tokenizer)
    batches = list(_batches(recipe, data))
    outputs, metrics = evaluate_language_model(work.path, generator, batches, writer, recipe, ranking, recipe.seed)
    work.finish(outputs, metrics, about(recipe))


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
