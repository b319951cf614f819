"""What documents quote of a run: its figures in one small file, with what made them, and the tables made of it.

A document holds a table between `<!-- numbers FILE what ... -->` and `<!-- end of numbers -->`; `fill` writes what is
between them anew from FILE, so no figure in such a table is typed by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from twice_rec.errors import InputError
from twice_rec.evaluation.domain_tables import sheet_over_domains
from twice_rec.evaluation.names import metric_name, variant_name
from twice_rec.evaluation.sheets import claim_rows, comparison_rows, defect_rows, sheet_to_markdown
from twice_rec.files import MANIFEST, read_json, read_jsonl
from twice_rec.manifest import Manifest, environment, redo_command
from twice_rec.markdown import markdown_table

_PARTS = ("variants", "common_users", "comparisons", "claims", "groups", "recommended", "position", "domains")
_BLOCK = re.compile(r"<!-- numbers (?P<words>[^>]*) -->\n(?P<table>.*?)<!-- end of numbers -->", re.DOTALL)
_LIST_IN_HEADER = {"uniform": "", "popularity": "popularity ", "hard": "hard ", "full": "full "}


def quotation(results: Mapping[str, Any], run_dirs: Sequence[Path], domain: str) -> dict[str, Any]:
    """Return what a document may quote: the parts of results.json with seven digits, and what they were made by."""
    about = provenance(list(_manifests(run_dirs)), domain)
    return {"about": about, **{name: short(results[name]) for name in _PARTS if name in results}}


def provenance(manifests: Sequence[tuple[Path, Manifest]], domain: str, command: str | None = None) -> dict[str, Any]:
    """Return what figures were made by: the commands, commits and seeds of some results, this machine, the day.

    Args:
        manifests: folders of results and their manifests, the earliest first.
        command: what was run here and now beside them.
    """
    commands = dict.fromkeys(redo_command(*one).removesuffix(" --overwrite true") for one in manifests)
    commits = dict.fromkeys(
        f"{manifest.about.get('commit')}{' and changes' if manifest.about.get('uncommitted_changes') else ''}"
        for _, manifest in manifests
    )
    machines = [manifest.about["machine"] for _, manifest in manifests if manifest.about.get("machine")]
    machines = [machine for i, machine in enumerate(machines) if machine not in machines[:i]]
    seeds = {manifest.about.get("recipe", {}).get("seed") for _, manifest in manifests}
    if command is not None:
        here = environment()
        commands[command] = commits[str(here["commit"])] = None
        machines += [here["machine"]] if here["machine"] not in machines else []
    return {
        "domain": domain,
        "made": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commands": list(commands),
        "commits": list(commits),
        "machine": machines[0] if len(machines) == 1 else machines,
        "seeds": sorted(seed for seed in seeds if seed is not None),
    }


def _manifests(run_dirs: Sequence[Path]) -> Iterator[tuple[Path, Manifest]]:
    """Yield the finished results of some runs, the earliest first."""
    found = []
    for run_dir in run_dirs:
        for pattern in ("*", "*/*"):
            for path in run_dir.glob(f"{pattern}/{MANIFEST}"):
                if not path.parent.is_symlink() and (manifest := Manifest.load(path.parent)) is not None:
                    found.append((path.stat().st_mtime, path.parent, manifest))
    for _, folder, manifest in sorted(found, key=lambda one: one[:2]):
        if manifest.stage != "report":
            yield folder, manifest


def short(value: Any) -> Any:
    """Return a value of JSON with seven digits per number."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {name: short(of) for name, of in value.items()}
    return [short(of) for of in value] if isinstance(value, (list, tuple)) else value


def fill(document: Path, more: Mapping[str, Callable[[Any, Sequence[str]], str]] = MappingProxyType({})) -> str:
    """Return a document with its tables made anew.

    Args:
        more: further kinds of tables: the word that names one -> what makes it of the file's content and the words
            behind; a file of JSON lines is a list.

    Raises:
        InputError: if a table names a file, a variant or a metric that is not there, or has no end.
    """

    def made(block: re.Match[str]) -> str:
        words = block["words"].split()
        try:
            path, what, *named = words
            file = document.parent / path
            content = [row for _, row in read_jsonl(file)] if file.suffix == ".jsonl" else read_json(file)
            table = {**_TABLES, **more}[what](content, named)
        except (ValueError, KeyError, StopIteration) as error:
            raise InputError(f"{document}: numbers {block['words']}: there is no {error}") from None
        return f"<!-- numbers {block['words']} -->\n{table}\n<!-- end of numbers -->"

    text = document.read_text(encoding="utf-8")
    begun, whole = text.count("<!-- numbers "), list(_BLOCK.finditer(text))
    if begun != len(whole) or text.count("<!-- end of numbers -->") != begun:
        raise InputError(
            f"{document}: {begun} tables begin by `<!-- numbers FILE what ... -->`, but not each ends by "
            "`<!-- end of numbers -->` before the next; what stands between them would be lost"
        )
    return _BLOCK.sub(made, text)


def _variants(quoted: Mapping[str, Any], words: Sequence[str], part: str = "variants") -> str:
    """Names of variants, then of metrics, which have a slash; an interval stands beside the first metric."""
    keys = [word for word in words if "/" in word]
    rows = quoted[part]["variants"] if part == "common_users" else quoted[part]
    lines = []
    for name in (word for word in words if "/" not in word):
        row, cells = rows[name], []
        for number, key in enumerate(keys):
            interval = " [{}, {}]".format(*map(_digits, row["ci95"][key])) if number == 0 else ""
            cells.append((_digits(row["metrics"][key]) if key in row["metrics"] else "-") + interval)
        lines.append([variant_name(name), *cells, f"{row['n']:,}", str(row["runs"])])
    header = [f"{_LIST_IN_HEADER[key.partition('/')[0]]}{metric_name(key)}" for key in keys]
    return markdown_table(["model", *header, "users", "seeds"], lines)


def _digits(value: float) -> str:
    return f"{value:.4f}".removeprefix("0") if 0 <= value < 1 else f"{value:.4f}"


def _comparisons(quoted: Mapping[str, Any], words: Sequence[str]) -> str:
    """All comparisons, or those of the named variants only."""
    rows = [row for row in quoted["comparisons"] if not words or row["a"] in words]
    return markdown_table(*comparison_rows(rows))


def _claims(quoted: Mapping[str, Any], words: Sequence[str]) -> str:
    """All claims, or those of the named questions only."""
    return markdown_table(*claim_rows([row for row in quoted["claims"] if not words or row["question"] in words]))


_TABLES: Mapping[str, Callable[[Mapping[str, Any], Sequence[str]], str]] = {
    "variants": _variants,
    "common_users": lambda quoted, words: _variants(quoted, words, "common_users"),
    "comparisons": _comparisons,
    "claims": _claims,
    "domains": lambda quoted, words: sheet_to_markdown(sheet_over_domains(quoted["domains"])),
    "defects": lambda quoted, words: markdown_table(*defect_rows(quoted["defects"]), texts=2),
}
