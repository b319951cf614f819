"""The settings of every stage with a language model; the names are those of TRL's ModelConfig where it has them."""

from __future__ import annotations

from functools import partial
from typing import Literal

from twice_rec.recipe import Settings, key, rule

CHUNKED_SDPA = "chunked_sdpa"  # ours, for CPUs; see `attention`
TAKES_MASKS = ("sdpa", CHUNKED_SDPA, "eager")  # kinds of attention that take a mask of ours, as a tensor
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output
estimate_key = partial(key, changes_result=False)
VARLEN = "varlen"  # ours, for GPUs; see `varlen`
SHARES_PREFIXES = (*TAKES_MASKS, VARLEN)  # kinds that can compute a common beginning once
ANOTHER_MODEL = "another model"


class ModelConfig(Settings):
    """How a language model is loaded."""

    model_revision: str | None = key(None, "branch, tag or commit of model_name_or_path on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = key("bfloat16", "type of the weights")
    attn_implementation: str = key("sdpa", f"attention: {', '.join(SHARES_PREFIXES)}, or another of transformers")

    @property
    def settings_alone(self) -> list[str]:
        """Settings with which no rows are laid out together, if some are with those here; see `trial`."""
        return []


class AdapterConfig(Settings):
    """Which weights of a language model are trained."""

    use_peft: bool = key(True, "train a LoRA adapter; false trains all weights")
    lora_r: int = key(8, "rank of the adapter", ge=1)
    lora_alpha: int = key(16, "scale of the adapter, divided by lora_r", ge=1)
    lora_dropout: float = key(0.0, "dropout on the adapter's input", ge=0, le=0.99)
    lora_target_modules: list[str] | Literal["all-linear"] = key(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "layers that get an adapter; all-linear for all but the output layer",
    )

    @property
    def target_layers(self) -> list[str] | str:
        """PEFT's word for all linear layers, which a flag gives as a list of one, or the names of the layers."""
        return ALL_LINEAR if ALL_LINEAR in self.lora_target_modules else list(self.lora_target_modules)


class PromptConfig(Settings):
    """How prompts are built; the same values belong in sft, grpo and evaluate."""

    max_prompt_tokens: int | None = key(
        None, "longest prompt in tokens; longer ones lose old interactions, then descriptions; null for no limit", ge=1
    )
    item_first: bool = key(False, "task 3 names the item before its rationale")


class ComputeConfig(Settings):
    """How rows are computed in training."""

    share_prefixes: bool = key(
        False,
        "compute the beginning that several rows share once instead of once per row, with the same loss; in stage 2 "
        "the rows of a user share their prompt and batch sizes count users, in stage 3 the completions of a group do",
    )
    compile_layers: bool = key(
        False, "let torch compile the model's layers: less memory traffic on a GPU, for about a minute at the start"
    )

    @rule
    def attention_takes_masks(self) -> str | None:
        if self.share_prefixes and self.attn_implementation not in SHARES_PREFIXES:
            return (
                f"share_prefixes needs attn_implementation {' or '.join(SHARES_PREFIXES)}, found "
                f"{self.attn_implementation}; change it, or set share_prefixes to false"
            )
        return None


class EstimateConfig(Settings):
    """What `--dry_run` and `twice-rec cost` assume of the hardware; nothing else reads it."""

    gpu_memory_gib: float | None = estimate_key(
        None, "memory of a GPU in GiB; null for that of this machine's, or 80 if it has none", gt=0
    )
    gpu_tflops: float = estimate_key(989.0, "peak of a GPU in TFLOP/s, bfloat16 without sparsity; H100: 989", gt=0)
    gpu_utilization: float = estimate_key(
        0.1, "share of that peak that training reaches; .10 measured in stages 2 and 3 (REPRODUCTION.md)", gt=0, le=1
    )
    model_shape: str | None = estimate_key(
        None, "file like a model's config.json, read if the model's own is not on this machine"
    )
