"""SASRec as a recipe asks for it: the search for settings, one training per seed, its checks and its files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from twice_rec.cf import checks
from twice_rec.cf.held_out import HeldOut, without_prompted
from twice_rec.cf.ranking import CFQuestions, Data, mean_metrics
from twice_rec.cf.recipe import SASRecRecipe
from twice_rec.cf.sasrec import SASRecScorer
from twice_rec.cf.sasrec_training import SASRecTrainer
from twice_rec.errors import InputError
from twice_rec.files import read_jsonl, write_jsonl
from twice_rec.run import IS_MAIN

logger = logging.getLogger(__name__)

STATE = "training_state.safetensors"  # beside a model that is being trained; whoever finishes the stage removes it
TUNING = "tuning.jsonl"
# What `tune` tries: nothing changed, then these.
SEARCH: tuple[dict[str, Any], ...] = (
    {},
    {"item_dropout": 0.5},
    {"hidden_size": 128, "inner_size": 128, "dropout": 0.5},
    {"dropout": 0.2, "item_dropout": 0.0},
)


class SASRecVariant:
    """The trainings of one recipe, on the same histories and validated by the same questions.

    Args:
        log: is told loss and validation after each validation of a training.

    Raises:
        InputError: if the search has a width that the recipe's heads do not divide, or if a split has no target.
    """

    def __init__(self, recipe: SASRecRecipe, data: Data, device: str, log: Callable[[dict[str, float]], None]):
        widths = [changed.get("hidden_size", recipe.hidden_size) for changed in SEARCH]
        if recipe.tune and (wrong := next((width for width in widths if width % recipe.num_heads), None)):
            raise InputError(
                f"tune tries hidden_size {wrong}, which does not divide by num_heads {recipe.num_heads}; choose "
                "another num_heads, or set tune to false"
            )
        self._recipe, self._data, self._device, self._log = recipe, data, device, log
        self._held_out = HeldOut(recipe.held_out_prompts, recipe.seed)
        self._histories = without_prompted(data.training_histories(), self._held_out)
        self._list = data.list_kinds("train")[0]
        self._valid = CFQuestions(data, "valid", [self._list, "full"], recipe.validation_users, recipe.seed)

    def train(self, folders: Mapping[int, Path]) -> list[dict[str, float]]:
        """Train once per seed, each into its folder; return what was measured. `tune` looks for settings first."""
        recipe = self.tuned(next(iter(folders.values()))) if self._recipe.tune else self._recipe
        return [self.train_and_save(recipe, folder, seed) for seed, folder in folders.items()]

    def train_and_save(self, recipe: SASRecRecipe, folder: Path, seed: int) -> dict[str, float]:
        """Train once, write `model.safetensors`, calibrated on validation, and `log.jsonl`; return what was measured.

        Args:
            recipe: this one's, or a tuned one.
        """
        trainer = self._trainer(recipe, seed, folder / STATE)
        model = trainer.run(
            lambda one: self._log({"loss": one.loss, "validation": one.validation, "epoch": one.epochs})
        )
        if not IS_MAIN:
            return {}
        scorer, asked = SASRecScorer(model), self._valid.asked
        scorer.calibrate(asked.histories, asked.candidates[self._list], asked.targets)
        share, best = scorer.popularity_share(asked.histories), trainer.best_validation
        simple = checks.simple_models(self._histories, len(self._data.catalog))
        validation = {name: mean_metrics(self._valid.ranks(one)) for name, one in {"sasrec": scorer, **simple}.items()}
        signs = checks.signs_of_poor_training(
            trainer.step < trainer.last_step, best is trainer.log[-1], share, validation
        )
        for sign in signs:
            logger.warning("%s: %s", folder.name, sign)
        scorer.held_out, scorer.signs = self._held_out, signs
        scorer.save(folder / "model.safetensors", self._data.catalog)
        write_jsonl(folder / "log.jsonl", map(asdict, trainer.log))
        figures = {
            "seed": seed,
            "best_step": best.step,
            "steps": trainer.step,
            "epochs": trainer.log[-1].epochs,
            **{f"valid/{metric}": value for metric, value in validation["sasrec"].items()},
            "train_seconds": round(sum(one.seconds for one in trainer.log), 1),
            "popularity_share": share,
        }
        logger.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        return figures

    def tuned(self, folder: Path) -> SASRecRecipe:
        """Return the recipe with those of `SEARCH`'s settings that are best on validation; writes `tuning.jsonl`.

        Each is trained as the recipe says, with its seed. After `tune_minutes` no further one is begun.
        """
        path = folder / TUNING
        tried = [row for _, row in read_jsonl(path)] if path.exists() else []
        for number, changed in enumerate(SEARCH[len(tried) :], start=len(tried)):
            took = sum(row["seconds"] for row in tried)  # also before a kill, so that one does not prolong the search
            (is_over,) = broadcast_object_list([took / 60 > self._recipe.tune_minutes])
            if tried and is_over:
                logger.warning(
                    "tune_minutes are over: %d of %d settings were not tried", len(SEARCH) - number, len(SEARCH)
                )
                break
            trainer = self._trainer(self._recipe.model_copy(update=changed), self._recipe.seed, folder / STATE)
            trainer.run()
            seconds = sum(one.seconds for one in trainer.log)
            tried.append({"settings": changed, "validation": trainer.best_validation.validation, "seconds": seconds})
            if IS_MAIN:
                write_jsonl(path, tried)
                (folder / STATE).unlink(missing_ok=True)
            PartialState().wait_for_everyone()  # or another process would go on from that state
            logger.info("tried %s: validation %.4f", changed or "the recipe's own", trainer.best_validation.validation)
        best = max(tried, key=lambda row: row["validation"])
        logger.info("chose %s", best["settings"] or "the recipe's own settings")
        return self._recipe.model_copy(update=best["settings"])

    def _trainer(self, recipe: SASRecRecipe, seed: int, state: Path) -> SASRecTrainer:
        validate = lambda model: self._valid.mean(SASRecScorer(model))
        return SASRecTrainer(
            recipe, recipe, len(self._data.catalog), self._histories, validate, seed, state, self._device
        )
