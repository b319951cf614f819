"""Who samples a step's completions; the choice by recipe.

Both functions wait for the recipe's servers if they will reach any. They raise an InputError if a server does not come
up in time, or has another base model, or if a GPU is missing that TRL's own vLLM needs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twice_rec.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from twice_rec.grpo.recipe import GRPORecipe
    from twice_rec.grpo.rollout.base import Rollouts


def make_rollouts(recipe: GRPORecipe, tokenizer: PreTrainedTokenizerBase, model_folder: Path) -> Rollouts | None:
    """Return the recipe's rollouts, or None if TRL samples itself; `attach` them to the trainer before it trains."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # TRL says that the hook may change; its version is pinned
    if recipe.rollout == "transformers":
        from twice_rec.grpo.rollout.local import InProcessRollouts

        return InProcessRollouts(tokenizer, recipe.seed)
    if recipe.rollout == "vllm_server":
        from twice_rec.grpo.rollout.vllm import ServerRollouts

        return ServerRollouts(recipe, tokenizer, model_folder)
    return None


def trl_arguments(recipe: GRPORecipe, model_folder: Path) -> dict[str, Any]:
    """Return what TRL's configuration needs if TRL reaches vLLM itself; nothing otherwise."""
    if recipe.rollout == "trl_colocate":
        import torch

        if not torch.cuda.is_available():
            raise InputError(
                "rollout is trl_colocate, a vLLM within the trainer's process, and torch sees no GPU; use --rollout "
                "transformers"
            )
        return {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_tensor_parallel_size": recipe.rollout_tensor_parallel_size,
            "vllm_gpu_memory_utilization": recipe.rollout_gpu_memory_utilization,
            "vllm_max_model_length": recipe.rollout_max_model_len,
        }
    if recipe.rollout == "trl_server":
        from twice_rec.grpo.rollout.vllm import await_servers

        await_servers(recipe, model_folder)
        host, _, port = recipe.rollout_servers[0].rpartition(":")
        return {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": host, "vllm_server_port": int(port)}
    return {}
