"""A stage's folder of results: its lock, its manifest, and whether it is finished, unfinished or not begun.

with StageRun(recipe, "sft", "sft", inputs) as run:
    if run.is_finished():
        return
    run.begin()
    ...                                  # write below run.path
    run.finish(outputs, figures)
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from twice_rec.errors import CheckedError, InputError
from twice_rec.files import atomic_path, hash_file, read_json, remove_temporaries, set_aside, write_json
from twice_rec.locks import writing
from twice_rec.manifest import BEGUN, Hashes, HubModel, Manifest, chain, environment, held, names_of
from twice_rec.masking import masked_values, masked_words
from twice_rec.recipe import Recipe
from twice_rec.weight_files import fault_of_checkpoint

logger = logging.getLogger(__name__)

IS_MAIN = int(os.environ.get("RANK", "0")) == 0  # of several processes, the first one writes

# How the files begin that a checkpoint of a trainer has beside those of `save_model`; some are DeepSpeed's.
_TRAINING_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "latest", "zero_to_fp32")

# What a trainer sums over the steps of this process and gives as that of all steps; with a resumed one it is wrong.
_OF_ONE_PROCESS = ("train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second", "num_tokens")


def require(path: Path, made_by: str) -> Path:
    """Return the path, which another stage must have made.

    Raises:
        InputError: if it does not exist; names the launcher that makes it.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; it is made by {made_by}, which must run first")
    return path


class StageRun:
    """One folder of results, held by one process at a time.

    A folder is begun with `begin`, which notes the settings and inputs, and finished with `finish`, which writes the
    manifest. A stage that runs again finds finished results and leaves them; it goes on with unfinished results of the
    same settings. Results of other settings or inputs are never touched unasked. While the run is entered, no other
    process can write the folder, or the results that it reads.

    Args:
        recipe: gives the run's folder, the settings and whether to overwrite.
        stage: name of the stage that makes the results.
        folder: the results' folder, relative to the run's.
        inputs: what is read, see `manifest.names_of`.
        settings: what changes the result, if that is not all of the recipe.

    Raises:
        InputError: on entry, if another process holds the folder or writes an input, or if an input is unfinished,
            damaged or stale.
    """

    check_only: ClassVar = False  # end at `begin` instead, with nothing written

    def __init__(
        self,
        recipe: Recipe,
        stage: str,
        folder: str,
        inputs: Iterable[Path | HubModel] = (),
        settings: Mapping[str, Any] | None = None,
    ):
        self.run_dir = recipe.run_path
        self.path = self.run_dir / folder
        self._recipe = recipe
        self._stage = stage
        self._settings = json.loads(json.dumps(recipe.settings() if settings is None else settings))  # as read back
        inputs = list(inputs)
        self._models = [model for model in inputs if isinstance(model, HubModel)]
        self._places = names_of(self.run_dir, [path for path in inputs if not isinstance(path, HubModel)])
        self._hashes = Hashes()
        self._started = time.time()
        self._locks = contextlib.ExitStack()
        self._is_new = False  # whether this process has begun the folder
        self._resumes = True

    def __enter__(self) -> StageRun:
        if IS_MAIN:
            with contextlib.ExitStack() as stack:
                stack.enter_context(writing(self.path))
                stack.enter_context(held(self._places.values(), self._hashes))
                remove_temporaries(self.path)
                self._locks = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._is_new and isinstance(error, InputError):
            self._leave_nothing()
        if IS_MAIN and not self.check_only:
            shutil.rmtree(self._replaced, ignore_errors=True)
            with contextlib.suppress(OSError):  # others may wait there, or nothing did
                self._replaced.parent.rmdir()
        self._locks.close()

    @property
    def _replaced(self) -> Path:
        """Where results wait that are being replaced."""
        return self.run_dir / ".replaced" / self.path.relative_to(self.run_dir)

    def _leave_nothing(self) -> None:
        """Remove a folder that this process has begun, if it holds no work, and put back what it was to replace."""
        if not self._resumes or [path.name for path in self.path.iterdir()] == [BEGUN]:
            shutil.rmtree(self.path)
            if self._replaced.exists():
                self._replaced.rename(self.path)

    @cached_property
    def _inputs(self) -> dict[str, str]:
        """Name -> hash or commit of every input, as it was when the stage first looked."""
        found = {name: self._hashes.of(path) for name, path in self._places.items()}
        return found | {model.key: model.commit for model in self._models}

    def is_finished(self) -> bool:
        """Return whether these very results are there, whole, and say so if they are.

        Raises:
            InputError: if one of their outputs was changed or removed since.
        """
        try:
            manifest = Manifest.load(self.path)
        except InputError:
            if self._recipe.overwrite:
                return False
            raise
        if manifest is None or self._differences(manifest.config, manifest.inputs):
            return False
        for name, expected in manifest.outputs.items():
            path = self.run_dir / name
            if not path.exists() or hash_file(path) != expected:
                if self._recipe.overwrite:
                    return False
                what = "is missing" if not path.exists() else "was changed"
                raise InputError(
                    f"{path} {what} since the {self._stage} stage finished; restore it, or make it again with "
                    "--overwrite true"
                )
        if IS_MAIN and not self.check_only:
            (self.path / BEGUN).unlink(missing_ok=True)  # left by a process that was killed right behind its manifest
        logger.info("%s is finished already; nothing to do", self.path)
        return True

    @classmethod
    def end_check(cls) -> None:
        """Raise CheckedError with `--check`; a stage calls it before it writes anything."""
        if cls.check_only:
            raise CheckedError

    def begin(self, resumes: bool = True) -> None:
        """Prepare the folder, keeping unfinished results of the same settings and inputs; the main process does it.

        What cannot be used is often noticed later only. If the stage then ends by an InputError, a folder that it has
        begun goes again, unless it holds work already, and the results that it was to replace come back.

        Args:
            resumes: whether the stage goes on with what it finds there; else nothing there counts as work.

        Raises:
            InputError: if the folder holds other results and the recipe does not say `overwrite`; names what differs.
            CheckedError: with `--check`, after that has been looked at.
        """
        if not IS_MAIN:
            return
        begun = self.path / BEGUN
        if self.path.exists() and any(self.path.iterdir()):
            kind, was, maker = "files of another origin", ({}, {}), None
            with contextlib.suppress(InputError, KeyError, TypeError):  # a damaged note is none
                if begun.exists():
                    note = read_json(begun)
                    kind, was, maker = "unfinished results", (note["settings"], note["inputs"]), note["stage"]
            with contextlib.suppress(InputError):  # `is_finished` says so, unless the results are to be replaced
                if manifest := Manifest.load(self.path):
                    kind, was, maker = "results", (manifest.config, manifest.inputs), manifest.stage
            if maker not in (None, self._stage):
                raise InputError(f"{self.path} holds {kind} of the {maker} stage; choose another name or --run_dir")
            differences = self._differences(*was)
            goes_on = kind == "unfinished results" and not differences
            if not goes_on and not self._recipe.overwrite:
                raise InputError(
                    f"{self.path} holds {kind}: {'; '.join(differences) or 'damaged'}. Keep them and choose another "
                    "--run_dir, or replace them with --overwrite true"
                )
            self.end_check()
            if goes_on:
                return
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced.parent.mkdir(parents=True, exist_ok=True)
            self.path.rename(self._replaced)
        self.end_check()
        self._is_new, self._resumes = True, resumes
        self.path.mkdir(parents=True, exist_ok=True)
        note = {
            "stage": self._stage,
            "settings": self._settings,
            "inputs": self._inputs,
            "command": masked_words(sys.argv),
        }
        write_json(begun, note)

    def finish(self, outputs: Iterable[Path], figures: Mapping[str, Any], results: int = 1) -> None:
        """Write the manifest, last of all.

        Args:
            outputs: files and folders that later stages rely on.
            figures: what the stage measured.
            results: how many results were made in the time that it took; each has its share.
        """
        seconds = round((time.time() - self._started) / results, 1)
        rests_on, stamps = chain(self.run_dir, self._inputs, self._places)
        written = names_of(self.run_dir, outputs)
        Manifest(
            stage=self._stage,
            config=self._settings,
            inputs=self._inputs,
            outputs={name: hash_file(path) for name, path in written.items()},
            figures=dict(figures),
            about={
                "command": masked_words(sys.argv),
                "recipe": masked_values(self._recipe.everything()),
                "seconds": seconds,
                **environment(),
            },
            rests_on=rests_on,
            stamps=stamps,
        ).save(self.path)
        (self.path / BEGUN).unlink(missing_ok=True)

    def train(self, trainer: Any) -> dict[str, Any]:
        """Train with one of TRL's trainers, from the newest checkpoint if there is one, and save as its users know it.

        If that checkpoint is of the last step, nothing is trained any more: its weights are the result. What the
        trainer logs is in `log.jsonl` of the folder.

        Returns:
            Number of steps, and the last values that the trainer logged; of a resumed training without its mean loss
            and speeds, since the trainer knows only of the steps since.

        Raises:
            InputError: if the training ended before its last step.
        """
        from twice_rec.training_log import LOG, TrainingLog, write_lines, write_log  # loads transformers

        if trainer.args.disable_tqdm:
            write_lines(trainer, self.path.name)
        if IS_MAIN:
            shutil.rmtree(self._replaced, ignore_errors=True)  # disks may be too small for old and new checkpoints
        trainer.add_callback(TrainingLog(self.path / LOG))
        checkpoint = last_checkpoint(self.path)
        if checkpoint and _is_of_the_last_step(checkpoint):
            logger.info("%s is of the last step; nothing is left to train", checkpoint)
            _take_weights(trainer, checkpoint, self.path)
        else:
            if checkpoint:
                _read_numbered_cpus()
                logger.info("resuming from %s", checkpoint)
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if trainer.state.global_step < trainer.state.max_steps:
                steps = f"{trainer.state.global_step} of {trainer.state.max_steps} steps"
                raise InputError(f"{self.path}: the training ended after {steps}; the same command goes on")
            trainer.save_model(str(self.path))
            summary = trainer.state.log_history[-1]
            for name in _OF_ONE_PROCESS if checkpoint else ():
                result.metrics.pop(name, None)
                summary.pop(name, None)
            trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        if trainer.is_world_process_zero():
            write_log(self.path / LOG, trainer.state.log_history)
        last = trainer.state.log_history[-1] if trainer.state.log_history else {}
        return {"steps": trainer.state.global_step, **{k: v for k, v in last.items() if isinstance(v, (int, float))}}

    def _differences(self, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
        settings = {**self._recipe.defaults(self._settings), **self._recipe.under_present_names(settings)}
        found = [
            f"{name} was {settings.get(name)!r}, is {self._settings.get(name)!r}"
            for name in sorted(settings.keys() | self._settings.keys())
            if settings.get(name) != self._settings.get(name)
        ]
        for name in sorted(inputs.keys() | self._inputs.keys()):
            was, now = inputs.get(name), self._inputs.get(name)
            if was != now:
                change = f"was {was[:12]}, is {now[:12]}" if was and now else "is new" if now else "is no longer read"
                found.append(f"input {name} {change}")
        return found


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole `checkpoint-N` of a trainer; damaged ones that are newer are set aside.

    They keep their files under a name that is not found again, `damaged-checkpoint-N`.
    """
    numbered = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    newest_first = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in newest_first:
        fault = fault_of_checkpoint(path)
        if fault is None:
            return path
        if IS_MAIN:
            logger.warning("%s cannot be resumed: %s; it is now %s", path, fault, set_aside(path))
    if newest_first:
        logger.warning("%s: no checkpoint is whole; training starts anew", folder)
    return None


def _is_of_the_last_step(checkpoint: Path) -> bool:
    state = read_json(checkpoint / "trainer_state.json")
    return 0 < state.get("max_steps", 0) <= state["global_step"]


def _take_weights(trainer: Any, checkpoint: Path, folder: Path) -> None:
    """Save what a checkpoint holds as `save_model` would, and give the trainer its state; its model stays as it is."""
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if trainer.is_world_process_zero():
        for path in checkpoint.iterdir():
            if path.is_file() and not path.name.startswith(_TRAINING_STATE):
                with atomic_path(folder / path.name) as temporary:
                    shutil.copyfile(path, temporary)
    summary = {"total_flos": trainer.state.total_flos, "epoch": trainer.state.epoch}  # as a training ends its log
    trainer.state.log_history.append({**summary, "step": trainer.state.global_step})
    trainer.save_metrics("train", summary)
    trainer.accelerator.wait_for_everyone()


@functools.cache
def _read_numbered_cpus() -> None:
    """Let torch load `cpu:0`: data-parallel processes on a CPU save their optimizer with that unknown place."""
    import torch

    torch.serialization.register_package(
        99, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


@contextlib.contextmanager
def wandb_run(recipe: Recipe) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open a Weights & Biases run for a stage without a trainer of its own; yield the function that logs a step."""
    if recipe.wandb == "none":
        yield lambda values: None
        return
    import wandb

    with wandb.init(config=masked_values(recipe.everything())) as run:
        yield run.log
