"""Stage 3b: the rollout server with the stage-2 model, on GPUs of its own (grpo_step1.sh).

Becomes vLLM's OpenAI-compatible server with the NCCL weight-transfer engine that TRL's server mode uses. Host, port and
model come from the same grpo.yaml as the trainer's. The server's development endpoints change its weights: bind it to
loopback or a private network only.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence

from twice_rec.artifacts import InputError
from twice_rec.config import GrpoRecipe, load_training_recipe
from twice_rec.stages.lifecycle import OWNED_BY_STAGES, grpo_start, run_stage

logger = logging.getLogger("serve")


def server_command(recipe: GrpoRecipe) -> list[str]:
    """The server's command line."""
    model = grpo_start(recipe)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", recipe.rollout_host, "--port", str(recipe.rollout_port), "--dtype", recipe.dtype]
    command += ["--tensor-parallel-size", str(recipe.rollout_tensor_parallel_size)]
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    command += [
        "--enable-prefix-caching",
        "--enable-scale-out",
        "--weight-transfer-config",
        json.dumps({"backend": "nccl"}),
    ]
    if recipe.rollout_max_model_len is not None:
        command += ["--max-model-len", str(recipe.rollout_max_model_len)]
    return command


def serve(loaded: tuple[GrpoRecipe, dict]) -> None:
    """Start the server in this process's place."""
    recipe, _ = loaded
    if recipe.rollout == "transformers":
        logger.info("rollout is transformers: the trainer samples itself and needs no server; go on with grpo_step2.sh")
        return
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vllm is not installed; pip install -r requirements-gpu.txt, or use --rollout transformers")
    command = server_command(recipe)
    logger.info("%s", shlex.join(command))
    os.execve(sys.executable, command, {**os.environ, "VLLM_SERVER_DEV_MODE": "1"})


def load(path: str, flags: Sequence[str]) -> tuple[GrpoRecipe, dict]:
    """Read grpo.yaml."""
    from trl import GRPOConfig

    return load_training_recipe(path, GrpoRecipe, GRPOConfig, flags, OWNED_BY_STAGES)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage("serve", GrpoRecipe, load, serve, arguments)


if __name__ == "__main__":
    sys.exit(main())
