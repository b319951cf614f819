"""Stage 5: everything under eval/ -> report/ (index.html, tables.md, tables.tex, results.json, figures/), and shown.

The page opens with the paper's claims and their verdicts. Beside eval/ it reads what the run has of training logs, the
CF model, judges and the A/B test. Made anew whenever it is called: it only sums up what the other stages measured, and
shows what of the run is fresh, stale or missing. Runs of other seeds are averaged, user by user. Stale results are left
out. With reports of other domains, it has the table over all domains.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from twice_rec.data.dataset import CATALOG, PreparedData
from twice_rec.evaluation.claims import claims_of
from twice_rec.evaluation.domains import check_reports, domains_of, read_own, read_reports, settings_of
from twice_rec.evaluation.evidence import Sources, gather
from twice_rec.evaluation.groups import details_of
from twice_rec.evaluation.page import save_report, show_report
from twice_rec.evaluation.predictions import PREDICTIONS
from twice_rec.evaluation.quotation import quotation
from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.report import results_of
from twice_rec.files import write_json
from twice_rec.manifest import Hashes
from twice_rec.run import StageRun
from twice_rec.stages.command_line import command
from twice_rec.stages.status import show_status

logger = logging.getLogger("report")


def report(recipe: ReportRecipe) -> None:
    """Sum up the run."""
    runs = list(dict.fromkeys([recipe.run_path, *map(Path, recipe.other_runs)]))  # one that is named twice counts once
    others = read_reports(recipe.domain_reports)
    variants, left_out = read_own(runs, others)
    data = PreparedData(runs[0] / "data")
    settings = settings_of(variants, data, recipe)
    check_reports(settings if variants else None, others, recipe)
    evaluations = [terms.folder for variant in variants.values() for terms in variant.terms]
    hashes = Hashes()
    sources = Sources(recipe, variants, hashes)
    inputs = [*(folder / PREDICTIONS for folder in evaluations), *sources.paths, *(other.path for other in others)]
    with StageRun(recipe, "report", "report", inputs) as run:
        run.end_check()
        results = results_of(variants, recipe, [*left_out, *sources.lines])
        results["claims"] = claims_of(variants, recipe, hashes)
        results["settings"] = settings
        if (data.folder / CATALOG).exists():
            results |= details_of(variants, data, recipe)
        if others or recipe.missing_domains:
            results["domains"] = domains_of(results, others, recipe)
        evidence = gather(recipe, variants, sources)
        run.finish(save_report(run.path, results, evidence, recipe, evaluations), {"left_out": results["left_out"]})
        if recipe.quote is not None:
            write_json(Path(recipe.quote).expanduser(), quotation(results, runs, recipe.domain))
    show_status(recipe.run_path)
    show_report(results, recipe.comparison_metric)
    logger.info("with intervals and all lists: %s", run.path / "index.html")


main = command("report", ReportRecipe, report)

if __name__ == "__main__":
    sys.exit(main())
