"""Tables of results: for the terminal, as Markdown, as JSON. The only module that prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from twice_rec.evaluation.predict import METRICS_FILE
from twice_rec.files import read_json
from twice_rec.markdown import markdown_table
from twice_rec.metrics import METRICS

# Rows of tables come in this order, others behind.
ORDER = ("random", "popularity", "itemknn", "ease", "sasrec", "base", "stage2", "stage3", "oracle")


def in_order(variants: Sequence[str]) -> list[str]:
    """Known variants first, in the order of the story; others behind, by name."""
    return sorted(variants, key=lambda v: (ORDER.index(v) if v in ORDER else _near(v), v))


def _near(variant: str) -> float:
    """`stage2_sampled` stands behind `stage2`."""
    for position, known in enumerate(ORDER):
        if variant.startswith(f"{known}_"):
            return position + 0.5
    return len(ORDER)


def read_metrics(run_dir: Path) -> dict[str, dict[str, float]]:
    """Variant -> metrics, of every finished evaluation of a run, in table order."""
    found = {path.parent.name: read_json(path) for path in (run_dir / "eval").glob(f"*/{METRICS_FILE}")}
    return {variant: found[variant] for variant in in_order(list(found))}


def columns_of(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The metric keys that some variant has: lists as they come, metrics in their usual order."""
    kinds = dict.fromkeys(key.partition("/")[0] for row in metrics.values() for key in row if "/" in key)
    order = [kind for kind in ("uniform", "popularity", "hard", "full") if kind in kinds]
    present = {key for row in metrics.values() for key in row}
    return [f"{kind}/{name}" for kind in order for name in METRICS if f"{kind}/{name}" in present]


def metrics_table(metrics: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> str:
    """One row for each variant that has one of the columns, with its number of users."""
    rows = [
        [variant, f"{int(row['n']):,}", *(f"{row[key]:.4f}" if key in row else "-" for key in columns)]
        for variant, row in metrics.items()
        if any(key in row for key in columns)
    ]
    return markdown_table(["variant", "users", *columns], rows)


def list_tables(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """One table for each kind of list: its name -> Markdown."""
    columns = columns_of(metrics)
    kinds = dict.fromkeys(key.partition("/")[0] for key in columns)
    return {kind: metrics_table(metrics, [key for key in columns if key.startswith(f"{kind}/")]) for kind in kinds}


def show_metrics(metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Print the tables of all lists to standard output."""
    show("\n\n".join(list_tables(metrics).values()))


def show(text: str) -> None:
    """Print to standard output."""
    sys.stdout.write(f"\n{text}\n\n")
    sys.stdout.flush()
