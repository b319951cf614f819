"""Stage 3b: the rollout servers with the stage-2 model (grpo_step1.sh).

Starts those of `rollout_servers` that are this machine's. The process becomes the last one; the others are its children
and end with it. Model and addresses come from the same grpo.yaml as the trainer's. Whoever reaches a server can load
adapters into it: bind it to loopback or a private network only.
"""

from __future__ import annotations

import importlib.util
import logging
import shlex
import sys
from collections.abc import Sequence

from twice_rec.config import GrpoRecipe, load_training_recipe
from twice_rec.errors import InputError
from twice_rec.stages.command_line import run_stage
from twice_rec.stages.lifecycle import OWNED_BY_STAGES, grpo_start

logger = logging.getLogger("serve")


def serve(loaded: tuple[GrpoRecipe, dict]) -> None:
    """Run the servers."""
    from twice_rec.grpo.rollout.vllm_command import become_server

    recipe, _ = loaded
    if recipe.rollout in ("transformers", "trl_colocate"):
        logger.info("rollout is %s: the trainer needs no server; go on with grpo_step2.sh", recipe.rollout)
        return
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vllm is not installed; pip install -r requirements-gpu.txt, or use --rollout transformers")
    model = grpo_start(recipe)
    step2 = f"bash grpo_step2.sh {shlex.join(sys.argv[2:])}"
    become_server(recipe, model, f"start the training with: {step2}; it waits for the servers")


def load(path: str, flags: Sequence[str]) -> tuple[GrpoRecipe, dict]:
    """Read grpo.yaml."""
    from trl import GRPOConfig

    return load_training_recipe(path, GrpoRecipe, GRPOConfig, flags, OWNED_BY_STAGES)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage("serve", GrpoRecipe, load, serve, arguments)


if __name__ == "__main__":
    sys.exit(main())
