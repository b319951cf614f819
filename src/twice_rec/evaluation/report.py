"""What stage 5 makes of everything under eval/: summaries with intervals, comparisons, and one HTML page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twice_rec.errors import InputError
from twice_rec.evaluation.predict import PREDICTIONS
from twice_rec.evaluation.tables import columns_of, in_order
from twice_rec.files import MANIFEST, read_json, read_records
from twice_rec.metrics import METRICS, Difference, bootstrap_intervals, paired_bootstrap, per_user
from twice_rec.records import Prediction


@dataclass(frozen=True)
class Variant:
    """All predictions of one variant.

    Args:
        users: those it was evaluated on -> their row, in the files' order.
        values: metric key -> float64 [users], averaged over the variant's trainings.
        runs: how many trainings these are.
    """

    users: Mapping[str, int]
    values: Mapping[str, NDArray[np.float64]]
    runs: int

    def column(self, key: str, users: Sequence[str]) -> NDArray[np.float64]:
        """float64 [len(users)] of one metric."""
        return self.values[key][[self.users[user] for user in users]]


def read_variants(run_dirs: Sequence[Path]) -> dict[str, Variant]:
    """Every finished evaluation of some runs, in table order; of the same name, they are trainings of one variant.

    Raises:
        InputError: where a run has none, or where two of a name were asked different questions.
    """
    folders: dict[str, list[Path]] = {}
    for run_dir in run_dirs:
        found = sorted((run_dir / "eval").glob(f"*/{MANIFEST}"))
        if not found:
            raise InputError(f"{run_dir / 'eval'}: nothing was evaluated yet; run sasrec.sh or evaluate.sh first")
        for path in found:
            folders.setdefault(path.parent.name, []).append(path.parent)
    return {name: _read(folders[name]) for name in in_order(list(folders))}


def _read(folders: Sequence[Path]) -> Variant:
    users: dict[str, int] = {}
    trainings: dict[tuple[Path, int], None] = {}
    rows: dict[str, list[int]] = {}  # list kind -> the row of each rank
    ranks: dict[str, list[int]] = {}
    for folder in folders:
        _check_same_data(folders[0], folder)
        for prediction in read_records(folder / PREDICTIONS, Prediction):
            trainings[folder, prediction.seed] = None
            row = users.setdefault(prediction.user_id, len(users))
            for kind, rank in prediction.ranks.items():
                rows.setdefault(kind, []).append(row)
                ranks.setdefault(kind, []).append(rank)
    values = {}
    for kind, of in ranks.items():
        if not (np.bincount(rows[kind], minlength=len(users)) == len(trainings)).all():
            raise InputError(
                f"{', '.join(map(str, folders))}: some users have no rank for {kind} in some of the "
                f"{len(trainings)} runs; evaluate all of them on the same users and lists"
            )
        for name in METRICS:
            values[f"{kind}/{name}"] = np.bincount(rows[kind], weights=per_user(name, of)) / len(trainings)
    return Variant(users, values, len(trainings))


def _check_same_data(one: Path, other: Path) -> None:
    """Both evaluations read the same items, purchases and candidate lists."""
    inputs = [read_json(folder / MANIFEST)["inputs"] for folder in (one, other)]
    for name in inputs[0].keys() & inputs[1].keys():
        if name.startswith("data/") and inputs[0][name] != inputs[1][name]:
            raise InputError(
                f"{one} and {other} were evaluated on different {name}; runs of other seeds need the same data folder"
            )


def summarise_variants(
    variants: Mapping[str, Variant], users: Sequence[str] | None, bootstrap_samples: int
) -> dict[str, dict[str, Any]]:
    """Means, 95 % intervals, number of users and of trainings of each variant.

    Args:
        users: evaluate on these only; None for each variant's own.
    """
    summary = {}
    for name, variant in variants.items():
        of = list(users) if users is not None else list(variant.users)
        columns = np.stack([variant.column(key, of) for key in variant.values], axis=1)
        intervals = bootstrap_intervals(columns, bootstrap_samples)
        summary[name] = {
            "metrics": dict(zip(variant.values, columns.mean(axis=0).tolist(), strict=True)),
            "ci95": dict(zip(variant.values, intervals.tolist(), strict=True)),
            "n": len(of),
            "runs": variant.runs,
        }
    return summary


def common_users(variants: Mapping[str, Variant]) -> list[str]:
    """The users that every variant was evaluated on, in the order of the first variant's."""
    first, *others = variants.values()
    return [user for user in first.users if all(user in variant.users for variant in others)]


def compare(variants: Mapping[str, Variant], a: str, b: str, metric: str, bootstrap_samples: int) -> dict[str, Any]:
    """Paired comparison of two variants on the users both have.

    Raises:
        InputError: for an unknown metric, naming those there are.
    """
    for name in (a, b):
        if metric not in variants[name].values:
            raise InputError(f"{name} was not evaluated on {metric}; it has {', '.join(variants[name].values)}")
    users = common_users({a: variants[a], b: variants[b]})
    if not users:
        raise InputError(f"{a} and {b} have no user in common")
    found: Difference = paired_bootstrap(
        variants[a].column(metric, users), variants[b].column(metric, users), bootstrap_samples
    )
    return {"a": a, "b": b, "metric": metric, "n": len(users), **asdict(found)}


def interval_table(summary: Mapping[str, Mapping[str, Any]], kind: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one list kind's table: every metric with its interval."""
    keys = [
        key for key in columns_of({name: row["metrics"] for name, row in summary.items()}) if key.startswith(f"{kind}/")
    ]
    rows = []
    for name, row in summary.items():
        if any(key in row["metrics"] for key in keys):
            cells = [
                f"{row['metrics'][key]:.4f} [{row['ci95'][key][0]:.4f}, {row['ci95'][key][1]:.4f}]"
                if key in row["metrics"]
                else "-"
                for key in keys
            ]
            rows.append([name, f"{row['n']:,}", str(row["runs"]), *cells])
    return ["variant", "users", "runs", *keys], rows


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the paired comparisons."""
    rows = [
        [
            f"{c['a']} - {c['b']}",
            c["metric"],
            f"{c['n']:,}",
            f"{c['difference']:+.4f}",
            f"[{c['ci95'][0]:+.4f}, {c['ci95'][1]:+.4f}]",
            f"{c['p']:.3f}",
        ]
        for c in comparisons
    ]
    return ["comparison", "metric", "users", "difference", "95 % interval", "p"], rows


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } p { max-width: 48rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left; font-weight: 600 } th { background: #f4f4f4 }
dt { float: left; clear: left; width: 9rem; color: #666 } dd { margin-left: 9.5rem }
"""


def html_page(
    title: str,
    intro: str,
    sections: Sequence[tuple[str, str, tuple[list[str], list[list[str]]]]],
    facts: Mapping[str, str],
) -> str:
    """One self-contained page.

    Args:
        sections: (heading, a sentence, (header, rows)).
        facts: how it was made, name -> value.
    """
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>"]
    for heading, sentence, (header, rows) in sections:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        parts.append(
            f"<h2>{html.escape(heading)}</h2><p>{html.escape(sentence)}</p>"
            f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
        )
    made = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    parts.append(f"<h2>How this was made</h2><dl>{made}</dl>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
