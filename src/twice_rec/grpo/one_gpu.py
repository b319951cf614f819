"""Whether stage 3's trainer and a vLLM fit together into the memory of one GPU, by the estimate of `--dry_run`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import floor
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from twice_rec.errors import InputError
from twice_rec.grpo.estimate import estimate
from twice_rec.grpo.recipe import GRPORecipe, micro_batches_add_up
from twice_rec.llm.footprint import GIB, USABLE, WEIGHT_BYTES, Shape, card_gib, this_gpu
from twice_rec.llm.tokens import encode_chat

logger = logging.getLogger(__name__)

_LEAST_BESIDE_WEIGHTS = 4.0  # GiB that a vLLM gets at least beside its weights, for caches and its own kernels
_KEPT = ("weights", "adapter", "gradients", "optimizer")  # parts that a trainer holds while vLLM samples
SHARE, PIECE = "rollout_gpu_memory_utilization", "tokens_at_once"
BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
_OTHER_LOSS = " (another loss: it depends on which completions share a micro-batch)"


class Card(NamedTuple):
    """A GPU on which a trainer and a vLLM are."""

    gib: float
    name: str
    others: float = 0.0  # GiB that neither of the two has


class Trainer(NamedTuple):
    """What decides the memory of a process that trains."""

    shape: Shape
    longest: int  # prompt, in tokens
    processes: int = 1
    zero: int = 0

    def parts(self, recipe: GRPORecipe) -> Mapping[str, float]:
        """Return part -> GiB, see `footprint.memory`."""
        longest = {"rationale": np.array([[self.longest, recipe.trainer_value("max_completion_length")]], float)}
        return estimate(recipe, self.shape, longest, 100, self.processes, self.zero).memory


def free_gib(recipe: GRPORecipe, trainer: Trainer, card: Card) -> float:
    """Return how much of the GPU is left, in GiB, when both have what they need; negative if they do not fit.

    A vLLM that sleeps while the trainer works (`vllm_enable_sleep_mode`) has its share only while it samples.
    """
    parts, share = trainer.parts(recipe), share_gib(recipe, card)
    needed = sum(parts.values()) + share
    if _sleeps(recipe):
        needed = max(sum(parts.values()), share + _kept(parts))
    return USABLE * card.gib - card.others - needed


def share_gib(recipe: GRPORecipe, card: Card) -> float:
    """Return the GiB that vLLM takes of a GPU."""
    return card.gib * recipe.rollout_gpu_memory_utilization


def least_gib(recipe: GRPORecipe, trainer: Trainer) -> float:
    """Return the GiB that vLLM needs of each of its GPUs: its part of the weights, and room for its caches."""
    weights = WEIGHT_BYTES[recipe.dtype] * trainer.shape.parameters / recipe.rollout_tensor_parallel_size / GIB
    return weights + _LEAST_BESIDE_WEIGHTS


def fault(recipe: GRPORecipe, trainer: Trainer, card: Card) -> str | None:
    """Return why the trainer and vLLM cannot both work on the GPU, in words; None if they can."""
    if (least := least_gib(recipe, trainer)) > share_gib(recipe, card):
        return f"vLLM's share is too small: its weights and least room take {least:.1f} GiB"
    return "they do not fit" if free_gib(recipe, trainer, card) < 0 else None


def remedy(recipe: GRPORecipe, trainer: Trainer, card: Card) -> str:
    """Return the settings with which both can work, the fewest changes first, as a user types them.

    Their step is that of the recipe. If their loss is another, this is said.
    """
    present = recipe.rollout_gpu_memory_utilization
    for changes in _changes(recipe, trainer):
        changed = with_changes(recipe, changes)
        parts = trainer.parts(changed)
        beside = _kept(parts) if _sleeps(changed) else sum(parts.values())
        most = floor(100 * (USABLE * card.gib - card.others - beside) / card.gib) / 100
        for share in (present, most):
            if fault(with_changes(changed, {SHARE: share}), trainer, card) is None:
                words = changes if share == present else {**changes, SHARE: share}
                flags = " ".join(f"--{name} {str(value).lower()}" for name, value in words.items())
                return flags + (_OTHER_LOSS if BATCH in changes and not micro_batches_add_up(recipe) else "")
    return "a GPU of its own for vLLM, as in recipes/grocery/grpo.yaml"


def with_changes(recipe: GRPORecipe, changes: Mapping[str, Any]) -> GRPORecipe:
    """Return a copy of the recipe with other values of some keys, ours or TRL's."""
    ours = {name: value for name, value in changes.items() if name in GRPORecipe.model_fields}
    changed = recipe.model_copy(deep=True, update=ours)
    changed.trainer_keys.update({name: value for name, value in changes.items() if name not in ours})
    return changed


def _sleeps(recipe: GRPORecipe) -> bool:
    return recipe.rollout == "trl_colocate" and bool(recipe.trainer_value("vllm_enable_sleep_mode"))


def _kept(parts: Mapping[str, float]) -> float:
    return sum(size for part, size in parts.items() if part in _KEPT)


def _changes(recipe: GRPORecipe, trainer: Trainer) -> Iterator[dict[str, Any]]:
    """Yield changes that take less and less memory, with the same completions in a step and in a sampled batch.

    With shared prompts a micro-batch is computed in pieces, which no loss notices. Else, and where weights are sharded,
    it becomes smaller.
    """
    value = recipe.trainer_value
    smaller: list[dict[str, Any]] = [{}]
    if recipe.share_prefixes and trainer.zero < 3:
        one = trainer.longest + value("max_completion_length")
        bounds = [2**power for power in range(17, 9, -1) if 2**power > one]
        smaller += [{PIECE: bound} for bound in [*bounds, one] if bound < (recipe.tokens_at_once or 2**17)]
    else:
        size, names = value(BATCH), [ACCUMULATION]
        if value("steps_per_generation") is not None:
            names.append("steps_per_generation")  # else that of accumulation, or from generation_batch_size
        for less in (n for n in range(size - 1, 0, -1) if size % n == 0):
            smaller.append({BATCH: less, **{name: value(name) * size // less for name in names}})
    for changes, always in product(smaller, [False] if value("gradient_checkpointing") else [False, True]):
        yield {**({"gradient_checkpointing": True} if always else {}), **changes}


def check_one_gpu(
    recipe: GRPORecipe, config: Any, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Look whether the trainer fits beside the vLLM on its GPU; nothing is done if there is none.

    TRL's colocated vLLM is there by its nature. A server is if `rollout_shares_gpu` says so, or if it is seen from the
    memory that other processes hold.

    Args:
        config: of the model that is trained.
        rows: with `prompt`.

    Raises:
        InputError: if they do not fit, or vLLM's share is too small, with settings that work.
    """
    card = _shared_card(recipe)
    if card is None:
        return
    try:
        shape = Shape.of(config)
    except (ValueError, AttributeError) as error:
        logger.info(
            "whether trainer and vLLM fit on %s is not known, since this model is not counted: %s", card.name, error
        )
        return
    longest = max(len(encode_chat(tokenizer, row["prompt"])) for row in rows)
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)) if zero else 0
    trainer = Trainer(shape, longest, int(os.environ.get("WORLD_SIZE", 1)), stage)
    parts, share = trainer.parts(recipe), share_gib(recipe, card)
    listed = ", ".join(f"{part} {size:.1f}" for part, size in parts.items())
    says = (
        f"on one GPU ({card.name}, {card.gib:.1f} GiB) the trainer takes about {sum(parts.values()):.1f} GiB "
        f"({listed}) and vLLM {share:.1f} ({SHARE} {recipe.rollout_gpu_memory_utilization:g})"
        + (f", others have {card.others:.1f}" if card.others >= 0.1 else "")
    )
    if (wrong := fault(recipe, trainer, card)) is None:
        logger.info("%s: they fit", says)
        return
    again = ", for grpo_step1.sh too" if recipe.rollout != "trl_colocate" else ""
    raise InputError(f"{says}: {wrong}; use {remedy(recipe, trainer, card)}{again}")


def _shared_card(recipe: GRPORecipe) -> Card | None:
    """Return the trainer's GPU if a vLLM is on it too, or will be."""
    if recipe.rollout == "transformers" or not torch.cuda.is_available():
        return None
    gib, name = card_gib(recipe)
    if recipe.rollout == "trl_colocate":
        return Card(gib, name)
    free, total = torch.cuda.mem_get_info(this_gpu())
    taken = (total - free - torch.cuda.memory_reserved(this_gpu())) / GIB
    share = share_gib(recipe, Card(gib, name))
    seen = recipe.vllm_is_beside_the_trainer or taken > share / 2
    return Card(gib, name, max(0.0, taken - share)) if seen else None
