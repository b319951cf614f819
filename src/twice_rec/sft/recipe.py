"""The settings of stage 2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from twice_rec.llm.recipe import (
    ANOTHER_MODEL,
    SHARES_PREFIXES,
    AdapterConfig,
    ComputeConfig,
    EstimateConfig,
    ModelConfig,
    PromptConfig,
)
from twice_rec.recipe import TrainerRecipe, is_named, key, required, rule
from twice_rec.run import require
from twice_rec.sft.dataset import TaskMixConfig


def is_sft_variant(variant: str) -> bool:
    """Whether a name is one of stage 2's results."""
    return is_named(variant, "stage2")


def sft_folder(variant: str) -> str:
    """Folder of a stage-2 variant under run_dir: `sft` for `stage2`, `sft_NAME` for `stage2_NAME`."""
    return variant.replace("stage2", "sft", 1)


class SFTRecipe(TrainerRecipe, ModelConfig, AdapterConfig, PromptConfig, ComputeConfig, TaskMixConfig, EstimateConfig):
    """Stage 2: multi-task SFT of the base model."""

    TRAINER_CONFIG: ClassVar = "SFTConfig"
    LOWEST: ClassVar = {**TrainerRecipe.LOWEST, "max_length": 1}
    OWNED: ClassVar = {
        **TrainerRecipe.OWNED,
        **dict.fromkeys(
            ("completion_only_loss", "assistant_only_loss"), "the loss is on completions alone; leave the key out"
        ),
        **dict.fromkeys(
            ("dataset_text_field", "dataset_kwargs", "dataset_num_proc", "truncation_mode"),
            "rows come from stages 0 and 1 and are encoded by the stage; use max_length and max_prompt_tokens",
        ),
        **dict.fromkeys(
            ("chat_template_path", "eos_token"),
            "all stages use those of the base model's tokenizer; change them in its folder",
        ),
        "shuffle_dataset": "rows are mixed by seed; use seed, or curriculum",
        "eval_packing": "training has no evaluation set; leave the key out, and use evaluate.sh",
    }

    variant: str = key(
        "stage2",
        "name of the results, stage2 or stage2_NAME: folder sft or sft_NAME under run_dir, and name in evaluate; "
        "stage 3 starts from stage2, or from the folder that its model_name_or_path names",
        changes_result=False,
    )
    rationales: str = key(
        "rationales",
        "folder of stage 1 whose rationales are trained on: rationales or rationales_NAME, its variant",
        changes_result=False,
    )
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

    @property
    def folder(self) -> str:
        """Folder of the results under run_dir."""
        return sft_folder(self.variant)

    @property
    def settings_alone(self) -> list[str]:
        """See `ModelConfig`; samples are drawn from prompts that are computed once."""
        off = {"share_prefixes": "false", "pack_tokens": "null", "sample_every": "null"}
        return [f"{name} {value}" for name, value in off.items() if getattr(self, name)]

    @rule
    def variant_names_a_folder(self) -> str | None:
        if not is_sft_variant(self.variant):
            names = "stage2 or stage2_NAME, NAME of letters, digits, _ . - and not sampled or likelihood"
            return f"variant is {self.variant!r}; it must be {names}"
        return None

    @rule
    def rationales_are_in_their_folder(self) -> str | None:
        if not is_named(self.rationales, "rationales"):
            return f"rationales is {self.rationales!r}; it must be rationales or rationales_NAME, a folder of stage 1"
        return None

    @rule
    def only_adapters_train_on_a_quantised_base(self) -> str | None:
        if self.quantization != "none" and not self.use_peft:
            return f"quantization {self.quantization} needs use_peft: quantised weights are not trained"
        return None

    @rule
    def packs_need_attention_that_keeps_rows_apart(self) -> str | None:
        if self.pack_tokens is not None and self.attn_implementation not in SHARES_PREFIXES:
            kinds = " or ".join(SHARES_PREFIXES)
            return f"pack_tokens needs attn_implementation {kinds}, found {self.attn_implementation}"
        return None

    @rule
    def a_curriculum_keeps_tasks_apart(self) -> str | None:
        if self.curriculum and (self.share_prefixes or self.pack_tokens is not None):
            other = "share_prefixes puts a user's rows" if self.share_prefixes else "pack_tokens puts rows of all tasks"
            return f"curriculum keeps the tasks apart, {other} together; use only one of them"
        return None

    def trainer_faults(self, keys: Mapping[str, Any]) -> dict[str, str]:
        """Return also the keys of TRL's that do not go with packs of ours, or with a curriculum."""
        ours = next((name for name in ("share_prefixes", "pack_tokens", "curriculum") if getattr(self, name)), None)
        faults = super().trainer_faults(keys)
        for name in ("packing", "padding_free"):
            if ours and keys.get(name):
                use = "set it to false" if ours == "curriculum" else "set it to false, and use pack_tokens"
                faults[name] = f"{name} is true, but {ours} decides itself which rows go together; {use}"
        strategy = "train_sampling_strategy"
        if self.curriculum and keys.get(strategy, "sequential") != "sequential":
            says = "but a curriculum keeps the rows' order; leave one of the two out"
            faults[strategy] = f"{strategy} is {keys[strategy]}, {says}"
        return faults


_OF_TRL = ("model_init_kwargs", "trust_remote_code")  # keys of TRL's configurations that transformers' has not


class SDPORecipe(TrainerRecipe, ModelConfig, AdapterConfig, PromptConfig, EstimateConfig):
    """Stage 2b: S-DPO, preferences with several rejected answers, on the stage-2 model."""

    LIBRARY: ClassVar = "transformers"
    TRAINER_CONFIG: ClassVar = "TrainingArguments"
    OWNED: ClassVar = {
        **{name: use for name, use in TrainerRecipe.OWNED.items() if name not in _OF_TRL},
        "label_names": "rows have no labels; the loss is that of S-DPO",
        "label_smoothing_factor": "the loss is that of S-DPO; leave the key out",
    }

    variant: str = key(
        "stage2_sdpo",
        "name of the results, stage2_NAME: folder sft_NAME under run_dir, and name in evaluate",
        changes_result=False,
    )
    model_name_or_path: str | None = key(
        None, "the model that is trained and, without its adapter, the reference; null for the stage-2 model"
    )
    num_negatives: int = key(3, "rejected answers per user, drawn from the candidates of its training list", ge=1)
    preference_rows: int | None = key(None, "training users, drawn by seed; null for all", ge=1)
    beta: float = key(1.0, "how much a difference to the reference counts in the loss", gt=0)

    @classmethod
    def trainer_config(cls) -> type:
        """Return the configuration class of transformers' trainer; TRL's DPO takes one rejected answer."""
        from transformers import TrainingArguments

        return TrainingArguments

    @property
    def folder(self) -> str:
        """Folder of the results under run_dir."""
        return sft_folder(self.variant)

    @property
    def settings_alone(self) -> list[str]:
        """See `ModelConfig`; a prompt is always computed once for its answers."""
        return [ANOTHER_MODEL]

    @rule
    def variant_is_not_that_of_stage_2(self) -> str | None:
        if self.variant == "stage2" or not is_sft_variant(self.variant):
            names = "stage2_NAME, NAME of letters, digits, _ . - and not sampled or likelihood"
            return f"variant is {self.variant!r}; it must be {names}"
        return None

    @rule
    def the_reference_is_the_model_without_adapter(self) -> str | None:
        return None if self.use_peft else "use_peft is false, but the reference is the model without its adapter"

    @rule
    def a_revision_needs_a_model(self) -> str | None:
        if self.model_revision is not None and self.model_name_or_path is None:
            return f"model_revision is {self.model_revision}, but model_name_or_path is null: no revisions there"
        return None

    @rule
    def answers_share_their_prompt(self) -> str | None:
        if self.attn_implementation not in SHARES_PREFIXES:
            kinds = " or ".join(SHARES_PREFIXES)
            return f"a prompt is computed once for its answers: attn_implementation must be {kinds}"
        return None


def preferred_model(recipe: SDPORecipe) -> Path:
    """Return the model that stage 2b starts from: a folder, or a name on the hub."""
    if recipe.model_name_or_path is not None:
        return Path(recipe.model_name_or_path)
    return require(recipe.run_path / "sft" / "merged", "sft.sh")
