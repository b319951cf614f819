"""The report's tables in their order, and as tables.md and tables.tex."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twice_rec.evaluation.claims import ARMS, CONTRADICTED, NOT_RUN, NOT_SHOWN, SHOWN, counts
from twice_rec.evaluation.domain_tables import (
    RULE_OVER_DOMAINS,
    claim_answer,
    claim_over_domains,
    claim_title,
    sheet_over_domains,
)
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
    spanned_to_latex,
)
from twice_rec.evaluation.tables import Table, lists_of
from twice_rec.evaluation.trials import is_simulated
from twice_rec.markdown import markdown_table
from twice_rec.records import RANKED_LISTS

INTRO = "Means over users with 95 % bootstrap intervals over users. Ties count against the target; every user counts."
RULE = (
    "A claim is shown if the 95 % interval of the paired difference lies on the claimed side of 0, contradicted if it "
    "lies on the other side, and not shown if it holds 0. Intervals are over users; seeds are averaged per user first. "
    "With several seeds the difference of each must lie on that side too; '2 of 3' says of how many seeds it does. "
    "p is corrected for the number of results by Holm's method."
)


_LONG = 14  # rows


@dataclass(frozen=True)
class Section:
    """One table with its heading: a sheet of variants, or plain rows."""

    id: str
    heading: str
    says: str
    sheet: Sheet | None = None
    rows: Table = ((), ())  # type: ignore[assignment]

    @property
    def folded(self) -> bool:
        """Whether the page shows it folded: a long table of one kind of list, which mostly repeats the first one."""
        return self.id.startswith("list-") and self.sheet is not None and len(self.sheet.rows) > _LONG


def sections_of(
    results: Mapping[str, Any], metric: str, domain: str, evidence: Evidence | None = None
) -> list[Section]:
    """Return the tables in their order; the shared users' table is of the metric's list. `Left out` is the last."""
    evidence = evidence or Evidence()
    kind, common = metric.partition("/")[0], results["common_users"]
    sections = list(_domains(results))
    if shared := sheet_of(common["variants"], kind, domain):
        says = f"The users that all of these variants share, {LISTS.get(kind, kind).lower()}. {shared.note}"
        sections.append(Section("same-users", "The same users for all", says, shared))
    if results["comparisons"]:
        says = f"{metric_with_list(metric)}, paired over users. Holm's p-values account for the number of comparisons."
        sections.append(Section("comparisons", "Comparisons", says, rows=comparison_rows(results["comparisons"])))
    for of_kind in lists_of(results["variants"]):
        if sheet := sheet_of(results["variants"], of_kind, domain):
            says = f"{RANKED_LISTS[of_kind]} Every variant on all users it was evaluated on. {sheet.note}".strip()
            sections.append(Section(f"list-{of_kind}", LISTS.get(of_kind, of_kind), says, sheet))
    sections += [*_recommended(results, kind), *_judged(evidence), *_clicks(evidence)]
    if results["left_out"]:
        says = "Not in these tables or comparisons, because it is stale or not equal to the rest."
        lines = [[line] for line in results["left_out"]]
        sections.append(Section("left-out", "Left out", says, rows=(["What and why"], lines)))
    return sections


def _domains(results: Mapping[str, Any]) -> Iterable[Section]:
    """Yield the table over domains, and the claim about all of them, once per ranking."""
    if not (found := results.get("domains")):
        return
    sheet = sheet_over_domains(found)
    kind = found["metrics"][0].partition("/")[0]
    says = (
        f"{LISTS.get(kind, kind)}. A domain's values are of the users that its variants share. A mean counts each "
        f"domain the same, and its interval combines theirs; a variant that lacks a domain has no mean. {sheet.note}"
    )
    yield Section("domains", "All domains", says, sheet)
    for claim in found["claims"]:
        says = f"{claim_answer(claim)} {metric_with_list(claim['metric'])}. {RULE_OVER_DOMAINS}"
        yield Section(f"domains-{claim['id']}", claim_title(claim), says, rows=claim_over_domains(claim))


def _recommended(results: Mapping[str, Any], kind: str) -> Iterable[Section]:
    """Yield the tables of what is recommended, and of how far the order of the candidates decides; see `groups`."""
    found = results.get("recommended") or {}
    rows = [
        [
            "The targets" if name == "targets" else variant_name(name),
            f"{of['coverage']:.3f}",
            f"{of['popularity']:,.1f}",
        ]
        for name, kinds in found.items()
        if (of := kinds.get("targets" if name == "targets" else kind))
    ]
    if rows:
        says = (
            f"{LISTS.get(kind, kind)}, {results['common_users']['n']:,} users: which share of the catalogue the items "
            "are that are ranked first, and the mean number of training interactions with them."
        )
        header = ["Variant", "Share of the catalogue", "Training interactions"]
        yield Section("recommended", "What is recommended", says, rows=(header, rows))
    orders = [
        [
            variant_name(name), str(of["k"]), f"{of['n']:,}", f"{of['changes']:.3f}", f"{of['choice_variance']:.3f}",
            f"{of['hr@1_std']:.4f}", f"{of['none']:.3f}",
        ]
        for name, of in (results.get("position") or {}).items()
        if "changes" in of
    ]  # fmt: skip
    if orders:
        says = (
            "Every question was asked with its candidates in several orders. Another choice: share of the questions "
            "with more than one first choice; variance: chance that two orders of a question choose differently; "
            "spread of HR@1: its standard deviation over orders."
        )
        header = ["Variant", "Orders", "Questions", "Another choice", "Variance", "Spread of HR@1", "No choice"]
        yield Section("orders", "The same question in other orders", says, rows=(header, orders))


def _judged(evidence: Evidence) -> Iterable[Section]:
    """Yield the tables of judges: what they said of each variant's rationales, and how far they agree."""
    rows = [
        [
            variant_name(variant), of.judge, _CONDITIONS.get(of.condition, of.condition.replace("_", " ")),
            "{:.3f} [{:.3f}, {:.3f}]".format(of.share["mean"], *of.share["ci95"]) if of.share else "-",
            "-" if of.chance is None else f"{of.chance:.3f}", f"{of.n:,}", f"{of.without_verdict:,}",
        ]
        for variant, judges in evidence.judged.items()
        for of in judges
    ]  # fmt: skip
    if rows:
        says = (
            f"Share of rationales with score 3 (the paper: {SATISFYING_SHARE:.4f}, by its own judge), of another "
            "user's rationales as a control, and how often a rationale alone points to its item among the candidates."
        )
        header = ["Rationales of", "Judge", "Asked for", "Share", "By chance", "Judged", "No verdict"]
        yield Section("judges", "Rationale quality", says, rows=(header, rows))
    pairs = [
        [
            variant_name(variant), f"{of['a']} and {of['b']}", of.get("condition", "").replace("_", " "),
            "-" if of.get("kappa") is None else f"{of['kappa']:.3f}",
            "[{:.3f}, {:.3f}]".format(*of["ci95"]) if of.get("ci95") else "-", f"{of.get('n', 0):,}",
        ]
        for variant, agreements in evidence.agreement.items()
        for of in agreements
    ]  # fmt: skip
    if pairs:
        header = ["Rationales of", "Judges", "Condition", "Quadratic kappa", "95 % interval", "Both judged"]
        yield Section("agreement", "Agreement of judges", "Of their scores, two by two.", rows=(header, pairs))


_CONDITIONS = {
    "item_shown": "score 3", "counterfactual": "score 3, another user's rationale", "item_hidden": "the hidden item",
}  # fmt: skip


def _clicks(evidence: Evidence) -> Iterable[Section]:
    """Yield the tables of the A/B test."""
    if not evidence.ab_test:
        return
    simulated = is_simulated(evidence.ab_test)
    name = "A/B test, simulated" if simulated else "A/B test"
    says = "A simulation on the synthetic domain's click model; no shopper was asked." if simulated else ""
    rows = []
    for of in evidence.ab_test.get("arms", []):
        papers = next((paper for paper, names in ARMS.items() if of["arm"] in names), "")
        latency, paper = (of.get("latency_ms") or {}).get("mean"), CLICKS.get(papers)
        rows.append(
            [
                variant_name(of["arm"]), f"{of['impressions']:,}", f"{of['clicks']:,}",
                "{:.4f} [{:.4f}, {:.4f}]".format(of["ctr"], *of["ci95"]), "-" if latency is None else f"{latency:,.1f}",
                f"{paper[0]:.4f}; {paper[1]} ms" if paper else "-",
            ]
        )  # fmt: skip
    header = ["Arm", "Impressions", "Clicks", "Click-through rate", "Milliseconds per call", "The paper, online"]
    yield Section("ab-test", name, says, rows=(header, rows))
    tests = [
        [
            f"{variant_name(test['a'])} less {variant_name(test['b'])}", f"{test['difference']:+.4f}",
            "[{:+.4f}, {:+.4f}]".format(*test["ci95"]),
            "[{:+.4f}, {:+.4f}]".format(*test["over_users"]["ci95"]) if "over_users" in test else "-",
            p_text(test.get("p")),
        ]
        for test in evidence.ab_test.get("comparisons", [])
    ]  # fmt: skip
    if tests:
        says = "Two-proportion tests, to be read once: who looks again and again finds differences that are not there."
        says += " The claims go by the interval over users: many visits of few users." if simulated else ""
        header = ["Difference of click-through rates", "Value", "95 %, over visits", "95 %, over users", "p of visits"]
        yield Section("ab-tests", f"{name}: differences", says, rows=(header, tests))


def answer_of(claims: Sequence[Mapping[str, Any]]) -> str:
    """Return the answer in a sentence, counted."""
    total = len({row["claim"] for row in claims})
    ran = len({row["claim"] for row in claims if row["verdict"] != NOT_RUN})
    if not ran:
        return f"This run tests none of {total} claims of the paper yet."
    number = counts(claims)
    ways = ", some in several ways" if len(claims) - number[NOT_RUN] > ran else ""
    return (
        f"This run tests {ran} of {total} claims of the paper{ways}: {number[SHOWN]} shown, "
        f"{number[NOT_SHOWN]} not shown, {number[CONTRADICTED]} contradicted. Differences between models are in "
        f"{metric_with_list(next(row['metric'] for row in claims))}."
    )


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
    packages = "booktabs,adjustbox" if results.get("domains") else "booktabs"
    parts = [f"% {' '.join(title.split())}. Needs \\usepackage{{{packages}}}."]
    if results.get("claims"):
        parts.append(rows_to_latex(*claim_rows(results["claims"]), "Claims of the paper", "claims"))
    for section in sections:
        caption = f"{section.heading}. {section.says}"
        if section.sheet and section.sheet.spans:
            parts.append(spanned_to_latex(section.sheet, caption, section.id))
        elif section.sheet:
            parts.append(sheet_to_latex(section.sheet, caption, section.id))
        elif section.id != "left-out":
            parts.append(rows_to_latex(*section.rows, caption, section.id))
    return "\n\n".join(parts) + "\n"
