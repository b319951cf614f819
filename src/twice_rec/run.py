"""One folder of results: its manifest, whether it is finished, how it is begun again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from twice_rec.errors import InputError
from twice_rec.files import MANIFEST, hash_file, read_json, write_json


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
        """Read `folder/manifest.json`; None where there is none."""
        path = Path(folder) / MANIFEST
        if not path.exists():
            return None
        row = read_json(path)
        try:
            return cls(**row)
        except TypeError as error:
            raise InputError(f"{path}: not a manifest of this version ({error}); delete it to redo the stage") from None


def environment() -> dict[str, Any]:
    """Commit, package versions and machine, for a manifest."""
    root = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    names = ("numpy", "scipy", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "openai", "vllm")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "commit": git.stdout.strip() or None,
        "uncommitted_changes": bool(dirty.stdout.strip()),
        "python": platform.python_version(),
        "versions": versions,
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
    }


class Work:
    """One folder of results: finished, unfinished, or not begun.

    A folder is begun with `begin`, which notes the settings and inputs, and finished with `finish`, which writes the
    manifest. A stage that is run again finds finished work and leaves it; unfinished work of the same settings it may
    take up where it stopped. Work of other settings or inputs is never touched unasked.

    Args:
        run_dir: the run's folder.
        folder: the results' folder, relative to it.
        stage: who makes them.
        settings: what changes the result.
        inputs: what is read. Files under `run_dir` are named relative to it, others by their name.
    """

    _BEGUN = ".begun.json"

    def __init__(
        self, run_dir: Path, folder: str, stage: str, settings: Mapping[str, Any], inputs: Iterable[Path] = ()
    ):
        self.run_dir = run_dir
        self.path = run_dir / folder
        self.stage = stage
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.inputs = {self._name(path): hash_file(path) for path in inputs}
        self._started = time.time()

    def _name(self, path: Path) -> str:
        absolute, root = Path(path).resolve(), self.run_dir.resolve()
        return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else f"source/{absolute.name}"

    def is_finished(self) -> bool:
        """Whether these very results are there, whole.

        Raises:
            InputError: where an output of theirs was changed or removed since.
        """
        manifest = Manifest.load(self.path)
        if manifest is None or self._differences(manifest.config, manifest.inputs):
            return False
        for name, expected in manifest.outputs.items():
            path = self.run_dir / name
            if not path.exists() or hash_file(path) != expected:
                what = "is missing" if not path.exists() else "was changed"
                raise InputError(
                    f"{path} {what} since the {self.stage} stage finished; restore it, or make it again with "
                    "--overwrite true"
                )
        return True

    def begin(self, overwrite: bool) -> None:
        """Prepare the folder for making the results, keeping unfinished work of the same settings and inputs.

        Raises:
            InputError: where the folder holds other results and `overwrite` is false; says what differs.
        """
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
            if not overwrite:
                raise InputError(
                    f"{self.path} holds {kind}: {'; '.join(differences) or 'damaged'}. Keep them and choose another "
                    "--run_dir, or replace them with --overwrite true"
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(begun, {"settings": self.settings, "inputs": self.inputs})

    def finish(self, outputs: Iterable[Path], figures: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write the manifest, last of all."""
        seconds = round(time.time() - self._started, 1)
        Manifest(
            stage=self.stage,
            config=self.settings,
            inputs=self.inputs,
            outputs={self._name(path): hash_file(path) for path in outputs},
            figures=dict(figures),
            about={**about, "seconds": seconds, **environment()},
        ).save(self.path)
        (self.path / self._BEGUN).unlink(missing_ok=True)

    def _differences(self, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
        found = [
            f"{name} was {settings.get(name)!r}, is {self.settings.get(name)!r}"
            for name in sorted(settings.keys() | self.settings.keys())
            if settings.get(name) != self.settings.get(name)
        ]
        for name in sorted(inputs.keys() | self.inputs.keys()):
            was, now = inputs.get(name), self.inputs.get(name)
            if was != now:
                found.append(f"input {name} was {was and was[:12]}, is {now and now[:12]}")
        return found
