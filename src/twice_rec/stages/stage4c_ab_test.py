"""Stage 4c: an A/B test -> ab_test/ab_test.json: impressions, clicks, intervals, tests, latency, and what peeking does.

It is a simulation on the synthetic domain's click model (`evaluation/ab_test.py`), unless `impressions_file` names the
log of a real test. Deterministic by seed, but for the latency. Deviation from the paper: its RQ5 was a test in a shop.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from twice_rec.data.dataset import PreparedData
from twice_rec.evaluation.ab_arms import run_simulation, simulation_inputs
from twice_rec.evaluation.ab_test import analyse, read_log, show_ab_test
from twice_rec.evaluation.recipe import AbTestRecipe
from twice_rec.files import read_json, write_json
from twice_rec.run import StageRun, require
from twice_rec.stages.command_line import command

logger = logging.getLogger("ab_test")


def ab_test(recipe: AbTestRecipe) -> None:
    """Run the test, or count a real one's log."""
    log = Path(recipe.impressions_file).expanduser() if recipe.impressions_file else None
    inputs = simulation_inputs(recipe) if log is None else [require(log, "your shop")]
    with StageRun(recipe, "ab_test", "ab_test", inputs) as run:
        path = run.path / "ab_test.json"
        if not run.is_finished():
            run.begin()
            if log is None:
                result = run_simulation(recipe, PreparedData(recipe.run_path / "data"))
            else:
                result = {"title": f"The log {log}", "kind": "log", **analyse(read_log(log), recipe)}
            write_json(path, result)
            run.finish([path], {arm["arm"]: arm["ctr"] for arm in result["arms"]})
    show_ab_test(read_json(path))


main = command("ab_test", AbTestRecipe, ab_test)

if __name__ == "__main__":
    sys.exit(main())
