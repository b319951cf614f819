"""Stage 5: everything under eval/ -> report/ (index.html, tables.md, results.json), and the tables on the terminal.

Made anew whenever it is called: it only sums up what the other stages measured. Runs of other seeds are averaged, user
by user.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.report import read_variants, results_of, save_report, show_report
from twice_rec.stages.command_line import command

logger = logging.getLogger("report")


def report(recipe: ReportRecipe) -> None:
    """Sum up the run."""
    runs = list(dict.fromkeys([recipe.run_path, *map(Path, recipe.other_runs)]))  # one that is named twice counts once
    results = results_of(read_variants(runs), recipe)
    folder = recipe.run_path / "report"
    save_report(folder, results, recipe, runs)
    show_report(results, recipe.comparison_metric)
    logger.info("with intervals and all lists: %s", folder / "index.html")


main = command("report", ReportRecipe, report)

if __name__ == "__main__":
    sys.exit(main())
