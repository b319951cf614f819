"""Every completion of stage 3 in files, and what a step's completions say: rates, confidences, warnings, samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from transformers import TrainerCallback

from twice_rec.catalog import Outcome
from twice_rec.files import atomic_path

logger = logging.getLogger(__name__)

Columns = Mapping[str, Sequence[Any]]

# Rewards that depend on the recommended item and on nothing else in the text.
ITEM_REWARDS = ("collaborative", "match", "cf")


def step_figures(columns: Columns, num_generations: int, weights: Mapping[str, float]) -> dict[str, float]:
    """What the completions of one step say about the rewards.

    - `outcome/<outcome>`: share of the completions that hit, miss, leave the candidates or are malformed.
    - `confidence/hit`, `confidence/miss`: the CF model's mean confidence in what they recommend; left out without any.
    - `groups/without_hit`: share of the groups in which no completion hits.
    - `groups/without_variance`: share of the groups whose completions all earn the same weighted sum of rewards, so
      that every advantage is 0. (TRL's `frac_reward_zero_std` is the same unless `scale_rewards` is batch.)
    - `structure/missing`: share of the completions that earn nothing for their structure (Eq. 3); left out where
      `structure` is no reward.
    - `reward/popularity_share`: how much of the item rewards (`ITEM_REWARDS`, weighted and summed) item popularity
      alone explains: R^2 of their least-squares line over `log_popularity`, over the completions that name a candidate.
      Left out where they are fewer than 3, or all popularities or all rewards are equal.

    Args:
        columns: `outcome`, `confidence`, `log_popularity`, and a column for each reward; the completions of a group
            stand together.
        num_generations: completions in a group.
        weights: reward name -> weight.
    """
    outcomes, confidences = np.array(columns["outcome"]), np.array(columns["confidence"])
    figures = {f"outcome/{outcome.value}": float((outcomes == outcome.value).mean()) for outcome in Outcome}
    for outcome in (Outcome.HIT, Outcome.MISS):
        if (chosen := outcomes == outcome.value).any():
            figures[f"confidence/{outcome.value}"] = float(confidences[chosen].mean())
    hits = (outcomes == Outcome.HIT.value).reshape(-1, num_generations)
    figures["groups/without_hit"] = float((~hits.any(axis=1)).mean())
    totals = _weighted(columns, weights, list(weights)).reshape(-1, num_generations)
    figures["groups/without_variance"] = float((np.ptp(totals, axis=1) < 1e-6).mean())
    if "structure" in weights:
        figures["structure/missing"] = float((np.array(columns["structure"]) == 0).mean())
    if item_rewards := [name for name in ITEM_REWARDS if name in weights]:
        named = np.isin(outcomes, (Outcome.HIT.value, Outcome.MISS.value))
        popularity = np.array(columns["log_popularity"])[named]
        earned = _weighted(columns, weights, item_rewards)[named]
        if len(earned) >= 3 and np.ptp(popularity) > 1e-6 and np.ptp(earned) > 1e-6:
            figures["reward/popularity_share"] = float(np.corrcoef(popularity, earned)[0, 1] ** 2)
    return figures


def _weighted(columns: Columns, weights: Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    return np.sum([weights[name] * np.array(columns[name], dtype=np.float64) for name in names], axis=0)


PATIENCE = 10  # steps in a row before a warning

# When a step is a bad one, and what it means where such steps do not end.
ALARMS: Sequence[tuple[Callable[[Mapping[str, float]], bool], str]] = (
    (
        lambda figures: figures["groups/without_variance"] > 0.9,
        "in each of the last %d steps more than nine groups of ten had no variance: all their completions earned the "
        "same, so their advantages are 0 and the policy learns next to nothing. Either the completions of a group are "
        "all alike (raise temperature or num_generations), or none of them hits (see groups/without_hit and "
        "outcome/hit: train stage 2 for longer, or use rewards that grade misses, such as collaborative with a lower "
        "tau, cf or rank). See %s",
    ),
    (
        lambda figures: figures["outcome/malformed"] > 0.5,
        "in each of the last %d steps more than half of the completions were malformed: they name no single item, or a "
        "title that is not the id's, and earn no item reward. If they are cut off (see completions/clipped_ratio), "
        "raise max_completion_length; if not, stage 2 has not taught the format: train it for longer, or lower "
        "temperature. See %s",
    ),
    (
        lambda figures: figures.get("structure/missing", 0.0) > 0.5,
        "in each of the last %d steps more than half of the completions had no whole structure (reward structure 0): a "
        "tag is missing or doubled, though the item may be right. Once all completions of a group lack it, none has an "
        "advantage from it, and it does not come back (rewards/structure/mean tells when it went): run again with a "
        "lower learning_rate, or a higher weight of structure in reward_weights. See %s",
    ),
)


class CompletionLog(TrainerCallback):
    """Writes every completion to `completions/completions_NNNNN.parquet` of the step that trained on it first.

    The columns are TRL's: `step`, `prompt`, `completion` (messages), one for each reward, those that reward functions
    log (see `rewards.StepRewards`), `advantage`. TRL itself writes the last batch before each log line, in place, and
    with every prompt on the terminal. A resumed run writes the steps it repeats over the old ones; there are no files
    of steps it has not reached. The step's figures join the trainer's metrics, over all processes' completions.

    Args:
        trainer: a GRPOTrainer; it is read at the end of each step.
        sample_every: show samples in the log, and in wandb where that is on, every so many steps; None for never.
        sample_completions: how many.
    """

    def __init__(self, trainer: Any, sample_every: int | None, sample_completions: int):
        self._trainer = trainer
        self._sample_every = sample_every
        self._sample_completions = sample_completions
        self._folder = Path(trainer.args.output_dir) / "completions"
        self._columns: dict[str, list[Any]] = {}
        self._newest: Any = None
        self._bad_steps = [0] * len(ALARMS)

    def path(self, step: int) -> Path:
        """File of a step."""
        return self._folder / f"completions_{step:05d}.parquet"

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Remove what a killed run wrote after the checkpoint that this one goes on from."""
        if state.is_world_process_zero:
            for path in self._folder.glob("completions_*.parquet"):
                if int(path.stem.rpartition("_")[2]) > state.global_step:
                    path.unlink()

    def on_substep_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Called by the trainer after each micro-batch but the step's last; it may have sampled anew for it."""
        self._take()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Called by the trainer."""
        self._take()
        if not self._columns:
            return  # the step trained once more on completions of an earlier one
        count = len(self._columns["completion"])
        columns = {"step": [state.global_step] * count, **self._columns}
        self._columns = {}
        names, values = self._trainer.reward_func_names, self._trainer.reward_weights.tolist()
        figures = step_figures(columns, self._trainer.num_generations, dict(zip(names, values, strict=True)))
        for name, value in figures.items():
            self._trainer._metrics["train"][name].append(value)
        self._warn(figures)
        if state.is_world_process_zero:
            with atomic_path(self.path(state.global_step)) as temporary:
                pyarrow.parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")
            if self._sample_every and state.global_step % self._sample_every == 0:
                self._show(columns, names, "wandb" in args.report_to)

    def _take(self) -> None:
        """Copy what the trainer has sampled since the last time; it keeps its newest batch of all processes."""
        logs = self._trainer._logs
        if not logs["completion"] or logs["completion"][-1] is self._newest:
            return
        self._newest = logs["completion"][-1]
        own = {"prompt": logs["prompt"], "completion": logs["completion"]}
        for name, values in {**own, **logs["rewards"], **logs["extra"], "advantage": logs["advantages"]}.items():
            self._columns.setdefault(name, []).extend(values)

    def _warn(self, figures: Mapping[str, float]) -> None:
        for number, (is_bad, text) in enumerate(ALARMS):
            self._bad_steps[number] = self._bad_steps[number] + 1 if is_bad(figures) else 0
            if self._bad_steps[number] == PATIENCE:
                logger.warning(text, PATIENCE, self._folder)

    def _show(self, columns: Columns, rewards: Sequence[str], to_wandb: bool) -> None:
        count = len(columns["completion"])
        chosen = np.unique(np.linspace(0, count - 1, min(self._sample_completions, count)).astype(int))
        shown = {name: values for name, values in columns.items() if name != "prompt"}
        rows = [{name: values[i] for name, values in shown.items()} for i in chosen]
        for row in rows:
            row["completion"] = row["completion"][0]["content"]
            earned = ", ".join(f"{name} {row[name]:.3g}" for name in rewards)
            told = " ".join(row["completion"].split())
            logger.info(
                "step %d, %s, %s, advantage %+.2f: %s", row["step"], row["outcome"], earned, row["advantage"], told
            )
        if to_wandb:
            import wandb

            table = wandb.Table(columns=list(shown), data=[[_plain(value) for value in row.values()] for row in rows])
            wandb.log({"completions": table}, commit=False)


def _plain(value: Any) -> Any:
    """NaN has no place in a wandb table's JSON."""
    return None if isinstance(value, float) and math.isnan(value) else value
