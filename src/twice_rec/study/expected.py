"""How long the runs of a study take: measured by earlier runs, else estimated as by `twice-rec cost`, else unknown.

A run's seconds are those in the manifests of equal results, whatever their seed, or of results of the same stage that
differ in nothing but what the study varies. What was measured alone takes longer beside others on the same cores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from twice_rec.errors import InputError
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.files import MANIFEST
from twice_rec.manifest import Manifest
from twice_rec.recipe import TrainerRecipe
from twice_rec.recipe_reader import load_recipe
from twice_rec.stages.cost import CostRecipe, stages_of
from twice_rec.study.places import Places, gpus_of_servers
from twice_rec.study.plan import Run, rankings_of, waits_for
from twice_rec.study.recipe import ENTRY, StudyRecipe

THERE, MEASURED, ALIKE, ESTIMATED, UNKNOWN = "there already", "measured", "measured, alike", "estimated", "unknown"
_OWN = ("seed", "ranking")  # keys of a manifest that do not change how long a result takes, or are looked at apart


@dataclass(frozen=True)
class Expected:
    """How many seconds a run takes, None if nobody knows, and from where that is known."""

    seconds: float | None
    how: str


def expected_of(runs: Sequence[Run], study: StudyRecipe) -> dict[Run, Expected]:
    """Return what is expected of each run."""
    manifests = _manifests(list(dict.fromkeys(run.run_dir for run in runs)))
    varied = _varied(study)
    costs: dict[str, Mapping[str, Any]] = {}
    found = {}
    for run in runs:
        domain = run.recipe.domain
        if domain not in costs:
            costs[domain] = _estimates(study, domain)
        found[run] = _measured(run, manifests, varied[run.stage]) or _estimated(run, costs[domain])
    return found


def total_seconds(runs: Sequence[Run], expected: Mapping[Run, Expected], places: Places) -> float:
    """Return when the last run ends if they start in their order as the runner starts them; unknown ones take none."""
    ends: dict[Run, float] = {}
    free = [0.0] * min(len(places.names), places.processes)
    for run in runs:
        ready = max((ends[other] for other in waits_for(run, runs)), default=0.0)
        taken = sorted(range(len(free)), key=free.__getitem__)[: min(places.needed(run), len(free))]
        start = max(ready, *(free[place] for place in taken))
        ends[run] = start + (expected[run].seconds or 0.0)
        for place in taken:
            free[place] = ends[run]
    return max(ends.values(), default=0.0)


def _manifests(run_dirs: Sequence[Path]) -> dict[Path, Manifest]:
    """The manifest of each finished result in some run folders."""
    found = {}
    for run_dir in run_dirs:
        for path in sorted([*run_dir.glob(f"*/{MANIFEST}"), *run_dir.glob(f"eval/*/{MANIFEST}")]):
            try:
                manifest = Manifest.load(path.parent)
            except InputError:  # the stage says so
                continue
            if manifest is not None:
                found[path.parent] = manifest
    return found


def _varied(study: StudyRecipe) -> dict[str, set[str]]:
    """Stage -> the keys in which its runs differ by the study's own doing."""
    varied: dict[str, set[str]] = {}
    for entry in study.runs:
        keys = {*entry, *entry.get("others", {})} - ENTRY.keys()
        varied.setdefault(entry["stage"], set()).update(keys)
    return varied


def _measured(run: Run, manifests: Mapping[Path, Manifest], varied: set[str]) -> Expected | None:
    """What earlier results tell: of each result that the run makes, those of equal settings, else those alike."""
    if run.reports_on:
        return None
    rankings = rankings_of(run.recipe) if isinstance(run.recipe, EvaluateRecipe) else {}
    results = run.makes if rankings else run.makes[:1]
    total, how = 0.0, MEASURED
    for path in results:
        ranking = rankings.get(path.name)
        of_kind = {place: m for place, m in manifests.items() if _is_evaluation(place) == _is_evaluation(path)}
        differs = {place: _difference(m, run, ranking) for place, m in of_kind.items()}
        own = differs.get(path)
        if own is not None and not own and manifests[path].config.get("seed", run.seed) == run.recipe.seed:
            continue
        equal = [place for place, keys in differs.items() if keys is not None and not keys]
        alike = [place for place, keys in differs.items() if keys is not None and keys <= varied]
        if not (equal or alike):
            return None
        how = how if equal else ALIKE
        total += mean(float(manifests[place].about.get("seconds", 0.0)) for place in equal or alike)
    return Expected(total, how) if total else Expected(0.0, THERE) if results else None


def _is_evaluation(folder: Path) -> bool:
    return folder.parent.name == "eval"


def _difference(manifest: Manifest, run: Run, ranking: str | None) -> set[str] | None:
    """The settings in which a result differs from what a run would have; None if it is of another kind."""
    if manifest.stage != run.stage or manifest.config.get("ranking") != ranking:
        return None
    recipe = run.recipe
    given = json.loads(json.dumps(recipe.everything()))
    if isinstance(recipe, EvaluateRecipe) and ranking is None:
        given["lists"] = recipe.lists_of(recipe.variants[0])  # of a score file, which is a run of its own
    of_trl = recipe.trainer_keys if isinstance(recipe, TrainerRecipe) else {}
    settings = recipe.settings() if isinstance(recipe, TrainerRecipe) else {}
    if isinstance(recipe, EvaluateRecipe) and ranking is not None:
        settings = recipe.ranking_settings(ranking)
        given |= settings
    stored = recipe.defaults(settings) | recipe.under_present_names(manifest.config)
    was = {name: value for name, value in json.loads(json.dumps(stored)).items() if name not in _OWN}
    differing = {name for name, value in was.items() if name not in given or given[name] != value}
    return differing | {name for name in of_trl if name not in was}


def _estimates(study: StudyRecipe, domain: str) -> Mapping[str, Any]:
    """What `twice-rec cost` says of a domain's stages; nothing if the recipes have no cost.yaml."""
    folder = Path(study.recipes_dir).expanduser()
    try:
        recipe = load_recipe(folder / "cost.yaml", CostRecipe, ["--domain", domain], here=False)
        return stages_of(recipe, folder, domain)[0]
    except (InputError, OSError):
        return {}


def _estimated(run: Run, costs: Mapping[str, Mapping[str, float]]) -> Expected:
    found = costs.get(Path(run.words[0]).stem, costs.get(run.stage, {}))
    hours = found.get("GPU-hours") or found.get("CPU-hours")
    if not hours:
        return Expected(None, UNKNOWN)
    if isinstance(run.recipe, EvaluateRecipe):
        hours /= 3  # of cost.yaml: base, stage2, stage3
    return Expected(3600 * hours / (1 + gpus_of_servers(run)), ESTIMATED)
