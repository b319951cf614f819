"""Rollouts from vLLM servers, which get each new policy as a LoRA adapter; servers that are down are waited for."""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase, TrainerCallback

from twice_rec.config import GrpoRecipe
from twice_rec.errors import InputError
from twice_rec.grpo.rollout.base import Group, Rollouts, record
from twice_rec.grpo.rollout.vllm_client import PolicyServer, ServerDown, base_name
from twice_rec.llm.generation import Completion
from twice_rec.llm.tokens import encode_chat, stop_token_ids

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 2.0
SAY_SECONDS = 30.0
QUIET_STEPS = 20  # between two warnings of the same


class ServerGone(InputError):
    """A server did not come back in time."""


class Patience:
    """Repeats requests to servers that are down, for a limited time, saying so now and then.

    Args:
        seconds: the limit, from a request's first failure on.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._said = -SAY_SECONDS
        self._lock = threading.Lock()

    def insist(self, address: str, request: Callable[[], T], again: Callable[[], None] = lambda: None) -> T:
        """The answer to a request.

        Args:
            again: to do before a request is repeated.

        Raises:
            ServerGone: where there is none in time.
        """
        since = None
        while True:
            try:
                if since is not None:
                    again()
                return request()
            except ServerDown as error:
                now = time.monotonic()
                since = now if since is None else since
                if now - since >= self._seconds:
                    raise ServerGone(f"no rollout server at {address} for {self._seconds:g} s: {error}") from None
                with self._lock:
                    if now - self._said >= SAY_SECONDS:
                        self._said = now
                        logger.warning(
                            "the rollout server at %s does not answer (%s); waiting up to %g s "
                            "(rollout_wait_seconds) for grpo_step1.sh to start it",
                            address,
                            error,
                            self._seconds,
                        )
                time.sleep(min(RETRY_SECONDS, self._seconds))


def await_servers(recipe: GrpoRecipe, base: str) -> list[PolicyServer]:
    """The recipe's servers, once all of them answer.

    Args:
        base: see `policy_server.base_name`.

    Raises:
        InputError: where one does not in time, or has another base model.
    """
    servers = [PolicyServer(address, recipe.rollout_timeout_seconds) for address in recipe.rollout_servers]
    patience = Patience(recipe.rollout_wait_seconds)
    for server in servers:
        try:
            facts = patience.insist(server.address, lambda server=server: server.check_base(base))
        except ServerGone as error:
            raise InputError(f"{error}. Start it with grpo_step1.sh and this recipe, then this again") from None
        logger.info("rollout server %s: vLLM %s, %s", server.address, facts.version, facts.base)
    return servers


@dataclass(frozen=True, slots=True)
class Policy:
    """A version of the policy as the servers know it."""

    name: str
    folder: Path
    version: int


class ServerRollouts(Rollouts):
    """vLLM servers answer. Every group is one request to one server, so that its answers share the prompt's cache.

    Before a step's first answers the adapter is saved and loaded on every server under a name of its own, by which the
    completions are asked for: an answer of another policy, or a prefix cached under one, cannot come back. A server
    that ends is waited for, given the adapter again, and asked again for what is missing.

    Args:
        recipe: the servers and time limits.
        tokenizer: of the policy.
        model_folder: the base model, which the servers must have loaded.

    Raises:
        InputError: where a server does not come up in time, or has another base model.
    """

    def __init__(self, recipe: GrpoRecipe, tokenizer: PreTrainedTokenizerBase, model_folder: Path):
        super().__init__(tokenizer, recipe.seed)
        self._recipe = recipe
        self._base = base_name(model_folder)
        self._policy: Policy | None = None
        self._warned = -QUIET_STEPS
        self._patience = Patience(recipe.rollout_wait_seconds)
        self._servers = await_servers(recipe, self._base)

    def attach(self, trainer: Any) -> None:
        """Take the place of TRL's vLLM in the trainer, and try out the adapter as it is now.

        Raises:
            InputError: where a server takes too few tokens, refuses the adapter, or gives other log-probabilities than
                it should.
        """
        from accelerate.utils import broadcast_object_list

        self._trainer = trainer
        self._stop = stop_token_ids(trainer.accelerator.unwrap_model(trainer.model), self._tokenizer)
        self._sampling = sampling_values(trainer.args)
        self._folder = Path(self._recipe.rollout_adapter_dir or Path(trainer.args.output_dir) / "policy").resolve()
        self._run = broadcast_object_list([uuid.uuid4().hex[:8]])[0]
        trainer.vllm_generation, trainer.use_vllm, trainer._last_loaded_step = self, True, -1
        trainer.add_callback(_Watch(self, trainer))
        if not trainer.vllm_importance_sampling_correction:
            logger.warning("vllm_importance_sampling_correction is false: rollout_logprob_gap is not watched either")
        facts = [server.facts() for server in self._servers]
        self._check_lengths([fact.max_model_len for fact in facts])
        if trainer.is_world_process_zero():
            for server, fact in zip(self._servers, facts, strict=True):
                for name, root in fact.adapters.items():
                    if Path(root).parent == self._folder:  # left by a run that was killed
                        server.unload(name)
            shutil.rmtree(self._folder, ignore_errors=True)
        self.sync_weights()
        for server in self._servers:
            self._try_out(server)
        values = {**self._sampling, "stop_token_ids": self._stop}
        logger.info("the rollout servers take the adapter; sampling: %s", values)

    def _check_lengths(self, limits: Sequence[int]) -> None:
        rows, answer = self._trainer.train_dataset, self._trainer.max_completion_length
        longest = self._recipe.max_prompt_tokens or max(
            len(encode_chat(self._tokenizer, row["prompt"])) for row in rows
        )
        for server, limit in zip(self._servers, limits, strict=True):
            if limit < longest + answer:
                raise InputError(
                    f"the rollout server at {server.address} takes {limit} tokens, but the longest prompt has "
                    f"{longest} and an answer up to {answer}; start it with --rollout_max_model_len "
                    f"{longest + answer}, or lower max_prompt_tokens or max_completion_length"
                )

    def _try_out(self, server: PolicyServer) -> None:
        """One token with all others ruled out: has it probability 1, as the correction needs, or that of the model?"""
        assert self._policy is not None
        prompt = encode_chat(self._tokenizer, [{"role": "user", "content": "?"}])
        only = {**self._sampling, "max_tokens": 1, "top_k": 1}
        (sample,) = self._insist(server, lambda: server.complete(self._policy.name, prompt, 1, self._stop, only))
        if sample.logprobs[0] < -0.01:
            raise InputError(
                f"the rollout server at {server.address} returns log-probabilities from before temperature and top-k; "
                "start it with --logprobs-mode processed_logprobs, as grpo_step1.sh does"
            )

    def sync_weights(self) -> None:
        """Give the servers the policy as it is now. TRL calls this before the first answers after a step."""
        trainer, old = self._trainer, self._policy
        version = trainer.state.global_step
        if old is not None and old.version == version:
            return
        started = time.perf_counter()
        name = f"policy-{self._run}-{version}"
        self._policy = Policy(name, self._folder / name, version)
        gone = None
        save_adapter(trainer, self._policy.folder)
        if trainer.is_world_process_zero():
            try:
                for server in self._servers:
                    self._insist(server, lambda server=server: server.load(name, self._policy.folder))
                    if old is not None:
                        with contextlib.suppress(ServerDown):  # then it has forgotten by itself
                            server.unload(old.name)
            except ServerGone as error:
                gone = str(error)
        self._agree(gone)
        if old is not None and trainer.is_world_process_zero():
            shutil.rmtree(old.folder, ignore_errors=True)
        self._sync_seconds = time.perf_counter() - started

    def _sample(self, groups: Sequence[Group], trainer: Any, version: int, call: int) -> list[list[Completion]]:
        policy = self._policy
        assert policy is not None
        if policy.version != version:
            raise RuntimeError(f"the servers have policy version {policy.version}, the trainer is at {version}")

        def ask(group: Group) -> list[Completion]:
            server = self._servers[group.number % len(self._servers)]
            seed = {"seed": self._seed_of(version, call, group.number)} if self._recipe.rollout_seeds else {}
            copies = len(group.positions)
            sampling = {**self._sampling, **seed}
            return self._insist(
                server, lambda: server.complete(policy.name, group.prompt_ids, copies, self._stop, sampling)
            )

        answers, gone = [], None
        try:
            with ThreadPoolExecutor(len(groups)) as pool:
                answers = list(pool.map(ask, groups))
        except ServerGone as error:
            gone = str(error)
        self._agree(gone)
        return answers

    def _insist(self, server: PolicyServer, request: Callable[[], T]) -> T:
        """Make a request until it is answered; a server that ended gets the policy again first."""

        def again() -> None:
            server.check_base(self._base)
            assert self._policy is not None
            server.load(self._policy.name, self._policy.folder)

        return self._patience.insist(server.address, request, again)

    def _agree(self, gone: str | None) -> None:
        """Where any process lost its server, all save and end together."""
        from accelerate.utils import gather_object

        reasons = [reason for reason in gather_object([gone]) if reason]
        if not reasons:
            return
        trainer = self._trainer
        step = trainer.state.global_step
        if step and not (Path(trainer.args.output_dir) / f"checkpoint-{step}").exists():
            trainer._save_checkpoint(trainer.model, trial=None)
        saved = f"step {step} is saved" if step else "no step was done yet"
        raise InputError(
            f"{reasons[0]}. {saved.capitalize()}. Start the server again with grpo_step1.sh and go on with: "
            f"bash grpo_step2.sh {shlex.join(sys.argv[2:])}"
        )

    def watch(self, trainer: Any) -> None:
        """After a step: the gap between the servers' and the trainer's log-probabilities, logged and warned of."""
        gaps = trainer._metrics["train"].get("sampling/sampling_logp_difference/mean")
        if not gaps:
            return
        record(trainer, "rollout/logprob_gap", gaps[-1])
        step, limit = trainer.state.global_step, self._recipe.rollout_logprob_gap
        if gaps[-1] > limit and step - self._warned >= QUIET_STEPS:
            self._warned = step
            logger.warning(
                "step %d: the server's log-probabilities are %.3g a token from the trainer's, above "
                "rollout_logprob_gap %g: another precision, another base model, or an adapter that did not arrive",
                step,
                gaps[-1],
                limit,
            )

    def close(self) -> None:
        """Take the last policy from the servers."""
        if self._policy is not None and self._trainer.is_world_process_zero():
            for server in self._servers:
                with contextlib.suppress(ServerDown):
                    server.unload(self._policy.name)
            shutil.rmtree(self._folder, ignore_errors=True)


class _Watch(TrainerCallback):
    """Tells the rollouts of the trainer's steps and end."""

    def __init__(self, rollouts: ServerRollouts, trainer: Any):
        self._rollouts = rollouts
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the step is logged."""
        self._rollouts.watch(self._trainer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing more will be asked."""
        self._rollouts.close()


def sampling_values(arguments: Any) -> dict[str, Any]:
    """Every sampling value of a request, from TRL's configuration: no server default decides anything."""
    return {
        "max_tokens": arguments.max_completion_length,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k or 0,
        "min_p": arguments.min_p or 0.0,
        "repetition_penalty": arguments.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": False,
        "skip_special_tokens": False,
        **(arguments.generation_kwargs or {}),
    }


def save_adapter(trainer: Any, folder: Path) -> None:
    """Write the LoRA adapter, whole also where DeepSpeed has split it; every process calls this."""
    from trl.distributed import DistributedBackend

    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gathered: contextlib.AbstractContextManager = contextlib.nullcontext()
    if DistributedBackend(trainer.accelerator).is_zero3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(trained)
    with gathered:
        if trainer.is_world_process_zero():
            model.save_pretrained(folder, selected_adapters=["default"])
