"""The settings of stage 1."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from twice_rec.recipe import Recipe, Settings, key, rule
from twice_rec.records import Verdict

send_key = partial(key, changes_result=False)  # how a request is sent does not change its completion


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
    extra_body: dict[str, Any] = key({}, "more keys of the request, such as {top_p: 0.9} or {seed: 1}")
    max_reasks: int = key(2, "times a malformed or cut-off completion is asked for again, with the fault named", ge=0)

    @rule
    def extra_keys_are_no_keys_of_ours(self) -> str | None:
        if self.extra_body.keys() & {"model", "messages", "stream", "response_format"}:
            return "extra_body may not hold model, messages, stream or response_format; they have keys of their own"
        return None


class ClientConfig(Settings):
    """How requests are sent (annotator openai); null means no limit."""

    base_url: str = send_key("https://api.openai.com/v1", "address of the API")
    api_key_env: str | None = send_key("OPENAI_API_KEY", "environment variable of the API key; null for no key")
    stream: bool = send_key(False, "receive completions piece by piece")
    concurrency: int = send_key(32, "requests in flight at the same time", ge=1)
    timeout_seconds: float = send_key(120.0, "time limit of a whole request", gt=0)
    max_attempts: int = send_key(8, "a request is given up after so many failures", ge=1)
    max_failures_in_a_row: int = send_key(20, "the run stops after so many given-up requests in a row", ge=1)
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

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return the cost in the currency of the prices."""
        return (prompt_tokens * self.price_per_million_input + completion_tokens * self.price_per_million_output) / 1e6


class RationalesRecipe(Recipe, CurationConfig, SamplingConfig, ClientConfig):
    """Stage 1: rationales for training targets, and their curation."""

    annotator: Literal["offline", "release", "openai", "batch"] = key(
        "offline",
        "who writes: offline works by rule, without a model; release takes the authors' released texts; openai asks "
        "any OpenAI-compatible server; batch writes and reads files for OpenAI's Batch API or vLLM's run_batch",
    )
    source_dir: str | None = key(None, "annotator release: folder of the authors' files", changes_result=False)
    max_rationales: int | None = key(None, "number of training users to annotate, drawn by seed; null for all", ge=1)
    self_check: bool = key(False, "openai, batch: the model checks what passes so far against a rubric")
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
        if self.self_check and not self.asks_a_model:
            return f"self_check is true, but annotator {self.annotator} has no model that could check; set it to false"
        return None
