"""The command line of a stage: arguments, logs, errors as one message, the environment of Weights & Biases."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from twice_rec import config, recipe_reader
from twice_rec.config import Recipe
from twice_rec.errors import InputError

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
        reader = config if issubclass(recipe_class, Recipe) else recipe_reader
        sys.stdout.write(f"usage: --config RECIPE [--key value ...]\n\n{reader.describe_keys(recipe_class)}\n")
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
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL_OR_LOCKED:
            logger.debug("%s", traceback.format_exc())
            logger.error("%s", _cannot_write(error))
        else:
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
