"""One vLLM server that has the policy: requests to it, and the errors that they can end with.

Token ids go over the wire in both directions, and every sampling value is sent: the server's defaults decide nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from twice_rec.errors import InputError
from twice_rec.files import hash_file
from twice_rec.llm.generation import Completion

QUICK_SECONDS = 30.0  # for requests that compute nothing


class ServerDown(InputError):
    """A server does not answer, or not with what it was asked for; later it may."""


class ServerFacts(NamedTuple):
    """What a server says about itself."""

    max_model_len: int  # longest prompt and completion together, in tokens
    adapters: Mapping[str, str]  # name -> folder of each that is loaded
    version: str  # of vLLM


def base_name(model_folder: Path) -> str:
    """Return the name under which grpo_step1.sh serves a model: a hash of its files, or its name on the hub."""
    return f"base-{hash_file(model_folder)[:16]}" if model_folder.is_dir() else str(model_folder)


class PolicyServer:
    """A vLLM server with LoRA adapters that are loaded at run time.

    Each method raises ServerDown if the server does not answer.

    Args:
        address: host:port.
        timeout: seconds for a request that generates or loads.
    """

    def __init__(self, address: str, timeout: float):
        self.address, self._timeout = address, timeout
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy

    def __str__(self) -> str:
        return f"the rollout server at {self.address}"

    def facts(self, base: str | None = None) -> ServerFacts:
        """Return what it serves; `base` names the base model that it must have, None allows any.

        Raises:
            InputError: if it is no vLLM, or has another base model.
        """
        _, models, version = (self._call(path)[1] for path in ("/health", "/v1/models", "/version"))
        try:
            cards = json.loads(models)["data"]
            own = next(card for card in cards if card["parent"] is None)
            adapters = {card["id"]: card["root"] for card in cards if card["parent"] is not None}
            served, facts = own["id"], ServerFacts(own["max_model_len"], adapters, json.loads(version)["version"])
        except (ValueError, KeyError, TypeError, StopIteration):
            raise InputError(
                f"what answers at {self.address} is no vLLM server: {models[:200]}; start one with grpo_step1.sh, or "
                "correct rollout_servers"
            ) from None
        if base not in (None, served):
            raise InputError(
                f"{self} serves {served!r}, the trainer's base model is {base!r}; stop it and start it again with "
                "grpo_step1.sh and this recipe"
            )
        return facts

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter; one that is loaded already stays.

        Raises:
            InputError: if it refuses the adapter, with its own words.
        """
        status, words = self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if status == 200 or "already been loaded" in words:
            return
        if status >= 500:
            self._call("/health")  # down, or only unwilling?
        raise InputError(
            f"{self} does not load the adapter {folder}: HTTP {status}, {words}. It must run with LoRA on and a rank "
            "limit of at least lora_r, as grpo_step1.sh starts it with this recipe, and see this folder under the same "
            "name; on another machine set rollout_adapter_dir to a shared folder"
        )

    def unload(self, name: str) -> None:
        """Forget an adapter, if it is there."""
        status, words = self._call("/v1/unload_lora_adapter", {"lora_name": name})
        if status not in (200, 404):
            raise ServerDown(f"{self.address}: HTTP {status}, {words}")

    def complete(
        self, policy: str, prompt: Sequence[int], num_generations: int, stop: Collection[int], sampling: dict[str, Any]
    ) -> list[Completion]:
        """Sample completions of one prompt, which is token ids.

        Args:
            policy: name of the adapter that must sample.
            stop: the token ids that end a completion.
            sampling: the request's other values: max_tokens, temperature, ...

        Raises:
            ServerDown: also if it ends within a completion, or no longer has the policy.
            InputError: if it refuses the request, or what answered is not the policy.
        """
        body = {"model": policy, "prompt": list(prompt), "n": num_generations, "stop_token_ids": sorted(stop)}
        asks = {"logprobs": 0, "return_token_ids": True, "stream": False}
        status, text = self._call("/v1/completions", {**body, **sampling, **asks})
        if status != 200:
            kind = ServerDown if status == 404 or status >= 500 else InputError
            raise kind(f"{self} answers HTTP {status}, {text}")
        response = json.loads(text)
        if response["model"] != policy:
            raise InputError(
                f"{self} answered as {response['model']!r}, asked for {policy!r}; another program is between, or "
                "changes its adapters: give the run a server of its own"
            )
        choices = sorted(response["choices"], key=lambda choice: choice["index"])
        if len(choices) != num_generations:
            raise ServerDown(f"{self.address} gave {len(choices)} completions instead of {num_generations}")
        return [self._completion(choice, stop, sampling["max_tokens"]) for choice in choices]

    def _completion(self, choice: Mapping[str, Any], stop: Collection[int], max_tokens: int) -> Completion:
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerDown(f"{self.address} ended a completion with {choice['finish_reason']!r}")
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if not ids or len(ids) != len(logprobs):
            raise InputError(
                f"{self} returned {len(ids or [])} tokens and {len(logprobs)} logprobs; it must be vLLM 0.31, started "
                "by grpo_step1.sh"
            )
        truncated = ids[-1] not in stop
        if truncated and len(ids) < max_tokens:
            raise InputError(
                f"{self} ended a completion with token {ids[-1]} after {len(ids)} tokens, which is not one of the stop "
                f"tokens {sorted(stop)}; start it with --generation-config vllm, as grpo_step1.sh does"
            )
        return Completion(ids, logprobs, truncated)

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """Return status and text, of an error the server's own words; a request without a body must succeed."""
        data, url = None if body is None else json.dumps(body).encode(), f"http://{self.address}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=QUICK_SECONDS if body is None else self._timeout) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            words = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                words = str(json.loads(words)["error"]["message"])
            words = words[:500] or str(error.reason)
            if body is None:
                raise ServerDown(f"{url}: HTTP {error.code}, {words}") from None
            return error.code, words
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise ServerDown(f"{url}: {reason}") from None
