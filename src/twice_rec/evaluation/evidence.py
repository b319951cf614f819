"""What the report shows beside the tables: training curves, calibration, judges, the A/B test, users.

A source that is missing, stale or being made is not read; the page then names what it would have shown.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from twice_rec.cf.baselines import BASELINES
from twice_rec.cf.sasrec import SASRecScorer
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.calibration import Calibration, calibration_of
from twice_rec.evaluation.curves import Curves, training_curves
from twice_rec.evaluation.equals import usable_json, why_not_usable
from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.report import Variant
from twice_rec.evaluation.trials import Judged, judged_of
from twice_rec.evaluation.users import Asked, browser_of, read_asked, read_judgements
from twice_rec.grpo.recipe import GRPORecipe, grpo_folder, is_grpo_variant
from twice_rec.manifest import Hashes, Manifest

logger = logging.getLogger(__name__)

_DATA = (dataset.CATALOG, dataset.SEQUENCES, dataset.candidates_file("test"))


@dataclass(frozen=True)
class Evidence:
    """What was found; what is None or empty was not."""

    curves: Mapping[str, Curves] = field(default_factory=dict)
    calibration: Calibration | None = None
    judged: Mapping[str, list[Judged]] = field(default_factory=dict)  # variant -> what judges said of it
    agreement: Mapping[str, list[Mapping[str, Any]]] = field(default_factory=dict)  # variant -> of each two judges
    ab_test: Mapping[str, Any] | None = None
    places: Mapping[str, list[int]] = field(default_factory=dict)  # variant -> choices at each place of the list
    browser: Mapping[str, Any] | None = None  # see `users.browser_of`


class Sources:
    """Which files beside `eval/` a report reads.

    Attributes:
        paths: those that can be used, inputs of the report.
        lines: one line about each that is there and cannot.
    """

    def __init__(self, recipe: ReportRecipe, variants: Mapping[str, Variant], hashes: Hashes):
        self._run_dir, self._hashes = recipe.run_path, hashes
        self.paths: list[Path] = []
        self.lines: list[str] = []
        self.rewards = reward_recipe(self._run_dir, variants)
        cf_model = self.rewards.cf_model if self.rewards else "sasrec"
        self.cf_model = self._run_dir / cf_model / "model.safetensors"
        self.judged = sorted(path.parent.name for path in (self._run_dir / "judge").glob("*/scores.json"))
        self.has_data = all(list(map(self._use, (self._run_dir / "data" / name for name in _DATA))))
        self.has_model = self.has_data and self._use(self.cf_model)
        if cf_model in BASELINES:
            self.lines.append(
                f"confidences left out: cf_model is {cf_model}, which is fitted in stage 3 and not stored"
            )
        for name in self.judged:
            self._use(self._run_dir / "judge" / name / "scores.json")
            self._use(self._run_dir / "judge" / name / "verdicts.jsonl")
        self._use(self._run_dir / "ab_test" / "ab_test.json")

    def _use(self, path: Path) -> bool:
        why = why_not_usable(path, self._hashes)
        if why is None:
            self.paths.append(path)
        elif path.exists():
            self.lines.append(f"{path} left out: {why}")
        return why is None


def reward_recipe(run_dir: Path, variants: Mapping[str, Variant]) -> GRPORecipe | None:
    """Return the recipe of the run's stage 3, the variant `stage3` first, with the tau that it used; None without one.

    All variants' completions are scored by it, so that their rewards can be compared.
    """
    names = sorted((name for name in variants if is_grpo_variant(name)), key=lambda name: (name != "stage3", name))
    for name in names:
        try:
            manifest = Manifest.load(run_dir / grpo_folder(name))
            if manifest is None:
                continue
            known = GRPORecipe.under_present_names(manifest.config)
            keys = {key: value for key, value in known.items() if key in GRPORecipe.model_fields}
            recipe = GRPORecipe(**{**keys, "run_dir": str(run_dir)})
        except (InputError, ValidationError):
            continue  # of another version, with rewards that are no more
        tau = manifest.figures.get("tau", recipe.reward_tau)
        return recipe.model_copy(update={"reward_tau": tau})
    return None


def gather(recipe: ReportRecipe, variants: Mapping[str, Variant], sources: Sources) -> Evidence:
    """Read and compute what can be shown."""
    run_dir = recipe.run_path
    scores = {
        name: found for name in sources.judged if (found := _json(run_dir / "judge" / name / "scores.json", sources))
    }
    data, asked, model = PreparedData(run_dir / "data"), None, None
    calibration, browser = None, None
    if sources.has_data:
        try:
            asked = read_asked(variants, _kind(recipe, variants), data.folder, recipe.seed)
            model = _model(sources, data)
            calibration = _calibration(sources, data, model, recipe.seed) if model else None
            browser = _browser(run_dir, sources, data, asked, model) if asked else None
        except InputError as error:
            logger.warning("the page has no users: %s", error)
    return Evidence(
        curves=training_curves(variants),
        calibration=calibration,
        judged={name: judged_of(found) for name, found in scores.items()},
        agreement={name: found.get("agreement", []) for name, found in scores.items()},
        ab_test=_json(run_dir / "ab_test" / "ab_test.json", sources),
        places=asked.places if asked else {},
        browser=browser,
    )


def _json(path: Path, sources: Sources) -> dict[str, Any] | None:
    return usable_json(path, Hashes())[0] if path in sources.paths else None


def _kind(recipe: ReportRecipe, variants: Mapping[str, Variant]) -> str:
    """Return the kind of list whose answers are shown: that of the comparisons, if language models were asked it."""
    kinds = dict.fromkeys(
        key.partition("/")[0] for variant in variants.values() if variant.terms[0].asked for key in variant.values
    )
    wanted = recipe.comparison_metric.partition("/")[0]
    return wanted if wanted in kinds else next(iter(kinds), wanted)


def _model(sources: Sources, data: PreparedData) -> SASRecScorer | None:
    if not sources.has_model:
        return None
    try:
        return SASRecScorer.load(sources.cf_model, data.catalog)
    except InputError as error:
        logger.warning("the page has no confidences: %s", error)
        return None


def _calibration(sources: Sources, data: PreparedData, model: SASRecScorer, seed: int) -> Calibration | None:
    debiased = sources.rewards.confidence_debiased if sources.rewards else False
    try:
        return calibration_of(model, sources.cf_model.parent.name, data, debiased, seed)
    except ValueError as error:  # trained by an earlier version, or without lists
        logger.warning("the page has no calibration: %s", error)
        return None


def _browser(
    run_dir: Path, sources: Sources, data: PreparedData, asked: Asked, model: SASRecScorer | None
) -> dict[str, Any]:
    judged = read_judgements(run_dir, sources.judged, sources.paths.__contains__)
    return browser_of(asked, data, model, sources.rewards, judged)
