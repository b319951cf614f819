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
import dataclasses
import fcntl
import functools
import json
import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from twice_rec.errors import InputError
from twice_rec.files import MANIFEST, hash_file, read_json, set_aside, write_json
from twice_rec.recipe import Recipe
from twice_rec.weight_files import fault_of_checkpoint

logger = logging.getLogger(__name__)

IS_MAIN = int(os.environ.get("RANK", "0")) == 0  # of several processes, the first one writes

_PACKAGES = ("numpy", "scipy", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "openai", "vllm")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a finished stage writes beside its outputs, last of all: without it the stage is not finished.

    Args:
        stage: name of the stage.
        config: the settings that change the result.
        inputs: path -> hash of what the stage read. Paths inside the run folder are relative to it.
        outputs: path -> hash of what the stage wrote, relative to the run folder.
        figures: what the stage measured.
        about: command, commit, versions, machine, times: to read, never compared.
    """

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path | str) -> None:
        """Write `folder/manifest.json`."""
        write_json(Path(folder) / MANIFEST, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path | str) -> Manifest | None:
        """Read `folder/manifest.json`; return None if there is none."""
        path = Path(folder) / MANIFEST
        if not path.exists():
            return None
        row = read_json(path)
        try:
            return cls(**row)
        except TypeError as error:
            raise InputError(f"{path}: not a manifest of this version ({error}); delete it to redo the stage") from None


def environment() -> dict[str, Any]:
    """Return commit, package versions and machine, for a manifest."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "commit": _git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain", "-uno")),
        "python": platform.python_version(),
        "versions": versions,
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
    }


def _git(*words: str) -> str:
    """What git says about the folder of this package; nothing if it says nothing, or is not installed."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


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
    same settings. Results of other settings or inputs are never touched unasked.

    Args:
        recipe: gives the run's folder, the settings and whether to overwrite.
        stage: name of the stage that makes the results.
        folder: the results' folder, relative to the run's.
        inputs: what is read. Files inside the run's folder are named relative to it, others by their name.
        settings: what changes the result, if that is not all of the recipe.

    Raises:
        InputError: on entry, if another process holds the folder.
    """

    _BEGUN = ".begun.json"

    def __init__(
        self,
        recipe: Recipe,
        stage: str,
        folder: str,
        inputs: Iterable[Path] = (),
        settings: Mapping[str, Any] | None = None,
    ):
        self.run_dir = recipe.run_path
        self.path = self.run_dir / folder
        self._recipe = recipe
        self._stage = stage
        self._settings = json.loads(json.dumps(recipe.settings() if settings is None else settings))  # as read back
        self._inputs = {self._name(path): hash_file(path) for path in inputs}
        self._started = time.time()
        self._lock: BinaryIO | None = None

    def __enter__(self) -> StageRun:
        if IS_MAIN:
            name = self.path.relative_to(self.run_dir).as_posix().replace("/", "__")
            self._lock = _locked(self.run_dir / ".locks" / name, self.path)
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _name(self, path: Path) -> str:
        absolute, root = Path(path).resolve(), self.run_dir.resolve()
        return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else f"source/{absolute.name}"

    def is_finished(self) -> bool:
        """Return whether these very results are there, whole, and say so if they are.

        Raises:
            InputError: if one of their outputs was changed or removed since.
        """
        manifest = Manifest.load(self.path)
        if manifest is None or self._differences(manifest.config, manifest.inputs):
            return False
        for name, expected in manifest.outputs.items():
            path = self.run_dir / name
            if not path.exists() or hash_file(path) != expected:
                what = "is missing" if not path.exists() else "was changed"
                raise InputError(
                    f"{path} {what} since the {self._stage} stage finished; restore it, or make it again with "
                    "--overwrite true"
                )
        logger.info("%s is finished already; nothing to do", self.path)
        return True

    def begin(self) -> None:
        """Prepare the folder, keeping unfinished results of the same settings and inputs; the main process does it.

        Raises:
            InputError: if the folder holds other results and the recipe does not say `overwrite`; names what differs.
        """
        if not IS_MAIN:
            return
        begun = self.path / self._BEGUN
        if self.path.exists() and any(self.path.iterdir()):
            manifest = Manifest.load(self.path)
            if manifest is not None:
                kind, was = "results", (manifest.config, manifest.inputs)
            elif begun.exists():
                note = read_json(begun)
                kind, was = "unfinished results", (note["settings"], note["inputs"])
            else:
                kind, was = "files of another origin", ({}, {})
            differences = self._differences(*was)
            if manifest is None and begun.exists() and not differences:
                return
            if not self._recipe.overwrite:
                raise InputError(
                    f"{self.path} holds {kind}: {'; '.join(differences) or 'damaged'}. Keep them and choose another "
                    "--run_dir, or replace them with --overwrite true"
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(begun, {"settings": self._settings, "inputs": self._inputs})

    def finish(self, outputs: Iterable[Path], figures: Mapping[str, Any]) -> None:
        """Write the manifest, last of all.

        Args:
            outputs: files and folders that later stages rely on.
            figures: what the stage measured.
        """
        seconds = round(time.time() - self._started, 1)
        Manifest(
            stage=self._stage,
            config=self._settings,
            inputs=self._inputs,
            outputs={self._name(path): hash_file(path) for path in outputs},
            figures=dict(figures),
            about={"command": sys.argv, "recipe": self._recipe.everything(), "seconds": seconds, **environment()},
        ).save(self.path)
        (self.path / self._BEGUN).unlink(missing_ok=True)

    def train(self, trainer: Any) -> dict[str, Any]:
        """Train with one of TRL's trainers, from the newest checkpoint if there is one, and save as its users know it.

        Returns:
            Number of steps, and the last values that the trainer logged.
        """
        checkpoint = last_checkpoint(self.path)
        if checkpoint:
            _read_numbered_cpus()
            logger.info("resuming from %s", checkpoint)
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_model(str(self.path))
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        last = trainer.state.log_history[-1] if trainer.state.log_history else {}
        return {"steps": trainer.state.global_step, **{k: v for k, v in last.items() if isinstance(v, (int, float))}}

    def _differences(self, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
        settings = self._recipe.under_present_names(settings)
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


def _locked(path: Path, results: Path) -> BinaryIO:
    """Lock a file and note its owner in it; the system unlocks it when the owner ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")  # noqa: SIM115 - closed by StageRun
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().decode(errors="replace").strip() or "another process"
        file.close()
        raise InputError(f"{results} is in use by {owner}; let it finish or end it, then run this again") from None
    file.truncate(0)
    file.write(
        f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode()
    )
    file.flush()
    return file


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

    with wandb.init(config=recipe.everything()) as run:
        yield run.log
