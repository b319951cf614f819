"""Stage 3b: the rollout servers with the stage-2 model (grpo_step1.sh).

Becomes a vLLM server, the last of `rollout_servers` that is this machine's; further ones of this machine run beside
it and end with it. If one of those fails, its error is in this terminal, and the trainer waits for it. Model and
addresses come from the same grpo.yaml as the trainer's. Whoever reaches a server can load adapters into it: bind it
to loopback or a private network only.
"""

from __future__ import annotations

import importlib.util
import logging
import shlex
import sys

from twice_rec.errors import InputError
from twice_rec.grpo.recipe import GRPORecipe, start_model
from twice_rec.manifest import Hashes, check_fresh
from twice_rec.run import StageRun
from twice_rec.stages.command_line import command
from twice_rec.stages.plan import plan_serve

logger = logging.getLogger("serve")


def serve(recipe: GRPORecipe) -> None:
    """Start the servers; this process becomes one of them."""
    from twice_rec.grpo.rollout.vllm_command import become_server

    if recipe.rollout in ("transformers", "trl_colocate"):
        logger.info("rollout is %s: the trainer needs no server; go on with grpo_step2.sh", recipe.rollout)
        return
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vllm is not installed; pip install -r requirements-gpu.txt, or use --rollout transformers")
    step2 = f"bash grpo_step2.sh {shlex.join(sys.argv[2:])}"
    start = start_model(recipe)
    check_fresh(start, Hashes())
    StageRun.end_check()
    become_server(recipe, start, f"start the training with: {step2} (it waits for the servers)")


main = command("serve", GRPORecipe, serve, plan_serve)

if __name__ == "__main__":
    sys.exit(main())
