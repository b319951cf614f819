"""The settings of the collaborative-filtering models."""

from __future__ import annotations

import re
from typing import Literal

from twice_rec.cf.baselines import BASELINES
from twice_rec.cf.confidence import CONFIDENCES
from twice_rec.recipe import DeviceConfig, Recipe, Settings, key, one_of, rule
from twice_rec.records import RANKED_LISTS

BaselineName = one_of(BASELINES)
ConfidenceKind = one_of(CONFIDENCES)
RankedList = one_of(RANKED_LISTS)


class SASRecConfig(Settings):
    """The shape of SASRec."""

    hidden_size: int = key(64, "width of the embeddings", ge=1)
    inner_size: int = key(256, "width of the feed-forward layers", ge=1)
    num_layers: int = key(2, "number of self-attention blocks", ge=1)
    num_heads: int = key(2, "number of attention heads", ge=1)
    dropout: float = key(0.3, "dropout on embeddings, attention weights and block outputs", ge=0, le=0.99)
    norm: Literal["post", "pre"] = key("post", "LayerNorm after or before each block")
    max_length: int = key(50, "number of most recent items of a history that the model sees", ge=1)

    @rule
    def heads_divide_the_width(self) -> str | None:
        broken = f"hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}"
        return broken if self.hidden_size % self.num_heads else None


class SASRecTrainerConfig(Settings):
    """How SASRec is trained."""

    loss: Literal["bce", "gbce", "softmax"] = key(
        "softmax", "bce: over sampled negatives; gbce: the same, calibrated; softmax: over all items"
    )
    num_negatives: int = key(
        1, "bce and gbce: uniform negatives per position, never the user's own training items", ge=1
    )
    gbce_t: float = key(0.75, "gbce: 0 is bce, 1 removes the overconfidence of sampling", ge=0, le=1)
    epochs: int = key(100, "largest number of epochs", ge=1)
    batch_size: int = key(128, "users per step", ge=1)
    learning_rate: float = key(1e-3, "learning rate of Adam", gt=0)
    weight_decay: float = key(0.0, "weight decay of Adam", ge=0)
    lr_scheduler_type: Literal["constant", "cosine"] = key(
        "constant", "schedule of the learning rate; cosine ends at 0 after the last epoch"
    )
    patience: int | None = key(
        5, "epochs without a better validation NDCG@10 (full) before training stops; null for never", ge=1
    )


class ConfidenceConfig(Settings):
    """Which CF model judges recommended items, and how its scores become confidences."""

    cf_model: str = key(
        "sasrec",
        "CF model that gives the confidences: the results' folder of a SASRec under run_dir (sasrec, sasrec_release), "
        f"or one of {', '.join(BASELINES)}, which is fitted when the stage starts",
    )
    confidence: ConfidenceKind = key(
        "sigmoid", "how scores become confidences: sigmoid (paper), calibrated on validation, or softmax over the list"
    )
    confidence_debiased: bool = key(False, "subtract each item's mean score over users first")

    @rule
    def popularity_is_not_debiased(self) -> str | None:
        if self.cf_model == "popularity" and self.confidence_debiased:
            return (
                "cf_model is popularity with confidence_debiased true, which leaves the same score for every item; set "
                "confidence_debiased to false, or choose another cf_model"
            )
        return None


_TAKEN = (
    "data",
    "rationales",
    "answers",
    "sft",
    "base",
    "eval",
    "report",
    "logs",
    "wandb",
    "oracle",
)  # folders, variants


class SASRecRecipe(Recipe, SASRecConfig, SASRecTrainerConfig, DeviceConfig):
    """Stage 3a: train SASRec, and evaluate it and the CF baselines."""

    variant: str = key("sasrec", "name of the results: folder under run_dir and under eval/")
    num_seeds: int = key(1, "trainings, with seed, seed + 1, ...; the first one's model gives the rewards", ge=1)
    baselines: list[BaselineName] = key(list(BASELINES), "CF models that are evaluated beside SASRec")
    lists: list[RankedList] = key(
        ["uniform", "full"], "lists that are ranked; full is the whole catalogue without the seen items"
    )
    export_scores: str | None = key(
        None, "write the first seed's test scores to this .npz: float32 [users, items]", changes_result=False
    )

    @rule
    def variant_names_folders(self) -> str | None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.variant):
            return f"variant is {self.variant!r}; it names folders: letters, digits, _ . -"
        name = self.variant.lower()  # some disks take upper and lower case for the same
        if name in (*BASELINES, *_TAKEN) or name.startswith(("grpo", "base_", "stage2", "stage3")):
            return f"variant is {self.variant!r}, the name of a baseline or of another stage's results; choose another"
        return None
