"""What curation did to a set of rationales, in figures: acceptance, lengths, evidence, leaks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.files import read_json, write_json, write_text
from twice_rec.markdown import markdown_table
from twice_rec.rationales.leaks import LEAKS, leaks_of

_LEAKS = {**LEAKS, "any": "any of these"}  # key of a report -> what tables call it


@dataclass(frozen=True, slots=True)
class Judged:
    """An example after curation: its rationale, and why that is rejected.

    Args:
        reason: empty if the rationale is accepted.
        text: empty if there is no rationale; then the fields after it are empty too.
    """

    user_id: str
    target: str
    reason: str = ""
    text: str = ""
    verdict: str = ""
    evidence: tuple[int, ...] = ()
    confidence: float | None = None
    annotator: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one set of rationales. Shares are fractions of 1; pairs are [rows, accepted rows].

    Args:
        rows: annotated examples, with a rationale or without.
        reasons: why rows were rejected -> rows.
        words: of accepted rationales: mean, min, p10, median, p90, max.
        evidence: of all rationales: mean number of past interactions cited, their mean share of the history, the share
            of rationales citing none, and of those citing the most recent one.
        leaks: share of accepted rationales that give something away of the target; `leaks_all` is over all rationales.
    """

    label: str
    rows: int
    accepted: int
    reasons: dict[str, int]
    verdicts: dict[str, list[int]]
    categories: dict[str, list[int]]
    words: dict[str, float]
    evidence: dict[str, float]
    leaks: dict[str, float]
    leaks_all: dict[str, float]


class Tally:
    """Counts rows one by one; its size depends on the numbers of categories and lengths, not of rows."""

    def __init__(self, catalog: ItemCatalog, label: str):
        self._catalog, self._label = catalog, label
        self._reasons, self._words = Counter[str](), Counter[int]()
        self._rows = [0, 0]  # all, accepted
        self._verdicts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._categories: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._leaks = {True: Counter[str](), False: Counter[str]()}  # accepted? -> leak -> rationales; "text" for all
        self._evidence = [0, 0, 0.0, 0, 0]  # rationales, citations, shares of histories, none cited, last cited

    def count_evidence(self, evidence: Sequence[int], history_length: int) -> None:
        """Count the evidence of one rationale, given as positions in the history."""
        one = (1, len(evidence), len(evidence) / history_length, not evidence, history_length - 1 in evidence)
        self._evidence = [total + value for total, value in zip(self._evidence, one, strict=True)]

    def count(self, row: Judged) -> Judged:
        """Count one row, and return it."""
        accepted, target = not row.reason, self._catalog[row.target]
        category = target.categories[-1] if target.categories else "(none)"
        for pair in (self._rows, self._verdicts[row.verdict or "(no answer)"], self._categories[category]):
            pair[0] += 1
            pair[1] += accepted
        if accepted:
            self._words[len(row.text.split())] += 1
        else:
            self._reasons[row.reason.partition(":")[0]] += 1
        if row.text:
            found = leaks_of(row.text, target)
            self._leaks[accepted].update(["text", *found, "any"] if found else ["text"])
        return row

    def report(self) -> Report:
        """Return the figures of everything counted."""
        rationales, cited, shares, none, last = self._evidence
        return Report(
            label=self._label,
            rows=self._rows[0],
            accepted=self._rows[1],
            reasons=dict(self._reasons.most_common()),
            verdicts=dict(sorted(self._verdicts.items())),
            categories=dict(sorted(self._categories.items(), key=lambda category: -category[1][0])),
            words=_lengths(self._words),
            evidence={
                "purchases_cited": _share(cited, rationales),
                "share_of_history": _share(shares, rationales),
                "none_cited": _share(none, rationales),
                "most_recent_cited": _share(last, rationales),
            },
            leaks=_leak_shares(self._leaks[True]),
            leaks_all=_leak_shares(self._leaks[True] + self._leaks[False]),
        )


def save_report(report: Report, other: Report | None, folder: Path) -> list[Path]:
    """Write `report.json` and `report.md`; with `other`, the second shows its figures too. Return both paths."""
    paths = [folder / "report.json", folder / "report.md"]
    write_json(paths[0], asdict(report))
    write_text(paths[1], to_markdown(report, other))
    return paths


def load_report(folder: Path) -> Report:
    """Read `report.json` of a folder of rationales.

    Raises:
        InputError: if there is none, or one of another version.
    """
    path = folder / "report.json"
    row = read_json(path)
    names = {field.name for field in fields(Report)}
    if not isinstance(row, dict) or row.keys() != names:
        raise InputError(f"{path}: expected the keys {', '.join(sorted(names))}; run rationales.sh again")
    return Report(**row)


def to_markdown(report: Report, other: Report | None = None) -> str:
    """Return the tables; with `other`, its figures come first, and a last column has the change from them."""
    both = [report] if other is None else [other, report]
    lines = [f"# Rationales: {report.label}", "", *([f"Beside: {other.label}", ""] if other else [])]
    header = ["", *(r.label for r in both), *(["change"] if other else [])]

    def table(title: str, rows: Mapping[str, Sequence[float]], decimals: int = 3) -> None:
        cells = []
        for name, values in rows.items():
            change = [f"{values[1] - values[0]:+,.{decimals}f}"] if other else []
            cells.append([name, *(f"{value:,.{decimals}f}" for value in values), *change])
        lines.extend([f"## {title}", "", markdown_table(header, cells), ""])

    def column(name: str, keys: Iterable[str]) -> dict[str, list[float]]:
        return {_LEAKS.get(key, key): [getattr(r, name).get(key, 0) for r in both] for key in keys}

    table("Rows", {name: [getattr(r, name) for r in both] for name in ("rows", "accepted")}, decimals=0)
    table("Share accepted", {"all": [_share(r.accepted, r.rows) for r in both]})
    table("Why rows were dropped", column("reasons", _keys(both, "reasons")), decimals=0)
    table("Share accepted by verdict", _shares(both, "verdicts"))
    table("Share accepted by category, the ten largest", _shares(both, "categories"))
    table("Words of accepted rationales", column("words", report.words))
    table("Evidence", column("evidence", report.evidence))
    table("Leaks: share of accepted rationales that give the target away", column("leaks", _LEAKS))
    table("Leaks: share of all rationales", column("leaks_all", _LEAKS))
    return "\n".join(lines).rstrip() + "\n"


def _shares(reports: Sequence[Report], name: str) -> dict[str, list[float]]:
    """Return the shares accepted of the first ten keys of a field of pairs; rows are counted in the last report."""
    rows = {}
    for key in _keys(reports, name)[:10]:
        pairs = [getattr(report, name).get(key, (0, 0)) for report in reports]
        rows[f"{key} ({pairs[-1][0]:,} rows)"] = [_share(accepted, of) for of, accepted in pairs]
    return rows


def _keys(reports: Sequence[Report], name: str) -> list[str]:
    return list(dict.fromkeys(key for report in reversed(reports) for key in getattr(report, name)))


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


def _leak_shares(counts: Counter[str]) -> dict[str, float]:
    return {name: _share(counts[name], counts["text"]) for name in _LEAKS}


def _lengths(words: Counter[int]) -> dict[str, float]:
    lengths = sorted(words.elements())  # small integers, shared: eight bytes each
    if not lengths:
        return {}
    at = lambda q: lengths[min(len(lengths) - 1, int(q * len(lengths)))]
    mean = round(sum(lengths) / len(lengths), 1)
    return {"mean": mean, "min": lengths[0], "p10": at(0.1), "median": at(0.5), "p90": at(0.9), "max": lengths[-1]}
