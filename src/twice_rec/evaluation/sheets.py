"""Tables for readers: one row per variant, the best marked, the paper beside ours; as Markdown and LaTeX too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from twice_rec.evaluation.names import CEILING, GROUPS, group_of, metric_name, variant_name
from twice_rec.evaluation.paper import table_1
from twice_rec.markdown import markdown_table
from twice_rec.metrics import METRICS

Mark = Literal["", "best", "second"]


@dataclass(frozen=True)
class Cell:
    """One value: its text, its interval, whether it is the best or second of its column, and the paper's value."""

    text: str
    interval: str = ""
    mark: Mark = ""
    paper: str = ""


@dataclass(frozen=True)
class Row:
    """One row: what readers see of the variant, its short name, what is told of it, and its values."""

    label: str
    variant: str
    about: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Sheet:
    """A table: what its columns are, and its rows, in groups."""

    about: tuple[str, ...]  # names of the columns before the values
    columns: tuple[str, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for _, rows in self.groups for row in rows]


def sheet_of(summary: Mapping[str, Mapping[str, Any]], kind: str, domain: str) -> Sheet | None:
    """Return the table of one kind of list; None if no variant has it.

    The best and second value of a column are marked if all variants were asked about as many users. Ceilings take no
    part in that.
    """
    present = {key for row in summary.values() for key in row["metrics"]}
    keys = [key for name in METRICS if (key := f"{kind}/{name}") in present]
    having = {name: row for name, row in summary.items() if any(key in row["metrics"] for key in keys)}
    if not having:
        return None
    with_asked = any("asked" in row for row in having.values())
    comparable = len({row["n"] for row in having.values()}) == 1
    marks = {key: _marks(having, key) if comparable else {} for key in keys}

    def row_of(name: str) -> Row:
        row = having[name]
        about = [*([row.get("asked", "")] if with_asked else []), f"{int(row['n']):,}", str(row.get("runs", ""))]
        return Row(
            variant_name(name), name, tuple(about), tuple(_cell(row, name, key, domain, marks[key]) for key in keys)
        )

    grouped = [(group, tuple(row_of(name) for name in having if group_of(name) == group)) for group in GROUPS]
    about = (*(("Asked",) if with_asked else ()), "Users", "Seeds")
    return Sheet(about, tuple(map(metric_name, keys)), tuple((group, rows) for group, rows in grouped if rows))


def _marks(summary: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Mark]:
    """Return variant -> mark; those that look equal in the table are equals."""
    values = {
        name: round(row["metrics"][key], 4)
        for name, row in summary.items()
        if key in row["metrics"] and group_of(name) != CEILING
    }
    best, second, *_ = [*sorted(set(values.values()), reverse=True), None, None]
    marks: dict[str, Mark] = {name: "best" for name, value in values.items() if value == best}
    marks |= {name: "second" for name, value in values.items() if value == second and len(marks) == 1}
    return marks if len(values) > 1 else {}


def _cell(row: Mapping[str, Any], name: str, key: str, domain: str, marks: Mapping[str, Mark]) -> Cell:
    if key not in row["metrics"]:
        return Cell("-")
    interval = row.get("ci95", {}).get(key)
    paper = table_1(domain, name, key)
    return Cell(
        f"{row['metrics'][key]:.4f}",
        "[{:.4f}, {:.4f}]".format(*interval) if interval else "",
        marks.get(name, ""),
        "" if paper is None else f"{paper:.4f}",
    )


def comparison_rows(comparisons: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the paired comparisons."""
    rows = [
        [
            f"{variant_name(c['a'])} less {variant_name(c['b'])}", f"{c['n']:,}", f"{c['difference']:+.4f}",
            "[{:+.4f}, {:+.4f}]".format(*c["ci95"]), p_text(c["p"]), p_text(c.get("p_holm")),
        ]
        for c in comparisons
    ]  # fmt: skip
    return ["Comparison", "Users", "Difference", "95 % interval", "p", "p (Holm)"], rows


def p_text(p: float | None) -> str:
    """Return a p-value with three digits; empty if there is none."""
    return "" if p is None else f"{p:.3f}" if p >= 0.0005 else "< .001"


def claim_rows(claims: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the claims."""
    rows = []
    for c in claims:
        found = c["difference"] is not None
        rows.append(
            [
                f"{c['question']}: {c['short']}", c["verdict"], f"{c['difference']:+.4f}" if found else "-",
                "[{:+.4f}, {:+.4f}]".format(*c["ci95"]) if found else "-", p_text(c["p_holm"]) or "-",
                "-" if c["n"] is None else f"{c['n']:,}", "-" if c["runs"] is None else str(c["runs"]),
            ]
        )  # fmt: skip
    return ["The paper", "Here", "Difference", "95 % interval", "p (Holm)", "Users", "Seeds"], rows


def sheet_to_markdown(sheet: Sheet) -> str:
    """Return a table as Markdown: the best bold, the second underlined as HTML, which Markdown takes."""

    def text(cell: Cell) -> str:
        value = {"best": f"**{cell.text}**", "second": f"<u>{cell.text}</u>"}.get(cell.mark, cell.text)
        paper = f" (paper {cell.paper})" if cell.paper else ""
        return " ".join(filter(None, [value, cell.interval])) + paper

    rows = [[_markdown(row.label), *row.about, *map(text, row.cells)] for row in sheet.rows]
    return markdown_table(["Variant", *sheet.about, *sheet.columns], rows)


def _markdown(text: str) -> str:
    return text.replace("|", "\\|")


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "[": "{[}", "]": "{]}",  # behind the end of a line a bracket would be its argument
}  # fmt: skip


def latex_text(text: str) -> str:
    """Return a text so that LaTeX prints it as it is."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def sheet_to_latex(sheet: Sheet, caption: str, label: str) -> str:
    """Return a table for LaTeX with booktabs: groups apart, the best bold, the second underlined."""

    def text(cell: Cell) -> str:
        value = latex_text(cell.text)
        value = {"best": rf"\textbf{{{value}}}", "second": rf"\underline{{{value}}}"}.get(cell.mark, value)
        interval = rf" {{\scriptsize {latex_text(cell.interval)}}}" if cell.interval else ""
        return value + interval

    width = 1 + len(sheet.about) + len(sheet.columns)
    body: list[list[str] | None] = []
    for _, rows in sheet.groups:
        body += [None] if body else []
        body += [[latex_text(row.label), *map(latex_text, row.about), *map(text, row.cells)] for row in rows]
    header = ["Variant", *sheet.about, *sheet.columns]
    return _latex(header, body, "l" + "r" * (width - 1), caption, label)


def rows_to_latex(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, label: str) -> str:
    """Return a plain table for LaTeX with booktabs."""
    body: list[list[str] | None] = [list(map(latex_text, row)) for row in rows]
    return _latex(header, body, "l" + "r" * (len(header) - 1), caption, label)


def _latex(header: Sequence[str], body: Sequence[list[str] | None], columns: str, caption: str, label: str) -> str:
    """Return a whole table; None in the body is a rule between groups."""
    lines = [r"\midrule" if row is None else f"{' & '.join(row)} \\\\" for row in body]
    top = " & ".join(map(latex_text, header))
    return "\n".join(
        [
            r"\begin{table}[t]", r"\centering\small", rf"\caption{{{latex_text(caption)}}}", rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rf"{top} \\", r"\midrule", *lines, r"\bottomrule",
            r"\end{tabular}", r"\end{table}",
        ]
    )  # fmt: skip
