"""One vLLM server that answers with the policy: requests to it, and what they can end with.

Token ids go over the wire in both directions. The server's own defaults decide nothing: every sampling value is sent.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twice_rec.errors import InputError
from twice_rec.files import hash_file
from twice_rec.llm.generation import Completion

QUICK_SECONDS = 30.0  # for requests that compute nothing


class ServerDown(InputError):
    """A server does not answer, or not with what it was asked for; later it may."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says about itself.

    Args:
        base: the name it serves its model under.
        max_model_len: longest prompt and answer.
        adapters: name -> folder of each that is loaded.
        version: of vLLM.
    """

    base: str
    max_model_len: int
    adapters: Mapping[str, str]
    version: str


def base_name(model_folder: Path) -> str:
    """The name under which grpo_step1.sh serves a model: a hash of its files, or its name on the hub."""
    return f"base-{hash_file(model_folder)[:16]}" if model_folder.is_dir() else str(model_folder)


class PolicyServer:
    """A vLLM server with LoRA adapters that are loaded at run time.

    Args:
        address: host:port.
        timeout: seconds for a request that generates or loads.
    """

    def __init__(self, address: str, timeout: float):
        self.address = address
        self._timeout = timeout
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business here

    def facts(self) -> ServerFacts:
        """What it serves.

        Raises:
            ServerDown: where it does not answer.
            InputError: where it is no vLLM.
        """
        self._call("/health", timeout=QUICK_SECONDS)
        texts = [self._call(path, timeout=QUICK_SECONDS) for path in ("/v1/models", "/version")]
        try:
            cards = json.loads(texts[0])["data"]
            base = next(card for card in cards if card["parent"] is None)
            adapters = {card["id"]: card["root"] for card in cards if card["parent"] is not None}
            return ServerFacts(base["id"], base["max_model_len"], adapters, json.loads(texts[1])["version"])
        except (ValueError, KeyError, TypeError, StopIteration):
            raise InputError(
                f"what answers at {self.address} is no vLLM server: {texts[0][:200]}; start one with grpo_step1.sh, or "
                "correct rollout_servers"
            ) from None

    def check_base(self, base: str) -> ServerFacts:
        """Its facts, if it serves this base model.

        Raises:
            ServerDown: where it does not answer.
            InputError: where it serves another.
        """
        facts = self.facts()
        if facts.base != base:
            raise InputError(
                f"the rollout server at {self.address} serves {facts.base!r}, the trainer's base model is {base!r}; "
                "stop it and start it again with grpo_step1.sh and this recipe"
            )
        return facts

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter; one that is loaded already stays.

        Raises:
            ServerDown: where it does not answer.
            InputError: where it refuses the adapter, with its own words.
        """
        try:
            self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except urllib.error.HTTPError as error:
            words = _words(error)
            if "already been loaded" not in words:
                if error.code >= 500:
                    self._call("/health", timeout=QUICK_SECONDS)  # down, rather than unwilling?
                raise InputError(
                    f"the rollout server at {self.address} does not load the adapter {folder}: HTTP {error.code}, "
                    f"{words}. It must run with LoRA on and a rank limit of at least lora_r, as grpo_step1.sh starts "
                    "it with this recipe, and see this folder under the same name; on another machine set "
                    "rollout_adapter_dir to a shared folder"
                ) from None

    def unload(self, name: str) -> None:
        """Forget an adapter, if it is there.

        Raises:
            ServerDown: where it does not answer.
        """
        try:
            self._call("/v1/unload_lora_adapter", {"lora_name": name})
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise ServerDown(f"{self.address}: HTTP {error.code}, {_words(error)}") from None

    def complete(
        self, policy: str, prompt: Sequence[int], copies: int, stop: Collection[int], sampling: Mapping[str, Any]
    ) -> list[Completion]:
        """Sample answers to one prompt.

        Args:
            policy: the adapter that must answer.
            prompt: token ids.
            copies: number of answers.
            stop: the ids that end an answer.
            sampling: the request's other values: max_tokens, temperature, ...

        Raises:
            ServerDown: where it does not answer, ends in mid-answer, or no longer has the policy.
            InputError: where it refuses the request, or what answered is not the policy.
        """
        body = {"model": policy, "prompt": list(prompt), "n": copies, "stop_token_ids": sorted(stop), **sampling}
        try:
            text = self._call("/v1/completions", {**body, "logprobs": 0, "return_token_ids": True, "stream": False})
        except urllib.error.HTTPError as error:
            what = f"the rollout server at {self.address} answers HTTP {error.code}, {_words(error)}"
            if error.code == 404 or error.code >= 500:
                raise ServerDown(what) from None
            raise InputError(what) from None
        response = json.loads(text)
        if response["model"] != policy:
            raise InputError(
                f"the rollout server at {self.address} answered as {response['model']!r}, asked for {policy!r}; "
                "another program stands between, or changes its adapters: give the run a server of its own"
            )
        return [self._sample(choice, stop, sampling["max_tokens"]) for choice in _in_order(response, copies)]

    def _sample(self, choice: Mapping[str, Any], stop: Collection[int], max_tokens: int) -> Completion:
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerDown(f"{self.address} ended an answer with {choice['finish_reason']!r}")
        ids, values = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if not ids or len(ids) != len(values):
            raise InputError(
                f"the rollout server at {self.address} returned {len(ids or [])} tokens and {len(values)} "
                "log-probabilities; it must be vLLM 0.31, started by grpo_step1.sh"
            )
        truncated = ids[-1] not in stop
        if truncated and len(ids) < max_tokens:
            raise InputError(
                f"the rollout server at {self.address} ended an answer with token {ids[-1]} after {len(ids)} tokens, "
                f"which is not one of the stop tokens {sorted(stop)}; start it with --generation-config vllm, as "
                "grpo_step1.sh does"
            )
        return Completion(ids, values, truncated)

    def _call(self, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=timeout or self._timeout) as response:
                return response.read().decode()
        except urllib.error.HTTPError as error:
            if body is None:
                raise ServerDown(f"http://{self.address}{path}: HTTP {error.code}, {_words(error)}") from None
            raise
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise ServerDown(f"http://{self.address}{path}: {reason}") from None


def _in_order(response: Mapping[str, Any], copies: int) -> list[Mapping[str, Any]]:
    choices = sorted(response["choices"], key=lambda choice: choice["index"])
    if len(choices) != copies:
        raise ServerDown(f"{len(choices)} answers instead of {copies}")
    return choices


def _words(error: urllib.error.HTTPError) -> str:
    """The server's own error text."""
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500] or str(error.reason)
