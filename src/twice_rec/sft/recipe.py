"""The settings of stage 2."""

from __future__ import annotations

from typing import ClassVar, Literal

from twice_rec.llm.recipe import TAKES_MASKS, VARLEN, AdapterConfig, ComputeConfig, ModelConfig, PromptConfig
from twice_rec.recipe import TrainerRecipe, key, required, rule
from twice_rec.sft.dataset import TaskMixConfig


class SFTRecipe(TrainerRecipe, ModelConfig, AdapterConfig, PromptConfig, ComputeConfig, TaskMixConfig):
    """Stage 2: multi-task SFT of the base model."""

    TRAINER_CONFIG: ClassVar = "SFTConfig"
    LOWEST: ClassVar = {**TrainerRecipe.LOWEST, "max_length": 1}
    PREFIX_ATTENTION: ClassVar = (*TAKES_MASKS, VARLEN)

    model_name_or_path: str = required("the base model: a folder, or a name on the hub")
    quantization: Literal["none", "8bit", "4bit"] = key(
        "none", "quantisation of the frozen base under an adapter, by bitsandbytes on a GPU (release: 8bit)"
    )
    pack_tokens: int | None = key(
        None,
        "put rows together into packs of at most so many tokens, without padding and with the same loss; batch sizes "
        "then count packs; null for batches of single rows",
        ge=1,
    )
    sample_every: int | None = key(
        None, "steps between sample completions in samples.jsonl; null for none", changes_result=False, ge=1
    )
    sample_prompts: int = key(4, "number of prompts that get sample completions", changes_result=False, ge=1)

    @rule
    def only_adapters_train_on_a_quantised_base(self) -> str | None:
        if self.quantization != "none" and not self.use_peft:
            return f"quantization {self.quantization} needs use_peft: quantised weights are not trained"
        return None

    @rule
    def packs_need_attention_that_keeps_rows_apart(self) -> str | None:
        if self.pack_tokens is not None and self.attn_implementation not in self.PREFIX_ATTENTION:
            kinds = " or ".join(self.PREFIX_ATTENTION)
            return f"pack_tokens needs attn_implementation {kinds}, found {self.attn_implementation}"
        return None

    @rule
    def a_curriculum_keeps_tasks_apart(self) -> str | None:
        if self.curriculum and (self.share_prefixes or self.pack_tokens is not None):
            other = "share_prefixes puts a user's rows" if self.share_prefixes else "pack_tokens puts rows of all tasks"
            return f"curriculum keeps the tasks apart, {other} together; use only one of them"
        return None
