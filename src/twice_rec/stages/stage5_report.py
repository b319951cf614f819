"""Stage 5: everything under eval/ -> report/ (index.html, tables.md, results.json), and the tables on the terminal.

Made anew whenever it is called: it only sums up what the other stages measured. Runs of other seeds are averaged, user
by user. Two views are given: every variant on all its users, and all variants on the users they share, since language
models may answer for fewer users.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from twice_rec.config import ReportRecipe, load_recipe
from twice_rec.evaluation import report as page
from twice_rec.evaluation.tables import columns_of, show
from twice_rec.files import MANIFEST, hash_file, write_json, write_text
from twice_rec.markdown import markdown_table
from twice_rec.run import environment
from twice_rec.stages.command_line import run_stage

logger = logging.getLogger("report")


def report(recipe: ReportRecipe) -> None:
    """Sum up the run."""
    runs = list(dict.fromkeys([recipe.run_path, *map(Path, recipe.other_runs)]))  # one that is named twice counts once
    variants = page.read_variants(runs)
    summary = page.summarise_variants(variants, None, recipe.bootstrap_samples)
    shared = page.common_users(variants)
    common = page.summarise_variants(variants, shared, recipe.bootstrap_samples) if shared else {}
    comparisons = []
    for a, b in recipe.comparisons:
        if missing := [name for name in (a, b) if name not in variants]:
            logger.warning("%s - %s left out: %s is not evaluated; %s are", a, b, missing[0], ", ".join(variants))
            continue
        comparisons.append(page.compare(variants, a, b, recipe.comparison_metric, recipe.bootstrap_samples))
    folder, about = recipe.run_path / "report", environment()
    made_of = {str(path): hash_file(path) for run in runs for path in sorted((run / "eval").glob(f"*/{MANIFEST}"))}
    write_json(
        folder / "results.json",
        {
            "variants": summary,
            "common_users": {"n": len(shared), "variants": common},
            "comparisons": comparisons,
            "manifest": {"domain": recipe.domain, "evaluations": made_of, **about},
        },
    )
    kinds = dict.fromkeys(
        key.partition("/")[0] for key in columns_of({n: row["metrics"] for n, row in summary.items()})
    )
    sections = [
        (
            f"Lists: {kind}",
            _ABOUT_LISTS[kind] + " Every variant on all users it was evaluated on.",
            page.interval_table(summary, kind),
        )
        for kind in kinds
    ]
    shared_table = page.interval_table(common, recipe.comparison_metric.partition("/")[0])
    if shared_table[1]:
        sections.insert(
            0, ("The same users for all", f"The {len(shared):,} users that all variants share.", shared_table)
        )
    if comparisons:
        sections.insert(1, ("Comparisons", "Paired over users.", page.comparison_table(comparisons)))
    intro = (
        "Means over users with 95 % bootstrap intervals over users. Ties count against the target; every user counts."
    )
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = {"made": now, "run": ", ".join(map(str, runs)), "commit": str(about["commit"]), "python": about["python"]}
    facts |= {"packages": ", ".join(f"{name} {version}" for name, version in about["versions"].items())}
    title = f"TWiCE-Rec on {recipe.domain}"
    write_text(folder / "index.html", page.html_page(title, intro, sections, facts))
    text = "\n\n".join(
        f"## {heading}\n\n{sentence}\n\n{markdown_table(*table)}" for heading, sentence, table in sections
    )
    write_text(folder / "tables.md", f"# {title}\n\n{intro}\n\n{text}\n")
    compact = [[row[0], row[1], *(cell.partition(" ")[0] for cell in row[3:])] for row in shared_table[1]]
    if compact:
        show(
            f"The {len(shared):,} users that all variants share:\n\n"
            + markdown_table(["variant", "users", *shared_table[0][3:]], compact)
        )
    if comparisons:
        show(markdown_table(*page.comparison_table(comparisons)))
    logger.info("with intervals and all lists: %s", folder / "index.html")


_ABOUT_LISTS = {
    "uniform": "The target among uniformly drawn items.",
    "popularity": "The target among items drawn in proportion to their training popularity.",
    "hard": "The target among items that item-kNN scores highest for the user.",
    "full": "The target among the whole catalogue without the user's earlier items.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage(
        "report", ReportRecipe, lambda path, flags: load_recipe(path, ReportRecipe, flags), report, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
