"""`twice-rec status RUN_DIR`: a tree of a run's results, each below what it rests on: what is fresh, stale or missing.

A result is fresh if all that it rests on is still as it was when the result was made, back to the data; see `manifest`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twice_rec.errors import InputError
from twice_rec.evaluation.tables import in_order, show
from twice_rec.files import MANIFEST, read_json
from twice_rec.locks import WITH_VARIANTS, owner_of, run_folder
from twice_rec.manifest import (
    BEGUN,
    Hashes,
    Manifest,
    changed_output,
    making_command,
    redo_command,
    stale_because,
    unfinished_command,
)

_WIDTH = 100

# What every run has: results -> the stage that makes them, and what they are shown below; in the order of the stages.
_EXPECTED = {
    "data": ("prepare", None),
    "rationales": ("rationales", "data"),
    "sft": ("sft", "rationales"),
    "sasrec": ("sasrec", "data"),
    "grpo": ("grpo", "sft"),
}
_VARIANTS = {"sft": "stage2", "grpo": "stage3"}  # how folders of models begin, and their names in the evaluation
_DEPTH = {"data": 0, "rationales": 2, "sft": 3, "grpo": 4}  # of inputs; a result is shown below the deepest of its own


@dataclass(frozen=True)
class Node:
    """A results folder: its name, what it is shown below, and what there is to say about it."""

    name: str
    parent: str | None
    says: str


def status(words: Sequence[str]) -> None:
    """Print the tree of the run that the words of the command line name."""
    if len(words) != 1 or words[0].startswith("-"):
        raise InputError(f"status: expected RUN_DIR, such as runs/tiny, found {' '.join(words) or 'nothing'}")
    show_status(Path(words[0]))


def show_status(run_dir: Path) -> None:
    """Print the tree of a run; InputError if there is no such folder."""
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such folder; give the run_dir of a recipe, such as runs/tiny")
    show("\n".join([str(run_dir), *tree(run_dir)]))


def tree(run_dir: Path) -> list[str]:
    """Return the lines of the tree, at most 100 characters each."""
    nodes = nodes_of(run_dir)
    parents = {node.name: node.parent for node in nodes}

    def depth(name: str) -> int:
        parent = parents[name]
        return 1 if parent is None else 1 + depth(parent)

    column = 2 + max(2 * depth(node.name) + len(node.name) for node in nodes)
    lines: list[str] = []

    def add(parent: str | None) -> None:
        for node in nodes:
            if node.parent == parent:
                label = f"{'  ' * depth(node.name)}{node.name}".ljust(column)
                width = max(_WIDTH - column, 40)
                first, *more = textwrap.wrap(node.says, width, break_on_hyphens=False)
                lines.extend([label + first, *(" " * column + line for line in more)])
                add(node.name)

    add(None)
    return lines


def nodes_of(run_dir: Path) -> list[Node]:
    """Return every result of a run that is there or expected."""
    patterns = ("*", *(f"{folder}/*" for folder in WITH_VARIANTS))
    there = [path for pattern in patterns for path in run_dir.glob(pattern) if _is_result(path)]
    names = {path.relative_to(run_dir).as_posix() for path in there}
    evaluated = in_order([name.removeprefix("eval/") for name in names if name.startswith("eval/")])
    judged = sorted(name for name in names if name.startswith("judge/"))
    others = sorted(n for n in names if n not in (*_EXPECTED, "report", *judged) and not n.startswith("eval/"))
    stages, hashes = [*_EXPECTED, *others], Hashes()
    nodes = []
    for name in [*stages, *(f"eval/{variant}" for variant in evaluated)]:
        parent = _parent(run_dir / name, stages) if name in names else _EXPECTED[name][1]
        says = says_of(run_dir / name, hashes) if name in names else _missing(run_dir, _EXPECTED[name][0])
        nodes.append(Node(name, parent, says))
    for name in judged:
        evaluation = name.replace("judge/", "eval/", 1)
        nodes.append(Node(name, evaluation if evaluation in names else None, says_of(run_dir / name, hashes)))
    for name in stages:
        stem, *rest = name.split("_", 1)
        variant = "_".join([_VARIANTS.get(stem, ""), *rest])
        if name in names and stem in _VARIANTS and variant not in evaluated:
            nodes.append(Node(f"eval/{variant}", name, f"{_missing(run_dir, 'evaluate')} --variants {variant}"))
    return [*nodes, Node("report", None, _report(run_dir, evaluated, hashes))]


def _is_result(path: Path) -> bool:
    return (path / MANIFEST).is_file() or (path / BEGUN).is_file()


def _parent(folder: Path, stages: Sequence[str]) -> str | None:
    """The deepest of the results that a result was made of."""
    manifest = Manifest.load(folder)
    inputs = manifest.inputs if manifest else read_json(folder / BEGUN).get("inputs", {})
    read = [stage for name in inputs if (stage := name.partition("/")[0]) in stages]
    return max(read, key=lambda name: _DEPTH.get(name.partition("_")[0], 1), default=None)


def says_of(folder: Path, hashes: Hashes) -> str:
    """Return in words whether a result is running, unfinished, changed, stale or fresh, and what to do."""
    if owner := owner_of(folder):
        return f"running: {owner}"
    if (manifest := Manifest.load(folder)) is None:
        return f"unfinished; finish it: {unfinished_command(folder)}; or remove {folder}"
    if changed := changed_output(folder, manifest, hashes):
        return f"stale: {changed} was changed since it was made; redo it: {redo_command(folder, manifest)}"
    if reason := stale_because(folder, hashes):
        return f"stale: {reason}; redo it: {redo_command(folder, manifest)}"
    gone = [name for name in manifest.outputs if not (run_folder(folder) / name).exists()]
    return f"fresh, but {', '.join(gone)} is gone" if gone else "fresh"


def _report(run_dir: Path, evaluated: Sequence[str], hashes: Hashes) -> str:
    folder = run_dir / "report"
    if (manifest := Manifest.load(folder)) is None:
        return _missing(run_dir, "report")
    made = (folder / MANIFEST).stat().st_mtime_ns
    newer = [
        name for name in evaluated
        if (path := run_dir / "eval" / name / MANIFEST).exists() and path.stat().st_mtime_ns > made
    ]  # fmt: skip
    says = says_of(folder, hashes)
    if newer and says == "fresh":
        return f"stale: eval/{newer[0]} is newer; redo it: {redo_command(folder, manifest)}"
    return says


def _missing(run_dir: Path, stage: str) -> str:
    """Say which command makes a result."""
    return f"missing; make it: {making_command(run_dir, stage)}"
