"""The command line and environment of a vLLM server, and its start: our process becomes the server."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from twice_rec.errors import InputError
from twice_rec.grpo.recipe import MAX_SERVED_RANK, GRPORecipe
from twice_rec.grpo.rollout import vllm_process
from twice_rec.grpo.rollout.vllm_client import base_name
from twice_rec.random_streams import stream_seed

logger = logging.getLogger(__name__)

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, MAX_SERVED_RANK)  # that vLLM's --max-lora-rank takes


def server_command(recipe: GRPORecipe, address: str, model_folder: Path) -> list[str]:
    """Return the command line of one server; with `trl_server`, of one for TRL's server mode: NCCL, no adapters."""
    host, _, port = address.rpartition(":")
    flags: dict[str, Any] = {
        "model": str(model_folder),
        "served_model_name": base_name(model_folder),
        "host": host,
        "port": port,
        "dtype": recipe.dtype,
        "seed": stream_seed(recipe.seed, "rollout server", address),  # draws if requests have no seeds
        "tensor_parallel_size": recipe.rollout_tensor_parallel_size,
        "distributed_executor_backend": recipe.rollout_executor,
        "max_model_len": recipe.rollout_max_model_len,
        "gpu_memory_utilization": recipe.rollout_gpu_memory_utilization,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
    }
    if recipe.rollout == "trl_server":
        flags |= {"max_logprobs": -1, "enable_scale_out": True, "weight_transfer_config": {"backend": "nccl"}}
    else:
        rank = next(rank for rank in SERVED_RANKS if rank >= recipe.lora_r)
        flags |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 2}  # a policy and the one before it
    return [sys.executable, "-m", vllm_process.__name__, *_words(flags | recipe.rollout_server_args)]


def _words(flags: Mapping[str, Any]) -> Iterator[str]:
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif value is not None:
            yield from (f"--{flag}", value if isinstance(value, str) else json.dumps(value))


def server_environment(recipe: GRPORecipe, number: int, servers: int) -> dict[str, str]:
    """Return the environment of server `number` of this machine's `servers`: switches, and its share of the GPUs."""
    switch = "VLLM_SERVER_DEV_MODE" if recipe.rollout == "trl_server" else "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    variables = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": str(recipe.rollout_cpu_kvcache_gib), switch: "1"}
    if servers > 1:
        size = recipe.rollout_tensor_parallel_size
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = given.split(",") if given else [str(index) for index in range(servers * size)]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * size : (number + 1) * size])
    return variables


def addresses_here(addresses: Sequence[str]) -> list[str]:
    """Return those whose host is this machine; an InputError says that there is none, or that its port is taken."""
    found = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, int(port)))
            found.append(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(
                    f"{address} is taken by another program, perhaps a rollout server that still runs; stop it, or "
                    "choose another port in rollout_servers"
                ) from None
    if not found:
        raise InputError(f"none of rollout_servers ({', '.join(addresses)}) is an address of this machine")
    return found


def become_server(recipe: GRPORecipe, model_folder: Path, then: str) -> NoReturn:
    """Replace this process by the last of this machine's servers; the others are its children and end with it.

    What the user does next, `then`, is logged before. For errors see `addresses_here`.
    """
    addresses = addresses_here(recipe.rollout_servers)
    for number, address in enumerate(addresses):
        command = server_command(recipe, address, model_folder)
        environment = server_environment(recipe, number, len(addresses))
        logger.info("%s", shlex.join(command))
        if number + 1 < len(addresses):
            subprocess.Popen(command, env=environment, preexec_fn=vllm_process.end_with_parent)
    logger.info("%s", then)
    os.execvpe(command[0], command, environment)
