"""The settings of stage 3: rewards, rollouts, and what TRL's GRPOConfig does not have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from twice_rec.cf.recipe import ConfidenceConfig
from twice_rec.grpo.rewards import REWARDS, RewardConfig
from twice_rec.llm.recipe import (
    SHARES_PREFIXES,
    AdapterConfig,
    ComputeConfig,
    EstimateConfig,
    ModelConfig,
    PromptConfig,
)
from twice_rec.recipe import Settings, TrainerRecipe, is_named, key, one_of, rule
from twice_rec.run import require

RewardName = one_of(REWARDS)
run_key = partial(key, changes_result=False)  # of how a run goes, not of what comes out


def is_grpo_variant(variant: str) -> bool:
    """Whether a name is one of stage 3's results."""
    return is_named(variant, "stage3")


def grpo_folder(variant: str) -> str:
    """Folder of a stage-3 variant under run_dir: `grpo` for `stage3`, `grpo_D` for `stage3_D`."""
    return variant.replace("stage3", "grpo", 1)


MAX_SERVED_RANK = 512  # of an adapter, in vLLM


# Keys of TRL's configuration for a vLLM that TRL reaches itself -> the values of rollout that use them.
# Sampling keys of TRL -> their values that change nothing, the only ones that rollout transformers has.
OFF_IN_PROCESS: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,), "top_k": (0, None), "min_p": (0.0, None), "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
}  # fmt: skip

SERVED = ("vllm_server", "trl_server")  # values of rollout with servers of their own
OF_TRL_ROLLOUTS = {
    "vllm_server_timeout": ("trl_server",),
    "vllm_group_port": ("trl_server",),
    "vllm_enable_sleep_mode": ("trl_colocate",),
    "vllm_model_impl": ("trl_colocate",),
    "vllm_structured_outputs_regex": ("trl_server", "trl_colocate"),
}


# Values of loss_type whose step has the same gradient however its completions are split into micro-batches of one size.
ADDITIVE_LOSSES = ("grpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo")


class RolloutConfig(Settings):
    """Who samples the completions."""

    rollout: Literal["transformers", "vllm_server", "trl_server", "trl_colocate"] = key(
        "transformers",
        "who samples: the trainer's own process; vLLM servers that grpo_step1.sh starts, on a CPU or on GPUs, and that "
        "get each policy as a LoRA adapter; such a server that gets full weights by NCCL (TRL's server mode); or a "
        "vLLM inside the trainer (TRL's colocate mode)",
    )
    rollout_servers: list[str] = run_key(
        ["127.0.0.1:8000"], "host:port of each server; grpo_step1.sh starts those whose host is its machine"
    )
    rollout_tensor_parallel_size: int = run_key(1, "GPUs per server", ge=1)
    rollout_executor: Literal["mp", "ray"] | None = run_key(
        None, "how a server's GPUs are run; ray for several machines; null lets vLLM choose"
    )
    rollout_max_model_len: int | None = run_key(
        None, "longest prompt and completion together that a server takes, in tokens", ge=1
    )
    rollout_gpu_memory_utilization: float = run_key(0.9, "share of a GPU's memory that a server takes", ge=0.01, le=1)
    rollout_shares_gpu: bool = run_key(
        False, "the servers are on the trainers' GPUs (grpo_one_gpu.yaml) and not on GPUs of their own"
    )
    rollout_cpu_kvcache_gib: int = run_key(4, "GiB of memory for a server's caches if it runs on a CPU", ge=1)
    rollout_server_args: dict[str, Any] = run_key(
        {}, "more of vLLM's flags, such as {max_num_seqs: 64, enforce_eager: true}"
    )
    rollout_seeds: bool = key(
        True, "send a seed with each request; a vLLM on a CPU ends at one whose prompt it computes in parts"
    )
    rollout_adapter_dir: str | None = run_key(
        None, "folder in which policies are written for the servers; null for policy/ beside the results"
    )
    rollout_timeout_seconds: float = run_key(600.0, "time limit of one request to a server", ge=1)
    rollout_wait_seconds: float = run_key(
        900.0, "how long training waits for a server that is down before it is saved and ends; below ddp_timeout", ge=0
    )
    rollout_logprob_gap: float = run_key(
        0.05,
        "mean difference of the server's and the trainer's log-probabilities from which on a warning is logged",
        ge=0,
    )

    rollout_tokens_per_second: float = run_key(
        5000.0, "of --dry_run: tokens that a rollout server writes per second and GPU; assumed, never measured", gt=0
    )

    @property
    def gpus_of_servers(self) -> int:
        """How many GPUs the rollout servers use; 0 if there are none."""
        return len(self.rollout_servers) * self.rollout_tensor_parallel_size if self.rollout in SERVED else 0

    @property
    def vllm_is_beside_the_trainer(self) -> bool:
        """Whether a trainer's GPU has a vLLM on it: TRL's colocated one, or a server that shares the GPU."""
        return self.rollout == "trl_colocate" or (self.rollout in SERVED and self.rollout_shares_gpu)

    @rule
    def servers_are_addresses(self) -> str | None:
        if not self.rollout_servers or not all(re.fullmatch(r"[^:/\s]+:\d{1,5}", s) for s in self.rollout_servers):
            return f"rollout_servers is {self.rollout_servers}; it must list host:port, 127.0.0.1:8000"
        return None

    @rule
    def trl_takes_one_server(self) -> str | None:
        if self.rollout == "trl_server" and len(self.rollout_servers) != 1:
            return f"rollout is trl_server with {len(self.rollout_servers)} rollout_servers; it takes one"
        return None


class CandidateLossConfig(Settings):
    """A loss on all candidates after sampled rationales, beside GRPO's; see `candidate_loss`."""

    candidate_loss: Literal["none", "expected_reward", "distillation"] = key(
        "none",
        "a loss on all candidates after a sampled rationale: none (paper); the exact expectation of the rewards that "
        "depend on the item; or the distance to a distribution of the CF model and the start model",
    )
    candidate_cf_weight: float = key(1.0, "of distillation: weight of the CF model's calibrated scores", ge=0)
    candidate_start_weight: float = key(
        0.0, "of distillation: weight of the start model's log-probabilities of the candidates", ge=0
    )
    candidate_weight: float = key(1.0, "weight of that loss beside GRPO's", gt=0)
    candidate_rationales: int | None = key(
        1, "different rationales of a prompt that it uses per micro-batch; null for all", ge=1
    )


class GRPORecipe(
    TrainerRecipe, ModelConfig, AdapterConfig, PromptConfig, ComputeConfig, RewardConfig, ConfidenceConfig,
    RolloutConfig, EstimateConfig, CandidateLossConfig,
):  # fmt: skip
    """Stage 3: confidence-weighted GRPO of the stage-2 model."""

    TRAINER_CONFIG: ClassVar = "GRPOConfig"
    KNOWN_VALUES: ClassVar = {
        "loss_type": (*ADDITIVE_LOSSES, "bnpo"),
        "importance_sampling_level": ("token", "sequence"),
        "scale_rewards": (True, False, "group", "batch", "none"),
    }
    LOWEST: ClassVar = {
        **TrainerRecipe.LOWEST,
        **dict.fromkeys(("max_completion_length", "num_iterations", "steps_per_generation"), 1),
        **dict.fromkeys(("generation_batch_size", "num_generations"), 2),
        **dict.fromkeys(("beta", "epsilon", "top_k"), 0),
    }
    ABOVE_ZERO: ClassVar = (*TrainerRecipe.ABOVE_ZERO, "temperature", "top_p")
    RENAMED: ClassVar = {"cf_variant": "cf_model"}
    OWNED: ClassVar = {
        **TrainerRecipe.OWNED,
        "reward_weights": "it is read from our own key of that name",
        **dict.fromkeys(
            ("log_completions", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
            "all completions go to completions/ by themselves, and sample_every shows some",
        ),
        "use_vllm": "use rollout",
        "vllm_mode": "use rollout: trl_server or trl_colocate",
        **dict.fromkeys(("vllm_server_host", "vllm_server_port", "vllm_server_base_url"), "use rollout_servers"),
        "vllm_tensor_parallel_size": "use rollout_tensor_parallel_size",
        "vllm_gpu_memory_utilization": "use rollout_gpu_memory_utilization",
        "vllm_max_model_length": "use rollout_max_model_len",
        **dict.fromkeys(
            (
                "cache_implementation", "use_transformers_paged", "use_transformers_continuous_batching",
                "transformers_continuous_batching_config",
            ),
            "completions are sampled by rollout; leave the key out",
        ),
        "chat_template_kwargs": "all stages use the chat template of the model's tokenizer; change it in its folder",
        "num_generations_eval": "training has no evaluation set; use num_samples of evaluate.sh",
        **dict.fromkeys(("max_tool_calling_iterations", "log_multimodal"), "prompts are text without tools"),
    }  # fmt: skip

    variant: str = run_key(
        "stage3",
        "name of the results, stage3 or stage3_NAME: folder grpo or grpo_NAME under run_dir, and name in evaluate",
    )
    model_name_or_path: str | None = key(
        None, "the model that stage 3 starts from, a folder or a name on the hub; null for the stage-2 model"
    )
    train_fraction: float = key(0.15, "share of the training examples that are prompted", gt=0, le=1)
    reward_funcs: list[RewardName] = key(
        ["collaborative", "structure", "tags", "only_expected_tags"], "rewards that are added up; see grpo/rewards.py"
    )
    reward_weights: list[float] = key([4.0, 1.0, 1.0, 1.0], "weight of each reward, in the same order")
    tokens_at_once: int | None = run_key(
        None,
        "with share_prefixes: a micro-batch goes through the model in pieces of at most so many tokens, with the same "
        "loss; a piece has at least one completion; null for all at once",
        ge=1,
    )
    sample_every: int | None = run_key(
        None, "show sample completions with their rewards every so many steps; null for never", ge=1
    )
    sample_completions: int = run_key(4, "number of sample completions that are shown", ge=1)

    def trainer_faults(self, keys: Mapping[str, Any]) -> dict[str, str]:
        """Return also the keys of TRL's that this rollout does not use, or not with these values."""
        unused = {
            name: f"{name} is for rollout {' or '.join(kinds)}, found rollout {self.rollout}; leave the key out"
            for name, kinds in OF_TRL_ROLLOUTS.items()
            if name in keys and self.rollout not in kinds
        }
        impossible = {
            name: f"{name} is {keys[name]}; with rollout: transformers only {off[0]} is possible; drop the key, or use "
            "--rollout vllm_server"
            for name, off in OFF_IN_PROCESS.items()
            if self.rollout == "transformers" and name in keys and keys[name] not in off
        }
        return super().trainer_faults(keys) | unused | impossible

    @property
    def folder(self) -> str:
        """Folder of the results under run_dir."""
        return grpo_folder(self.variant)

    @property
    def settings_alone(self) -> list[str]:
        """See `ModelConfig`; the trainer's own samples, and rewards that ask the policy, compute a prompt once."""
        used = [
            (self.share_prefixes, "share_prefixes false"),
            (self.rollout == "transformers", "rollout vllm_server"),
            *((bool(REWARDS[name].needs_policy), f"reward_funcs without {name}") for name in self.reward_funcs),
        ]
        return [setting for is_used, setting in used if is_used]

    @rule
    def variant_names_a_folder(self) -> str | None:
        if not is_grpo_variant(self.variant):
            names = "stage3 or stage3_NAME, NAME of letters, digits, _ . - and not sampled or likelihood"
            return f"variant is {self.variant!r}; it must be {names}"
        return None

    @rule
    def pieces_are_of_shared_rows(self) -> str | None:
        if self.tokens_at_once is not None and not self.share_prefixes:
            return "tokens_at_once is for share_prefixes; set that to true, or lower per_device_train_batch_size"
        return None

    @rule
    def a_revision_needs_a_model(self) -> str | None:
        if self.model_revision is not None and self.model_name_or_path is None:
            found = f"model_revision is {self.model_revision}, but model_name_or_path is null"
            return f"{found}: the stage-2 model has no revisions"
        return None

    @rule
    def the_policy_can_be_asked(self) -> str | None:
        asking = [name for name in self.reward_funcs if REWARDS[name].needs_policy]
        ranking = [name for name in asking if REWARDS[name].needs_policy == "target_rank"]
        if ranking and self.item_first:
            return (
                f"the reward {ranking[0]} judges the rationale by the item that follows it, but item_first is true: "
                f"all completions of a prompt would earn the same; leave {ranking[0]} out of reward_funcs"
            )
        if asking and self.attn_implementation not in SHARES_PREFIXES:
            *others, last = SHARES_PREFIXES
            kinds = f"{', '.join(others)} or {last}"
            return f"reward {asking[0]} needs attn_implementation {kinds}, found {self.attn_implementation}"
        return None

    @rule
    def rewards_have_weights(self) -> str | None:
        if len(self.reward_funcs) != len(self.reward_weights):
            found = (
                f"reward_funcs has {len(self.reward_funcs)} names and reward_weights {len(self.reward_weights)} values"
            )
            return f"{found}; they go in pairs"
        if not self.reward_funcs:
            return "reward_funcs is empty; there is nothing to optimise"
        if not any(self.reward_weights) and self.candidate_loss != "distillation":
            return "reward_weights are all 0; there is nothing to optimise"
        return None

    @rule
    def candidates_can_be_scored(self) -> str | None:
        if self.candidate_loss == "none":
            return None
        if self.item_first or not self.share_prefixes:
            needed = "item_first false and share_prefixes true"
            found = f"item_first {self.item_first} and share_prefixes {self.share_prefixes}"
            return f"candidate_loss is {self.candidate_loss}; it needs {needed}, found {found}"
        if self.candidate_loss == "distillation" and not (self.candidate_cf_weight or self.candidate_start_weight):
            return "candidate_cf_weight and candidate_start_weight are 0; distillation has nothing to learn from"
        if self.candidate_loss == "expected_reward" and not any(
            weight and REWARDS[name].depends_on_item
            for name, weight in zip(self.reward_funcs, self.reward_weights, strict=False)
        ):
            names = ", ".join(name for name, one in REWARDS.items() if one.depends_on_item)
            return f"candidate_loss is expected_reward, but no reward of the item ({names}) has a weight"
        return None

    @rule
    def servers_take_adapters(self) -> str | None:
        if self.rollout == "vllm_server" and not (self.use_peft and self.lora_r <= MAX_SERVED_RANK):
            return (
                f"rollout is vllm_server with use_peft {self.use_peft} and lora_r {self.lora_r}; it sends adapters up "
                f"to rank {MAX_SERVED_RANK}: set use_peft true and a lower rank, or rollout trl_server"
            )
        return None


def micro_batches_add_up(recipe: GRPORecipe) -> bool:
    """Return whether a step's gradient does not depend on which completions share a micro-batch.

    It does if the loss counts a micro-batch's tokens, and if the entropies within one decide: a bonus on them, or only
    the most uncertain tokens count.
    """
    value = recipe.trainer_value
    by_entropy = value("entropy_coef") or value("use_adaptive_entropy") or value("top_entropy_quantile") < 1
    return value("loss_type") in ADDITIVE_LOSSES and not by_entropy


def start_model(recipe: GRPORecipe) -> Path:
    """Return the model that stage 3 starts from, for trainer and server alike: a folder, or a name on the hub."""
    if recipe.model_name_or_path is not None:
        return Path(recipe.model_name_or_path)
    return require(recipe.run_path / "sft" / "merged", "sft.sh")
