"""What curation did to a set of rationales, in figures: acceptance, lengths, evidence, leaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol, TypeVar

from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.files import read_json, write_json, write_text
from twice_rec.rationales.leaks import LEAKS, leaks_of

_LEAK_MEANINGS = {
    "title": "names the target's title",
    "brand": "names its brand",
    "id": "names its id",
    "purchase": "speaks of its purchase as having happened",
    "any": "any of these",
}


class Outcome(Protocol):
    """A row after curation; `curate.Judged` is one."""

    @property
    def target(self) -> str:
        """Id of the target item."""
        ...

    @property
    def reason(self) -> str:
        """Empty for an accepted row."""
        ...

    @property
    def text(self) -> str:
        """Empty where there is no rationale."""
        ...

    @property
    def verdict(self) -> str:
        """Empty where there is no rationale."""
        ...


Row = TypeVar("Row", bound=Outcome)


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one set of rationales. Shares are fractions of 1; pairs are [rows, accepted rows].

    Args:
        reasons: why rows were dropped -> rows.
        words: of accepted rationales: mean, min, p10, median, p90, max.
        evidence: of all rationales: mean number of past purchases cited, their mean share of the history, the share
            of rationales citing none, and of those citing the most recent one.
        leaks: share of accepted rationales that give something away of the target; `leaks_all` is over all rationales.
    """

    label: str
    rows: int
    accepted: int
    reasons: dict[str, int]
    verdicts: dict[str, tuple[int, int]]
    categories: dict[str, tuple[int, int]]
    words: dict[str, float]
    evidence: dict[str, float]
    leaks: dict[str, float]
    leaks_all: dict[str, float]


class Tally:
    """Counts rows one by one; its size depends on the numbers of categories and lengths, not of rows."""

    def __init__(self, catalog: ItemCatalog, label: str):
        self._catalog = catalog
        self._label = label
        self._reasons, self._words = Counter[str](), Counter[int]()
        self._verdicts: dict[str, list[int]] = {}
        self._categories: dict[str, list[int]] = {}
        self._leaks = {True: Counter[str](), False: Counter[str]()}
        self._texts = {True: 0, False: 0}
        self._rows = Counter[bool]()
        self._evidence = [0, 0, 0.0, 0, 0]  # rationales, purchases cited, shares of histories, none cited, last cited

    def count_evidence(self, evidence: Sequence[int], history_length: int) -> None:
        """Count the evidence of one rationale, given as positions in the history."""
        one = (1, len(evidence), len(evidence) / history_length, not evidence, history_length - 1 in evidence)
        self._evidence = [total + value for total, value in zip(self._evidence, one, strict=True)]

    def count(self, row: Row) -> Row:
        """Count one row after curation, and hand it on."""
        accepted = not row.reason
        target = self._catalog[row.target]
        self._rows[accepted] += 1
        if row.reason:
            self._reasons[row.reason.partition(":")[0]] += 1
        category = target.categories[-1] if target.categories else "(none)"
        for name, table in ((row.verdict or "(no answer)", self._verdicts), (category, self._categories)):
            pair = table.setdefault(name, [0, 0])
            pair[0] += 1
            pair[1] += accepted
        if row.text:
            found = leaks_of(row.text, target)
            self._texts[accepted] += 1
            self._leaks[accepted].update([*found, "any"] if found else [])
        if accepted:
            self._words[len(row.text.split())] += 1
        return row

    def report(self) -> Report:
        """The figures of everything counted."""
        accepted, everything = self._leaks[True], self._leaks[True] + self._leaks[False]
        rationales, cited, shares, none, last = self._evidence
        return Report(
            label=self._label,
            rows=self._rows.total(),
            accepted=self._rows[True],
            reasons=dict(self._reasons.most_common()),
            verdicts={name: (pair[0], pair[1]) for name, pair in sorted(self._verdicts.items())},
            categories={
                name: (pair[0], pair[1]) for name, pair in sorted(self._categories.items(), key=lambda c: -c[1][0])
            },
            words=_lengths(self._words),
            evidence={
                "purchases_cited": _share(cited, rationales),
                "share_of_history": _share(shares, rationales),
                "none_cited": _share(none, rationales),
                "most_recent_cited": _share(last, rationales),
            },
            leaks={name: _share(accepted[name], self._texts[True]) for name in (*LEAKS, "any")},
            leaks_all={name: _share(everything[name], sum(self._texts.values())) for name in (*LEAKS, "any")},
        )


def save_report(report: Report, other: Report | None, folder: Path) -> list[Path]:
    """Write `report.json` and `report.md`, the second beside the figures of `other` where it is given."""
    paths = [folder / "report.json", folder / "report.md"]
    write_json(paths[0], asdict(report))
    write_text(paths[1], to_markdown(report, other))
    return paths


def load_report(folder: Path) -> Report:
    """Read `report.json` of a folder of rationales; InputError where there is none of this version."""
    row = read_json(folder / "report.json")
    names = {field.name for field in fields(Report)}
    if not isinstance(row, dict) or row.keys() != names:
        raise InputError(
            f"{folder / 'report.json'}: expected the keys {', '.join(sorted(names))}; run rationales.sh again"
        )
    return Report(**row)


def to_markdown(report: Report, other: Report | None = None) -> str:
    """The tables; with `other`, a second column of its figures and the change from it to this set."""
    both = [report] if other is None else [other, report]
    lines = [f"# Rationales: {report.label}", ""]
    if other is not None:
        lines += [f"Beside: {other.label}", ""]
    head = ["", *(r.label for r in both), *(["change"] if other else [])]

    def table(title: str, rows: Mapping[str, Sequence[float]], whole: bool = False) -> None:
        lines.extend([f"## {title}", "", _line(head), _line(["---"] + ["---:"] * (len(head) - 1))])
        for name, values in rows.items():
            shown = [f"{value:,.0f}" if whole else f"{value:.3f}" for value in values]
            change = [f"{values[1] - values[0]:+,.{0 if whole else 3}f}"] if other else []
            lines.append(_line([name, *shown, *change]))
        lines.append("")

    def column(name: str, keys: Sequence[str]) -> dict[str, list[float]]:
        return {key: [getattr(r, name).get(key, 0) for r in both] for key in keys}

    table("Rows", {n: [getattr(r, n) for r in both] for n in ("rows", "accepted")}, whole=True)
    table("Share accepted", {"all": [_share(r.accepted, r.rows) for r in both]})
    table("Why rows were dropped", column("reasons", _keys(both, "reasons")), whole=True)
    for title, name in (
        ("Share accepted by verdict", "verdicts"),
        ("Share accepted by category, the ten largest", "categories"),
    ):
        keys = _keys(both, name)[:10]
        rows = {f"{k} ({_rows_of(report, name, k):,} rows)": _shares(both, name, k) for k in keys}
        table(title, rows)
    table("Words of accepted rationales", column("words", list(report.words)))
    table("Evidence", column("evidence", list(report.evidence)))
    leaks = {_LEAK_MEANINGS[key]: [r.leaks[key] for r in both] for key in _LEAK_MEANINGS}
    table("Leaks: share of accepted rationales that give the target away", leaks)
    leaks = {_LEAK_MEANINGS[key]: [r.leaks_all[key] for r in both] for key in _LEAK_MEANINGS}
    table("Leaks: share of all rationales", leaks)
    return "\n".join(lines).rstrip() + "\n"


def _rows_of(report: Report, name: str, key: str) -> int:
    return getattr(report, name).get(key, (0, 0))[0]


def _shares(reports: Sequence[Report], name: str, key: str) -> list[float]:
    pairs = (getattr(report, name).get(key, (0, 0)) for report in reports)
    return [_share(accepted, rows) for rows, accepted in pairs]


def _keys(reports: Sequence[Report], name: str) -> list[str]:
    return list(dict.fromkeys(key for report in reversed(reports) for key in getattr(report, name)))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


def _lengths(words: Counter[int]) -> dict[str, float]:
    lengths = sorted(words.elements())  # small integers, shared: eight bytes a row
    if not lengths:
        return {}
    at = lambda q: lengths[min(len(lengths) - 1, int(q * len(lengths)))]
    mean = round(sum(lengths) / len(lengths), 1)
    return {"mean": mean, "min": lengths[0], "p10": at(0.1), "median": at(0.5), "p90": at(0.9), "max": lengths[-1]}
