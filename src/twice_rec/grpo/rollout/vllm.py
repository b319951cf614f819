"""Rollouts from vLLM servers, which get each new policy as a LoRA adapter; training waits for a server that is down."""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase, TrainerCallback

from twice_rec.errors import InputError
from twice_rec.grpo.recipe import GRPORecipe, RolloutConfig
from twice_rec.grpo.rollout.base import Group, Rollouts
from twice_rec.grpo.rollout.vllm_client import PolicyServer, ServerDown, ServerFacts, base_name
from twice_rec.grpo.trl_private import metrics, save_adapter, save_checkpoint, take_the_place_of_vllm
from twice_rec.llm.generation import Completion
from twice_rec.llm.tokens import encode_chat, stop_token_ids

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 2.0  # between two tries
SAY_SECONDS = 30.0  # between two warnings that a server is down
QUIET_STEPS = 20  # between two warnings of a gap


class ServerGone(InputError):
    """A server did not come back in time."""


class Patience:
    """Repeats requests to servers that are down for `seconds` from the first failure on, and says so now and then."""

    def __init__(self, seconds: float):
        self._seconds, self._lock = seconds, threading.Lock()
        self._said = -SAY_SECONDS  # time of the last warning

    def retry(self, address: str, request: Callable[[], T], prepare: Callable[[], object] = lambda: None) -> T:
        """Make a request until the server answers it, with `prepare` before each repetition; return its answer.

        Raises:
            ServerGone: if the server does not answer in time.
        """
        since = None
        while True:
            try:
                if since is not None:
                    prepare()
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
                            f"the rollout server at {address} does not answer ({error}); waiting up to "
                            f"{self._seconds:g} s (rollout_wait_seconds) for grpo_step1.sh to start it"
                        )
                time.sleep(min(RETRY_SECONDS, self._seconds))


def await_servers(config: RolloutConfig, model_folder: Path) -> list[PolicyServer]:
    """Return the recipe's servers when all of them answer and have the base model in `model_folder`.

    Raises:
        InputError: if one does not answer in time, or has another base model.
    """
    base, patience = base_name(model_folder), Patience(config.rollout_wait_seconds)
    servers = [PolicyServer(address, config.rollout_timeout_seconds) for address in config.rollout_servers]
    for server in servers:
        try:
            facts = patience.retry(server.address, partial(server.facts, base))
        except ServerGone as error:
            raise InputError(f"{error}. Start it with grpo_step1.sh and this recipe, then this again") from None
        logger.info("rollout server %s: vLLM %s, %s", server.address, facts.version, base)
    return servers


class ServerRollouts(Rollouts, TrainerCallback):
    """vLLM servers sample. Every group is one request to one server, so that its completions share the prompt's cache.

    Before a step's first completions the adapter is saved, and every server loads it under a new name. Each request
    asks for the policy by that name, so neither a completion of another policy nor a cached prefix of one can come
    back. If a server ends, training waits for it, gives it the adapter again, and asks again for what is missing.

    Making one waits for the servers, and raises what `await_servers` raises.
    """

    def __init__(self, recipe: GRPORecipe, tokenizer: PreTrainedTokenizerBase, model_folder: Path):
        super().__init__(tokenizer, recipe.seed)
        self._recipe, self._base = recipe, base_name(model_folder)
        self._policy: str | None = None  # name of the newest adapter on the servers, and of its folder
        self._warned = -QUIET_STEPS  # step of the last warning of a gap
        self._patience = Patience(recipe.rollout_wait_seconds)
        self._servers = await_servers(recipe, model_folder)

    def attach(self, trainer: Any) -> None:
        """Take the place of TRL's vLLM in the trainer, and try out the adapter as it is now.

        Raises:
            InputError: if a server takes too few tokens, refuses the adapter, or gives other logprobs than it should.
        """
        self._trainer = trainer
        self._stop = stop_token_ids(trainer.accelerator.unwrap_model(trainer.model), self._tokenizer)
        self._sampling = sampling_values(trainer.args)
        self._folder = Path(self._recipe.rollout_adapter_dir or Path(trainer.args.output_dir) / "policy").resolve()
        self._run = broadcast_object_list([uuid.uuid4().hex[:8]])[0]
        take_the_place_of_vllm(trainer, self)
        trainer.add_callback(self)
        if not trainer.vllm_importance_sampling_correction:
            logger.warning("vllm_importance_sampling_correction is false: rollout_logprob_gap is not watched either")
        facts = [(server, server.facts()) for server in self._servers]
        self._check_lengths(facts)
        if trainer.is_world_process_zero():
            for server, fact in facts:
                for name, root in fact.adapters.items():
                    if Path(root).parent == self._folder:  # left by a run that was killed
                        server.unload(name)
            shutil.rmtree(self._folder, ignore_errors=True)
        self.sync_weights()
        for server in self._servers:
            self._try_out(server)
        sampling = {**self._sampling, "stop_token_ids": self._stop}
        logger.info("the rollout servers take the adapter; sampling: %s", sampling)

    def _check_lengths(self, facts: Sequence[tuple[PolicyServer, ServerFacts]]) -> None:
        """Compare each server's limit with the longest prompt and completion."""
        prompts, completion = self._trainer.train_dataset["prompt"], self._trainer.max_completion_length
        longest = self._recipe.max_prompt_tokens or max(len(encode_chat(self._tokenizer, p)) for p in prompts)
        for server, fact in facts:
            if fact.max_model_len < longest + completion:
                raise InputError(
                    f"{server} takes {fact.max_model_len} tokens, but the longest prompt has {longest} and a "
                    f"completion up to {completion}; start it with --rollout_max_model_len {longest + completion}, or "
                    "lower max_prompt_tokens or max_completion_length"
                )

    def _try_out(self, server: PolicyServer) -> None:
        """Sample one token with all others ruled out: taken after top-k, as it must be, its probability is 1."""
        policy = self._policy_of(self._trainer.state.global_step)
        prompt = encode_chat(self._tokenizer, [{"role": "user", "content": "?"}])
        only = {**self._sampling, "max_tokens": 1, "top_k": 1}
        (completion,) = self._retry(server, lambda: server.complete(policy, prompt, 1, self._stop, only))
        if completion.logprobs[0] < -0.01:
            raise InputError(
                f"{server} returns logprobs from before temperature and top-k; start it with --logprobs-mode "
                "processed_logprobs, as grpo_step1.sh does"
            )

    def sync_weights(self) -> None:
        """Give the servers the policy as it is now. TRL calls this before the first completions after a step."""
        started, old, new = time.perf_counter(), self._policy, self._name(self._trainer.state.global_step)
        if new == old:
            return
        self._policy = new
        save_adapter(self._trainer, self._folder / new)
        with self._ending_together():
            if self._trainer.is_world_process_zero():
                for server in self._servers:
                    self._retry(server, partial(server.load, new, self._folder / new))
                if old is not None:
                    self._forget(old, self._folder / old)
        self._sync_seconds = time.perf_counter() - started

    def _forget(self, policy: str, folder: Path) -> None:
        for server in self._servers:
            with contextlib.suppress(ServerDown):  # if it is down, it has forgotten by itself
                server.unload(policy)
        shutil.rmtree(folder, ignore_errors=True)

    def _name(self, version: int) -> str:
        return f"policy-{self._run}-{version}"

    def _policy_of(self, version: int) -> str:
        """Return the name of the policy on the servers, which must be the one of so many optimizer steps."""
        if self._policy != self._name(version):
            raise RuntimeError(f"the servers have the policy {self._policy}, the trainer is at version {version}")
        return self._policy

    def _sample(self, groups: Sequence[Group], trainer: Any, version: int, call: int) -> list[list[Completion]]:
        policy = self._policy_of(version)

        def ask(group: Group) -> list[Completion]:
            server = self._servers[group.number % len(self._servers)]
            # vLLM adds a completion's place in the request to its seed; a group's first place in the step comes before,
            # so that all completions of a step have seeds of their own, also if a group is split over requests.
            seed = {"seed": self._seed_of(version) + group.first} if self._recipe.rollout_seeds else {}
            count, sampling = len(group.positions), {**self._sampling, **seed}
            return self._retry(server, lambda: server.complete(policy, group.prompt_ids, count, self._stop, sampling))

        with self._ending_together(), ThreadPoolExecutor(len(groups)) as pool:
            return list(pool.map(ask, groups))

    def _retry(self, server: PolicyServer, request: Callable[[], T]) -> T:
        """Make a request until the server answers; before each repetition the server gets the policy again."""

        def prepare() -> None:
            server.facts(self._base)
            policy = self._policy_of(self._trainer.state.global_step)
            server.load(policy, self._folder / policy)

        return self._patience.retry(server.address, request, prepare)

    @contextlib.contextmanager
    def _ending_together(self) -> Iterator[None]:
        """If any process loses its server within, save and raise in every process."""
        gone = None
        try:
            yield
        except ServerGone as error:
            gone = str(error)
        reasons = [reason for reason in gather_object([gone]) if reason]
        if not reasons:
            return
        step = self._trainer.state.global_step
        if step and not (Path(self._trainer.args.output_dir) / f"checkpoint-{step}").exists():
            save_checkpoint(self._trainer)
        saved = f"Step {step} is saved" if step else "No step was done yet"
        raise InputError(
            f"{reasons[0]}. {saved}. Start the server again with grpo_step1.sh and go on with: bash grpo_step2.sh "
            f"{shlex.join(sys.argv[2:])}"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Log the gap between the servers' and the trainer's logprobs, and warn of a large one."""
        gaps = metrics(self._trainer).get("sampling/sampling_logp_difference/mean")
        if not gaps:
            return
        gap, step, limit = gaps[-1], state.global_step, self._recipe.rollout_logprob_gap
        metrics(self._trainer)["rollout/logprob_gap"].append(gap)
        if gap > limit and step - self._warned >= QUIET_STEPS:
            self._warned = step
            logger.warning(
                f"step {step}: the server's logprobs are {gap:.3g} per token from the trainer's, above "
                f"rollout_logprob_gap {limit:g}: another precision, another base model, or an adapter that did not "
                "arrive"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Take the last policy from the servers."""
        if self._policy is not None and self._trainer.is_world_process_zero():
            self._forget(self._policy, self._folder)


def sampling_values(arguments: Any) -> dict[str, Any]:
    """Return every sampling value of a request, from TRL's configuration, so that no server default decides."""
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
