"""The settings behind the recipes, and the one way to read them.

A recipe is a flat YAML file. `load_recipe` checks every key against the dataclasses below, and for the stages that use
a TRL trainer against TRL's own configuration, then applies `--key value` overrides through the same checks. Unknown,
misspelt, duplicate and missing keys, wrong types, values outside a choice and combinations that cannot work are all
reported together. (TRL's own parser accepts 4.5 for an int, values outside a Literal, duplicate keys and abbreviated
flags.)
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import yaml

from twice_rec.errors import InputError

C = TypeVar("C", bound="Recipe")


def key(default: Any, says: str, *, changes_result: bool = True) -> Any:
    """A recipe key: its default, the line `--help` prints, and whether another value makes another result."""
    metadata = {"help": says, "changes_result": changes_result}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(says: str, *, changes_result: bool = True) -> Any:
    """A recipe key without a default."""
    return field(metadata={"help": says, "changes_result": changes_result})


@dataclass(frozen=True)
class Check:
    """A condition across keys. Where a key it reads is itself wrong, it is passed over."""

    holds: Callable[[Any], bool]
    says: Callable[[Any], str]


def at_least(name: str, bound: float) -> Check:
    """`name` is None or at least `bound`."""
    return Check(
        lambda c: getattr(c, name) is None or getattr(c, name) >= bound,
        lambda c: f"{name} is {getattr(c, name)}; it must be at least {bound}",
    )


def within(name: str, low: float, high: float) -> Check:
    """Low <= `name` <= high, or None."""
    return Check(
        lambda c: getattr(c, name) is None or low <= getattr(c, name) <= high,
        lambda c: f"{name} is {getattr(c, name)}; it must be between {low} and {high}",
    )


ListKind = Literal["uniform", "popularity", "hard"]
PromptField = Literal["title", "item_id", "brand", "category", "price", "description", "details"]
ReviewField = Literal["rating", "review_title", "review_text"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The keys every recipe has."""

    run_dir: str = required("folder of all results; {domain} is replaced", changes_result=False)
    domain: str = required("name of the domain, as in the paper")
    seed: int = required("of everything that is drawn in this stage")
    overwrite: bool = key(False, "replace finished results that were made with other settings", changes_result=False)
    wandb: Literal["none", "offline", "online"] = key(
        "none", "log to Weights & Biases; offline needs no account", changes_result=False
    )
    wandb_project: str = key("twice_rec", "its project", changes_result=False)
    wandb_group: str | None = key(None, "its group; by default the name of run_dir", changes_result=False)
    wandb_run_name: str | None = key(None, "its run name; by default the stage", changes_result=False)

    CHECKS: typing.ClassVar[tuple[Check, ...]] = (at_least("seed", 0),)

    @property
    def run_path(self) -> Path:
        """`run_dir` with the domain filled in."""
        return Path(self.run_dir.replace("{domain}", self.domain))

    def settings(self) -> dict[str, Any]:
        """The keys that change the result, for the manifest."""
        return {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("changes_result", True)
        }


@dataclass(frozen=True, kw_only=True)
class PrepareRecipe(Recipe):
    """Stage 0: from a source of purchases to catalogue, sequences and candidate lists."""

    source: Literal["world", "amazon2023", "amazon2014", "atomic", "release"] = required(
        "where the purchases come from"
    )
    source_dir: str | None = key(None, "folder of the source's files; the world needs none", changes_result=False)
    reviews_file: str | None = key(None, "name in source_dir, where it is not the source's usual one")
    metadata_file: str | None = key(None, "name in source_dir, where it is not the source's usual one")
    untitled_items: Literal["drop", "keep"] = key("drop", "items without a title: drop them, or keep the id as title")
    k_core: int = key(5, "every item keeps at least this many users, every user this many items")
    min_history: int = key(5, "users keep at least this many interactions, targets included")
    max_history: int | None = key(20, "users keep their most recent interactions up to this many; null for all")
    split: Literal["leave_one_out", "temporal"] = key("leave_one_out", "how targets are chosen")
    temporal_valid: float = key(0.1, "temporal split: share of interactions in the validation period")
    temporal_test: float = key(0.1, "temporal split: share of interactions in the test period")
    num_candidates: int = key(30, "length of every candidate list, the target included")
    candidate_lists: list[ListKind] = key(["uniform"], "how negatives are drawn; one stored list each")
    hard_pool: int = key(100, "hard negatives are drawn from this many items with the highest item-kNN scores")
    prompt_list: ListKind = key("uniform", "the list that training prompts show")
    prompt_history_items: int | None = key(None, "prompts show this many most recent purchases; null for all")
    prompt_history_fields: list[PromptField] = key(["title", "item_id", "description", "details"], "of past items")
    prompt_review_fields: list[ReviewField] = key(["review_title", "rating"], "of past purchases")
    prompt_candidate_fields: list[PromptField] = key(["title", "item_id", "description", "details"], "of candidates")
    prompt_description_chars: int | None = key(300, "descriptions are cut to this; null for no cut")
    prompt_details_chars: int | None = key(300, "details are cut to this; null for no cut")
    prompt_review_chars: int | None = key(300, "review titles and texts are cut to this; null for no cut")
    world_users: int = key(20_000, "synthetic domain: users")
    world_items: int = key(500, "synthetic domain: items")
    world_taste: float = key(2.2, "strength of taste for diets and brands, which text shows")
    world_complement: float = key(2.4, "strength of complements between categories, which text shows")
    world_cohort: float = key(2.6, "strength of the hidden cohort, which only interactions show")
    world_popularity: float = key(0.5, "strength of the popularity of single items")
    world_brand: float = key(1.0, "strength of the popularity of brands, which only interactions show")

    CHECKS: typing.ClassVar[tuple[Check, ...]] = (
        *Recipe.CHECKS,
        at_least("k_core", 1),
        Check(
            lambda c: c.min_history >= (3 if c.split == "leave_one_out" else 2),
            lambda c: (
                f"min_history is {c.min_history}; {c.split} needs at least "
                f"{3 if c.split == 'leave_one_out' else 2}: a history, and a target for each split"
            ),
        ),
        Check(
            lambda c: c.max_history is None or c.max_history >= max(c.min_history, c.k_core),
            lambda c: (
                f"max_history is {c.max_history}; it must be at least min_history ({c.min_history}) and "
                f"k_core ({c.k_core})"
            ),
        ),
        at_least("num_candidates", 2),
        at_least("hard_pool", 1),
        Check(
            lambda c: "hard" not in c.candidate_lists or c.hard_pool >= c.num_candidates - 1,
            lambda c: (
                f"hard_pool is {c.hard_pool}; num_candidates {c.num_candidates} draws "
                f"{c.num_candidates - 1} negatives from it"
            ),
        ),
        Check(
            lambda c: c.prompt_list in c.candidate_lists,
            lambda c: f"prompt_list is {c.prompt_list}; candidate_lists has only {', '.join(c.candidate_lists)}",
        ),
        Check(
            lambda c: c.source == "world" or c.source_dir is not None,
            lambda c: f"source {c.source} reads files: set source_dir, or pass --source_dir FOLDER",
        ),
        Check(
            lambda c: {"title", "item_id"} <= set(c.prompt_candidate_fields),
            lambda c: (
                f"prompt_candidate_fields is {c.prompt_candidate_fields}; answers name a candidate by title and "
                "item_id, so both must be shown"
            ),
        ),
        Check(
            lambda c: c.temporal_valid > 0 and c.temporal_test > 0 and c.temporal_valid + c.temporal_test < 1,
            lambda c: (
                f"temporal_valid {c.temporal_valid} and temporal_test {c.temporal_test} must be above 0 and "
                "leave a share for training"
            ),
        ),
        at_least("prompt_history_items", 1),
        at_least("prompt_description_chars", 1),
        at_least("prompt_details_chars", 1),
        at_least("prompt_review_chars", 1),
        at_least("world_users", 1),
        at_least("world_items", 50),
    )


@dataclass(frozen=True, kw_only=True)
class RationalesRecipe(Recipe):
    """Stage 1: rationales for training targets, and their curation."""

    annotator: Literal["offline", "release", "openai", "batch"] = key(
        "offline",
        "who writes: offline works by rule, without a model; release takes the authors' released texts; openai asks "
        "any OpenAI-compatible server; batch writes and reads files for OpenAI's Batch API or vLLM's run_batch",
    )
    source_dir: str | None = key(None, "release: folder of the authors' files", changes_result=False)
    max_rationales: int | None = key(None, "annotate this many training users, drawn by seed; null for all")

    # Curation
    accepted_verdicts: list[Literal["relevant", "weak", "irrelevant"]] = key(
        ["relevant"], "the annotator's verdicts that pass"
    )
    min_words: int = key(5, "shorter rationales are rejected")
    max_words: int = key(300, "longer rationales are rejected")
    max_similarity: float | None = key(
        0.8,
        "rationales at least this similar (Jaccard of three-word runs) to an earlier one are rejected; null for none",
    )
    self_check: bool = key(False, "openai, batch: the model checks what passes so far against a rubric")
    compare_with: str | None = key(None, "folder of another rationale set, whose report is shown beside this one's")

    # openai and batch: what is asked
    model: str | None = key(None, "name of the model, as the server knows it")
    exemplars: str | None = key(None, "file of worked annotations for the prompt", changes_result=False)
    forward_looking: bool = key(False, "ask for texts that argue from the history without naming the target as bought")
    target_words: int = key(150, "length of a rationale that is asked for")
    temperature: float = key(1.0, "of sampling")
    max_tokens: int = key(600, "longest answer")
    structured_outputs: bool = key(True, "the server enforces the answer's JSON schema; false for servers that cannot")
    extra_body: dict[str, Any] = key({}, "more keys of the request, such as {top_p: 0.9} or {seed: 1}")
    max_reasks: int = key(2, "malformed and cut-off answers are asked again so often, with the fault named")

    # openai: how it is sent
    base_url: str = key("https://api.openai.com/v1", "address of the API", changes_result=False)
    api_key_env: str | None = key(
        "OPENAI_API_KEY", "environment variable of the API key; null for servers without keys", changes_result=False
    )
    stream: bool = key(False, "receive answers piece by piece", changes_result=False)
    concurrency: int = key(32, "requests at a time", changes_result=False)
    timeout_seconds: float = key(120.0, "for a whole request", changes_result=False)
    max_attempts: int = key(8, "a request is given up after so many failures", changes_result=False)
    max_failures_in_a_row: int = key(
        20, "requests given up with none answered between: the run stops", changes_result=False
    )
    backoff_seconds: float = key(1.0, "first wait after a failure; doubles each time", changes_result=False)
    backoff_max_seconds: float = key(60.0, "longest wait, unless the server asks for more", changes_result=False)
    requests_per_minute: float | None = key(None, "limit; null for none", changes_result=False)
    tokens_per_minute: float | None = key(None, "limit on tokens in and out; null for none", changes_result=False)
    price_per_million_input: float = key(0.0, "price of a million tokens in", changes_result=False)
    price_per_million_output: float = key(0.0, "price of a million tokens out", changes_result=False)
    max_cost: float | None = key(
        None, "hard budget of all answers of this run_dir; null for none", changes_result=False
    )
    dry_run: bool = key(False, "only say how many calls, tokens and how much money it takes", changes_result=False)

    CHECKS: typing.ClassVar[tuple[Check, ...]] = (
        *Recipe.CHECKS,
        *(
            at_least(name, 1)
            for name in (
                "max_rationales", "target_words", "max_tokens", "concurrency", "max_attempts", "max_failures_in_a_row",
                "requests_per_minute", "tokens_per_minute",
            )
        ),
        *(
            at_least(name, 0)
            for name in (
                "temperature", "max_reasks", "backoff_seconds", "backoff_max_seconds", "price_per_million_input",
                "price_per_million_output", "max_cost",
            )
        ),
        within("max_similarity", 0.3, 1),
        Check(
            lambda c: c.timeout_seconds > 0,
            lambda c: f"timeout_seconds is {c.timeout_seconds}; it must be above 0",
        ),
        Check(
            lambda c: 0 <= c.min_words <= c.max_words,
            lambda c: f"min_words {c.min_words} and max_words {c.max_words} leave no length that passes",
        ),
        Check(lambda c: bool(c.accepted_verdicts), lambda c: "accepted_verdicts is empty; nothing would pass"),
        Check(
            lambda c: c.annotator != "release" or c.source_dir is not None,
            lambda c: "annotator release reads the authors' files: set source_dir, or pass --source_dir FOLDER",
        ),
        *(
            Check(
                lambda c, name=name: c.annotator not in ("openai", "batch") or getattr(c, name) is not None,
                lambda c, name=name: f"annotator {c.annotator} needs {name}, found null",
            )
            for name in ("model", "exemplars")
        ),
        Check(
            lambda c: not c.self_check or c.annotator in ("openai", "batch"),
            lambda c: f"self_check is true, but annotator {c.annotator} has no model that could check; set it to false",
        ),
        Check(
            lambda c: c.max_cost is None or c.price_per_million_input + c.price_per_million_output > 0,
            lambda c: (
                f"max_cost is {c.max_cost}, but price_per_million_input and price_per_million_output are 0; set the "
                "prices, or max_cost to null"
            ),
        ),
        Check(
            lambda c: not c.extra_body.keys() & {"model", "messages", "stream", "response_format"},
            lambda c: "extra_body may not hold model, messages, stream or response_format; they have keys of their own",
        ),
    )  # fmt: skip


Baseline = Literal["random", "popularity", "itemknn", "ease"]
RankedList = Literal["uniform", "popularity", "hard", "full"]


@dataclass(frozen=True, kw_only=True)
class SasrecRecipe(Recipe):
    """Stage 3a: SASRec, and the CF baselines beside it."""

    variant: str = key("sasrec", "name of the results: folder under run_dir and under eval/")
    hidden_size: int = key(64, "width")
    inner_size: int = key(256, "width of the feed-forward layers")
    num_layers: int = key(2, "self-attention blocks")
    num_heads: int = key(2, "attention heads")
    dropout: float = key(0.3, "on embeddings, attention weights and block outputs")
    norm: Literal["post", "pre"] = key("post", "LayerNorm after or before each block")
    max_length: int = key(50, "most recent items of a history that the model sees")
    loss: Literal["bce", "gbce", "softmax"] = key("softmax", "over sampled negatives, calibrated so, or all items")
    num_negatives: int = key(1, "bce and gbce: uniform negatives a position, never the user's own items")
    gbce_t: float = key(0.75, "gbce: 0 is bce, 1 removes the sampling's overconfidence")
    epochs: int = key(100, "at most")
    batch_size: int = key(128, "users a step")
    learning_rate: float = key(1e-3, "of Adam")
    weight_decay: float = key(0.0, "of Adam")
    lr_scheduler_type: Literal["constant", "cosine"] = key("constant", "cosine ends at 0 after the last epoch")
    patience: int | None = key(5, "epochs without a better validation NDCG@10 (full) before stopping; null for never")
    num_seeds: int = key(1, "trainings with seed, seed + 1, ...; the first one's model gives the rewards")
    baselines: list[Baseline] = key(["random", "popularity", "itemknn", "ease"], "evaluated beside SASRec")
    lists: list[RankedList] = key(["uniform", "full"], "what is ranked; full is the catalogue without the seen items")
    device: str = key("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one", changes_result=False)
    export_scores: str | None = key(
        None, "write the first seed's test scores to this .npz: float32 [users, items]", changes_result=False
    )

    CHECKS: typing.ClassVar[tuple[Check, ...]] = (
        *Recipe.CHECKS,
        Check(
            lambda c: c.num_heads >= 1 and c.hidden_size % c.num_heads == 0,
            lambda c: f"hidden_size {c.hidden_size} does not divide by num_heads {c.num_heads}",
        ),
        Check(
            lambda c: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", c.variant) is not None,
            lambda c: f"variant is {c.variant!r}; it names folders: letters, digits, _ . -",
        ),
        within("dropout", 0, 0.99),
        within("gbce_t", 0, 1),
        *(
            at_least(name, 1)
            for name in (
                "hidden_size", "inner_size", "num_layers", "max_length", "num_negatives", "epochs", "batch_size",
                "patience", "num_seeds",
            )
        ),
        Check(lambda c: c.learning_rate > 0, lambda c: f"learning_rate is {c.learning_rate}; it must be above 0"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelKeys:
    """How a language model is loaded and what of it is trained; the names are those of TRL's ModelConfig."""

    model_revision: str | None = key(None, "branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = key("bfloat16", "of the weights")
    attn_implementation: str = key("sdpa", "sdpa, chunked_sdpa, eager, flex_attention, ...")
    use_peft: bool = key(True, "train a LoRA adapter; false trains all weights")
    lora_r: int = key(8, "rank of the adapter")
    lora_alpha: int = key(16, "its scale is lora_alpha / lora_r")
    lora_dropout: float = key(0.0, "on the adapter's input")
    lora_target_modules: list[str] = key(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "layers that get an adapter"
    )


MAX_PROMPT_TOKENS = (
    "longer prompts lose the oldest purchases, then text of descriptions; the same value belongs in sft, grpo and "
    "evaluate; null for no limit"
)
ITEM_FIRST = "task 3 names the item before its rationale; the same value belongs in sft, grpo and evaluate"
MODEL_CHECKS = (at_least("lora_r", 1), at_least("lora_alpha", 1), within("lora_dropout", 0, 0.99))

TAKES_MASKS = ("sdpa", "chunked_sdpa", "eager")  # kinds of attention that take a mask of ours, as a tensor


def sharing_takes_masks(*implementations: str) -> Check:
    """Shared prefixes need a kind of attention that takes a mask of their own."""
    return Check(
        lambda c: not c.share_prefixes or c.attn_implementation in implementations,
        lambda c: (
            f"share_prefixes needs attn_implementation {' or '.join(implementations)}, found {c.attn_implementation}; "
            "change it, or set share_prefixes to false"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class SftRecipe(ModelKeys, Recipe):
    """Stage 2: multi-task SFT. All keys of TRL's SFTConfig stand beside these."""

    model_name_or_path: str = required("the base model: a folder, or a name on the hub")
    quantization: Literal["none", "8bit", "4bit"] = key(
        "none", "of the frozen base under an adapter, by bitsandbytes on a GPU (release: 8bit)"
    )
    item_info_rows: int | None = key(None, "rows of task 1 (title -> item); null for all, 0 for none")
    direct_rows: int | None = key(None, "rows of task 2 (history + candidates -> item); null for all, 0 for none")
    rationale_rows: int | None = key(None, "rows of task 3 (the same -> rationale, item); null for all, 0 for none")
    item_info_weight: float = key(1.0, "how often each row of task 1 stands in an epoch; fractions are drawn")
    direct_weight: float = key(1.0, "the same for task 2")
    rationale_weight: float = key(1.0, "the same for task 3")
    curriculum: bool = key(False, "train on the tasks one after another, 1, 2, 3, instead of mixed")
    max_prompt_tokens: int | None = key(None, MAX_PROMPT_TOKENS)
    item_first: bool = key(False, ITEM_FIRST)
    share_prefixes: bool = key(
        False, "compute what the prompts of a user's rows have in common once; batch sizes then count users"
    )
    sample_every: int | None = key(
        None, "write sample answers to samples.jsonl every so many steps; null for never", changes_result=False
    )
    sample_prompts: int = key(4, "prompts of the sample answers", changes_result=False)

    CHECKS: typing.ClassVar[tuple[Check, ...]] = (
        *Recipe.CHECKS,
        *MODEL_CHECKS,
        *(at_least(f"{task}_{of}", 0) for task in ("item_info", "direct", "rationale") for of in ("rows", "weight")),
        *(at_least(name, 1) for name in ("max_prompt_tokens", "sample_every", "sample_prompts")),
        Check(
            lambda c: c.quantization == "none" or c.use_peft,
            lambda c: f"quantization {c.quantization} needs use_peft: quantised weights are not trained",
        ),
        sharing_takes_masks(*TAKES_MASKS),
        Check(
            lambda c: not (c.share_prefixes and c.curriculum),
            lambda c: "curriculum keeps the tasks apart, share_prefixes puts a user's rows together; set one to false",
        ),
        Check(
            lambda c: (
                not c.item_info_rows == c.direct_rows == c.rationale_rows == 0
                and bool(c.item_info_weight or c.direct_weight or c.rationale_weight)
            ),
            lambda c: "item_info_rows, direct_rows and rationale_rows, or their weights, are all 0; nothing is left",
        ),
    )


RewardName = Literal[
    "collaborative", "match", "cf", "structure", "tags", "tags_release", "only_expected_tags", "rank"
]  # fmt: skip

# Results of stage 3: stage3, or stage3_NAME; names that evaluation gives to second rankings are left to it.
_GRPO_VARIANT = re.compile(r"stage3(?:_[A-Za-z0-9.-]+)*(?<!_sampled)(?<!_likelihood)")


def grpo_folder(variant: str) -> str:
    """Folder of a stage-3 variant under run_dir: `grpo` for `stage3`, `grpo_D` for `stage3_D`."""
    return variant.replace("stage3", "grpo", 1)


MAX_SERVED_RANK = 512  # of an adapter, in vLLM


@dataclass(frozen=True, kw_only=True)
class GrpoRecipe(ModelKeys, Recipe):
    """Stage 3: confidence-weighted GRPO. All keys of TRL's GRPOConfig stand beside these."""

    variant: str = key(
        "stage3",
        "name of the results, stage3 or stage3_NAME: folder grpo or grpo_NAME under run_dir, and name in evaluate",
        changes_result=False,
    )
    model_name_or_path: str | None = key(
        None, "the model stage 3 starts from, a folder or a name on the hub; null for the stage-2 model"
    )
    max_prompt_tokens: int | None = key(None, MAX_PROMPT_TOKENS)
    item_first: bool = key(False, ITEM_FIRST)
    train_fraction: float = key(0.15, "share of the training examples that are prompted")
    share_prefixes: bool = key(False, "compute a group's prompt once instead of once a sample; the same loss")
    reward_funcs: list[RewardName] = key(["collaborative", "structure", "tags", "only_expected_tags"], "see rewards.py")
    reward_weights: list[float] = key([4.0, 1.0, 1.0, 1.0], "one a reward, in the same order")
    reward_lambda: float = key(3.0, "Eq. 2: bonus of a confident hit")
    reward_tau: float | None = key(0.3, "Eq. 2: confidence from which on it counts; null to set reward_tau_quantile")
    reward_tau_quantile: float | None = key(None, "tau as a quantile of the confidences of validation candidates")
    reward_rank: Literal["reciprocal_rank", "ndcg"] = key(
        "reciprocal_rank", "what the reward rank makes of the target's rank"
    )
    confidence: Literal["sigmoid", "calibrated", "softmax"] = key("sigmoid", "how SASRec's scores become confidences")
    confidence_debiased: bool = key(False, "remove each item's mean score over users first")
    cf_variant: str = key("sasrec", "the CF model under run_dir that gives the confidences")
    rollout: Literal["transformers", "vllm_server", "trl_server", "trl_colocate"] = key(
        "transformers",
        "who samples: the trainer's own process; vLLM servers that grpo_step1.sh starts, on a CPU or on GPUs, and that "
        "get each policy as a LoRA adapter; such a server that gets full weights by NCCL (TRL's server mode); or a "
        "vLLM inside the trainer (TRL's colocate mode)",
    )
    rollout_servers: list[str] = key(
        ["127.0.0.1:8000"],
        "host:port of each server; grpo_step1.sh starts those whose host is its machine",
        changes_result=False,
    )
    rollout_tensor_parallel_size: int = key(1, "GPUs of a server", changes_result=False)
    rollout_executor: Literal["mp", "ray"] | None = key(
        None, "how a server's GPUs are run; ray for several machines; null lets vLLM choose", changes_result=False
    )
    rollout_max_model_len: int | None = key(None, "longest prompt and answer a server takes", changes_result=False)
    rollout_gpu_memory_utilization: float = key(0.9, "share of a GPU a server takes", changes_result=False)
    rollout_cpu_kvcache_gib: int = key(4, "memory for a server's caches where it runs on a CPU", changes_result=False)
    rollout_server_args: dict[str, Any] = key(
        {}, "more of vLLM's flags, {max_num_seqs: 64, enforce_eager: true}", changes_result=False
    )
    rollout_seeds: bool = key(
        True, "send a seed with each request; a vLLM on a CPU ends at one whose prompt it computes in parts"
    )
    rollout_adapter_dir: str | None = key(
        None, "where policies are written for the servers; null is policy/ beside the results", changes_result=False
    )
    rollout_timeout_seconds: float = key(600.0, "for one request to a server", changes_result=False)
    rollout_wait_seconds: float = key(
        900.0,
        "how long a server that is down is waited for before training is saved and ends; below ddp_timeout",
        changes_result=False,
    )
    rollout_logprob_gap: float = key(
        0.05, "mean difference of server's and trainer's log-probabilities to warn of", changes_result=False
    )
    sample_every: int | None = key(
        None, "show sample completions with their rewards every so many steps; null for never", changes_result=False
    )
    sample_completions: int = key(4, "how many of them", changes_result=False)

    @property
    def folder(self) -> str:
        """Folder of the results under run_dir."""
        return grpo_folder(self.variant)

    CHECKS: typing.ClassVar[tuple[Check, ...]] = (
        *Recipe.CHECKS,
        *MODEL_CHECKS,
        sharing_takes_masks(*TAKES_MASKS, "flex_attention"),
        Check(
            lambda c: _GRPO_VARIANT.fullmatch(c.variant) is not None,
            lambda c: (
                f"variant is {c.variant!r}; it must be stage3 or stage3_NAME, NAME of letters, digits, _ . - and not "
                "sampled or likelihood"
            ),
        ),
        Check(
            lambda c: c.model_revision is None or c.model_name_or_path is not None,
            lambda c: (
                f"model_revision is {c.model_revision}, but model_name_or_path is null: the stage-2 model has no "
                "revisions"
            ),
        ),
        Check(
            lambda c: "rank" not in c.reward_funcs or not c.item_first,
            lambda c: (
                "the reward rank judges the rationale by the item that follows it, but item_first is true: all "
                "completions of a prompt would earn the same; leave rank out of reward_funcs"
            ),
        ),
        Check(
            lambda c: "rank" not in c.reward_funcs or c.attn_implementation in (*TAKES_MASKS, "flex_attention"),
            lambda c: (
                f"reward rank needs attn_implementation {', '.join(TAKES_MASKS)} or flex_attention, found "
                f"{c.attn_implementation}"
            ),
        ),
        *(at_least(name, 1) for name in ("sample_every", "sample_completions")),
        Check(
            lambda c: 0 < c.train_fraction <= 1,
            lambda c: f"train_fraction is {c.train_fraction}; it must be above 0 and at most 1",
        ),
        Check(
            lambda c: len(c.reward_funcs) == len(c.reward_weights),
            lambda c: (
                f"reward_funcs has {len(c.reward_funcs)} names and reward_weights {len(c.reward_weights)} "
                "values; they go in pairs"
            ),
        ),
        Check(lambda c: bool(c.reward_funcs), lambda c: "reward_funcs is empty; there is nothing to optimise"),
        Check(
            lambda c: not c.reward_weights or any(c.reward_weights),
            lambda c: "reward_weights are all 0; there is nothing to optimise",
        ),
        Check(
            lambda c: (c.reward_tau is None) != (c.reward_tau_quantile is None),
            lambda c: (
                f"reward_tau is {c.reward_tau} and reward_tau_quantile {c.reward_tau_quantile}; set one of them "
                "and the other to null"
            ),
        ),
        within("reward_tau", 0, 1),
        within("reward_tau_quantile", 0, 1),
        Check(
            lambda c: bool(c.rollout_servers) and all(re.fullmatch(r"[^:/\s]+:\d{1,5}", s) for s in c.rollout_servers),
            lambda c: f"rollout_servers is {c.rollout_servers}; it must list host:port, 127.0.0.1:8000",
        ),
        Check(
            lambda c: c.rollout != "trl_server" or len(c.rollout_servers) == 1,
            lambda c: f"rollout is trl_server with {len(c.rollout_servers)} rollout_servers; it takes one",
        ),
        Check(
            lambda c: c.rollout != "vllm_server" or (c.use_peft and c.lora_r <= MAX_SERVED_RANK),
            lambda c: (
                f"rollout is vllm_server with use_peft {c.use_peft} and lora_r {c.lora_r}; it sends adapters up to "
                f"rank {MAX_SERVED_RANK}: set use_peft true and a lower rank, or rollout trl_server"
            ),
        ),
        at_least("rollout_tensor_parallel_size", 1),
        at_least("rollout_cpu_kvcache_gib", 1),
        within("rollout_gpu_memory_utilization", 0.01, 1),
        at_least("rollout_timeout_seconds", 1),
        at_least("rollout_wait_seconds", 0),
        at_least("rollout_logprob_gap", 0),
        at_least("max_prompt_tokens", 1),
        at_least("reward_lambda", 0),
    )


def _is_ours(variant: str) -> bool:
    return variant in ("base", "stage2", "oracle") or _GRPO_VARIANT.fullmatch(variant) is not None


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe(Recipe):
    """Stage 4: the same test questions to every variant."""

    variants: list[str] = key(
        ["base", "stage2", "stage3"],
        "base, stage2, stage3 or stage3_NAME (grpo's variant); oracle for the world; or a name in outside_scores",
    )
    model_name_or_path: str | None = key(None, "variant base: the model stage 2 starts from")
    outside_scores: dict[str, str] = key({}, "other models: variant name -> .npz with `scores` [users, items]")
    num_users: int | None = key(None, "LLM variants answer for this many test users, drawn by seed; null for all")
    lists: list[ListKind] = key(["uniform"], "the candidate lists that LLM variants are asked about")
    score_lists: list[RankedList] = key(["uniform", "full"], "what the oracle and outside models rank")
    rankings: list[Literal["likelihood", "sampled"]] = key(
        ["likelihood"],
        "how answers become a ranking; the first keeps the variant's name, the second is <variant>_<ranking>",
    )
    with_rationale: bool = key(True, "ask for a rationale first (task 3), or for the item alone (task 2)")
    num_samples: int = key(5, "sampled: answers a question")
    temperature: float = key(0.9, "sampled")
    top_p: float = key(1.0, "sampled")
    max_prompt_tokens: int | None = key(None, MAX_PROMPT_TOKENS)
    item_first: bool = key(False, ITEM_FIRST)
    max_new_tokens: int = key(300, "longest answer")
    batch_size: int = key(8, "questions at once")
    dtype: Literal["float32", "bfloat16", "float16"] = key("bfloat16", "of the weights")
    attn_implementation: str = key("sdpa", "sdpa, chunked_sdpa, eager, ...")
    device: str = key("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one", changes_result=False)

    CHECKS: typing.ClassVar[tuple[Check, ...]] = (
        *Recipe.CHECKS,
        *(
            at_least(name, 1)
            for name in ("num_users", "num_samples", "max_new_tokens", "batch_size", "max_prompt_tokens")
        ),
        Check(
            lambda c: c.temperature > 0 and 0 < c.top_p <= 1,
            lambda c: f"temperature {c.temperature} must be above 0 and top_p {c.top_p} in (0, 1]",
        ),
        Check(lambda c: bool(c.rankings), lambda c: "rankings is empty; give likelihood, sampled or both"),
        Check(
            lambda c: "base" not in c.variants or c.model_name_or_path is not None,
            lambda c: "variants names base: set model_name_or_path to the model stage 2 starts from",
        ),
        Check(
            lambda c: len(set(c.variants)) == len(c.variants),
            lambda c: f"variants names one twice: {', '.join(c.variants)}",
        ),
        Check(
            lambda c: not any(map(_is_ours, c.outside_scores)),
            lambda c: "outside_scores uses a name of ours (base, stage2, stage3, stage3_..., oracle); choose another",
        ),
        Check(
            lambda c: all(_is_ours(v) or v in c.outside_scores for v in c.variants),
            lambda c: (
                "variants names "
                + ", ".join(v for v in c.variants if not _is_ours(v) and v not in c.outside_scores)
                + "; known are base, stage2, stage3, stage3_NAME, oracle and the names in outside_scores"
            ),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ReportRecipe(Recipe):
    """Stage 5: tables of everything under eval/."""

    other_runs: list[str] = key([], "run folders of other seeds on the same data, averaged with run_dir's")
    comparisons: list[list[str]] = key([], "pairs of variants, [a, b], compared on the users both have")
    comparison_metric: str = key("uniform/hr@1", "the metric of the comparisons")
    bootstrap_samples: int = key(1000, "of the 95 % intervals")

    CHECKS: typing.ClassVar[tuple[Check, ...]] = (
        *Recipe.CHECKS,
        at_least("bootstrap_samples", 100),
        Check(
            lambda c: all(len(pair) == 2 for pair in c.comparisons),
            lambda c: "comparisons holds something that is not a pair [a, b]",
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as a string, for want of a dot; recipes mean the number."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
               r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)  # fmt: skip


@dataclass(frozen=True)
class _Given:
    """One value and where it came from: `line 12` or `--key`."""

    value: Any
    where: str


def load_recipe(path: Path | str, recipe: type[C], overrides: Sequence[str] = ()) -> C:
    """Read a recipe of our own keys.

    Args:
        path: the YAML file.
        recipe: one of the dataclasses above.
        overrides: command-line words, `["--seed", "1", "--lists=[uniform]"]`.

    Raises:
        InputError: one message that lists everything wrong, each with its line or flag.
    """
    given, errors = _read(path, overrides, recipe, ())
    values = _check(given, recipe, errors)
    _raise(path, errors)
    return recipe(**values)


def load_training_recipe(
    path: Path | str,
    recipe: type[C],
    trainer_config: type,
    overrides: Sequence[str] = (),
    owned: Mapping[str, str] = types.MappingProxyType({}),
) -> tuple[C, dict[str, Any]]:
    """Read a recipe in which a TRL configuration's keys stand beside ours.

    Args:
        trainer_config: the dataclass of TRL (SFTConfig, GRPOConfig) that knows the other keys.
        owned: its keys that the stage sets itself -> what to use instead, for the message.

    Returns:
        Our recipe, and the checked keyword arguments for `trainer_config`; the caller builds it, adding `owned`.
    """
    given, errors = _read(path, overrides, recipe, (trainer_config,))
    ours = {f.name for f in dataclasses.fields(recipe)}
    for name in [name for name in given if name in owned and name not in ours]:
        errors.append(f"{given[name].where}: {name} is set by the stage: {owned[name]}")
        del given[name]
    theirs = {name: entry for name, entry in given.items() if name not in ours}
    values = _check({name: entry for name, entry in given.items() if name in ours}, recipe, errors)
    keywords = _convert(theirs, trainer_config, errors)
    if not errors:
        try:
            trainer_config(output_dir="unused", report_to="none", **keywords)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            errors.append(f"{trainer_config.__name__} refuses the values: {error}")
    _raise(path, errors)
    return recipe(**values), keywords


def _raise(path: Path | str, errors: Sequence[str]) -> None:
    if errors:
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        raise InputError(f"{path}: {count} in the recipe\n" + "\n".join(f"  {error}" for error in errors))


def _read(
    path: Path | str, overrides: Sequence[str], recipe: type, others: Iterable[type]
) -> tuple[dict[str, _Given], list[str]]:
    """The given keys that some class knows, and the errors so far."""
    errors: list[str] = []
    hints: dict[str, Any] = {}
    for cls in (*others, recipe):
        hints |= {f.name: None for f in dataclasses.fields(cls) if f.init}
        hints |= {name: hint for name, hint in typing.get_type_hints(cls).items() if name in hints}
    given = _read_yaml(Path(path), errors)
    for flag, text in _flags(overrides, hints, errors):
        given[flag] = _Given(_flag_value(text, hints.get(flag)), f"--{flag}")
    for name in [name for name in given if name not in hints]:
        near = difflib.get_close_matches(name, hints, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else "see --help for the keys there are"
        errors.append(f"{given.pop(name).where}: unknown key {name}; {hint}")
    return given, errors


def _read_yaml(path: Path, errors: list[str]) -> dict[str, _Given]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; give one of the recipes in it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise InputError(f"{path}: the recipe is empty")
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{path}: expected lines of `key: value`, found a {root.tag.rpartition(':')[2]}")
        _report_duplicates(root, errors)
        given = {}
        for key_node, value_node in root.value:
            where = f"line {key_node.start_mark.line + 1}"
            given.setdefault(
                str(loader.construct_object(key_node)), _Given(loader.construct_object(value_node, deep=True), where)
            )
        return given
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    finally:
        loader.dispose()


def _report_duplicates(node: yaml.Node, errors: list[str]) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                errors.append(f"line {line}: {key_node.value} stands in line {seen[key_node.value]} already")
            seen.setdefault(key_node.value, line)
            _report_duplicates(value_node, errors)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _report_duplicates(child, errors)


def _flags(words: Sequence[str], hints: Mapping[str, Any], errors: list[str]) -> Iterable[tuple[str, list[str]]]:
    """Split `--key value ...` and `--key=value` words into (key, values)."""
    current: tuple[str, list[str]] | None = None
    for word in words:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and len(word) > 2:
            if current:
                yield current
            current = (name, [word.partition("=")[2]] if "=" in word else [])
        elif current is None:
            errors.append(f"{word!r} on the command line belongs to no --key")
        else:
            current[1].append(word)
    if current:
        yield current


def _flag_value(texts: list[str], hint: Any) -> Any:
    """`--key` alone means true; several words make a list; a word is read as YAML where that fits the key's type."""
    if not texts:
        return True
    values = []
    for text in texts:
        try:
            value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
        except yaml.YAMLError:
            value = text
        if hint is not None and len(texts) == 1 and _mismatch(value, hint) and not _mismatch(text, hint):
            value = text
        values.append(value)
    wants_list = any(typing.get_origin(h) is list for h in _alternatives(hint))
    if len(values) == 1 and not (wants_list and not isinstance(values[0], list) and values[0] is not None):
        return values[0]
    return values


def _check(given: Mapping[str, _Given], recipe: type, errors: list[str]) -> dict[str, Any]:
    """Convert our keys and run the recipe's checks on those that are sound."""
    values = _convert(given, recipe, errors)
    sound = SimpleNamespace(**values)
    for f in dataclasses.fields(recipe):
        if f.name in given:
            continue
        if f.default is not dataclasses.MISSING:
            setattr(sound, f.name, f.default)
        elif f.default_factory is not dataclasses.MISSING:
            setattr(sound, f.name, f.default_factory())
        else:
            errors.append(f"missing key {f.name}: {f.metadata['help']}")
    for check in recipe.CHECKS:  # type: ignore[attr-defined]
        try:
            if not check.holds(sound):
                errors.append(check.says(sound))
        except AttributeError:
            continue  # it reads a key that is wrong itself, reported above
    return values


def _convert(given: Mapping[str, _Given], cls: type, errors: list[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    choices = {f.name: f.metadata.get("choices") for f in dataclasses.fields(cls)}
    values = {}
    for name, entry in given.items():
        wrong = _mismatch(entry.value, hints[name])
        if wrong is None and choices[name] and entry.value not in choices[name]:
            wrong = f"one of {', '.join(map(str, choices[name]))}"
        if wrong:
            errors.append(f"{entry.where}: {name} must be {wrong}, found {entry.value!r}")
        else:
            values[name] = _as_float(entry.value, hints[name])
    return values


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _mismatch(value: Any, hint: Any) -> str | None:
    """None where the value fits the type hint, else what would."""
    options = _alternatives(hint)
    enums = [option for option in options if isinstance(option, type) and issubclass(option, enum.Enum)]
    if enums:  # transformers writes `SchedulerType | str`, meaning the enumeration's values
        options = tuple(option for option in options if option is not str)
    if any(_fits(value, option) for option in options):
        return None
    return " or ".join(dict.fromkeys(_describe(option) for option in options))


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin is list or hint is list:
        return isinstance(value, list) and all(_mismatch(v, arguments[0]) is None for v in value if arguments)
    if origin is dict or hint is dict:
        return isinstance(value, dict) and all(
            _mismatch(k, arguments[0]) is None and _mismatch(v, arguments[1]) is None
            for k, v in value.items()
            if arguments
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    return isinstance(hint, type) and isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    if origin is list:
        return f"a list of {_describe(arguments[0])}"
    if origin is dict or hint is dict:
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _as_float(value: Any, hint: Any) -> Any:
    """1 where a float is meant becomes 1.0, also inside lists, so that 1 and 1.0 make the same manifest."""
    for option in _alternatives(hint):
        if typing.get_origin(option) is list and isinstance(value, list):
            return [_as_float(entry, typing.get_args(option)[0]) for entry in value]
    takes_int = any(option is int for option in _alternatives(hint))
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_number and float in _alternatives(hint) and not takes_int else value


def describe_keys(recipe: type) -> str:
    """The text of `--help`: every key of ours, its type, default and meaning."""
    hints = typing.get_type_hints(recipe)
    lines = [(recipe.__doc__ or "").strip(), ""]
    for f in dataclasses.fields(recipe):
        if f.default is not dataclasses.MISSING:
            default = f"default {yaml.safe_dump(f.default).splitlines()[0]}"
        elif f.default_factory is not dataclasses.MISSING:
            default = f"default {f.default_factory()}"
        else:
            default = "required"
        kinds = " or ".join(_describe(option) for option in _alternatives(hints[f.name]))
        lines += [f"  --{f.name}", f"      {f.metadata['help']} ({kinds}; {default})"]
    return "\n".join(lines)
