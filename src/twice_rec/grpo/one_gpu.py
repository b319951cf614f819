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
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.llm.footprint import GIB, USABLE, Shape, card_gib
from twice_rec.llm.tokens import encode_chat

logger = logging.getLogger(__name__)

_LEAST_BESIDE_WEIGHTS = 4.0  # GiB that a vLLM gets at least beside its weights, for caches and its own kernels
_KEPT = ("weights", "adapter", "gradients", "optimizer")  # parts that a trainer holds while vLLM samples
SHARE, BATCH, ACCUMULATION = (
    "rollout_gpu_memory_utilization", "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip


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
    parts, share = trainer.parts(recipe), card.gib * getattr(recipe, SHARE)
    needed = sum(parts.values()) + share
    if recipe.rollout == "trl_colocate" and recipe.trainer_value("vllm_enable_sleep_mode"):
        needed = max(sum(parts.values()), share + sum(size for part, size in parts.items() if part in _KEPT))
    return USABLE * card.gib - card.others - needed


def remedy(recipe: GRPORecipe, trainer: Trainer, card: Card) -> str:
    """Return the settings with which both fit, the fewest changes first, as a user types them."""
    present = getattr(recipe, SHARE)
    for changes in _changes(recipe):
        changed = recipe.model_copy(deep=True)
        changed.trainer_keys.update(changes)
        least = (trainer.parts(changed)["weights"] + _LEAST_BESIDE_WEIGHTS) / card.gib
        most = floor(100 * (present + free_gib(changed, trainer, card) / card.gib)) / 100
        for share in (present, most):
            tried = changed.model_copy(deep=True, update={SHARE: share})
            if share >= least and free_gib(tried, trainer, card) >= 0:
                words = changes if share == present else {**changes, SHARE: share}
                return " ".join(f"--{name} {str(value).lower()}" for name, value in words.items())
    return "a GPU of its own for vLLM, as in recipes/grocery/grpo.yaml"


def _changes(recipe: GRPORecipe) -> Iterator[dict[str, Any]]:
    """Yield keys of TRL's with less and less memory, and the same effective batch."""
    checkpointing, size, accumulation = map(recipe.trainer_value, ("gradient_checkpointing", BATCH, ACCUMULATION))
    sizes = [n for n in range(size, 0, -1) if size % n == 0]
    for smaller, always in product(sizes, [False] if checkpointing else [False, True]):
        changes = {"gradient_checkpointing": True} if always else {}
        if smaller < size:
            changes |= {BATCH: smaller, ACCUMULATION: accumulation * size // smaller}
        yield changes


def check_one_gpu(
    recipe: GRPORecipe, config: Any, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Look whether the trainer fits beside the vLLM on its GPU; nothing is done if there is none.

    TRL's colocated vLLM is there by its nature. Of a server it is seen from the memory that other processes hold.

    Args:
        config: of the model that is trained.
        rows: with `prompt`.

    Raises:
        InputError: if they do not fit, with settings that do.
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
    parts, share = trainer.parts(recipe), card.gib * getattr(recipe, SHARE)
    listed = ", ".join(f"{part} {size:.1f}" for part, size in parts.items())
    says = (
        f"on one GPU ({card.name}, {card.gib:.1f} GiB) the trainer takes about {sum(parts.values()):.1f} GiB "
        f"({listed}) and vLLM {share:.1f} ({SHARE} {getattr(recipe, SHARE):g})"
        + (f", others have {card.others:.1f}" if card.others >= 0.1 else "")
    )
    if free_gib(recipe, trainer, card) >= 0:
        logger.info("%s: they fit", says)
        return
    again = ", for grpo_step1.sh too" if recipe.rollout != "trl_colocate" else ""
    raise InputError(f"{says}: they do not fit; use {remedy(recipe, trainer, card)}{again}")


def _shared_card(recipe: GRPORecipe) -> Card | None:
    """Return the trainer's GPU if a vLLM is on it too, or will be."""
    if recipe.rollout == "transformers" or not torch.cuda.is_available():
        return None
    gib, name = card_gib(recipe)
    if recipe.rollout == "trl_colocate":
        return Card(gib, name)
    free, total = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))
    share, taken = gib * getattr(recipe, SHARE), (total - free - torch.cuda.memory_reserved()) / GIB
    return Card(gib, name, max(0.0, taken - share)) if taken > share / 2 else None
