"""What all stages do alike: the command line, logs, errors as one message, Weights & Biases, distributed processes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twice_rec.artifacts import InputError, Work
from twice_rec.config import GrpoRecipe, Recipe, describe_keys
from twice_rec.data.dataset import PreparedData
from twice_rec.data.fitting import PromptWriter
from twice_rec.evaluation.baselines import CFScorer
from twice_rec.evaluation.predict import CFQuestions, evaluate_scorers
from twice_rec.prompts import Message

logger = logging.getLogger(__name__)

IS_MAIN = int(os.environ.get("RANK", "0")) == 0

_FULL_OR_LOCKED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def run_stage(
    name: str,
    recipe_class: type[Recipe],
    load: Callable[[str, Sequence[str]], Any],
    body: Callable[[Any], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run one stage from the command line `--config RECIPE [--key value ...]`; returns the exit status.

    Args:
        name: of the stage, for the log.
        load: reads the recipe, with overrides; or (recipe, keywords of a trainer's configuration).
        body: does the work with what `load` gave.

    Returns:
        0 done; 2 something the user gave cannot be used; 130 interrupted; 1 anything else. All but the last leave one
        message and no trace on the terminal; the log file has the trace.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in words or "-h" in words:
        sys.stdout.write(f"usage: --config RECIPE [--key value ...]\n\n{describe_keys(recipe_class)}\n")
        return 0
    _log_to_terminal()

    def logged() -> int:
        if len(words) < 2 or words[0] != "--config":
            raise InputError(
                f"{name}: expected --config RECIPE [--key value ...], found {' '.join(words) or 'nothing'}"
            )
        loaded = load(words[1], words[2:])
        recipe: Recipe = loaded[0] if isinstance(loaded, tuple) else loaded
        with _log_to_file(recipe.run_path, name):
            logger.info("%s: %s", name, " ".join(words))
            _announce_wandb(recipe, name)
            return _guarded(name, lambda: body(loaded))

    return _guarded(name, logged)


def _guarded(name: str, body: Callable[[], int | None]) -> int:
    """The exit status of `body`, whatever it raises told in one message."""
    try:
        return body() or 0
    except KeyboardInterrupt:
        logger.error("%s: interrupted; nothing is lost: the same command goes on where it stopped", name)
        return 130
    except InputError as error:
        logger.error("%s", error)
        return 2
    except OSError as error:
        if error.errno not in _FULL_OR_LOCKED:
            raise
        logger.debug("%s", traceback.format_exc())
        logger.error("%s", _cannot_write(error))
        return 1
    except Exception:
        logger.exception("%s failed", name)
        return 1


def _cannot_write(error: OSError) -> str:
    where = error.filename or "a file"
    return (
        f"cannot write {where}: {error.strerror}. Finished files are whole and nothing half-written is left in their "
        "place; make room or choose another --run_dir, then run the same command again"
    )


class _TerminalFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def _log_to_terminal() -> None:
    root = logging.getLogger()
    root.setLevel(logging.DEBUG)
    for handler in [h for h in root.handlers if isinstance(h, _Terminal)]:
        root.removeHandler(handler)
    terminal = _Terminal()
    terminal.setLevel(logging.INFO if IS_MAIN else logging.ERROR)
    terminal.setFormatter(_TerminalFormat("%(message)s"))
    root.addHandler(terminal)
    for noisy in (
        "urllib3",
        "filelock",
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
        "openai",
        "fsspec",
        "asyncio",
        "matplotlib",
        "datasets",
        "wandb",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Terminal(logging.StreamHandler):
    """Writes to whatever standard error is at the time, so that progress bars and tests see it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)


@contextlib.contextmanager
def _log_to_file(run_dir: Path, name: str) -> Iterator[None]:
    """Append everything to `run_dir/logs/NAME.log`; other processes than the first to a file of their own."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if IS_MAIN else f".rank{os.environ['RANK']}"
    handler = logging.FileHandler(folder / f"{name}{suffix}.log", encoding="utf-8")
    handler.setLevel(logging.DEBUG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _announce_wandb(recipe: Recipe, name: str) -> None:
    """Set the environment that `wandb.init()` and transformers' callback read."""
    if recipe.wandb == "none":
        os.environ["WANDB_MODE"] = "disabled"
        return
    os.environ["WANDB_MODE"] = recipe.wandb
    os.environ["WANDB_PROJECT"] = recipe.wandb_project
    os.environ["WANDB_RUN_GROUP"] = recipe.wandb_group or recipe.run_path.name
    os.environ["WANDB_NAME"] = recipe.wandb_run_name or name
    os.environ["WANDB_DIR"] = str(recipe.run_path)


def about(recipe: Recipe, trainer_keys: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Any]:
    """Command and whole recipe, for the manifest. Recipes hold no secrets: keys come from the environment."""
    return {"command": sys.argv, "recipe": {**dataclasses.asdict(recipe), **trainer_keys}}


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


def prompt_writer(data: PreparedData, recipe: Any, tokenizer: Any) -> PromptWriter:
    """The writer of a model's prompts, the same in stages 2, 3 and 4."""
    from twice_rec.llm.modeling import encode_chat

    def count_tokens(prompt: Sequence[Message]) -> int:
        return len(encode_chat(tokenizer, prompt))

    return PromptWriter(data.catalog, data.prompt_format, recipe.max_prompt_tokens, count_tokens, recipe.item_first)


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
