"""Tables of results, for the terminal. Only this module and `stages.status` print."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twice_rec.cf.baselines import BASELINES
from twice_rec.cf.recbole_models import RECBOLE_MODELS
from twice_rec.data.dataset import KNOWN_SCORES
from twice_rec.evaluation.equals import Terms, fresh_evaluations, labels
from twice_rec.evaluation.predictions import METRICS_FILE
from twice_rec.files import read_json
from twice_rec.markdown import markdown_table
from twice_rec.metrics import METRICS
from twice_rec.records import RANKED_LISTS

logger = logging.getLogger(__name__)

Summary = Mapping[str, Mapping[str, Any]]  # variant -> metrics, n; perhaps asked; in a report ci95 and runs
Table = tuple[list[str], list[list[str]]]  # header, rows

# Rows of tables come in this order; variants without a place here follow by name.
ORDER = (*BASELINES, *RECBOLE_MODELS, "sasrec", "base", "stage2", "stage3", *KNOWN_SCORES)


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
    """Return the table of one kind of list: one row per variant that has it; with intervals, also its runs.

    If language models were asked in different ways, a column says how.
    """
    present = {key for row in summary.values() for key in row["metrics"]}
    keys = [key for name in METRICS if (key := f"{kind}/{name}") in present]

    def cell(row: Mapping[str, Any], key: str) -> str:
        if key not in row["metrics"]:
            return "-"
        interval = " [{:.4f}, {:.4f}]".format(*row["ci95"][key]) if with_intervals else ""
        return f"{row['metrics'][key]:.4f}{interval}"

    with_label = any("asked" in row for row in summary.values())
    columns = [*(["asked"] if with_label else []), "users", *(["runs"] if with_intervals else [])]

    def about(row: Mapping[str, Any]) -> list[str]:
        says = {"asked": row.get("asked", "-"), "users": f"{int(row['n']):,}", "runs": str(row.get("runs"))}
        return [says[column] for column in columns]

    rows = [
        [name, *about(row), *(cell(row, key) for key in keys)]
        for name, row in summary.items()
        if any(key in row["metrics"] for key in keys)
    ]
    return ["variant", *columns, *keys], rows


def show_metrics(run_dir: Path) -> None:
    """Print the metrics of every fresh evaluation of a run, one table per kind of list, and what was left out."""
    folders, lines = fresh_evaluations(run_dir)
    found = {folder.name: read_json(folder / METRICS_FILE) for folder in folders}
    asked = labels({folder.name: Terms.of(folder) for folder in folders})
    summary = {
        name: {"metrics": found[name], "n": found[name]["n"], **({"asked": asked[name]} if name in asked else {})}
        for name in in_order(list(found))
    }
    show("\n\n".join(markdown_table(*list_table(summary, kind)) for kind in lists_of(summary)))
    for line in lines:
        logger.warning("%s", line)


def show(text: str) -> None:
    """Print to standard output."""
    sys.stdout.write(f"\n{text}\n\n")
    sys.stdout.flush()
