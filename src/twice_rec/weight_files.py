"""Whether files of weights, and checkpoints of a trainer, are whole. Sizes and headers are read, never the weights."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STATE = "trainer_state.json"
SHARDS = "*.safetensors.index.json"  # names the files over which a large model's weights are spread

_LFS_POINTER = b"version https://git-lfs"
_OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt")  # a trainer writes both, or neither with `save_only_model`
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


def fault_of_weights(path: Path) -> str | None:
    """Return what is wrong with a file of safetensors; None if header and size fit together."""
    if fault := _fault_of_bytes(path):
        return fault
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or (8 + length > size and length <= _LARGEST_HEADER):
            return f"is cut: {size:,} bytes, and its header alone needs {8 + length:,}"
        if length > _LARGEST_HEADER:
            return "is not a file of safetensors"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return "has a damaged header"
    return None if size == expected else f"has {size:,} bytes, and its header says {expected:,}"


def fault_of_shards(index: Path) -> str | None:
    """Return what is wrong with the index of a model in several files; None if all that it names are there."""
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _fault_of_bytes(index) or "is damaged"
    missing = sorted(name for name in named if not (index.parent / name).is_file())
    return f"names {missing[0]}, which is missing" if missing else None


def fault_of_checkpoint(folder: Path) -> str | None:
    """Return what is wrong with a `checkpoint-N` of a trainer; None if training can go on from it.

    It holds `trainer_state.json`, which is written last, and weights. It holds optimizer, schedule and random states
    too, unless none of them was saved. DeepSpeed writes its own files, into the folder that the file `latest` names.
    """
    try:
        if "global_step" not in json.loads((folder / STATE).read_text(encoding="utf-8")):
            return f"{STATE} is damaged"
        latest = (folder / "latest").read_text(encoding="utf-8").strip() if (folder / "latest").exists() else None
        if latest is not None:
            return _fault_of_files([*folder.glob("*.safetensors"), *_or_missing(folder / latest, "*.pt")])
        is_adapter = (folder / "adapter_config.json").exists()
        weights = folder / ("adapter_model.safetensors" if is_adapter else "model.safetensors")
        found = [weights] if is_adapter else list(folder.glob(SHARDS)) or [weights]
        files = [*found, *folder.glob("*.safetensors"), *folder.glob("adapter_config.json")]
        random_states = _random_states(folder)
        if random_states or any((folder / name).exists() for name in _OPTIMIZER_FILES):
            files += [*(folder / name for name in _OPTIMIZER_FILES), *(random_states or [folder / "rng_state.pth"])]
        return _fault_of_files([*files, *folder.glob("scaler.pt")])
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError):
        return f"{STATE} is damaged"


def _random_states(folder: Path) -> list[Path]:
    """The random states of all processes: those that are there, and those that must be between them."""
    numbers = [int(found[1]) for p in folder.glob("rng_state_*.pth") if (found := re.search(r"_(\d+)\.pth$", p.name))]
    of_processes = [folder / f"rng_state_{number}.pth" for number in range(max(numbers, default=-1) + 1)]
    return of_processes or list(folder.glob("rng_state.pth"))


def _or_missing(folder: Path, pattern: str) -> list[Path]:
    return list(folder.glob(pattern)) or [folder]  # the folder's own name is then what is missing


def _fault_of_files(paths: Iterable[Path]) -> str | None:
    for path in paths:
        if fault := fault_of_file(path):
            return f"{path.name} {fault}"
    return None


def fault_of_file(path: Path) -> str | None:
    """Return what is wrong with a file of a model or a checkpoint, by its kind; None if it is whole."""
    if path.name.endswith(".index.json"):
        return fault_of_shards(path)
    if path.suffix == ".safetensors":
        return fault_of_weights(path)
    if fault := _fault_of_bytes(path):
        return fault
    if path.suffix == ".json":
        return None if _is_json(path) else "is damaged"
    if path.suffix not in (".pt", ".pth"):
        return None
    return None if zipfile.is_zipfile(path) else "is cut or damaged"  # torch.save writes zip files, their list last


def _fault_of_bytes(path: Path) -> str | None:
    if not path.is_file():
        return "is missing"
    with open(path, "rb") as file:
        beginning = file.read(len(_LFS_POINTER))
    if not beginning:
        return "is empty"
    if beginning == _LFS_POINTER:
        return "is a pointer of Git LFS, not the file itself; run `git lfs pull` where it was cloned"
    return None


def _is_json(path: Path) -> bool:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(value, dict)
