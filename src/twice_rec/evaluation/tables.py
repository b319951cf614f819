"""Tables of results, for the terminal. The only module that prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from twice_rec.cf.baselines import BASELINES
from twice_rec.evaluation.predictions import METRICS_FILE
from twice_rec.files import read_json
from twice_rec.markdown import markdown_table
from twice_rec.metrics import METRICS
from twice_rec.records import RANKED_LISTS

# Rows of tables come in this order; variants without a place here follow by name.
ORDER = (*BASELINES, "sasrec", "base", "stage2", "stage3", "oracle")


def in_order(variants: Sequence[str]) -> list[str]:
    """Sort variants for a table: those of `ORDER` first, each followed by its own kind (`stage2`, `stage2_sampled`)."""

    def place(variant: str) -> float:
        if variant in ORDER:
            return ORDER.index(variant)
        return next((i + 0.5 for i, known in enumerate(ORDER) if variant.startswith(f"{known}_")), len(ORDER))

    return sorted(variants, key=lambda variant: (place(variant), variant))


def read_metrics(run_dir: Path) -> dict[str, dict[str, float]]:
    """Read the metrics of every finished evaluation of a run: variant -> metrics, in table order."""
    found = {path.parent.name: read_json(path) for path in (run_dir / "eval").glob(f"*/{METRICS_FILE}")}
    return {variant: found[variant] for variant in in_order(list(found))}


def columns_of(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the metric keys that some variant has, in table order."""
    present = {key for row in metrics.values() for key in row}
    return [key for kind in RANKED_LISTS for name in METRICS if (key := f"{kind}/{name}") in present]


def lists_of(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the ranked lists that some variant has metrics of, in table order."""
    return list(dict.fromkeys(key.partition("/")[0] for key in columns_of(metrics)))


def metrics_table(metrics: Mapping[str, Mapping[str, float]], kind: str) -> str:
    """Return the Markdown table of one kind of list: one row per variant that has it, with its number of users."""
    columns = [key for key in columns_of(metrics) if key.startswith(f"{kind}/")]
    rows = [
        [variant, f"{int(row['n']):,}", *(f"{row[key]:.4f}" if key in row else "-" for key in columns)]
        for variant, row in metrics.items()
        if any(key in row for key in columns)
    ]
    return markdown_table(["variant", "users", *columns], rows)


def show_metrics(metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Print the tables of all lists to standard output."""
    show("\n\n".join(metrics_table(metrics, kind) for kind in lists_of(metrics)))


def show(text: str) -> None:
    """Print to standard output."""
    sys.stdout.write(f"\n{text}\n\n")
    sys.stdout.flush()
