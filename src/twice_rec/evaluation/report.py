"""The report: everything under eval/ summed up with intervals, compared, and written as a page, tables and JSON.

Two views are given: every variant on all its users, and all variants on the users they share, since language models may
answer for fewer users.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twice_rec.errors import InputError
from twice_rec.evaluation.predictions import PREDICTIONS
from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.tables import Summary, Table, in_order, list_table, lists_of, show
from twice_rec.files import MANIFEST, hash_file, read_json, read_records, write_json, write_text
from twice_rec.markdown import markdown_table
from twice_rec.metrics import METRICS, bootstrap_intervals, paired_bootstrap, per_user
from twice_rec.records import RANKED_LISTS, Prediction
from twice_rec.run import environment

logger = logging.getLogger(__name__)

INTRO = "Means over users with 95 % bootstrap intervals over users. Ties count against the target; every user counts."


@dataclass(frozen=True)
class Variant:
    """All predictions of one variant."""

    users: Mapping[str, int]  # those it was evaluated on -> their row, in the files' order
    values: Mapping[str, NDArray[np.float64]]  # metric key -> [users], averaged over the variant's trainings
    runs: int  # how many trainings these are

    def column(self, key: str, users: Sequence[str]) -> NDArray[np.float64]:
        """Return one metric of some users: float64 [len(users)]."""
        return self.values[key][[self.users[user] for user in users]]


def read_variants(run_dirs: Sequence[Path]) -> dict[str, Variant]:
    """Read every finished evaluation of some runs, in table order; those of one name are trainings of one variant.

    Raises:
        InputError: if a run has none, or if two of one name were asked different questions.
    """
    folders: dict[str, list[Path]] = {}
    for run_dir in run_dirs:
        if not (found := _manifests(run_dir)):
            raise InputError(f"{run_dir / 'eval'}: nothing was evaluated yet; run sasrec.sh or evaluate.sh first")
        for path in found:
            folders.setdefault(path.parent.name, []).append(path.parent)
    return {name: _read(folders[name]) for name in in_order(list(folders))}


def _manifests(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "eval").glob(f"*/{MANIFEST}"))


def _read(folders: Sequence[Path]) -> Variant:
    users: dict[str, int] = {}
    trainings: dict[tuple[Path, int], None] = {}
    found: dict[str, list[tuple[int, int]]] = {}  # kind of list -> (row of the user, rank)
    for folder in folders:
        _check_same_data(folders[0], folder)
        for prediction in read_records(folder / PREDICTIONS, Prediction):
            trainings[folder, prediction.seed] = None
            row = users.setdefault(prediction.user_id, len(users))
            for kind, rank in prediction.ranks.items():
                found.setdefault(kind, []).append((row, rank))
    values = {}
    for kind, pairs in found.items():
        rows, ranks = np.array(pairs).T
        if not (np.bincount(rows, minlength=len(users)) == len(trainings)).all():
            raise InputError(
                f"{', '.join(map(str, folders))}: some users have no rank for {kind} in some of the "
                f"{len(trainings)} runs; evaluate all of them on the same users and lists"
            )
        for name in METRICS:
            values[f"{kind}/{name}"] = np.bincount(rows, weights=per_user(name, ranks)) / len(trainings)
    return Variant(users, values, len(trainings))


def _check_same_data(one: Path, other: Path) -> None:
    """Check that both evaluations read the same items, interactions and candidate lists."""
    inputs = [read_json(folder / MANIFEST)["inputs"] for folder in (one, other)]
    for name in inputs[0].keys() & inputs[1].keys():
        if name.startswith("data/") and inputs[0][name] != inputs[1][name]:
            raise InputError(
                f"{one} and {other} were evaluated on different {name}; runs of other seeds need the same data folder"
            )


def results_of(variants: Mapping[str, Variant], recipe: ReportRecipe) -> dict[str, Any]:
    """Return summaries and comparisons, for results.json; a pair that is not evaluated is left out with a warning."""
    shared, samples = common_users(variants), recipe.bootstrap_samples
    comparisons = []
    for a, b in recipe.comparisons:
        if missing := [name for name in (a, b) if name not in variants]:
            logger.warning("%s - %s left out: %s is not evaluated; %s are", a, b, missing[0], ", ".join(variants))
        else:
            comparisons.append(compare(variants, a, b, recipe.comparison_metric, samples))
    common = summarise_variants(variants, shared, samples) if shared else {}
    return {
        "variants": summarise_variants(variants, None, samples),
        "common_users": {"n": len(shared), "variants": common},
        "comparisons": comparisons,
    }


def summarise_variants(variants: Mapping[str, Variant], users: Sequence[str] | None, bootstrap_samples: int) -> Summary:
    """Return means, 95 % intervals, users and trainings of each variant, on the given users or else on all its own."""
    summary = {}
    for name, variant in variants.items():
        of = list(variant.users) if users is None else users
        columns = np.stack([variant.column(key, of) for key in variant.values], axis=1)  # [users, metrics]
        intervals = bootstrap_intervals(columns, bootstrap_samples)  # [metrics, 2]
        summary[name] = {
            "metrics": dict(zip(variant.values, columns.mean(axis=0).tolist(), strict=True)),
            "ci95": dict(zip(variant.values, intervals.tolist(), strict=True)),
            "n": len(of),
            "runs": variant.runs,
        }
    return summary


def common_users(variants: Mapping[str, Variant]) -> list[str]:
    """Return the users that every variant was evaluated on, in the order of the first variant's."""
    first, *others = variants.values()
    return [user for user in first.users if all(user in variant.users for variant in others)]


def compare(variants: Mapping[str, Variant], a: str, b: str, metric: str, bootstrap_samples: int) -> dict[str, Any]:
    """Compare two variants on the users both have, user by user.

    Raises:
        InputError: for a metric that one was not evaluated on, or if they share no user.
    """
    for name in (a, b):
        if metric not in variants[name].values:
            raise InputError(f"{name} was not evaluated on {metric}; it has {', '.join(variants[name].values)}")
    users = common_users({a: variants[a], b: variants[b]})
    if not users:
        raise InputError(f"{a} and {b} have no user in common")
    left, right = (variants[name].column(metric, users) for name in (a, b))
    found = paired_bootstrap(left, right, bootstrap_samples)
    return {"a": a, "b": b, "metric": metric, "n": len(users), **asdict(found)}


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of paired comparisons."""
    rows = []
    for c in comparisons:
        interval = "[{:+.4f}, {:+.4f}]".format(*c["ci95"])
        difference = f"{c['difference']:+.4f}"
        rows.append([f"{c['a']} - {c['b']}", c["metric"], f"{c['n']:,}", difference, interval, f"{c['p']:.3f}"])
    return ["comparison", "metric", "users", "difference", "95 % interval", "p"], rows


def sections_of(results: Mapping[str, Any], metric: str) -> list[tuple[str, str, Table]]:
    """Return the parts of the page: heading, a sentence, table. The shared users' table is of the metric's list."""
    says = "Every variant on all users it was evaluated on."
    sections = [
        (f"Lists: {kind}", f"{RANKED_LISTS[kind]} {says}", list_table(results["variants"], kind, True))
        for kind in lists_of(results["variants"])
    ]
    shared = list_table(results["common_users"]["variants"], metric.partition("/")[0], True)
    if shared[1]:
        says = f"The {results['common_users']['n']:,} users that all variants share."
        sections.insert(0, ("The same users for all", says, shared))
    if results["comparisons"]:
        sections.insert(1, ("Comparisons", "Paired over users.", comparison_table(results["comparisons"])))
    return sections


def save_report(folder: Path, results: Mapping[str, Any], recipe: ReportRecipe, run_dirs: Sequence[Path]) -> None:
    """Write index.html, tables.md and results.json, each with what it was made of."""
    about, sections = environment(), sections_of(results, recipe.comparison_metric)
    made_of = {str(path): hash_file(path) for run in run_dirs for path in _manifests(run)}
    manifest = {"domain": recipe.domain, "evaluations": made_of, **about}
    write_json(folder / "results.json", {**results, "manifest": manifest})
    title = f"TWiCE-Rec on {recipe.domain}"
    facts = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "run": ", ".join(map(str, run_dirs)),
        "commit": str(about["commit"]),
        "python": about["python"],
        "packages": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
    }
    write_text(folder / "index.html", html_page(title, sections, facts))
    text = "\n\n".join(f"## {heading}\n\n{says}\n\n{markdown_table(*table)}" for heading, says, table in sections)
    write_text(folder / "tables.md", f"# {title}\n\n{INTRO}\n\n{text}\n")


def show_report(results: Mapping[str, Any], metric: str) -> None:
    """Print the shared users' table, without intervals, and the comparisons."""
    common = results["common_users"]
    table = list_table(common["variants"], metric.partition("/")[0])
    if table[1]:
        show(f"The {common['n']:,} users that all variants share:\n\n{markdown_table(*table)}")
    if results["comparisons"]:
        show(markdown_table(*comparison_table(results["comparisons"])))


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } p { max-width: 48rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left; font-weight: 600 } th { background: #f4f4f4 }
dt { float: left; clear: left; width: 9rem; color: #666 } dd { margin-left: 9.5rem }
"""


def html_page(title: str, sections: Sequence[tuple[str, str, Table]], facts: Mapping[str, str]) -> str:
    """Return one self-contained page; `facts` says how it was made, name -> value."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>"

    parts = [f"<h1>{escape(title)}</h1><p>{escape(INTRO)}</p>"]
    for heading, says, (header, rows) in sections:
        table = f"<table>{cells('th', header)}{''.join(cells('td', row) for row in rows)}</table>"
        parts.append(f'<h2>{escape(heading)}</h2><p>{escape(says)}</p><div class="wide">{table}</div>')
    made = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    parts.append(f"<h2>How this was made</h2><dl>{made}</dl>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
