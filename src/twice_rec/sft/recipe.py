"""The settings of stage 2."""

from __future__ import annotations

from typing import ClassVar, Literal

from twice_rec.llm.recipe import TAKES_MASKS, AdapterConfig, ModelConfig, PromptConfig, SharedPrefixConfig
from twice_rec.recipe import Settings, TrainerRecipe, key, required, rule
from twice_rec.sft.dataset import TASKS


class TaskMixConfig(Settings):
    """How much of each task is trained on."""

    item_info_rows: int | None = key(None, "rows of task 1 (title -> item); null for all, 0 for none", ge=0)
    direct_rows: int | None = key(None, "rows of task 2 (history, candidates -> item); null for all, 0 for none", ge=0)
    rationale_rows: int | None = key(None, "rows of task 3 (-> rationale and item); null for all, 0 for none", ge=0)
    item_info_weight: float = key(1.0, "how often each row of task 1 occurs in an epoch; fractions are drawn", ge=0)
    direct_weight: float = key(1.0, "how often each row of task 2 occurs in an epoch; fractions are drawn", ge=0)
    rationale_weight: float = key(1.0, "how often each row of task 3 occurs in an epoch; fractions are drawn", ge=0)
    curriculum: bool = key(False, "train on the tasks one after another, 1, 2, 3, instead of mixed")

    def rows_of(self, task: str) -> int | None:
        """Return how many rows of a task are drawn; None for all."""
        return getattr(self, f"{task}_rows")

    def weight_of(self, task: str) -> float:
        """Return how often each of them occurs in an epoch."""
        return getattr(self, f"{task}_weight")

    @rule
    def something_is_left(self) -> str | None:
        if any(self.rows_of(task) != 0 and self.weight_of(task) for task in TASKS):
            return None
        return "every task has 0 rows (item_info_rows, ...) or weight 0 (item_info_weight, ...); nothing is left"


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
