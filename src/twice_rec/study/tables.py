"""What a study prints: its plan before it runs, and what has become of each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twice_rec.markdown import markdown_table
from twice_rec.study.expected import UNKNOWN, Expected, total_seconds
from twice_rec.study.places import Places
from twice_rec.study.plan import Run
from twice_rec.study.runner import Row

_WHY = 160  # characters of an error in the table; the log has all of it


def plan_table(runs: Sequence[Run], expected: Mapping[Run, Expected], places: Places) -> str:
    """Return the runs in their order, with the seconds that are expected of each, and of all together."""
    several = any(run.domain for run in runs)
    rows = []
    for number, run in enumerate(runs, start=1):
        seconds, how = expected[run].seconds, expected[run].how
        about = [run.domain] if several else []
        time = "-" if seconds is None else f"{seconds:,.0f}"
        rows.append([str(number), *about, str(run.seed), run.stage, run.what, time, how])
    header = ["run", *(["domain"] if several else []), "seed", "stage", "what", "seconds", "known from"]
    return f"{markdown_table(header, rows)}\n\n{_summary(runs, expected, places)}"


def _summary(runs: Sequence[Run], expected: Mapping[Run, Expected], places: Places) -> str:
    unknown = sum(expected[run].how == UNKNOWN for run in runs)
    alone = sum(expected[run].seconds or 0.0 for run in runs)
    total = total_seconds(runs, expected, places)
    where = f"one GPU each of {', '.join(places.gpus)}" if places.gpus else "on this machine's cores"
    threads = "1 thread" if places.threads == 1 else f"{places.threads} threads"
    lines = [
        f"{len(runs)} runs, at most {places.processes} at the same time, {where}, {threads} each.",
        f"Expected: {duration(total)} ({duration(alone)} one after another)"
        + (f", and {unknown} more of unknown length." if unknown else "."),
    ]
    if unknown == len(runs):
        lines[1] = "Nobody knows how long they take: no earlier run of this folder has equal settings."
    shared = {f"{run.run_dir / name} -> {target}" for run in runs for name, target in run.links.items()}
    return "\n".join([*lines, *(f"Shared: {line}" for line in sorted(shared))])


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def result_table(rows: Sequence[Row]) -> str:
    """Return what has become of each run."""
    several = any(row.run.domain for row in rows)
    cells = []
    for row in rows:
        about = [row.run.domain] if several else []
        seconds = "-" if row.seconds is None else f"{row.seconds:,.0f}"
        why = row.says if len(row.says) <= _WHY else f"{row.says[:_WHY]} ..."
        cells.append([*about, str(row.run.seed), row.run.stage, row.run.what, row.state, seconds, why])
    return markdown_table([*(["domain"] if several else []), "seed", "stage", "what", "state", "seconds", "why"], cells)
