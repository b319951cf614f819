"""Tables of results, for the terminal. The only module that prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twice_rec.cf.baselines import BASELINES
from twice_rec.evaluation.predictions import METRICS_FILE
from twice_rec.files import read_json
from twice_rec.markdown import markdown_table
from twice_rec.metrics import METRICS
from twice_rec.records import RANKED_LISTS

Summary = Mapping[str, Mapping[str, Any]]  # variant -> metrics, n, and in a report ci95 and runs
Table = tuple[list[str], list[list[str]]]  # header, rows

# Rows of tables come in this order; variants without a place here follow by name.
ORDER = (*BASELINES, "sasrec", "base", "stage2", "stage3", "oracle")


def in_order(variants: Sequence[str]) -> list[str]:
    """Sort variants for a table: those of `ORDER` first, each followed by its own kind (`stage2`, `stage2_sampled`)."""

    def place(variant: str) -> float:
        if variant in ORDER:
            return ORDER.index(variant)
        return next((i + 0.5 for i, known in enumerate(ORDER) if variant.startswith(f"{known}_")), len(ORDER))

    return sorted(variants, key=lambda variant: (place(variant), variant))


def lists_of(summary: Summary) -> list[str]:
    """Return the ranked lists that some variant has metrics of, in table order."""
    present = {key.partition("/")[0] for row in summary.values() for key in row["metrics"]}
    return [kind for kind in RANKED_LISTS if kind in present]


def list_table(summary: Summary, kind: str, with_intervals: bool = False) -> Table:
    """Return the table of one kind of list: one row per variant that has it; with intervals, also its runs."""
    present = {key for row in summary.values() for key in row["metrics"]}
    keys = [key for name in METRICS if (key := f"{kind}/{name}") in present]

    def cell(row: Mapping[str, Any], key: str) -> str:
        if key not in row["metrics"]:
            return "-"
        interval = " [{:.4f}, {:.4f}]".format(*row["ci95"][key]) if with_intervals else ""
        return f"{row['metrics'][key]:.4f}{interval}"

    rows = [
        [name, f"{int(row['n']):,}", *([str(row["runs"])] if with_intervals else []), *(cell(row, key) for key in keys)]
        for name, row in summary.items()
        if any(key in row["metrics"] for key in keys)
    ]
    return ["variant", "users", *(["runs"] if with_intervals else []), *keys], rows


def show_metrics(run_dir: Path) -> None:
    """Print the metrics of every finished evaluation of a run, one table per kind of list."""
    found = {path.parent.name: read_json(path) for path in (run_dir / "eval").glob(f"*/{METRICS_FILE}")}
    summary = {name: {"metrics": found[name], "n": found[name]["n"]} for name in in_order(list(found))}
    show("\n\n".join(markdown_table(*list_table(summary, kind)) for kind in lists_of(summary)))


def show(text: str) -> None:
    """Print to standard output."""
    sys.stdout.write(f"\n{text}\n\n")
    sys.stdout.flush()
