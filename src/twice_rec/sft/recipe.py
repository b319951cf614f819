"""The settings of stage 2."""

from __future__ import annotations

from typing import ClassVar, Literal

from twice_rec.llm.recipe import TAKES_MASKS, AdapterConfig, ModelConfig, PromptConfig, SharedPrefixConfig
from twice_rec.recipe import TrainerRecipe, key, required, rule
from twice_rec.sft.dataset import TaskMixConfig


class SFTRecipe(TrainerRecipe, ModelConfig, AdapterConfig, PromptConfig, SharedPrefixConfig, TaskMixConfig):
    """Stage 2: multi-task SFT of the base model."""

    TRAINER_CONFIG: ClassVar = "SFTConfig"
    PREFIX_ATTENTION: ClassVar = TAKES_MASKS

    model_name_or_path: str = required("the base model: a folder, or a name on the hub")
    quantization: Literal["none", "8bit", "4bit"] = key(
        "none", "quantisation of the frozen base under an adapter, by bitsandbytes on a GPU (release: 8bit)"
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
    def a_curriculum_keeps_tasks_apart(self) -> str | None:
        if self.share_prefixes and self.curriculum:
            return "curriculum keeps the tasks apart, share_prefixes puts a user's rows together; set one to false"
        return None
