"""The settings of stage 1."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

from twice_rec.masking import PLACEHOLDER
from twice_rec.recipe import Recipe, Settings, is_named, key, rule
from twice_rec.records import Verdict

send_key = partial(key, changes_result=False)  # how a request is sent does not change its completion

REQUEST_KEYS = ("temperature", "max_completion_tokens", "response_format", "stream_options")  # may have other names
_OURS = {"model", "messages", "stream", "response_format"}


class CurationConfig(Settings):
    """Which rationales are kept."""

    accepted_verdicts: list[Verdict] = key(["relevant"], "verdicts of the annotator that pass")
    min_words: int = key(5, "shorter rationales are rejected", ge=0)
    max_words: int = key(300, "longer rationales are rejected")
    max_similarity: float | None = key(
        0.8, "rejected if this similar to an earlier one (Jaccard of three-word runs); null for no limit", ge=0.3, le=1
    )

    @rule
    def some_length_passes(self) -> str | None:
        if self.min_words > self.max_words:
            return f"min_words {self.min_words} and max_words {self.max_words} leave no length that passes"
        return None

    @rule
    def some_verdict_passes(self) -> str | None:
        return None if self.accepted_verdicts else "accepted_verdicts is empty; nothing would pass"


class SamplingConfig(Settings):
    """What a request says besides its messages (annotators openai and batch)."""

    model: str | None = key(None, "name of the model, as the server knows it")
    temperature: float = key(1.0, "temperature of the sampling", ge=0)
    max_tokens: int = key(600, "longest completion in tokens", ge=1)
    structured_outputs: bool = key(True, "let the server enforce the JSON schema; false for servers that cannot")
    request_keys: dict[str, str | None] | None = key(
        None, "keys of the request to rename or leave out: {max_completion_tokens: max_tokens, temperature: null}"
    )
    extra_body: dict[str, Any] = key({}, "more keys of the request, such as {top_p: 0.9} or {seed: 1}", hidden=True)
    max_reasks: int = key(2, "times a malformed or cut-off completion is asked for again, with the fault named", ge=0)

    @rule
    def extra_keys_are_no_keys_of_ours(self) -> str | None:
        taken = _OURS if self.sends_a_schema else _OURS - {"response_format"}
        if self.extra_body.keys() & taken:
            return (
                "extra_body may not hold model, messages, stream or response_format; they have keys of their own "
                "(response_format may be in it if structured_outputs is false)"
            )
        return None

    @rule
    def the_request_has_the_keys_that_get_other_names(self) -> str | None:
        renamed = self.request_keys or {}
        if unknown := sorted(renamed.keys() - set(REQUEST_KEYS)):
            return (
                f"request_keys holds {', '.join(unknown)}; it can rename {', '.join(REQUEST_KEYS)}, or leave them out "
                "by null"
            )
        names = [name for name in renamed.values() if name is not None]
        kept = set(REQUEST_KEYS) - renamed.keys() | _OURS
        if doubled := sorted(set(names) & (kept | self.extra_body.keys()) | {n for n in names if names.count(n) > 1}):
            return f"request_keys gives the name {', '.join(doubled)} to a second key of the request"
        return None

    @property
    def sends_a_schema(self) -> bool:
        """Whether requests hold a JSON schema under `response_format`."""
        renamed = self.request_keys or {}
        return self.structured_outputs and renamed.get("response_format", "response_format") == "response_format"

    def under_their_names(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the request under the names that the server knows, without what it does not know."""
        names = {name: (self.request_keys or {}).get(name, name) for name in body}
        return {str(names[name]): value for name, value in body.items() if names[name] is not None}

    def most_tokens(self) -> int:
        """Return the most tokens that one request can write, as far as its keys tell."""
        limits = [self.extra_body.get(name) for name in ("max_completion_tokens", "max_tokens")]
        choices = [count for name in ("n", "best_of") if isinstance(count := self.extra_body.get(name), int)]
        return max([self.max_tokens, *(n for n in limits if isinstance(n, int))]) * max([1, *choices])


class ClientConfig(Settings):
    """How requests are sent (annotator openai); null means no limit."""

    base_url: str = send_key("https://api.openai.com/v1", "address of the API; it may hold ${NAME}", hidden=True)
    api_key_env: str | None = send_key(
        "OPENAI_API_KEY", "environment variable of the API key; null for no key", hidden=True
    )
    extra_headers: dict[str, str] = send_key(
        {}, "more HTTP headers; ${NAME} stands for that environment variable", hidden=True
    )
    preflight: bool = send_key(True, "ask for the list of models first; false for servers whose list is wrong")
    stream: bool = send_key(False, "receive completions piece by piece")
    concurrency: int = send_key(32, "requests in flight at the same time", ge=1)
    timeout_seconds: float = send_key(120.0, "time limit of a whole request", gt=0)
    max_attempts: int = send_key(8, "a request is given up after so many failures", ge=1)
    max_failures_in_a_row: int = send_key(
        20, "the run stops after so many given-up requests, or rows without a usable answer, in a row", ge=1
    )
    max_unanswered: int = send_key(0, "rows without an answer of the API with which the stage may finish", ge=0)
    backoff_seconds: float = send_key(1.0, "first wait after a failure; it doubles with each further one", ge=0)
    backoff_max_seconds: float = send_key(60.0, "longest wait after a failure, unless the server asks for more", ge=0)
    requests_per_minute: float | None = send_key(None, "limit of requests per minute", ge=1)
    tokens_per_minute: float | None = send_key(None, "limit of tokens per minute, prompts plus completions", ge=1)
    price_per_million_input: float = send_key(0.0, "price of a million prompt tokens", ge=0)
    price_per_million_output: float = send_key(0.0, "price of a million completion tokens", ge=0)
    max_cost: float | None = send_key(None, "hard budget of all completions of this run_dir; null for none", ge=0)

    @rule
    def a_budget_needs_prices(self) -> str | None:
        if self.max_cost is not None and not self.price_per_million_input + self.price_per_million_output > 0:
            return (
                f"max_cost is {self.max_cost}, but price_per_million_input and price_per_million_output are 0; set the "
                "prices, or max_cost to null"
            )
        return None

    @rule
    def the_address_is_one(self) -> str | None:
        url = self.base_url
        try:
            parts, _ = urlsplit(url), urlsplit(PLACEHOLDER.sub("1", url)).port
        except ValueError:
            return "base_url is no address; expected one like https://HOST:PORT/v1"
        if re.search(r"[\s\"'\u2018-\u201f]", url) or "://" not in PLACEHOLDER.sub("://", url):
            return (
                "base_url is no address (it needs http:// or https://, no blanks, no quotes), like https://HOST:PORT/v1"
            )
        if parts.path.rstrip("/").endswith(("/chat/completions", "/responses")):
            return "base_url ends in the path of a request; give what is before it, which usually ends in /v1"
        return None

    @rule
    def headers_can_be_sent(self) -> str | None:
        for name, value in self.extra_headers.items():
            if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
                return "extra_headers holds a name that no header can have"
            if re.search(r"[^\x20-\x7e]", value):
                return f"extra_headers: the value of {name} holds a line break or characters that are not latin"
        return None

    @rule
    def a_variable_is_named_and_not_its_value_given(self) -> str | None:
        name = self.api_key_env
        if name is None or name in os.environ or re.fullmatch(r"[A-Z][A-Z0-9]{0,15}(_[A-Z0-9]{1,15})*", name):
            return None
        return (
            "api_key_env is not the name of an environment variable that is set (capitals, digits and _); export the "
            "API key in one, and give its name, never the key itself"
        )

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return the cost in the currency of the prices."""
        return (prompt_tokens * self.price_per_million_input + completion_tokens * self.price_per_million_output) / 1e6


class RationalesRecipe(Recipe, CurationConfig, SamplingConfig, ClientConfig):
    """Stage 1: rationales for training targets, and their curation."""

    annotator: Literal["offline", "themes", "release", "openai", "batch"] = key(
        "offline",
        "who writes: offline works by rule, for the synthetic domain; themes by rule, for real texts; release takes "
        "the authors' released texts; openai asks any OpenAI-compatible server; batch writes and reads files for "
        "OpenAI's Batch API or vLLM's run_batch",
    )
    source_dir: str | None = key(None, "annotator release: folder of the authors' files", changes_result=False)
    max_rationales: int | None = key(None, "number of training users to annotate, drawn by seed; null for all", ge=1)
    variant: str = key(
        "rationales",
        "name of the results, rationales or rationales_NAME: their folder under run_dir, which sft's rationales names",
        changes_result=False,
    )
    self_check: bool | Literal["pick"] = key(
        False,
        "the annotator checks what passes so far: true against a rubric, with the target shown (openai, batch); pick "
        "by choosing the target from the training candidates, with the rationale and without being told (by rule too)",
    )
    compare_with: str | None = key(None, "folder of another rationale set, whose report is shown beside this one's")
    exemplars: str | None = key(None, "openai, batch: file of worked annotations for the prompt", changes_result=False)
    forward_looking: bool = key(False, "openai, batch: ask for texts that argue to the target without naming it")
    target_words: int = key(150, "openai, batch: length of a rationale that is asked for", ge=1)
    dry_run: bool = key(False, "only say how many calls, tokens and how much money it takes", changes_result=False)

    @property
    def asks_a_model(self) -> bool:
        """Whether a language model writes the rationales."""
        return self.annotator in ("openai", "batch")

    @rule
    def the_release_has_a_folder(self) -> str | None:
        if self.annotator == "release" and self.source_dir is None:
            return "annotator release reads the authors' files: set source_dir, or pass --source_dir FOLDER"
        return None

    @rule
    def model_and_exemplars_are_named(self) -> str | None:
        missing = [name for name in ("model", "exemplars") if self.asks_a_model and getattr(self, name) is None]
        return f"annotator {self.annotator} needs {' and '.join(missing)}, found null" if missing else None

    @rule
    def a_model_checks_itself(self) -> str | None:
        by_rule = self.self_check == "pick" and self.annotator in ("offline", "themes")
        if not self.self_check or self.asks_a_model or by_rule:
            return None
        found = f"self_check is {str(self.self_check).lower()}, but annotator {self.annotator}"
        return f"{found} has no model that could check; set it to false"

    @rule
    def variant_names_rationales(self) -> str | None:
        if not is_named(self.variant, "rationales"):
            return f"variant is {self.variant!r}; it must be rationales or rationales_NAME"
        return None
