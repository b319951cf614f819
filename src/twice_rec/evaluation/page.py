"""The report's page, tables and files: index.html, tables.md, tables.tex, results.json, figures/.

The page is one file without an address outside it. It opens with the claims; a figure or section is there only if its
data is, and what is not there is named with the command that makes it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twice_rec.evaluation import figures
from twice_rec.evaluation.claims import NOT_RUN
from twice_rec.evaluation.domain_tables import terminal_over_domains
from twice_rec.evaluation.drawing import Chart, save
from twice_rec.evaluation.evidence import Evidence
from twice_rec.evaluation.names import metric_with_list, variant_name
from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.sections import INTRO, RULE, Section, answer_of, latex_page, markdown_page, sections_of
from twice_rec.evaluation.sheets import claim_rows, p_text
from twice_rec.evaluation.tables import Table, list_table, show
from twice_rec.files import MANIFEST, hash_file, write_json, write_text
from twice_rec.locks import run_folder
from twice_rec.manifest import environment, making_command
from twice_rec.markdown import markdown_table

logger = logging.getLogger(__name__)


def charts_of(results: Mapping[str, Any], evidence: Evidence, metric: str) -> list[tuple[Chart | None, str, str]]:
    """Return every figure, or None, with what it is called and the stage that makes its data."""
    return [
        (figures.stages(results, metric), "figure of stages A to E", "study"),
        (figures.lambdas(results, metric), "figure of lambda 0 to 5", "study"),
        (figures.rationales(results, metric), "figure of rationales on and off", "study"),
        (figures.judged(evidence.judged), "figure of rationale quality", "judge"),
        (figures.training(evidence.curves), "training curves of stage 3", "grpo"),
        (figures.calibration(evidence.calibration), "calibration of the CF confidence", "sasrec"),
        (figures.by_group(results, metric, "history_length"), "hits by history length", "report"),
        (figures.by_group(results, metric, "target_popularity"), "hits by popularity of the target", "report"),
        (figures.position(results, evidence.places), "position in the list", "evaluate"),
    ]


def absent_of(
    results: Mapping[str, Any], evidence: Evidence, charts: Sequence[tuple[Chart | None, str, str]], run_dir: Path
) -> list[tuple[list[str], str, str]]:
    """Return what was not run yet: what is missing together, the command that makes it, or else why it is missing."""
    by_command: dict[str, list[str]] = {}
    by_reason: dict[str, list[str]] = {}
    for row in results.get("claims", []):
        if row["verdict"] == NOT_RUN:
            name = f"{row['question']}: {row['short']}"
            for command in row["commands"]:
                by_command.setdefault(command, []).append(name)
            if not row["commands"]:
                by_reason.setdefault(row["why"], []).append(name)
    others = [(what, stage) for chart, what, stage in charts if chart is None]
    others += [] if evidence.browser else [("browser of users", "evaluate")]
    for what, stage in others:
        by_command.setdefault(making_command(run_dir, stage), []).append(what)
    absent = [(what, command, "") for command, what in by_command.items()]
    return absent + [(what, "", why) for why, what in by_reason.items()]


def claims_shown(claims: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the claims that were run, with one or more results each; bars of one metric have one scale."""
    ran = [row for row in claims if row["verdict"] != NOT_RUN]
    widest: dict[str, float] = {}
    for row in ran:
        widest[row["metric"]] = max(widest.get(row["metric"], 1e-9), *(abs(bound) for bound in row["ci95"]))
    shown: dict[str, dict[str, Any]] = {}
    for row in ran:
        low, high = row["ci95"]
        result = {
            **row, "value": signed(row["difference"]), "interval": f"[{signed(low)}, {signed(high)}]",
            "facts": _facts(row),
            "bar": {
                name: round(100 + 92 * value / widest[row["metric"]], 1)
                for name, value in (("low", low), ("high", high), ("mean", row["difference"]))
            },
        }  # fmt: skip
        claim = {"question": row["question"], "says": row["says"], "compared": _compared(row), "results": []}
        shown.setdefault(row["claim"], claim)["results"].append(result)
    return list(shown.values())


def signed(value: float) -> str:
    """Return a difference with its sign, a true minus."""
    return f"{value:+.4f}".replace("-", "\u2212")


def _compared(row: Mapping[str, Any]) -> str:
    if row.get("paper") is not None:
        return f"{variant_name(row['a'])} less the paper's {row['paper']:.4f}"
    metric = "click-through rate" if row["metric"] == "ctr" else metric_with_list(row["metric"])
    return f"{variant_name(row['a'])} less {variant_name(row['b'])}; {metric}"


def _facts(row: Mapping[str, Any]) -> str:
    """Return what stands beside a result: value, numbers, p."""
    what = "rationales" if row["metric"] == "judge/share_3" else row.get("counted", "users")
    facts = [f"{row['value']:.4f} here"] if row.get("value") is not None else []
    facts += [] if row["n"] is None else [f"{row['n']:,} {what}"]
    seeds = [f"{row['runs']} seed{'' if row['runs'] == 1 else 's'}"]
    facts += seeds if what == "users" and row["metric"] != "ctr" else []
    facts += [f"p {p_text(row['p_holm'])}"] if row.get("p_holm") is not None else []
    return ", ".join(facts)


def save_report(
    folder: Path, results: Mapping[str, Any], evidence: Evidence, recipe: ReportRecipe, evaluations: Sequence[Path]
) -> list[Path]:
    """Write everything, each with what it was made of; return the files."""
    about, metric = environment(), recipe.comparison_metric
    made_of = {str(path / MANIFEST): hash_file(path / MANIFEST) for path in evaluations}
    manifest = {"domain": recipe.domain, "evaluations": made_of, **about}
    write_json(folder / "results.json", {**results, "manifest": manifest})
    title = f"TWiCE-Rec on {recipe.domain}"
    sections = sections_of(results, metric, recipe.domain, evidence)
    charts = charts_of(results, evidence, metric)
    drawn, files = [], []
    for chart in (chart for chart, _, _ in charts if chart is not None):
        svg, of_chart = save(chart, folder / "figures")
        drawn.append((chart, svg))
        files += of_chart
    _remove_old(folder / "figures", files)
    facts = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "run": ", ".join(dict.fromkeys(str(run_folder(path)) for path in evaluations)),
        "commit": str(about["commit"]),
        "python": about["python"],
        "packages": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
    }
    absent = absent_of(results, evidence, charts, recipe.run_path)
    write_text(folder / "index.html", html_page(title, results, sections, drawn, absent, evidence.browser, facts))
    write_text(folder / "tables.md", markdown_page(title, results, sections))
    write_text(folder / "tables.tex", latex_page(title, results, sections))
    return [folder / name for name in ("index.html", "tables.md", "tables.tex", "results.json")] + files


def _remove_old(folder: Path, files: Sequence[Path]) -> None:
    """Remove figures of an earlier report that this one does not have."""
    for path in [*folder.glob("*.png"), *folder.glob("*.pdf")]:
        if path not in files:
            path.unlink()


def html_page(
    title: str,
    results: Mapping[str, Any],
    sections: Sequence[Section],
    drawn: Sequence[tuple[Chart, str]],
    absent: Sequence[tuple[Sequence[str], str, str]],
    browser: Mapping[str, Any] | None,
    facts: Mapping[str, str],
) -> str:
    """Return the page. Every text is escaped by the template, but for the figures, which `drawing` has escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("twice_rec.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    tables = [section for section in sections if section.id != "left-out"]
    contents = [("answer", "Claims"), *([("not-run", "Not run yet")] if absent else [])]
    contents += [*([("domains", "All domains")] if results.get("domains") else []), ("tables", "Tables")]
    contents += [("figures", "Figures")] if drawn else []
    contents += [("users", "Users")] if browser else []
    contents += [("left-out", "Left out")] if results["left_out"] else []
    text = environment.get_template("page.html").render(
        title=title, answer=answer_of(results.get("claims", [])), rule=RULE, intro=INTRO,
        claims=claims_shown(results.get("claims", [])), absent=absent, sections=tables,
        figures=drawn, left_out=results["left_out"], facts=facts,
        contents=[*contents, ("made", "How this was made")],
        users=json_in_html(browser) if browser else None, users_say=_users_say(browser) if browser else "",
    )  # fmt: skip
    return text.strip() + "\n"


def json_in_html(value: object) -> str:
    """Return JSON that can be put into a page: nothing in it ends or begins an element or a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _users_say(browser: Mapping[str, Any]) -> str:
    says = f"{len(browser['users'])} of the users that all language models were asked about, drawn at random."
    if browser["rewards"]:
        says += " Rewards are those of stage 3 in this run, computed for the completion that is shown."
    return says


def show_report(results: Mapping[str, Any], metric: str) -> None:
    """Print the shared users' table, without intervals, the comparisons and the claims; log what is left out."""
    common = results["common_users"]
    table = list_table(common["variants"], metric.partition("/")[0])
    if table[1]:
        which = "all variants" if len(common["variants"]) == len(results["variants"]) else "these variants"
        show(f"The {common['n']:,} users that {which} share:\n\n{markdown_table(*table)}")
    if results["comparisons"]:
        show(markdown_table(*comparison_table(results["comparisons"])))
    for line in results["left_out"]:
        logger.warning("%s", line)
    if results.get("domains"):
        show(terminal_over_domains(results["domains"], metric))
    if results.get("claims"):
        show(f"{answer_of(results['claims'])}\n\n{markdown_table(*claim_rows(results['claims']))}")


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of paired comparisons for the terminal, with the short names."""
    rows = []
    for c in comparisons:
        interval = "[{:+.4f}, {:+.4f}]".format(*c["ci95"])
        difference = f"{c['difference']:+.4f}"
        p = [f"{c['p']:.3f}", f"{c['p_holm']:.3f}"]
        rows.append([f"{c['a']} - {c['b']}", c["metric"], f"{c['n']:,}", difference, interval, *p])
    return ["comparison", "metric", "users", "difference", "95 % interval", "p", "p (Holm)"], rows
