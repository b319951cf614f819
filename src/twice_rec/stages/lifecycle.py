"""What stages do alike between command line and manifest: inputs, trainers, devices, CF models evaluated."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twice_rec.cf.baselines import CFScorer
from twice_rec.config import GrpoRecipe, Recipe
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.predict import CFQuestions, evaluate_scorers
from twice_rec.run import Work

logger = logging.getLogger(__name__)


def about(recipe: Recipe, trainer_keys: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Any]:
    """Command and whole recipe, for the manifest. Recipes hold no secrets: keys come from the environment."""
    everything = dataclasses.asdict(recipe) if dataclasses.is_dataclass(recipe) else recipe.everything()
    return {"command": sys.argv, "recipe": {**everything, **trainer_keys}}


# Keys of a trainer's configuration that a stage sets itself -> what to use instead.
OWNED_BY_STAGES = {
    "output_dir": "results go to a folder of run_dir",
    "report_to": "use wandb: none, offline or online",
    "run_name": "use wandb_run_name",
    "resume_from_checkpoint": "a checkpoint in the results' folder is resumed by itself",
    "model_init_kwargs": "use dtype, attn_implementation and model_revision",
    "reward_weights": "it is read from our own key of that name",
    **dict.fromkeys(
        ("log_completions", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
        "all completions go to completions/ by themselves, and sample_every shows some",
    ),
    "use_vllm": "use rollout",
    "vllm_mode": "use rollout: trl_server or trl_colocate",
}


def owned_arguments(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The trainer arguments that `OWNED_BY_STAGES` keeps from recipes, but for reward_weights."""
    return {
        "output_dir": str(folder),
        "seed": recipe.seed,
        "report_to": "none" if recipe.wandb == "none" else "wandb",
        "run_name": os.environ.get("WANDB_NAME"),
    }


def train_and_save(trainer: Any, folder: Path, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one, and leave model, metrics and state as transformers' users know them."""
    if checkpoint:
        _read_numbered_cpus()
        logger.info("resuming from %s", checkpoint)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(str(folder))
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


@functools.cache
def _read_numbered_cpus() -> None:
    """Data-parallel processes on a CPU save and load their optimizer as `cpu:0`, a place that torch does not know."""
    import torch

    torch.serialization.register_package(
        99, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


def trainer_figures(trainer: Any) -> dict[str, Any]:
    """Steps, final loss and speed of a transformers trainer, for the manifest."""
    last = trainer.state.log_history[-1] if trainer.state.log_history else {}
    return {"steps": trainer.state.global_step, **{k: v for k, v in last.items() if isinstance(v, (int, float))}}


def say_finished(folder: Path) -> None:
    """Tell the user that nothing is redone."""
    logger.info("%s is finished already; nothing to do", folder)


def need(path: Path, made_by: str) -> Path:
    """The path, which another stage must have made.

    Raises:
        InputError: where it is not there, naming the launcher that makes it.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; it is made by {made_by}, which must run first")
    return path


def grpo_start(recipe: GrpoRecipe) -> Path:
    """The model that stage 3 starts from, for trainer and server alike: a folder, or a name on the hub."""
    if recipe.model_name_or_path is not None:
        return Path(recipe.model_name_or_path)
    return need(recipe.run_path / "sft" / "merged", "sft.sh")


def torch_device(name: str) -> str:
    """`auto` is a GPU if there is one; a GPU that is asked for must be there."""
    import torch

    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name.startswith("cuda") and not available:
        raise InputError(f"device is {name}, but torch {torch.__version__} sees no GPU; use --device cpu")
    return name


@contextlib.contextmanager
def wandb_run(recipe: Recipe) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A Weights & Biases run for stages without a trainer of their own; yields what logs a step. Silent for `none`."""
    if recipe.wandb == "none":
        yield lambda values: None
        return
    import wandb

    with wandb.init(config=dataclasses.asdict(recipe)) as run:
        yield run.log


def evaluate_variant(
    recipe: Recipe,
    stage: str,
    name: str,
    data: PreparedData,
    lists: Sequence[str],
    scorers: Callable[[], Iterable[CFScorer]],
    inputs: Iterable[Path],
    settings: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
    """Write eval/<name>/ of a CF model on the test targets, unless it is there already.

    Args:
        scorers: makes one model, or one a training run.
        inputs: what the result depends on.
        settings: what else it depends on, beside the lists.
    """
    work = Work(recipe.run_path, f"eval/{name}", stage, {"lists": list(lists), **settings}, inputs)
    if work.is_finished():
        say_finished(work.path)
        return
    work.begin(recipe.overwrite)
    outputs, metrics = evaluate_scorers(work.path, CFQuestions.of(data, "test", lists), scorers(), recipe.seed)
    work.finish(outputs, metrics, about(recipe))
