"""Figures: drawn once with matplotlib, saved as PNG and PDF, and as SVG for the page.

In the page's SVG every colour is a variable of its style sheet, so that a figure is readable in light and in dark. It
has a title and no address of another file, and its ids are of this figure only. matplotlib is imported late.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from twice_rec.evaluation.tables import Table
from twice_rec.files import atomic_path

INK, FAINT, GRID = "#1b1d21", "#5c636d", "#d5d9de"
ON_SERIES = "#fdfdfe"  # text on a colour of `SERIES`
SERIES = ("#0b62a4", "#c2560a", "#1a7f5a", "#8a4fb0", "#977011", "#59636f")  # also told apart by marker and line
MARKERS, LINES = ("o", "s", "^", "D", "v", "P"), ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))

# Colour in the files -> its variable in the page.
_VARIABLES: Mapping[str, str] = {
    INK: "currentColor", FAINT: "var(--faint)", GRID: "var(--line)", ON_SERIES: "var(--ground)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)},
}  # fmt: skip

_STYLE: Mapping[str, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 9,
    "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.titlelocation": "left",
    "lines.linewidth": 1.6, "lines.markersize": 5, "svg.fonttype": "none", "text.parse_math": False,
    "pdf.fonttype": 42,
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """One figure before it is drawn.

    Attributes:
        name: of its files.
        title: what it shows, as a heading.
        caption: how to read it.
        alternative: what is seen in it, for those who do not see it.
        draw: draws on a matplotlib figure.
        table: the numbers behind it.
        height: in inches; the width is that of a column of the page.
    """

    name: str
    title: str
    caption: str
    alternative: str
    draw: Callable[[Any], None]
    table: Table
    height: float = 2.9


WIDTH = 4.5  # inches; as narrow as a phone allows without texts too small to read


def save(chart: Chart, folder: Path) -> tuple[str, list[Path]]:
    """Draw a figure; return its SVG for the page, and its files, `NAME.png` and `NAME.pdf`."""
    from matplotlib import style
    from matplotlib.figure import Figure

    files = []
    with style.context(["default", {**_STYLE, "svg.hashsalt": chart.name}]):
        figure = Figure(figsize=(WIDTH, chart.height), layout="constrained")
        chart.draw(figure)
        for ending, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
            files.append(folder / f"{chart.name}.{ending}")
            with atomic_path(files[-1]) as temporary:
                figure.savefig(temporary, format=ending, dpi=200, metadata=metadata)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return page_svg(text.getvalue(), chart), files


def page_svg(text: str, chart: Chart) -> str:
    """Return matplotlib's SVG as a part of the page: see this module."""
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    referred = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', body))
    kept = {one or other for one, other in referred}
    prefix = f"{chart.name}-"
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in kept else "", body)
    body = re.sub(r'href="#', f'href="#{prefix}', body)
    body = re.sub(r"url\(#", f"url(#{prefix}", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    names = f"{prefix}title {prefix}says"
    title = f'<title id="{prefix}title">{escape(chart.title)}</title>'
    says = f'<desc id="{prefix}says">{escape(chart.alternative)}</desc>'
    return f'<svg {view[0] if view else ""} role="img" aria-labelledby="{names}">{title}{says}{body.strip()}'


def intervals(axes: Any, x: Sequence[float], rows: Sequence[Mapping[str, Any]], series: int, label: str = "") -> None:
    """Draw means with their intervals as points with bars, horizontal places given; `rows` have `mean` and `ci95`."""
    means = [row["mean"] for row in rows]
    low = [max(0.0, mean - row["ci95"][0]) for mean, row in zip(means, rows, strict=True)]
    high = [max(0.0, row["ci95"][1] - mean) for mean, row in zip(means, rows, strict=True)]
    number = series % len(SERIES)
    axes.errorbar(
        x, means, yerr=[low, high], fmt=MARKERS[number], color=SERIES[number], capsize=3, elinewidth=1.3, label=label
    )


def line_of(axes: Any, height: float, label: str, number: int) -> None:
    """Draw a horizontal line across, named at its left end."""
    axes.axhline(height, color=FAINT, linewidth=1, linestyle=LINES[1 + number % 3])
    axes.annotate(
        label, (0, height), xycoords=("axes fraction", "data"), xytext=(3, 2), textcoords="offset points",
        ha="left", va="bottom", fontsize=7, color=FAINT,
    )  # fmt: skip
