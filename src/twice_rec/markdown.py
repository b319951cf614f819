"""The one writer of Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table with columns padded to the same width, readable in a terminal too; numbers to the right.

    Args:
        texts: number of columns of text, which come first.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return f"| {' | '.join(cell.ljust(w) if i < texts else cell.rjust(w) for i, (cell, w) in pairs)} |"

    rules = (f":{'-' * (width + 1)}" if i < texts else f"{'-' * (width + 1)}:" for i, width in enumerate(widths))
    return "\n".join([line(header), f"|{'|'.join(rules)}|", *map(line, rows)])
