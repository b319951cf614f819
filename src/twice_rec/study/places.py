"""Where the runs of a study go: GPUs, or a share of the processor's cores.

A place is one GPU, or one share of the cores. A run takes one, stage 3 with rollout servers also those of its servers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from twice_rec.errors import InputError
from twice_rec.grpo.recipe import SERVED, GRPORecipe
from twice_rec.study.plan import Run
from twice_rec.study.recipe import StudyRecipe

LOCAL = ("127.0.0.1", "localhost", "0.0.0.0", "[::1]")  # noqa: S104 - compared with, never bound


@dataclass(frozen=True)
class Places:
    """The places of this machine.

    Args:
        gpus: names of the GPUs, as in CUDA_VISIBLE_DEVICES; empty on a machine without.
        processes: how many runs there are at most at the same time.
        threads: of each run.
    """

    gpus: tuple[str, ...]
    processes: int
    threads: int

    @classmethod
    def of_machine(cls, study: StudyRecipe) -> Places:
        """Return the places that a study has here."""
        gpus, cores = visible_gpus(), _cores()
        processes = study.processes or len(gpus) or cores
        threads = max(1, cores // processes)
        if (given := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(given) > 0:
            threads = min(threads, int(given))
        return cls(gpus, processes, threads)

    @property
    def names(self) -> list[str]:
        """All places; with GPUs each is one, as many as there are processes may be taken."""
        return list(self.gpus) if self.gpus else [f"core {number}" for number in range(self.processes)]

    def needed(self, run: Run) -> int:
        """Return how many places a run takes."""
        if not self.gpus:
            return min(1 + (num_servers(run) > 0), self.processes)
        return 1 + gpus_of_servers(run)

    def environment(self, taken: Sequence[str]) -> dict[str, str]:
        """Return the environment of a run in the places that it takes, of which the first is its own."""
        variables = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = taken[0]
        return variables

    def environment_of_servers(self, taken: Sequence[str]) -> dict[str, str]:
        """Return the environment of a run's servers."""
        variables = self.environment(taken)
        if self.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(taken[1:] or taken)
        return variables

    def check(self, runs: Sequence[Run]) -> None:
        """Raise an InputError if a run can never have its places, or if its servers are on another machine."""
        for run in runs:
            if self.gpus and (needed := self.needed(run)) > len(self.gpus):
                raise InputError(
                    f"{run.name} takes {needed} GPUs, a trainer's and {needed - 1} of rollout servers, and this "
                    f"machine has {len(self.gpus)}; name a recipe with rollout_shares_gpu true in runs, such as "
                    "grpo_one_gpu.yaml"
                )
            if num_servers(run) and (far := [a for a in _servers(run) if a.rpartition(":")[0] not in LOCAL]):
                raise InputError(
                    f"{run.name} has rollout_servers {', '.join(far)}, but a study starts the servers itself, on its "
                    "own machine; give 127.0.0.1:PORT (the ports are chosen anew for each run)"
                )


def num_servers(run: Run) -> int:
    """Return how many rollout servers a run needs."""
    return len(_servers(run))


def gpus_of_servers(run: Run) -> int:
    """Return how many GPUs of their own the rollout servers of a run need."""
    recipe = run.recipe
    return recipe.gpus_of_servers if isinstance(recipe, GRPORecipe) and not recipe.rollout_shares_gpu else 0


def flags_of_servers(run: Run) -> list[str]:
    """Return the flags with free ports for a run's servers, so that several runs have theirs at the same time."""
    if not num_servers(run):
        return []
    with_ports = [f"127.0.0.1:{port}" for port in free_ports(num_servers(run) + 1)]
    flags = ["--rollout_servers", f"[{', '.join(with_ports[1:])}]"]
    if isinstance(run.recipe, GRPORecipe) and run.recipe.rollout == "trl_server":
        flags += ["--vllm_group_port", with_ports[0].rpartition(":")[2]]
    return flags


def free_ports(count: int) -> list[int]:
    """Return ports on which nobody listens."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def visible_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that this process may use."""
    import torch

    count = torch.cuda.device_count()
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(given[:count]) if given else tuple(map(str, range(count)))


def _servers(run: Run) -> list[str]:
    recipe = run.recipe
    return recipe.rollout_servers if isinstance(recipe, GRPORecipe) and recipe.rollout in SERVED else []


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
