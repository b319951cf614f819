"""Every completion of stage 3 in files, and what a step's completions say: rates, confidences, warnings, samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from transformers import TrainerCallback

from twice_rec.catalog import Outcome
from twice_rec.files import atomic_path
from twice_rec.grpo.rewards import REWARDS
from twice_rec.grpo.trl_private import metrics, newest_completions
from twice_rec.training_log import is_last, shortened

logger = logging.getLogger(__name__)

Columns = Mapping[str, Sequence[Any]]


def step_figures(columns: Columns, num_generations: int, weights: Mapping[str, float]) -> dict[str, float]:
    """Return what the completions of one step say about the rewards.

    - `outcome/<outcome>`: share of the completions that hit, miss, leave the candidates or are malformed.
    - `confidence/hit`, `confidence/miss`: mean confidence in what they recommend; left out if there is none.
    - `groups/without_hit`: share of the groups in which no completion hits.
    - `groups/without_variance`: share of the groups whose completions all earn the same weighted sum of rewards, so
      that every advantage is 0. (TRL's `frac_reward_zero_std` is the same unless `scale_rewards` is batch.)
    - `structure/missing`: share of the completions that earn nothing for their structure (Eq. 3); left out if
      `structure` is no reward.
    - `reward/popularity_share`: popularity share of the rewards that depend on the item, weighted and summed: R^2 of
      their least-squares line over `log_popularity`, over the completions that recommend a candidate. Left out if these
      are fewer than 3, or if all their popularities or all their rewards are equal.

    Args:
        columns: `outcome`, `confidence`, `log_popularity`, and a column per reward, B values each; the completions of a
            group are side by side.
        num_generations: completions per group.
        weights: reward name -> weight.
    """
    outcomes, confidences = np.array(columns["outcome"]), np.array(columns["confidence"])  # [B]
    figures = {f"outcome/{outcome.value}": float((outcomes == outcome.value).mean()) for outcome in Outcome}
    for outcome in (Outcome.HIT, Outcome.MISS):
        if (chosen := outcomes == outcome.value).any():
            figures[f"confidence/{outcome.value}"] = float(confidences[chosen].mean())
    hits = (outcomes == Outcome.HIT.value).reshape(-1, num_generations)  # [groups, num_generations]
    figures["groups/without_hit"] = float((~hits.any(axis=1)).mean())
    totals = _weighted(columns, weights, list(weights)).reshape(-1, num_generations)  # [groups, num_generations]
    figures["groups/without_variance"] = float((np.ptp(totals, axis=1) < 1e-6).mean())
    if "structure" in weights:
        figures["structure/missing"] = float((np.array(columns["structure"]) == 0).mean())
    if item_rewards := [name for name, reward in REWARDS.items() if reward.depends_on_item and name in weights]:
        named = np.isin(outcomes, (Outcome.HIT.value, Outcome.MISS.value))  # [B]
        popularity = np.array(columns["log_popularity"])[named]  # [named]
        earned = _weighted(columns, weights, item_rewards)[named]  # [named]
        if len(earned) >= 3 and np.ptp(popularity) > 1e-6 and np.ptp(earned) > 1e-6:
            figures["reward/popularity_share"] = float(np.corrcoef(popularity, earned)[0, 1] ** 2)
    return figures


def _weighted(columns: Columns, weights: Mapping[str, float], names: Sequence[str]) -> NDArray[np.float64]:
    """Return the weighted sum of some rewards, [B]."""
    return np.sum([weights[name] * np.array(columns[name], dtype=np.float64) for name in names], axis=0)


PATIENCE = 10  # bad steps in a row before a warning

# When a step is bad, and what many such steps in a row mean.
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
        "tag is missing or doubled, though the item may be right. If all completions of a group lack it, none has an "
        "advantage from it, and it does not come back (rewards/structure/mean shows when it was lost): run again with "
        "a lower learning_rate, or a higher weight of structure in reward_weights. See %s",
    ),
)


class CompletionLog(TrainerCallback):
    """Writes every completion to `completions/completions_NNNNN.parquet` of the step that trained on it first.

    The columns are TRL's: `step`, `prompt`, `completion` (messages), one per reward, those that reward functions log
    (see `scoring.StepRewards`), `advantage`. (TRL itself writes the last batch before each log line only, not
    atomically, and prints every prompt.) A resumed run writes the steps that it repeats over the old ones, and removes
    the files of steps that it has not reached. The step's figures join the trainer's metrics, over the completions of
    all processes.

    Args:
        trainer: a GRPOTrainer; it is read at the end of each step.
        sample_every: show samples in the log, and in wandb if that is on, every so many steps and at the last one; None
            for never.
        sample_completions: number of samples.
    """

    def __init__(self, trainer: Any, sample_every: int | None, sample_completions: int):
        self._trainer, self._sample_every, self._sample_completions = trainer, sample_every, sample_completions
        self._folder = Path(trainer.args.output_dir) / "completions"
        self._columns: dict[str, list[Any]] = {}
        self._newest: Any = None  # last completion that was read
        self._bad_steps = [0] * len(ALARMS)

    def path(self, step: int) -> Path:
        """Return the file of a step."""
        return self._folder / f"completions_{step:05d}.parquet"

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Remove what a killed run wrote after the checkpoint from which this one goes on."""
        if state.is_world_process_zero:
            for path in self._folder.glob("completions_*.parquet"):
                if int(path.stem.rpartition("_")[2]) > state.global_step:
                    path.unlink()

    def on_substep_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Read what the trainer has sampled since the last call; it calls this before each further micro-batch."""
        columns = newest_completions(self._trainer)
        if columns["completion"] and columns["completion"][-1] is not self._newest:
            self._newest = columns["completion"][-1]
            for name, values in columns.items():
                self._columns.setdefault(name, []).extend(values)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Write the step's completions and log its figures."""
        self.on_substep_end(args, state, control)  # of the last micro-batch
        if not self._columns:
            return  # the step trained once more on completions of an earlier one
        columns = {"step": [state.global_step] * len(self._columns["completion"]), **self._columns}
        self._columns = {}
        names, values = self._trainer.reward_func_names, self._trainer.reward_weights.tolist()
        figures = step_figures(columns, self._trainer.num_generations, dict(zip(names, values, strict=True)))
        for name, value in figures.items():
            metrics(self._trainer)[name].append(value)
        for number, (is_bad, text) in enumerate(ALARMS):
            self._bad_steps[number] = self._bad_steps[number] + 1 if is_bad(figures) else 0
            if self._bad_steps[number] == PATIENCE:
                logger.warning(text, PATIENCE, self._folder)
        if state.is_world_process_zero:
            with atomic_path(self.path(state.global_step)) as temporary:
                pyarrow.parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")
            if self._sample_every and (state.global_step % self._sample_every == 0 or is_last(state)):
                self._show(columns, names, "wandb" in args.report_to)

    def _show(self, columns: Columns, rewards: Sequence[str], to_wandb: bool) -> None:
        count = len(columns["completion"])
        chosen = np.unique(np.linspace(0, count - 1, min(self._sample_completions, count)).astype(int))
        rows = [{name: values[i] for name, values in columns.items()} for i in chosen]
        for row in rows:
            row["prompt"] = shortened(row["prompt"])
            row["completion"] = row["completion"][0]["content"]
            earned = ", ".join([row["outcome"], *(f"{name} {row[name]:.3g}" for name in rewards)])
            text = " ".join(row["completion"].split())
            logger.info("step %d, %s, advantage %+.2f: %s", row["step"], earned, row["advantage"], text)
        if to_wandb:
            import wandb

            # The JSON of a table has no NaN, the only value that differs from itself.
            values = [[value if value == value else None for value in row.values()] for row in rows]
            wandb.log({"completions": wandb.Table(list(rows[0]), values)}, commit=False)
