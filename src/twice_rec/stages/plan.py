"""What `--dry_run` of stages 2, 3b and 3c prints: processes, batch, steps, tokens, memory, time, and the commands.

Nothing is loaded, written or sent. The recipe is read as for another machine, so a login node without a GPU will do.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from twice_rec.data.dataset import CATALOG, PreparedData, training_files
from twice_rec.errors import InputError
from twice_rec.evaluation.tables import show
from twice_rec.grpo import estimate as of_grpo
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rollout.vllm_command import server_command
from twice_rec.llm.footprint import card_gib, gpu_hours, read_shape
from twice_rec.sft import estimate as of_sft
from twice_rec.sft.estimate import Estimate, Lengths, Population
from twice_rec.sft.recipe import SFTRecipe


@dataclass(frozen=True, slots=True)
class Launch:
    """How training is started; `launch.sh` tells it in ACCELERATE_CONFIG and ACCELERATE_FLAGS."""

    processes: int
    machines: int
    zero: int
    command: str

    @classmethod
    def of_environment(cls, stage: str) -> Launch:
        """Read them; InputError if ACCELERATE_CONFIG cannot be read."""
        import torch

        run = shlex.join(["-m", "twice_rec", stage, *(word for word in sys.argv[2:] if word != "--dry_run")])
        path, flags = os.environ.get("ACCELERATE_CONFIG"), os.environ.get("ACCELERATE_FLAGS", "").split()
        if not path:
            return cls(1, 1, 0, f"python {run}")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"ACCELERATE_CONFIG is {path}, which cannot be read: {error}") from None
        values |= {flag.removeprefix("--"): value for flag, value in itertools.pairwise(flags)}
        processes = int(values.get("num_processes") or torch.cuda.device_count() or 1)
        zero = values.get("deepspeed_config", {}).get("zero_stage", 0)
        command = " ".join(["accelerate launch --quiet --config_file", path, *flags, run])
        return cls(processes, int(values.get("num_machines") or 1), zero, command)


def plan_training(recipe: SFTRecipe | GRPORecipe) -> None:
    """Print the plan of stage 2 or 3c; for errors see `read_shape`, `measure` and `Launch`."""
    launch, model = Launch.of_environment("sft" if isinstance(recipe, SFTRecipe) else "grpo"), _model(recipe)
    shape, folder = read_shape(model, recipe), recipe.run_path / "data"
    lines = {"processes": f"{launch.processes}, a GPU each, on {launch.machines} machines; ZeRO stage {launch.zero}"}
    limit = float(recipe.max_prompt_tokens or recipe.trainer_value("max_length") or 8192)
    lengths: Lengths = dict.fromkeys(of_sft.TASKS, np.array([[limit, 300.0]]))
    population, how = Population(100, 100, 100), ""
    is_prepared = (folder / CATALOG).exists()
    if is_prepared:
        training_files(recipe.run_path)
        lengths, population, how = of_sft.measure(PreparedData(folder), recipe, model)
    if isinstance(recipe, SFTRecipe):
        found = of_sft.estimate(recipe, shape, lengths, population, launch.processes, launch.zero)
    else:
        found = of_grpo.estimate(recipe, shape, lengths, population.users, launch.processes, launch.zero)
    lines["effective batch"] = _batch(recipe, found, launch.processes, is_prepared)
    if is_prepared:
        lines |= _work(recipe, found, lengths, how, launch.processes)
    else:
        lines["steps, tokens, time"] = (
            f"not known before {folder} is there (prepare.sh); memory is for the longest prompts"
        )
    _print(lines | _memory(recipe, found), [launch.command])


def plan_serve(recipe: GRPORecipe) -> None:
    """Print the commands of the rollout servers, and the memory that they take."""
    card, whence = card_gib(recipe)
    share, gpus = recipe.rollout_gpu_memory_utilization, recipe.rollout_tensor_parallel_size
    folder = Path(_model(recipe) or recipe.run_path / "sft" / "merged")
    commands = [shlex.join(server_command(recipe, a, folder)) for a in recipe.rollout_servers if rollout_gpus(recipe)]
    lines = {
        "rollout": f"{recipe.rollout}: {len(commands)} servers with {gpus} GPUs each"
        if commands
        else f"{recipe.rollout}: no server",
        "memory per GPU": f"{share * card:,.1f} of {card:,.1f} GiB ({whence}), by rollout_gpu_memory_utilization",
    }
    _print(lines, commands)


def rollout_gpus(recipe: GRPORecipe) -> int:
    """Return how many GPUs the rollout servers take; 0 if the trainer samples itself."""
    if recipe.rollout in ("transformers", "trl_colocate"):
        return 0
    return len(recipe.rollout_servers) * recipe.rollout_tensor_parallel_size


def hours_of(recipe: SFTRecipe | GRPORecipe, found: Estimate, processes: int = 1) -> tuple[float, float, float]:
    """Return the hours of training, those of rollouts, which come in turn with it, and the GPU-hours of both."""
    training, rollouts, servers = gpu_hours(found.flops, recipe) / processes, 0.0, 0
    if isinstance(recipe, GRPORecipe):
        servers = rollout_gpus(recipe)
        rollouts = found.written / recipe.rollout_tokens_per_second / (servers or processes) / 3600
    return training, rollouts, (training + rollouts) * (processes + servers)


def _model(recipe: SFTRecipe | GRPORecipe) -> str | None:
    """The model that is trained; None for a stage-2 model that is not made yet."""
    merged = recipe.run_path / "sft" / "merged"
    return recipe.model_name_or_path or (str(merged) if merged.is_dir() else None)


def _batch(recipe: SFTRecipe | GRPORecipe, found: Estimate, processes: int, is_prepared: bool) -> str:
    size, accumulated = map(recipe.trainer_value, ("per_device_train_batch_size", "gradient_accumulation_steps"))
    says = f"{size} x {accumulated} accumulated x {processes} processes"
    if isinstance(recipe, GRPORecipe):
        k = recipe.trainer_value("num_generations")
        odd = (
            f", WHICH DOES NOT DIVIDE by num_generations {k}"
            if found.batch % k
            else f", {found.batch / k:g} prompts x {k}"
        )
        together = of_grpo.prompts_per_batch(recipe)
        return f"{says} = {found.batch:,.0f} completions{odd}; {size} completions at once, of {together:.1f} prompts"
    unit = f"packs of {recipe.pack_tokens:,} tokens" if recipe.pack_tokens else "rows (users, if they share a prompt)"
    return f"{says} {unit}" + (f" = {found.batch:.1f} rows on average" if is_prepared else "")


def _work(
    recipe: SFTRecipe | GRPORecipe, found: Estimate, lengths: Lengths, how: str, processes: int
) -> dict[str, str]:
    quantiles = " / ".join(f"{q:,.0f}" for q in np.percentile(lengths["direct"][:, 0], (10, 50, 90, 100)))
    training, rollouts, together = hours_of(recipe, found, processes)
    lines = {
        "rows": ", ".join(f"{count:,.0f} {name}" for name, count in found.rows.items()),
        "steps": f"{found.steps:,}",
        "prompts": f"{quantiles} tokens at 10 / 50 / 90 / 100 %, counted by {how}",
        "tokens": f"{found.tokens:,.0f} of rows, {found.computed:,.0f} computed",
        "FLOPs": f"{found.flops:.3g}",
        "training": f"{training:,.2f} h at {recipe.gpu_utilization:.0%} of {recipe.gpu_tflops:g} TFLOP/s [assumed: "
        "gpu_utilization, gpu_tflops]",
    }
    if isinstance(recipe, GRPORecipe):
        rate = f"{recipe.rollout_tokens_per_second:,.0f} tokens/s per GPU [assumed: rollout_tokens_per_second]"
        lines["rollouts"] = f"{found.written:,.0f} tokens, {rollouts:,.2f} h at {rate}, in turn with training"
    return lines | {"GPU-hours": f"{together:,.2f}"}


def _memory(recipe: SFTRecipe | GRPORecipe, found: Estimate) -> dict[str, str]:
    card, whence = card_gib(recipe)
    needed = sum(found.memory.values())
    parts = ", ".join(f"{part} {size:.2f}" for part, size in found.memory.items())
    lines = {"memory per GPU": f"{needed:.1f} GiB for {found.at_once:,} tokens at once: {parts}"}
    fits = f"it fits {card:.0f} GiB ({whence})"
    if needed > 0.95 * card:
        remedy = "set gradient_checkpointing to true, or lower pack_tokens or per_device_train_batch_size"
        fits = f"IT DOES NOT FIT {card:.0f} GiB ({whence}): {remedy}"
    lines["fits"] = fits
    if isinstance(recipe, GRPORecipe) and recipe.rollout != "transformers":
        share = recipe.rollout_gpu_memory_utilization * card
        beside = "fits too" if needed + share <= 0.95 * card else "DOES NOT FIT"
        lines["vLLM's share"] = f"{share:.1f} GiB on each of its GPUs; on the GPU of a trainer it {beside}"
    return lines


def _print(lines: Mapping[str, str], commands: Sequence[str]) -> None:
    width = max(map(len, lines))
    shown = [f"{name.ljust(width)}  {says}" for name, says in lines.items()]
    show("\n".join([*shown, "", *commands]).rstrip())
