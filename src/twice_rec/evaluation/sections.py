"""The report's tables in their order, and as tables.md and tables.tex."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twice_rec.evaluation.claims import CONTRADICTED, NOT_RUN, NOT_SHOWN, SHOWN, counts
from twice_rec.evaluation.evidence import Evidence
from twice_rec.evaluation.names import LISTS, metric_with_list, variant_name
from twice_rec.evaluation.paper import CLICKS, SATISFYING_SHARE
from twice_rec.evaluation.sheets import (
    Sheet,
    claim_rows,
    comparison_rows,
    p_text,
    rows_to_latex,
    sheet_of,
    sheet_to_latex,
    sheet_to_markdown,
)
from twice_rec.evaluation.tables import Table, lists_of
from twice_rec.markdown import markdown_table
from twice_rec.records import RANKED_LISTS

INTRO = "Means over users with 95 % bootstrap intervals over users. Ties count against the target; every user counts."
_MARKED = "Bold: the best of a column; underlined: the second; ceilings take no part."
RULE = (
    "A claim is shown if the 95 % interval of the paired difference lies on the claimed side of 0, contradicted if it "
    "lies on the other side, and not shown if it holds 0. Intervals are over users; seeds are averaged per user first."
)


@dataclass(frozen=True)
class Section:
    """One table with its heading: a sheet of variants, or plain rows."""

    id: str
    heading: str
    says: str
    sheet: Sheet | None = None
    rows: Table = ((), ())  # type: ignore[assignment]


def sections_of(
    results: Mapping[str, Any], metric: str, domain: str, evidence: Evidence | None = None
) -> list[Section]:
    """Return the tables in their order; the shared users' table is of the metric's list. `Left out` is the last."""
    evidence = evidence or Evidence()
    kind, common = metric.partition("/")[0], results["common_users"]
    sections = []
    if shared := sheet_of(common["variants"], kind, domain):
        says = f"The {common['n']:,} users that all of these variants share, {LISTS.get(kind, kind).lower()}. {_MARKED}"
        sections.append(Section("same-users", "The same users for all", says, shared))
    if results["comparisons"]:
        says = f"{metric_with_list(metric)}, paired over users. Holm's p-values account for the number of comparisons."
        sections.append(Section("comparisons", "Comparisons", says, rows=comparison_rows(results["comparisons"])))
    for of_kind in lists_of(results["variants"]):
        says = f"{RANKED_LISTS[of_kind]} Every variant on all users it was evaluated on."
        heading = LISTS.get(of_kind, of_kind)
        sections.append(Section(f"list-{of_kind}", heading, says, sheet_of(results["variants"], of_kind, domain)))
    sections += [*_recommended(results), *_judged(evidence), *_clicks(evidence)]
    if results["left_out"]:
        says = "Not in these tables or comparisons, because it is stale or not equal to the rest."
        lines = [[line] for line in results["left_out"]]
        sections.append(Section("left-out", "Left out", says, rows=(["What and why"], lines)))
    return sections


def _recommended(results: Mapping[str, Any]) -> Iterable[Section]:
    """Yield the table of what is recommended, whatever was measured of it."""
    found = results.get("recommended") or {}
    keys = list(dict.fromkeys(key for row in found.values() for key, value in row.items() if _is_number(value)))
    if keys:
        rows = [
            [variant_name(name), *(f"{row[key]:.4g}" if _is_number(row.get(key)) else "-" for key in keys)]
            for name, row in found.items()
        ]
        header = ["Variant", *(key.replace("_", " ").capitalize() for key in keys)]
        yield Section("recommended", "What is recommended", "Of the items that are ranked first.", rows=(header, rows))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _judged(evidence: Evidence) -> Iterable[Section]:
    """Yield the table of judges: satisfying rationales, and whether a rationale alone points to its item."""
    rows = []
    for variant, scores in evidence.judged.items():
        for judge, conditions in scores.get("judges", {}).items():
            of = {name: conditions.get(name) or {} for name in ("item_shown", "counterfactual", "item_hidden")}
            chance = of["item_hidden"].get("chance")
            rows.append(
                [
                    variant_name(variant), judge, _share(of["item_shown"].get("share3")),
                    _share(of["counterfactual"].get("share3")), _share(of["item_hidden"].get("share")),
                    "-" if chance is None else f"{chance:.3f}", str(of["item_shown"].get("n", "-")),
                    str(of["item_shown"].get("no_verdict", "-")),
                ]
            )  # fmt: skip
    if rows:
        says = (
            f"Share of rationales with score 3 (the paper: {SATISFYING_SHARE:.4f}, by its own judge), of another "
            "user's rationales as a control, and how often the rationale alone points to its item among the candidates."
        )
        header = ["Rationales of", "Judge", "Score 3", "Another user's", "Points to its item", "By chance", "Judged"]
        yield Section("judges", "Rationale quality", says, rows=([*header, "No verdict"], rows))


def _share(value: Mapping[str, Any] | None) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(value["mean"], *value["ci95"]) if value else "-"


_PAPERS_ARMS = {"random": "random", "sasrec": "ML", "ml": "ML", "stage3": "full", "full": "full", "twice_rec": "full"}


def _clicks(evidence: Evidence) -> Iterable[Section]:
    """Yield the tables of the A/B test."""
    if not evidence.ab_test:
        return
    simulated = evidence.ab_test.get("simulation", True)
    what = "A simulation on the synthetic domain's click model; no shopper was asked." if simulated else ""
    rows = []
    for arm, of in evidence.ab_test.get("arms", {}).items():
        interval = " [{:.4f}, {:.4f}]".format(*of["ci95"]) if of.get("ci95") else ""
        paper = CLICKS.get(_PAPERS_ARMS.get(arm.lower(), ""))
        latency = of.get("latency_ms")
        rows.append(
            [
                variant_name(arm), f"{of.get('impressions', 0):,}", f"{of.get('clicks', 0):,}",
                f"{of.get('ctr', 0):.4f}{interval}", "-" if latency is None else f"{latency:,.0f}",
                f"{paper[0]:.4f}; {paper[1]} ms" if paper else "-",
            ]
        )  # fmt: skip
    header = ["Arm", "Impressions", "Clicks", "Click-through rate", "Milliseconds per call", "The paper, online"]
    name = "A/B test, simulated" if simulated else "A/B test"
    yield Section("ab-test", name, what, rows=(header, rows))
    tests = [
        [
            f"{variant_name(test['a'])} less {variant_name(test['b'])}", f"{test['difference']:+.4f}",
            "[{:+.4f}, {:+.4f}]".format(*test["ci95"]), p_text(test.get("p")),
        ]
        for test in evidence.ab_test.get("tests", [])
    ]  # fmt: skip
    if tests:
        header = ["Difference of click-through rates", "Value", "95 % interval", "p"]
        yield Section("ab-tests", f"{name}: differences", "Two-proportion tests.", rows=(header, tests))


def answer_of(claims: Sequence[Mapping[str, Any]]) -> str:
    """Return the answer in a sentence, counted."""
    number = counts(claims)
    parts = [f"{number[name]} {name}" for name in (SHOWN, NOT_SHOWN, CONTRADICTED, NOT_RUN)]
    return f"Of {len(claims)} claims of the paper, this run finds: {', '.join(parts)}."


def markdown_page(title: str, results: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Return tables.md."""
    parts = [f"# {title}\n\n{answer_of(results.get('claims', []))}\n\n{INTRO}"]
    if results.get("claims"):
        parts.append(f"## Claims\n\n{RULE}\n\n{markdown_table(*claim_rows(results['claims']))}")
    for section in sections:
        header, rows = section.rows
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        table = sheet_to_markdown(section.sheet) if section.sheet else markdown_table(header, escaped)
        parts.append(f"## {section.heading}\n\n{section.says}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def latex_page(title: str, results: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Return tables.tex: tables that a document reads as input, with booktabs."""
    parts = [f"% {' '.join(title.split())}. Needs \\usepackage{{booktabs}}."]
    if results.get("claims"):
        parts.append(rows_to_latex(*claim_rows(results["claims"]), "Claims of the paper", "claims"))
    for section in sections:
        caption = f"{section.heading}. {section.says}"
        if section.sheet:
            parts.append(sheet_to_latex(section.sheet, caption, section.id))
        elif section.id != "left-out":
            parts.append(rows_to_latex(*section.rows, caption, section.id))
    return "\n\n".join(parts) + "\n"
