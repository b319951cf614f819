"""Stage 6: many runs of the other stages as one plan -> run_dir and <run_dir>_seedN, study/ (logs, study.json).

The recipe names the runs: the variants of RQ3, RQ4 and RQ6 and the improved rewards, over several seeds and domains.
What is equal for all seeds is done once and linked. As many processes run at once as there are GPUs or cores. A run
that fails ends nothing but what waits for it. Every stage skips what is finished, so the same command goes on. Of
several domains, the first one's report comes last and has the table over all of them.

Limits: one machine, and one GPU per training (rollout servers have their own); larger ones are started by hand.
"""

from __future__ import annotations

import contextlib
import logging
import sys

from twice_rec.errors import Unfinished
from twice_rec.evaluation.tables import show
from twice_rec.locks import writing
from twice_rec.run import StageRun
from twice_rec.stages.command_line import command
from twice_rec.study.expected import expected_of
from twice_rec.study.places import Places
from twice_rec.study.plan import make_plan
from twice_rec.study.recipe import StudyRecipe
from twice_rec.study.runner import GOOD, Runner
from twice_rec.study.tables import plan_table, result_table

logger = logging.getLogger("study")


def study(recipe: StudyRecipe) -> None:
    """Run the plan; Unfinished if a run failed or was skipped."""
    runs, places = make_plan(recipe), Places.of_machine(recipe)
    places.check(runs)
    StageRun.end_check()
    show(plan_table(runs, expected_of(runs, recipe), places))
    folder = recipe.run_path / "study"
    with writing(folder):
        runner = Runner(runs, places, folder)
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: show(result_table(runner.rows)))
            rows = runner.run()
    for row in rows:
        if row.run.sums_up and row.state in GOOD:
            logger.info("all domains in one table: %s#domains", row.run.makes[0] / "index.html")
    failed = [row for row in rows if row.state not in GOOD]
    if failed:
        raise Unfinished(
            f"{len(failed)} of {len(rows)} runs are not done, the first of them {failed[0].run.name}; its log is "
            f"{failed[0].log}. The same command runs what is missing"
        )
    reports = [str(path / "index.html") for row in rows if row.run.reports_on for path in row.run.makes]
    logger.info("%d runs done; %s", len(rows), ", ".join(reports) or folder)


def plan(recipe: StudyRecipe) -> None:
    """Print the plan."""
    runs, places = make_plan(recipe, here=False), Places.of_machine(recipe)
    show(plan_table(runs, expected_of(runs, recipe), places))


main = command("study", StudyRecipe, study, plan)

if __name__ == "__main__":
    sys.exit(main())
