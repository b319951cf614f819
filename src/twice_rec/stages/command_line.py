"""The command line `twice-rec STAGE RECIPE [--key value ...]`: its logs, its errors, the environment of wandb."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from twice_rec.errors import CheckedError, InputError, Unfinished
from twice_rec.masking import masked
from twice_rec.progress import is_log
from twice_rec.recipe import Recipe
from twice_rec.recipe_reader import describe_keys, load_recipe, show_recipe
from twice_rec.run import IS_MAIN, StageRun

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=Recipe)
Main = Callable[..., int]

# Stage -> its module in this folder, its launcher, and what it does.
STAGES = {
    "prepare": ("stage0_prepare", "prepare.sh", "read interactions, filter, split, draw candidate lists"),
    "rationales": ("stage1_rationales", "rationales.sh", "write rationales and keep the good ones"),
    "sft": ("stage2_sft", "sft.sh", "fine-tune the base model on three tasks"),
    "sdpo": ("stage2b_sdpo", "sdpo.sh", "S-DPO on the stage-2 model, a baseline"),
    "sasrec": ("stage3a_sasrec", "sasrec.sh", "train SASRec, evaluate it and the CF baselines"),
    "baselines": ("stage3a_baselines", "baselines.sh", "train RecBole's CF models and evaluate them"),
    "serve": ("stage3b_serve", "grpo_step1.sh", "start the rollout servers"),
    "grpo": ("stage3c_grpo", "grpo_step2.sh", "train with confidence-weighted GRPO"),
    "evaluate": ("stage4_evaluate", "evaluate.sh", "ask every model the same test questions"),
    "judge": ("stage4b_judge", "judge.sh", "judge the rationales of evaluated models"),
    "report": ("stage5_report", "report.sh", "write tables with intervals and comparisons"),
    "ab_test": ("stage4c_ab_test", "ab_test.sh", "simulate an A/B test, or count the log of a real one"),
    "study": ("stage6_study", "study.sh", "run every variant over several seeds, as one plan of the stages above"),
    "share": ("stage7_share", "share.sh", "put a model, its card and its results in a folder, or on the hub"),
}

_NOISY = (
    "urllib3", "filelock", "httpx", "httpx2", "httpcore", "httpcore2", "openai", "fsspec", "asyncio", "matplotlib",
    "datasets", "wandb", "fontTools",
)  # fmt: skip
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_FULL_OR_LOCKED = {*_FULL, errno.EACCES, errno.EPERM}
# What libraries that write files by themselves (safetensors, tokenizers, torch, SQLite) say of the same.
_FULL_IN_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|os error (?:28|30|122)\b|disk is full"
    r"|PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs \d+"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `twice-rec STAGE RECIPE [--key value ...]` or `twice-rec status RUN_DIR`; return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if is_log():  # before libraries are loaded that look at it
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if words[:1] in (["status"], ["cost"], ["release"], ["model"]):
        name = words[0]
        module = importlib.import_module(f"twice_rec.stages.{name}")
        _log_to_terminal()
        return _guarded(name, lambda: getattr(module, name)(words[1:]))
    if words and words[0] in STAGES:
        module = importlib.import_module(f"twice_rec.stages.{STAGES[words[0]][0]}")
        return module.main(words[1:])
    lines = ["usage: twice-rec STAGE RECIPE [--key value ...]", "", "Stages, in their order, and their launchers:"]
    lines += [f"  {name:<11} {launcher:<15} {does}" for name, (_, launcher, does) in STAGES.items()]
    lines += [
        "",
        "twice-rec status RUN_DIR       shows what of a run is fresh, stale, unfinished, running or missing",
        "twice-rec cost RECIPE          estimates what each stage takes: tokens, GPU-hours, API cost, disk",
        "twice-rec release FOLDER       counts the release's defects in the authors' released files",
        "twice-rec model NAME           makes a folder of a ready language model, see recipes/models",
        "twice-rec STAGE --help         lists the keys of the stage's recipe",
        "twice-rec STAGE RECIPE --show  prints the recipe, defaults filled in, and where each value comes from",
        "twice-rec STAGE RECIPE --dry_run  says what sft, sdpo, serve, grpo, rationales, judge and study would take",
        "twice-rec STAGE RECIPE --check looks at the recipe and at what the stage reads, and does nothing else",
        "",
        "A recipe is a YAML file, such as recipes/tiny/sft.yaml. Any key of it can be set by --key value.",
    ]
    if words and words[0] not in ("--help", "-h"):
        sys.stderr.write("\n".join([masked(f"no stage {words[0]!r}"), *lines]) + "\n")
        return 2
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def command(
    name: str, recipe_class: type[C], body: Callable[[C], None], plan: Callable[[C], None] | None = None
) -> Main:
    """Make the `main` of a stage, which takes `RECIPE [--key value ...]`, or `--config RECIPE` with the same flags.

    Args:
        name: name of the stage, for the log.
        body: does the work of the recipe that is read.
        plan: prints for `--dry_run` what that takes; it leaves nothing behind, no log either.

    Returns:
        A function from the words of the command line to the exit status: 0 done; 2 something the user gave cannot be
        used; 130 interrupted; 1 anything else. All but the last leave one message and no trace on the terminal; the
        log file has the trace.
    """

    def stage_main(arguments: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if arguments is None else arguments)
        if "--help" in words or "-h" in words:
            program = f"twice-rec {name}" if name in STAGES else f"bash {name}.sh"
            usage = f"usage: {program} RECIPE [--key value ...]"
            sys.stdout.write(f"{usage}\n\n{(recipe_class.__doc__ or '').strip()}\n\n{describe_keys(recipe_class)}\n")
            return 0
        _log_to_terminal()
        return _guarded(name, lambda: _run(name, recipe_class, body, plan, words))

    stage_main.recipe_class = recipe_class  # type: ignore[attr-defined]
    return stage_main


def _run(
    name: str, recipe_class: type[C], body: Callable[[C], None], plan: Callable[[C], None] | None, words: list[str]
) -> int:
    given = words[1:] if words[:1] == ["--config"] else words
    path, *flags = given or [""]
    if not path or path.startswith("--"):
        raise InputError(f"{name}: expected RECIPE, then flags such as --seed 1, found {' '.join(words) or 'nothing'}")
    check, flags = "--check" in flags, [flag for flag in flags if flag != "--check"]
    if "--show" in flags:
        flags.remove("--show")
        sys.stdout.write(show_recipe(path, recipe_class, flags) + "\n")
        return 0
    if plan is not None and "--dry_run" in flags:
        plan(load_recipe(path, recipe_class, without_dry_run(flags), here=False))
        return 0
    recipe = load_recipe(path, recipe_class, flags)
    with _log_to_file(recipe.run_path, name):
        logger.info("%s: %s", name, " ".join([path, *flags]))
        _announce_wandb(recipe, name)
        StageRun.check_only = check
        try:
            return _guarded(name, lambda: body(recipe), recipe.run_path)
        finally:
            StageRun.check_only = False


def without_dry_run(words: Sequence[str]) -> list[str]:
    """Return the words of a command without `--dry_run`, or `--dry_run true`."""
    place = words.index("--dry_run") if "--dry_run" in words else len(words)
    return [*words[:place], *words[place + 1 + (list(words[place + 1 : place + 2]) == ["true"]) :]]


def _guarded(name: str, body: Callable[[], int | None], run_dir: Path | None = None) -> int:
    """Return the exit status of `body`, which writes below `run_dir`; whatever it raises is told in one message."""
    try:
        return body() or 0
    except KeyboardInterrupt:
        logger.error("%s: interrupted; nothing is lost: the same command goes on where it stopped", name)
        return 130
    except CheckedError:
        logger.info("%s: checked; nothing is wrong", name)
        return 0
    except InputError as error:
        logger.error("%s", error)
        return 2
    except Unfinished as error:
        logger.error("%s", error)
        return 1
    except Exception as error:
        if failed := _failed_write(error, run_dir):
            logger.debug("%s", traceback.format_exc())
            logger.error(
                "cannot write %s. Finished files are whole and nothing half-written is left in their place; make room "
                "or choose another --run_dir, then run the same command again",
                failed,
            )
        else:
            logger.exception("%s failed", name)
        return 1


def _failed_write(error: BaseException, run_dir: Path | None) -> str | None:
    """Say what could not be written and why, if an exception, or what it came from, is a write that failed."""
    somewhere = "a file" if run_dir is None else f"a file below {run_dir}"
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in (_FULL_OR_LOCKED if found is error else _FULL):
            return f"{found.filename or somewhere}: {found.strerror}"
        if not isinstance(found, InputError) and _FULL_IN_WORDS.search(str(found)):
            return f"{somewhere}: {str(found).strip().splitlines()[0]}"
        found = found.__cause__ or found.__context__
    return None


class _MaskedFormat(logging.Formatter):
    """Leaves secrets out of the whole text, traces of exceptions included."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class _TerminalFormat(_MaskedFormat):
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
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Terminal(logging.StreamHandler):
    """Writes to whatever standard error is at the time, so that progress bars and tests see it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)


class _LogFile(logging.FileHandler):
    """A log that is silent on a full disk; what else cannot be written there is told."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Lose the line."""

    def close(self) -> None:
        """See `FileHandler`; what is still to be written may be lost."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def _log_to_file(run_dir: Path, name: str) -> Iterator[None]:
    """Append everything to `run_dir/logs/NAME.log`; other processes than the first to a file of their own."""
    folder = run_dir / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _FULL_OR_LOCKED:
            raise
        raise InputError(f"run_dir is {run_dir}: no folder can be made there ({error.strerror})") from None
    suffix = "" if IS_MAIN else f".rank{os.environ['RANK']}"
    handler = _LogFile(folder / f"{name}{suffix}.log", encoding="utf-8")
    handler.setLevel(logging.DEBUG)
    handler.setFormatter(_MaskedFormat("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
