"""What `--dry_run` of stages 2, 2b, 3b and 3c prints: processes, batch, steps, tokens, memory, time, and the commands.

Nothing is loaded, written or sent. The recipe is read as for another machine, so a login node without a GPU will do.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

import numpy as np
import yaml

from twice_rec.data.dataset import CATALOG, PreparedData, training_files
from twice_rec.errors import InputError
from twice_rec.evaluation.tables import show
from twice_rec.grpo import estimate as of_grpo
from twice_rec.grpo.one_gpu import SHARE, Card, Trainer, fault, least_gib, remedy, share_gib
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rollout.vllm_command import server_command
from twice_rec.llm.footprint import USABLE, card_gib, gpu_hours, read_shape
from twice_rec.masking import masked_words
from twice_rec.sft import estimate as of_sft
from twice_rec.sft.estimate import Estimate, Lengths, Population
from twice_rec.sft.recipe import SDPORecipe, SFTRecipe
from twice_rec.stages.command_line import without_dry_run

Training = SFTRecipe | SDPORecipe | GRPORecipe
_STAGES: dict[type, str] = {SFTRecipe: "sft", SDPORecipe: "sdpo", GRPORecipe: "grpo"}


def plan_training(recipe: Training) -> None:
    """Print the plan of stage 2, 2b or 3c; InputError if a file that it reads cannot be read, or no shape is found."""
    processes, machines, zero, command = _launch(_STAGES[type(recipe)])
    model, folder = _model(recipe), recipe.run_path / "data"
    shape, is_prepared = read_shape(model, recipe), (folder / CATALOG).exists()
    lines = {"processes": f"{processes}, a GPU each, on {machines} machines; ZeRO stage {zero}"}
    if is_prepared:
        training_files(recipe.run_path)
        lengths, there, how = of_sft.measure(PreparedData(folder), recipe, model)
    else:  # memory is that of the longest rows, and the rest is not shown
        limit = float(recipe.max_prompt_tokens or recipe.trainer_value("max_length") or 8192)
        lengths, there, how = dict.fromkeys(of_sft.TASKS, np.array([[limit, 300.0]])), Population(100, 100, 100), ""
    if isinstance(recipe, SFTRecipe):
        found = of_sft.estimate(recipe, shape, lengths, there, processes, zero)
    elif isinstance(recipe, SDPORecipe):
        found = of_sft.estimate_preferences(recipe, shape, lengths, there.users, processes, zero)
    else:
        found = of_grpo.estimate(recipe, shape, lengths, there.users, processes, zero)
    lines["effective batch"] = _batch(recipe, found, processes, is_prepared)
    if is_prepared:
        lines |= _work(recipe, found, processes)
        quantiles = " / ".join(f"{q:,.0f}" for q in np.percentile(lengths["direct"][:, 0], (10, 50, 90, 100)))
        of_users = f"{len(lengths['direct'])} users, the one with the longest prompt among them"
        lines["prompts"] = f"{quantiles} tokens at 10 / 50 / 90 / 100 % of {of_users}; counted by {how}"
    else:
        lines["steps, tokens, time"] = f"not known before {folder} is there (prepare.sh)"
    if isinstance(recipe, GRPORecipe) and recipe.vllm_is_beside_the_trainer:
        lines |= _memory_with_vllm(recipe, found, Trainer(shape, _longest(lengths), processes, zero))
    else:
        lines |= _memory(recipe, found)
    if isinstance(recipe, GRPORecipe) and recipe.gpus_of_servers and not recipe.rollout_shares_gpu:
        lines["vLLM's share"] = _on_other_gpus(recipe, Trainer(shape, _longest(lengths), processes, zero))
    if isinstance(recipe, GRPORecipe):
        left_out = {
            "cf_hints: its lines of the prompt": recipe.cf_hints > 0,
            f"candidate_loss {recipe.candidate_loss}: its operations and memory": recipe.candidate_loss != "none",
        }
        if any(left_out.values()):
            lines["not counted"] = "; ".join(what for what, is_used in left_out.items() if is_used)
    _print(lines, [command])


def plan_serve(recipe: GRPORecipe) -> None:
    """Print the commands of the rollout servers, and the memory that they take."""
    card, whence = card_gib(recipe)
    folder = Path(_model(recipe) or recipe.run_path / "sft" / "merged")
    commands = [shlex.join(server_command(recipe, a, folder)) for a in recipe.rollout_servers if recipe.gpus_of_servers]
    servers = f"{len(commands)} servers, {recipe.rollout_tensor_parallel_size} GPUs each" if commands else "no server"
    share = f"{recipe.rollout_gpu_memory_utilization * card:.1f} of {card:.1f} GiB ({whence})"
    there = "" if folder.is_dir() else "; sft.sh makes it, and the served name becomes a hash of its files"
    _print({"rollout": f"{recipe.rollout}: {servers}", "memory per GPU": share, "model": f"{folder}{there}"}, commands)


def hours_of(recipe: Training, found: Estimate, processes: int = 1) -> tuple[float, float, float]:
    """Return the hours of training, those of rollouts, which come in turn with it, and the GPU-hours of both."""
    training, rollouts, gpus = gpu_hours(found.flops, recipe) / processes, 0.0, processes
    if isinstance(recipe, GRPORecipe):
        servers = recipe.gpus_of_servers
        rollouts = found.written / recipe.rollout_tokens_per_second / (servers or processes) / 3600
        gpus = max(processes, servers) if recipe.vllm_is_beside_the_trainer else processes + servers
    return training, rollouts, (training + rollouts) * gpus


def _launch(stage: str) -> tuple[int, int, int, str]:
    """Return processes, machines, ZeRO's stage and the command, from what `launch.sh` tells in the environment."""
    import torch

    run = shlex.join(["-m", "twice_rec", stage, *without_dry_run(masked_words(sys.argv[2:]))])
    path, flags = os.environ.get("ACCELERATE_CONFIG"), os.environ.get("ACCELERATE_FLAGS", "").split()
    if not path:
        return 1, 1, 0, f"python {run}"
    try:
        values = dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        words = [word for flag in flags for word in flag.split("=", 1)]
        values |= {flag.removeprefix("--"): value for flag, value in itertools.pairwise(words)}
        processes = int(values.get("num_processes") or torch.cuda.device_count() or 1)
        machines = int(values.get("num_machines") or 1)
        zero = int((values.get("deepspeed_config") or {}).get("zero_stage", 0))
        if processes < 1 or machines < 1:
            raise ValueError(f"{processes} processes on {machines} machines")
    except (OSError, yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"ACCELERATE_CONFIG is {path}, with ACCELERATE_FLAGS {' '.join(flags) or 'empty'}, which cannot be read as "
            f"a configuration of accelerate: {error}; recipes/accelerate_configs has some"
        ) from None
    command = " ".join(["accelerate launch --quiet --config_file", path, *flags, run])
    return processes, machines, zero, command


def _model(recipe: Training) -> str | None:
    """The model that is trained; None for a stage-2 model that is not made yet."""
    merged = recipe.run_path / "sft" / "merged"
    return recipe.model_name_or_path or (str(merged) if merged.is_dir() else None)


def _batch(recipe: Training, found: Estimate, processes: int, is_prepared: bool) -> str:
    size, accumulated = map(recipe.trainer_value, ("per_device_train_batch_size", "gradient_accumulation_steps"))
    says = f"{size} x {accumulated} accumulated x {processes} processes"
    if isinstance(recipe, GRPORecipe):
        k = recipe.trainer_value("num_generations")
        groups = f"{found.batch / k:g} prompts x {k}" if found.batch % k == 0 else f"WHICH DOES NOT DIVIDE by {k}"
        together = of_grpo.prompts_per_batch(recipe)
        return (
            f"{says} = {found.batch:,.0f} completions, {groups}; {size} completions at once, of {together:.1f} prompts"
        )
    if isinstance(recipe, SDPORecipe):
        return f"{says} users, {1 + recipe.num_negatives} answers each"
    unit = f"packs of {recipe.pack_tokens:,} tokens" if recipe.pack_tokens else "rows (users, if they share a prompt)"
    return f"{says} {unit}" + (f" = {found.batch:.1f} rows on average" if is_prepared else "")


def _work(recipe: Training, found: Estimate, processes: int) -> dict[str, str]:
    training, rollouts, together = hours_of(recipe, found, processes)
    lines = {
        "rows": ", ".join(f"{count:,.0f} {name}" for name, count in found.rows.items()),
        "steps": f"{found.steps:,}",
        "tokens": f"{found.tokens:,.0f} of rows, {found.computed:,.0f} computed",
        "FLOPs": f"{found.flops:.3g}",
        "training": f"{training:,.2f} h at {recipe.gpu_utilization:.0%} of {recipe.gpu_tflops:g} TFLOP/s [assumed: "
        "gpu_utilization, gpu_tflops]",
    }
    if isinstance(recipe, GRPORecipe):
        rate = f"{recipe.rollout_tokens_per_second:,.0f} tokens/s per GPU [assumed: rollout_tokens_per_second]"
        lines["rollouts"] = f"{found.written:,.0f} tokens, {rollouts:,.2f} h at {rate}, in turn with training"
    return lines | {"GPU-hours": f"{together:,.2f}"}


def _memory(recipe: Training, found: Estimate) -> dict[str, str]:
    card, whence = card_gib(recipe)
    needed = sum(found.memory.values())
    lines = {"memory per GPU": _parts(found, found.memory)}
    if needed <= USABLE * card:
        lines["fits"] = f"it fits {card:.0f} GiB ({whence})"
    else:
        in_pieces = isinstance(recipe, GRPORecipe) and recipe.share_prefixes
        lower = "tokens_at_once" if in_pieces else "pack_tokens or per_device_train_batch_size"
        use = f"set gradient_checkpointing to true, or lower {lower}"
        lines["fits"] = f"IT DOES NOT FIT {card:.0f} GiB ({whence}): {use}"
    return lines


def _parts(found: Estimate, parts: Mapping[str, float]) -> str:
    listed = ", ".join(f"{part} {size:.2f}" for part, size in parts.items())
    return f"{sum(parts.values()):.1f} GiB for {found.at_once:,} tokens at once: {listed}"


def _longest(lengths: Lengths) -> int:
    return int(lengths["rationale"][:, 0].max())


def _memory_with_vllm(recipe: GRPORecipe, found: Estimate, trainer: Trainer) -> dict[str, str]:
    """Return the lines of a GPU that has a trainer and a vLLM."""
    card = Card(*card_gib(recipe))
    shared = _parts(found, {**found.memory, "vLLM": share_gib(recipe, card)})
    if recipe.trainer_value("vllm_enable_sleep_mode"):
        shared += ", which sleeps while the trainer works"
    if (wrong := fault(recipe, trainer, card)) is None:
        fits = f"it fits {card.gib:.0f} GiB ({card.name}), with vLLM on the same GPU"
    else:
        use = remedy(recipe, trainer, card)
        fits = f"IT DOES NOT FIT {card.gib:.0f} GiB ({card.name}), with vLLM on the same GPU: {wrong}; use {use}"
    return {"memory per GPU": shared, "fits": fits}


def _on_other_gpus(recipe: GRPORecipe, trainer: Trainer) -> str:
    card = Card(*card_gib(recipe))
    says = f"{share_gib(recipe, card):.1f} GiB on each of its GPUs"
    if (least := least_gib(recipe, trainer)) > share_gib(recipe, card):
        enough = ceil(100 * least / card.gib) / 100
        use = f"--{SHARE} {enough:g}" if enough <= USABLE else "a larger GPU, or a higher rollout_tensor_parallel_size"
        says += f", which is TOO SMALL: its weights and least room take {least:.1f} GiB; use {use}"
    return says


def _print(lines: Mapping[str, str], commands: Sequence[str]) -> None:
    width = max(map(len, lines))
    shown = [f"{name.ljust(width)}  {says}" for name, says in lines.items()]
    show("\n".join([*shown, "", *commands]).rstrip())
