"""The table over domains and the claim about all of them, as readers see them; see `domains`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from twice_rec.evaluation.claims import NOT_RUN, VERDICTS
from twice_rec.evaluation.names import (
    GROUPS,
    asked_name,
    domain_name,
    group_of,
    metric_name,
    metric_with_list,
    variant_name,
)
from twice_rec.evaluation.paper import table_1
from twice_rec.evaluation.sheets import Cell, Mark, Row, Sheet, marks_of, p_text
from twice_rec.evaluation.tables import Table
from twice_rec.markdown import markdown_table

RULE_OVER_DOMAINS = (
    "Each domain's verdict is that of its own report; p is corrected by Holm's method for the number of domains. The "
    "claim about all domains is shown if it is shown in each, and contradicted if one domain contradicts it with a "
    "corrected p of at most .05."
)

_MEAN = ""  # the place of the mean among the domains
Marks = Mapping[tuple[str, str], Mapping[str, Mark]]  # (domain, metric) -> variant -> mark


def sheet_over_domains(found: Mapping[str, Any]) -> Sheet:
    """Return the table: one row per variant, a group of columns per domain, and the mean over all of them."""
    domains, metrics, variants = [*found["domains"], *found["missing"]], found["metrics"], found["variants"]
    of_all = len(domains)
    marks = {(domain, key): _marks(variants, domain, key) for domain in (*domains, _MEAN) for key in metrics}
    seeds = {name: _seeds(row) for name, row in variants.items()}
    about = () if len(set(seeds.values())) == 1 else ("Seeds",)
    ways = Counter(asked_name(row["asked"]) for row in variants.values() if row.get("asked"))
    usual = max(ways, key=ways.__getitem__, default="")

    def row_of(name: str) -> Row:
        row = variants[name]
        cells = [_cell(row, name, domain, key, marks) for domain in domains for key in metrics]
        cells += [_mean_cell(row, name, domains, key, marks) for key in metrics]
        asked = asked_name(row.get("asked", ""))
        told = (seeds[name],) if about else ()
        return Row(variant_name(name), name, "" if asked == usual else asked, told, tuple(cells))

    grouped = ((group, tuple(row_of(name) for name in variants if group_of(name) == group)) for group in GROUPS)
    spans = [f"{domain_name(name)}, {found['users'][name]:,} users" for name in found["domains"]]
    spans += [f"{domain_name(name)}, no report" for name in found["missing"]]
    spans.append(f"Mean over {of_all} domains")
    columns = tuple(map(metric_name, metrics)) * len(spans)
    only = next(iter(seeds.values()))
    notes = [] if about else [f"{only} seed{'' if only == '1' else 's'}"]
    notes += [f"language models are asked by {usual}, unless said otherwise"] if len(ways) > 1 else []
    notes += [_same_data(found)] if found["same_data"] else []
    notes += ["bold: the best of a column; underlined: the second; ceilings take no part"]
    note = "; ".join(notes)
    shown = tuple((group, rows) for group, rows in grouped if rows)
    return Sheet(about, columns, shown, f"{note[:1].upper()}{note[1:]}.", tuple((s, len(metrics)) for s in spans))


def _same_data(found: Mapping[str, Any]) -> str:
    names = " and ".join(map(domain_name, found["same_data"]))
    return f"{names} have the same data under several names, so nothing has a mean"


def _seeds(row: Mapping[str, Any]) -> str:
    runs = sorted({of["runs"] for of in row["domains"].values()})
    return "-" if not runs else str(runs[0]) if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"


def _marks(variants: Mapping[str, Mapping[str, Any]], domain: str, key: str) -> dict[str, Mark]:
    values = {name: _value(row, domain, key) for name, row in variants.items()}
    return marks_of({name: value for name, value in values.items() if value is not None})


def _value(row: Mapping[str, Any], domain: str, key: str) -> float | None:
    if domain == _MEAN:
        return row["mean"][key]["mean"] if row["mean"] else None
    return row["domains"][domain]["metrics"][key] if domain in row["domains"] else None


def _cell(row: Mapping[str, Any], name: str, domain: str, key: str, marks: Marks) -> Cell:
    published = table_1(domain, name, key)
    paper = "" if published is None else f"{published:.4f}"
    value = _value(row, domain, key)
    if value is None:
        return Cell(row["absent"][domain], paper=paper)
    interval = "[{:.4f}, {:.4f}]".format(*row["domains"][domain]["ci95"][key])
    return Cell(f"{value:.4f}", interval, marks[domain, key].get(name, ""), paper)


def _mean_cell(row: Mapping[str, Any], name: str, domains: Sequence[str], key: str, marks: Marks) -> Cell:
    """The mean over all domains, or how many of them the variant lacks; the paper's if it has all of them."""
    published = [value for domain in domains if (value := table_1(domain, name, key)) is not None]
    paper = f"{sum(published) / len(published):.4f}" if len(published) == len(domains) else ""
    if row["mean"] is None:
        return Cell(f"lacks {len(row['absent'])} of {len(domains)}" if row["absent"] else "same data", paper=paper)
    of = row["mean"][key]
    return Cell(f"{of['mean']:.4f}", "[{:.4f}, {:.4f}]".format(*of["ci95"]), marks[_MEAN, key].get(name, ""), paper)


def claim_over_domains(claim: Mapping[str, Any]) -> Table:
    """Return header and rows of a claim: one row per domain, then what they say together."""
    rows = []
    for of in claim["domains"]:
        verdict = of["verdict"] if of["verdict"] != NOT_RUN or of["why"] == NOT_RUN else f"{NOT_RUN}: {of['why']}"
        numbers = ["-" if of[name] is None else f"{of[name]:,}" for name in ("n", "runs")]
        difference = _difference(of["difference"], of["ci95"])
        rows.append([domain_name(of["domain"]), verdict, *difference, p_text(of["p_holm"]) or "-", *numbers])
    rows.append([f"All {len(claim['domains'])} domains", claim["verdict"], *_difference(claim["mean"], claim["ci95"])])
    rows[-1] += ["-", "-", "-"]
    return ["Domain", "Here", "Difference", "95 % interval", "p (Holm)", "Users", "Seeds"], rows


def claim_answer(claim: Mapping[str, Any]) -> str:
    """Return the verdict about all domains in a sentence, with the number of domains of each verdict."""
    together = ", ".join(f"{claim['counts'][name]} {name}" for name in VERDICTS if claim["counts"][name])
    return f"In all {len(claim['domains'])} domains: {claim['verdict']} ({together})."


def claim_title(claim: Mapping[str, Any]) -> str:
    """Return what a claim about all domains is called."""
    return ", ".join(filter(None, [f"{claim['question']}, all domains: {claim['short']}", claim["way"]]))


def _difference(value: float | None, interval: Sequence[float] | None) -> list[str]:
    if value is None or interval is None:
        return ["-", "-"]
    return [f"{value:+.4f}", "[{:+.4f}, {:+.4f}]".format(*interval)]


def terminal_over_domains(found: Mapping[str, Any], metric: str) -> str:
    """Return what the terminal shows: one metric, without intervals, and the claims."""
    domains = [*found["domains"], *found["missing"]]
    key = metric if metric in found["metrics"] else found["metrics"][0]
    rows = []
    for name, row in found["variants"].items():
        cells = [_cell(row, name, domain, key, {(domain, key): {}}).text for domain in domains]
        rows.append([name, *cells, _mean_cell(row, name, domains, key, {(_MEAN, key): {}}).text])
    table = markdown_table(["variant", *domains, "mean"], rows)
    claims = [
        f"{claim_title(claim)}. {claim_answer(claim)}\n\n{markdown_table(*claim_over_domains(claim))}"
        for claim in found["claims"]
    ]
    note = f"{_same_data(found)}." if found["same_data"] else ""
    title = f"All domains, {metric_with_list(key)}:"
    return "\n\n".join(filter(None, [title, table, note, *claims]))
