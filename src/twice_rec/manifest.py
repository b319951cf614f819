"""What a result rests on, from the data to the report: the manifest of each finished stage, and whether it is fresh.

A manifest holds the hash of every input, and through the inputs' own manifests the hash of everything behind them. A
result is stale if one of these is there now with other content, and fresh otherwise. A file that was only removed
makes nothing stale: the result is still what it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from twice_rec.errors import InputError
from twice_rec.files import MANIFEST, hash_file, read_json, write_json
from twice_rec.locks import reading, run_folder
from twice_rec.masking import masked_words

BEGUN = ".begun.json"  # notes the settings and inputs of an unfinished stage
HUB = "hub/"  # begins the names of models that come from the hub

_PACKAGES = ("numpy", "scipy", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "openai", "vllm")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model that is read from the hub. `commit` is what its revision means now."""

    name: str
    revision: str | None
    commit: str

    @property
    def key(self) -> str:
        """Its name among the inputs of a manifest."""
        return f"{HUB}{self.name}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a finished stage writes beside its outputs, last of all: without it the stage is not finished.

    Args:
        stage: name of the stage.
        config: the settings that change the result.
        inputs: name -> hash of what the stage read. Paths inside the run folder are relative to it. A model of the hub
            is `hub/NAME@REVISION` -> its commit.
        outputs: path -> hash of what the stage wrote, relative to the run folder.
        figures: what the stage measured.
        about: command, commit, versions, machine, times: to read, never compared.
        rests_on: the same as inputs for everything behind them, what lies deepest first; paths outside the run folder
            are absolute.
        stamps: path outside the run folder -> its size and time; if they are the same, it is not read again.
    """

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    rests_on: dict[str, str] = dataclasses.field(default_factory=dict)
    stamps: dict[str, str] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path | str) -> None:
        """Write `folder/manifest.json`."""
        write_json(Path(folder) / MANIFEST, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path | str) -> Manifest | None:
        """Read `folder/manifest.json`; return None if there is none."""
        path = Path(folder) / MANIFEST
        if not path.exists():
            return None
        try:
            manifest = cls(**read_json(path))
            if not all(isinstance(part, dict) for part in (manifest.config, manifest.inputs, manifest.outputs)):
                raise TypeError("a part is empty")
            return manifest
        except (InputError, TypeError) as error:
            raise InputError(
                f"{path}: not a manifest of this version ({error}); run the stage again with --overwrite true"
            ) from None

    def everything(self, folder: Path) -> dict[str, str]:
        """Return `rests_on`; for a result of an earlier version, what can be known of it. `folder` holds the result."""
        if self.rests_on:
            return self.rests_on
        run_dir = run_folder(folder)
        return chain(run_dir, self.inputs, {name: run_dir / name for name in self.inputs if name[:7] != "source/"})[0]


class Hashes:
    """Hashes of files and folders, each computed once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, path: Path) -> str:
        """Return `hash_file` of a path."""
        key = os.path.abspath(path)
        if key not in self._known:
            self._known[key] = hash_file(path)
        return self._known[key]


def stamp(path: Path) -> str:
    """Return size and time of a file, or a digest of those of a folder's files."""
    if not path.is_dir():
        about = path.stat()
        return f"{about.st_size} bytes, {about.st_mtime_ns} ns"
    files = sorted(child for child in path.rglob("*") if child.is_file() and child.name != MANIFEST)
    return hashlib.sha256("\n".join(f"{file.relative_to(path)} {stamp(file)}" for file in files).encode()).hexdigest()


def names_of(run_dir: Path, paths: Iterable[Path]) -> dict[str, Path]:
    """Name the inputs of a stage: relative to the run's folder, or `source/` and as much of the path's end as it takes
    to tell it from the others. Returns name -> path.
    """
    named: dict[str, Path] = {}
    for path in paths:
        inside, parts, length = _name_in(run_dir, path), Path(os.path.abspath(path)).parts, 1
        name = inside or f"source/{parts[-1]}"
        while named.get(name, path) != path and length < len(parts):
            length += 1
            name = "source/" + "/".join(parts[-length:])
        named[name] = path
    return named


def _name_in(run_dir: Path, path: Path) -> str | None:
    """A path relative to the run's folder, also if the run's folder holds a link to it; None outside."""
    as_given = Path(os.path.abspath(path)), Path(os.path.abspath(run_dir))
    for place, root in (as_given, (path.resolve(), run_dir.resolve())):
        if place.is_relative_to(root):
            return place.relative_to(root).as_posix()
    return None


def stage_folder(path: Path) -> Path | None:
    """Return the results folder that a path lies in, or is; None if no stage made it."""
    place = Path(os.path.abspath(path))
    return next((folder for folder in (place, *place.parents[:3]) if _holds_results(folder)), None)


def _holds_results(folder: Path) -> bool:
    if (folder / BEGUN).exists():
        return True
    if not (folder / MANIFEST).is_file():
        return False
    with contextlib.suppress(InputError):
        row = read_json(folder / MANIFEST)
        return isinstance(row, dict) and {"stage", "outputs"} <= row.keys()
    return True  # damaged; `Manifest.load` says so


def chain(
    run_dir: Path, inputs: Mapping[str, str], places: Mapping[str, Path]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return `rests_on` and `stamps` of a result, see `Manifest`.

    Args:
        inputs: name -> hash, or commit of a model of the hub.
        places: name -> path of those inputs that are files or folders.
    """
    rests_on: dict[str, str] = {}
    stamps: dict[str, str] = {}
    for folder in dict.fromkeys(stage_folder(path) for path in places.values()):
        if folder is None or (manifest := Manifest.load(folder)) is None:
            continue
        of_run = Path(os.path.abspath(run_folder(folder)))
        is_ours = of_run == Path(os.path.abspath(run_dir))
        key_here = lambda key: key if is_ours or key.startswith(HUB) else str(of_run / key)  # noqa: B023
        rests_on |= {key_here(key): value for key, value in manifest.everything(folder).items()}
        stamps |= manifest.stamps
    for name, value in inputs.items():
        if name.startswith("source/") and name in places:
            path = os.path.abspath(places[name])
            rests_on[path], stamps[path] = value, stamp(Path(path))
        else:
            rests_on[name] = value
    return rests_on, stamps


def stale_because(folder: Path, hashes: Hashes) -> str | None:
    """Return what makes a finished result stale, in words; None if it is fresh."""
    manifest = Manifest.load(folder)
    if manifest is None:
        return None
    run_dir, place = run_folder(folder), Path(os.path.abspath(folder))
    made = [Path(os.path.abspath(run_dir / name)) for name in manifest.outputs]
    if made and not any(path.is_relative_to(place) for path in made):
        return f"it is a copy of what the {manifest.stage} stage wrote to {_shown(made[0])}"
    for key, recorded in manifest.everything(folder).items():
        if change := _change(run_folder(folder), key, recorded, manifest.stamps.get(key), hashes):
            return f"it rests on {key}, which {change}"
    return None


def _change(run_dir: Path, key: str, recorded: str, seen: str | None, hashes: Hashes) -> str | None:
    if key.startswith((HUB, "source/")):
        return None
    path = run_dir / key
    maker = stage_folder(path)
    made = Manifest.load(maker) if maker else None
    if maker and made is None:
        return "is being made anew"
    if not path.exists():
        is_made = made is None or maker is None or made.outputs.get(_name_in(run_folder(maker), path) or "") == recorded
        return None if is_made else "is no longer made"
    if seen is not None and stamp(path) == seen:
        return None
    now = hashes.of(path)
    return None if now == recorded else f"has changed since (was {recorded[:12]}, is {now[:12]})"


def changed_output(folder: Path, manifest: Manifest, hashes: Hashes, path: Path | None = None) -> str | None:
    """Return an output of a finished result that is not as its stage left it, of those that `path` is or has."""
    place = Path(os.path.abspath(path or folder))
    for name, recorded in manifest.outputs.items():
        output = Path(os.path.abspath(run_folder(folder) / name))
        touched = output.is_relative_to(place) or place.is_relative_to(output)
        if touched and output.exists() and hashes.of(output) != recorded:
            return name
    return None


def check_fresh(path: Path, hashes: Hashes) -> None:
    """Check a result that is to be read: finished, as its stage left it, and fresh. What no stage made passes.

    Raises:
        InputError: if it is not; says because of what, and which command makes it again.
    """
    if (folder := stage_folder(path)) is None:
        return
    where = _shown(folder)
    if (manifest := Manifest.load(folder)) is None:
        command = unfinished_command(folder)
        raise InputError(f"{where} is unfinished; finish it first: {command}; or remove {folder}")
    if changed := changed_output(folder, manifest, hashes, path):
        raise InputError(
            f"{_shown(run_folder(folder) / changed)} was changed since the {manifest.stage} stage finished; restore "
            f"it, or make it again: {redo_command(folder, manifest)}"
        )
    if reason := stale_because(folder, hashes):
        raise InputError(f"{where} is stale: {reason}; redo it first: {redo_command(folder, manifest)}")


@contextlib.contextmanager
def held(paths: Iterable[Path], hashes: Hashes | None = None) -> Iterator[None]:
    """Keep other processes from changing what is read, and check that it is finished, whole and fresh.

    Raises:
        InputError: see `check_fresh` and `locks.reading`.
    """
    paths, hashes = list(paths), hashes or Hashes()
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(stage_folder(path) for path in paths):
            if folder is not None:
                stack.enter_context(reading(folder))
        for path in paths:
            check_fresh(path, hashes)
        yield


def launcher_of(stage: str) -> str:
    """Return the name of the launcher that makes a stage's results."""
    return "grpo_step2.sh" if stage == "grpo" else f"{stage}.sh"


def redo_command(folder: Path, manifest: Manifest) -> str:
    """Return the command that makes a finished result again, in the run that holds it now."""
    overwrite = "" if manifest.stage == "report" else " --overwrite true"  # a report is always made anew
    return _command(folder, manifest.stage, manifest.about.get("command", [])) + overwrite


def unfinished_command(folder: Path) -> str:
    """Return the command that finishes a result that is begun."""
    note = read_json(folder / BEGUN)
    return _command(folder, note.get("stage") or folder.name, note.get("command", []))


def making_command(run_dir: Path, stage: str) -> str:
    """Return the command that makes a result that is missing; its recipe lies beside that of another stage of the run.

    If none is found there, the command has the word RECIPE.
    """
    for folder in sorted(path.parent for path in run_dir.glob(f"*/{MANIFEST}")):
        words: list[str] = []
        with contextlib.suppress(InputError):  # of a damaged one `check_fresh` tells
            manifest = Manifest.load(folder)
            words = words_of(manifest.stage, manifest.about.get("command", [])) if manifest else []
        if words and (recipe := Path(words[0]).with_name(f"{stage}.yaml")).exists():
            named = "--run_dir" in words or folder.is_symlink()  # a link's command has another run's folder
            flag = ["--run_dir", shlex.quote(_shown(run_dir))] if named else []  # which may have moved since
            return " ".join(["bash", launcher_of(stage), shlex.quote(str(recipe)), *flag])
    return f"bash {launcher_of(stage)} RECIPE --run_dir {shlex.quote(str(run_dir))}"


def _command(folder: Path, stage: str, command: list[str]) -> str:
    words = words_of(stage, command)
    if "--run_dir" in words[:-1]:  # the run may have been copied or moved since
        place, run_dir = words.index("--run_dir") + 1, run_folder(folder.resolve() if folder.is_symlink() else folder)
        if Path(words[place]).resolve() != run_dir.resolve():
            words[place] = _shown(run_dir)
    return " ".join(["bash", launcher_of(stage), *map(shlex.quote, words)])


def words_of(stage: str, command: Sequence[str]) -> list[str]:
    """Return recipe and flags of an earlier command line of this package, without `--overwrite` and secrets."""
    kept: list[str] = []
    words = iter(masked_words(command[2:]) if tuple(command[1:2]) in ((stage,), ("--config",)) else ())
    for word in words:
        if word == "--overwrite":
            next(words, None)
        else:
            kept.append(_shown(Path(word)) if os.path.isabs(word) else word)
    return kept


def _shown(path: Path) -> str:
    """A path as short as it can be from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


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
