"""Starting vLLM servers as child processes that never outlive their launcher."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twice_rec.config import GrpoRecipe
from twice_rec.errors import InputError
from twice_rec.grpo.rollout.vllm_client import PolicyServer, ServerDown, base_name

logger = logging.getLogger(__name__)

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes

# Ends a process group once the launcher has let go of the pipe, be it by SIGKILL.
_WATCHER = """
import os, signal, sys, time
sys.stdin.read()
group = int(sys.argv[1])
for number in (signal.SIGTERM, signal.SIGKILL):
    try:
        os.killpg(group, number)
        for _ in range(100):
            time.sleep(0.1)
            os.killpg(group, 0)
    except ProcessLookupError:
        break
"""


def server_command(recipe: GrpoRecipe, address: str, model_folder: Path) -> list[str]:
    """The command line of one server.

    `trl_server` becomes the server of TRL's server mode: with the NCCL engine, without adapters.
    """
    host, _, port = address.rpartition(":")
    flags: dict[str, Any] = {
        "model": str(model_folder),
        "served_model_name": base_name(model_folder),
        "host": host,
        "port": port,
        "dtype": recipe.dtype,
        "seed": recipe.seed,
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
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *_words(flags | recipe.rollout_server_args)]


def _words(flags: Mapping[str, Any]) -> Iterator[str]:
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif value is not None:
            yield from (f"--{flag}", value if isinstance(value, str) else json.dumps(value))


def server_environment(recipe: GrpoRecipe, number: int, servers: int) -> dict[str, str]:
    """The environment of server `number` of this machine's `servers`: switches, and its share of the GPUs."""
    variables = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": str(recipe.rollout_cpu_kvcache_gib)}
    switch = "VLLM_SERVER_DEV_MODE" if recipe.rollout == "trl_server" else "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    variables[switch] = "1"
    if servers > 1:
        size = recipe.rollout_tensor_parallel_size
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = given.split(",") if given else [str(index) for index in range(servers * size)]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * size : (number + 1) * size])
    return variables


def addresses_here(addresses: Sequence[str]) -> list[str]:
    """Those whose host is this machine.

    Raises:
        InputError: where there is none, or its port is taken.
    """
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


def run_servers(recipe: GrpoRecipe, model_folder: Path, when_ready: str) -> None:
    """Run this machine's servers until one of them ends or the launcher is stopped, by whatever signal.

    Args:
        when_ready: logged once all answer.

    Raises:
        InputError: where an address is taken, or a server ends.
    """
    addresses = addresses_here(recipe.rollout_servers)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.ExitStack() as stack:
        processes = {}
        for number, address in enumerate(addresses):
            command = server_command(recipe, address, model_folder)
            logger.info("%s", shlex.join(command))
            environment = server_environment(recipe, number, len(addresses))
            processes[address] = stack.enter_context(child_group(command, environment))
        waiting = set(addresses)
        while True:
            for address, process in processes.items():
                if process.poll() is not None:
                    raise InputError(f"the server at {address} ended with status {process.returncode}; see above")
            for address in sorted(waiting):
                with contextlib.suppress(ServerDown):
                    PolicyServer(address, 10).facts()
                    waiting.remove(address)
                    if not waiting:
                        logger.info("%s", when_ready)
            time.sleep(0.5)


@contextlib.contextmanager
def child_group(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """Run a command in a process group of its own, which ends, all of it, with the block or with this process."""
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
    watcher = subprocess.Popen(
        [sys.executable, "-c", _WATCHER, str(process.pid)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        assert watcher.stdin is not None
        watcher.stdin.close()
        process.wait()
        watcher.wait()
