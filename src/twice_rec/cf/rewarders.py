"""Rewarders: the CF model that gives stage 3 its confidences, chosen by the recipe key `cf_model`.

It is a SASRec that stage 3a saved, or one of `BASELINES`, which is fitted when stage 3 starts. A baseline that is
written for the tables is thereby a rewarder too.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twice_rec.cf.baselines import BASELINES, CFScorer
from twice_rec.cf.confidence import ConfidenceModel, Floats, Histories
from twice_rec.cf.held_out import NOTHING, HeldOut
from twice_rec.cf.ranking import Data, fit_baseline
from twice_rec.cf.recipe import ConfidenceConfig, HintConfig
from twice_rec.cf.sasrec import SASRecScorer
from twice_rec.errors import InputError
from twice_rec.recipe import DeviceConfig

logger = logging.getLogger(__name__)


class ScorerRewarder(ConfidenceModel):
    """The confidences of a fitted `CFScorer`.

    A scorer that asks who the user is (random) gets a number made of the history, so its confidences are repeatable.
    """

    def __init__(self, scorer: CFScorer, batch_size: int = 512):
        self._scorer = scorer
        self._batch_size = batch_size

    def logits(self, histories: Histories, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `ConfidenceModel`."""
        parts = [np.take_along_axis(z, items[rows] - 1, axis=1) for rows, z in self._scores(histories)]  # [B, C]
        return np.concatenate(parts).astype(np.float32)

    def item_means(self, histories: Histories) -> NDArray[np.float32]:
        """See `ConfidenceModel`."""
        total = sum(z.sum(axis=0, dtype=np.float64) for _, z in self._scores(histories))  # [N]
        return np.concatenate([[0.0], total / len(histories)]).astype(np.float32)

    def _scores(self, histories: Histories) -> Iterator[tuple[slice, Floats]]:
        """Yield one batch after another: its rows of the histories, and their scores, float [B, N]."""
        for start in range(0, len(histories), self._batch_size):
            rows = slice(start, start + self._batch_size)
            users = np.array([zlib.crc32(np.array(history, np.int64).tobytes()) for history in histories[rows]])
            yield rows, np.asarray(self._scorer.scores(users, histories[rows]))


def rewarder_inputs(config: HintConfig, run_path: Path) -> list[Path]:
    """Return the files that a rewarder is loaded from, or calibrated on, for the manifest.

    Raises:
        InputError: if `cf_model` names a SASRec that is not there.
    """
    if config.cf_model in BASELINES:
        return [run_path / "data" / "candidates.valid.jsonl"]
    path = run_path / config.cf_model / "model.safetensors"
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder; it is made by sasrec.sh, which must run first. cf_model is "
            f"{config.cf_model}; {', '.join(BASELINES)} need no file"
        )
    return [path]


def load_rewarder(config: HintConfig, run_path: Path, data: Data, prompts: HeldOut = NOTHING) -> ConfidenceModel:
    """Load the SASRec that `cf_model` names, onto a GPU if there is one, or fit the baseline on the run's data.

    A baseline is fitted without the prompts' targets. A SASRec that was trained on them is named in the log.

    Raises:
        InputError: if there is no such model, it cannot give the confidences that the recipe asks for, or hints would
            tell a target that it remembers.
    """
    if config.cf_model not in BASELINES:
        device = config if isinstance(config, DeviceConfig) else DeviceConfig()
        scorer = SASRecScorer.load(rewarder_inputs(config, run_path)[0], data.catalog, device.torch_device())
        for sign in scorer.signs:
            logger.warning("cf_model %s: %s", config.cf_model, sign)
        if not scorer.held_out.covers(prompts):
            remembers = (
                f"cf_model {config.cf_model} was trained on targets of these prompts (it held out those of a share of "
                f"{scorer.held_out.fraction:g}, seed {scorer.held_out.seed}; train_fraction is {prompts.fraction:g}, "
                f"seed {prompts.seed}), so its confidence in them is partly memory; set held_out_prompts in "
                "sasrec.yaml to train_fraction, with the same seed"
            )
            if config.cf_hints:
                raise InputError(f"{remembers}, or cf_hints to 0: the policy would learn to copy that memory")
            logger.warning(remembers)
        return scorer
    model = ScorerRewarder(fit_baseline(config.cf_model, data, prompts.seed, held_out=prompts))
    model.held_out = prompts
    (kind,) = data.list_kinds("train")
    valid = data.questions("valid", [kind])
    model.calibrate(valid.histories, valid.candidates[kind], valid.targets)
    debiased = isinstance(config, ConfidenceConfig) and config.confidence_debiased
    if debiased and "debiased" not in model.calibration:
        raise InputError(
            f"confidence_debiased is true, but cf_model {config.cf_model} scores an item alike for all users, which "
            "leaves nothing; set confidence_debiased to false, or choose another cf_model"
        )
    return model
