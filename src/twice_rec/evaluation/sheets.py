"""Tables for readers: one row per variant, the best marked, the paper beside ours; as Markdown and LaTeX too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from twice_rec.evaluation.names import CEILING, GROUPS, asked_name, group_of, metric_name, variant_name
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
    """One row: what readers see of the variant, its short name, how it was asked, what is told of it, its values."""

    label: str
    variant: str
    asked: str
    about: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Sheet:
    """A table: what its columns are, its rows, in groups, and a note: what is the same in all rows has no column."""

    about: tuple[str, ...]  # names of the columns before the values
    columns: tuple[str, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]
    note: str
    spans: tuple[tuple[str, int], ...] = ()  # groups of columns: the name of each, and how many columns it has

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for _, rows in self.groups for row in rows]


def sheet_of(summary: Mapping[str, Mapping[str, Any]], kind: str, domain: str) -> Sheet | None:
    """Return the table of one kind of list; None if no variant has it.

    The best and second value of a column are marked if all variants were asked about as many users.
    """
    present = {key for row in summary.values() for key in row["metrics"]}
    keys = [key for name in METRICS if (key := f"{kind}/{name}") in present]
    having = {name: row for name, row in summary.items() if any(key in row["metrics"] for key in keys)}
    if not having:
        return None
    counts = {"Users": {n: f"{int(row['n']):,}" for n, row in having.items()}}
    counts["Seeds"] = {n: str(row.get("runs", 1)) for n, row in having.items()}
    alike = {name: next(iter(values.values())) for name, values in counts.items() if len(set(values.values())) == 1}
    about = tuple(name for name in counts if name not in alike)
    notes = [f"{value} {name.lower() if value != '1' else name.lower()[:-1]}" for name, value in alike.items()]
    ways = Counter(asked_name(row["asked"]) for row in having.values() if row.get("asked"))
    usual = max(ways, key=ways.__getitem__, default="")
    notes += [f"language models are asked by {usual}, unless said otherwise"] if len(ways) > 1 else []
    certain = [key for key in keys if all(row["metrics"].get(key) == 1 for row in having.values())]
    notes += [f"{' and '.join(map(metric_name, certain))} is 1 for all"] if certain else []
    keys = [key for key in keys if key not in certain] or keys
    marks = {key: _marks(having, key) if "Users" in alike else {} for key in keys}

    def row_of(name: str) -> Row:
        row = having[name]
        cells = tuple(_cell(row, name, key, domain, marks[key]) for key in keys)
        told = tuple(counts[column][name] for column in about)
        asked = asked_name(row.get("asked", ""))
        return Row(variant_name(name), name, "" if asked == usual else asked, told, cells)

    grouped = [(group, tuple(row_of(name) for name in having if group_of(name) == group)) for group in GROUPS]
    marked = ["bold: the best of a column; underlined: the second; ceilings take no part"] if "Users" in alike else []
    note = "; ".join([*notes, *marked])
    shown = tuple((group, rows) for group, rows in grouped if rows)
    return Sheet(about, tuple(map(metric_name, keys)), shown, f"{note[:1].upper()}{note[1:]}." if note else "")


def _marks(summary: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Mark]:
    values = {name: row["metrics"][key] for name, row in summary.items() if key in row["metrics"]}
    return marks_of(values)


def marks_of(of_variants: Mapping[str, float]) -> dict[str, Mark]:
    """Return variant -> mark in a column; those that look equal are equals, and ceilings take no part."""
    values = {name: round(value, 4) for name, value in of_variants.items() if group_of(name) != CEILING}
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
    return "" if p is None else f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def claim_rows(claims: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the claims."""
    rows = []
    for c in claims:
        difference, interval = "-", "-"
        if c["difference"] is not None:
            difference, interval = f"{c['difference']:+.4f}", "[{:+.4f}, {:+.4f}]".format(*c["ci95"])
        says = ", ".join(filter(None, [f"{c['question']}: {c['short']}", c["way"]]))
        numbers = ["-" if c[name] is None else f"{c[name]:,}" for name in ("n", "runs")]
        numbers[0] += f" {c['counted']}" if c.get("counted", "users") != "users" else ""
        numbers[1] = seeds_text(c) or numbers[1]
        rows.append([says, c["verdict"], difference, interval, p_text(c["p_holm"]) or "-", *numbers])
    return ["The paper", "Here", "Difference", "95 % interval", "p (Holm)", "Users", "Seeds"], rows


def seeds_text(row: Mapping[str, Any]) -> str:
    """Return how many seeds' own differences have the sign of their mean, as `2 of 3`; nothing if there is one seed."""
    by_seed = row.get("by_seed") or ()
    agree = sum(of * row["difference"] > 0 for of in by_seed)
    return f"{agree} of {len(by_seed)}" if by_seed else ""


def defect_rows(findings: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of what was counted of the release's defects; a defect is named in its first row."""
    rows, before = [], None
    for finding in findings:
        value, figure = finding.get("value"), "-"
        if isinstance(value, int):
            figure = f"{value:,}" + (f" of {finding['of']:,}" if "of" in finding else "")
        elif value is not None:
            figure = f"{value:,.4f}" if abs(value) < 10 else f"{value:,.1f}"
        interval = " [{:.4f}, {:.4f}]".format(*finding["ci95"]) if "ci95" in finding else ""
        rows.append(["" if finding["defect"] == before else finding["release"], finding["counted"], figure + interval])
        before = finding["defect"]
    return ["The release", "Counted", "Figure"], rows


def sheet_to_markdown(sheet: Sheet) -> str:
    """Return a table as Markdown: the best bold, the second underlined as HTML, which Markdown takes."""

    def text(cell: Cell) -> str:
        value = {"best": f"**{cell.text}**", "second": f"<u>{cell.text}</u>"}.get(cell.mark, cell.text)
        paper = f" (paper {cell.paper})" if cell.paper else ""
        return " ".join(filter(None, [value, cell.interval])) + paper

    rows = [[_markdown(_label(row)), *row.about, *map(text, row.cells)] for row in sheet.rows]
    groups = [_markdown(name) for name, number in sheet.spans for _ in range(number)]
    columns = [": ".join(names) for names in zip(*([groups] if groups else []), sheet.columns, strict=True)]
    return markdown_table(["Variant", *sheet.about, *columns], rows)


def _label(row: Row) -> str:
    return f"{row.label} ({row.asked})" if row.asked else row.label


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
        body += [[latex_text(_label(row)), *map(latex_text, row.about), *map(text, row.cells)] for row in rows]
    header = ["Variant", *sheet.about, *sheet.columns]
    return _latex(header, body, "l" + "r" * (width - 1), caption, label)


def spanned_to_latex(sheet: Sheet, caption: str, label: str, most: int = 4) -> str:
    """Return a table with groups of columns for LaTeX with booktabs and adjustbox: at most so many groups side by side.

    A value's interval and the paper's value are in lines of their own below it.
    """
    blocks, begin = [], 0
    for number in range(0, len(sheet.spans), most):
        spans = sheet.spans[number : number + most]
        width = sum(columns for _, columns in spans)
        blocks.append(_latex_block(sheet, spans, slice(begin, begin + width)))
        begin += width
    head = [r"\begin{table*}[t]", r"\centering\small", rf"\caption{{{latex_text(caption)}}}", rf"\label{{tab:{label}}}"]
    return "\n".join([*head, "\n\n\\medskip\n".join(blocks), r"\end{table*}"])


def _latex_block(sheet: Sheet, spans: Sequence[tuple[str, int]], columns: slice) -> str:
    def value(cell: Cell) -> str:
        text = latex_text(cell.text)
        return {"best": rf"\textbf{{{text}}}", "second": rf"\underline{{{text}}}"}.get(cell.mark, text)

    def small(text: str) -> str:
        return rf"{{\scriptsize {latex_text(text)}}}" if text else ""

    before = 1 + len(sheet.about)
    groups, rules, place = [""] * before, [], before + 1
    for name, number in spans:
        groups.append(rf"\multicolumn{{{number}}}{{c}}{{{latex_text(name)}}}")
        rules.append(rf"\cmidrule(lr){{{place}-{place + number - 1}}}")
        place += number
    header = ["Variant", *sheet.about, *sheet.columns[columns]]
    lines = [" & ".join(groups) + r" \\", " ".join(rules), " & ".join(map(latex_text, header)) + r" \\"]
    for _, rows in sheet.groups:
        lines.append(r"\midrule")
        for row in rows:
            cells, about = row.cells[columns], map(latex_text, (_label(row), *row.about))
            under = [[cell.interval for cell in cells], [f"paper {cell.paper}" if cell.paper else "" for cell in cells]]
            lines.append(" & ".join([*about, *map(value, cells)]) + r" \\")
            lines += [" & ".join([""] * before + list(map(small, texts))) + r" \\" for texts in under if any(texts)]
    return "\n".join(
        [
            r"\begin{adjustbox}{max width=\textwidth}", rf"\begin{{tabular}}{{{'l' + 'r' * (place - 2)}}}", r"\toprule",
            *lines, r"\bottomrule", r"\end{tabular}", r"\end{adjustbox}",
        ]
    )  # fmt: skip


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
