"""The settings of sharing."""

from __future__ import annotations

import re
from functools import partial
from typing import Literal

from twice_rec.recipe import Recipe, key, rule

_VARIANT = re.compile(r"stage[23](_[A-Za-z0-9.-]+)*")
_FOLDERS = {"stage2": "sft", "stage3": "grpo"}
push_key = partial(key, changes_result=False)


class ShareRecipe(Recipe):
    """Sharing: a model of stage 2 or 3 with its card and results, in a folder and on the hub."""

    variant: str = key("stage3", "which model: stage2, stage2_NAME, stage3 or stage3_NAME")
    weights: Literal["merged", "adapter"] = key(
        "merged", "the whole model, or the LoRA adapter alone, which needs the model that it was trained on"
    )
    base_model_id: str | None = key(
        None, "name on the hub of the model that this one was made from; null for the one in the recipe of its training"
    )
    license: str | None = key(
        None, "licence of the model as the hub writes it, such as apache-2.0; null for what the base model's card says"
    )
    card_notes: str | None = key(None, "Markdown file with words of your own, a part of the card; null for none")
    bootstrap_samples: int = key(1000, "resamples behind each 95 % interval", ge=100)
    hub_model_id: str | None = push_key(
        None, "repository on the hub to upload to, OWNER/NAME; null for none. The token is HF_TOKEN's or the login's"
    )
    hub_private: bool = push_key(True, "only you see the repository; false makes it public")

    @property
    def model_folder(self) -> str:
        """Folder of the training under run_dir, `grpo_NAME` for stage3_NAME."""
        return _FOLDERS[self.variant[:6]] + self.variant[6:]

    @rule
    def variant_is_one_of_ours(self) -> str | None:
        if not _VARIANT.fullmatch(self.variant):
            return f"variant is {self.variant!r}; it must be stage2, stage3, or one of them with _NAME"
        return None

    @rule
    def names_on_the_hub_have_an_owner(self) -> str | None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        for name in ("hub_model_id", "base_model_id"):
            if (value := getattr(self, name)) is None:
                continue
            try:
                validate_repo_id(value)
            except HFValidationError:
                value = ""
            if "/" not in value:
                return f"{name} is {getattr(self, name)!r}; it must be OWNER/NAME, as on the hub"
        return None
