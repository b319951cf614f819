"""The settings of the collaborative-filtering models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from twice_rec.cf.baselines import BASELINES
from twice_rec.cf.confidence import CONFIDENCES
from twice_rec.cf.recbole_models import NOT_IN_RECBOLE, RECBOLE_MODELS
from twice_rec.recipe import DeviceConfig, Recipe, Settings, key, one_of, rule
from twice_rec.records import RANKED_LISTS

BaselineName = one_of(BASELINES)
ConfidenceKind = one_of(CONFIDENCES)
RankedList = one_of(RANKED_LISTS)


SOFTMAX_ITEMS = 20_000  # loss auto: with more items than these the softmax is over a sample
POSITIONS = 1024  # that a step predicts if batch_size is null
VALIDATION_STEPS = 200  # the fewest between two validations if validation_steps is null


class SASRecConfig(Settings):
    """The shape of SASRec."""

    hidden_size: int = key(64, "width of the embeddings", ge=1)
    inner_size: int = key(64, "width of the feed-forward layers", ge=1)
    num_layers: int = key(2, "number of self-attention blocks", ge=1)
    num_heads: int = key(2, "number of attention heads", ge=1)
    dropout: float = key(0.4, "dropout on embeddings, attention weights and block outputs", ge=0, le=0.99)
    norm: Literal["post", "pre"] = key("pre", "LayerNorm after or before each block")
    max_length: int = key(
        50, "number of most recent items of a history that the model sees; it is trained on longer ones in pieces", ge=1
    )

    @rule
    def heads_divide_the_width(self) -> str | None:
        broken = f"hidden_size {self.hidden_size} does not divide by num_heads {self.num_heads}"
        return broken if self.hidden_size % self.num_heads else None


class SASRecTrainerConfig(Settings):
    """How SASRec is trained. Steps and validations count, not epochs, so that one recipe serves data of any size."""

    loss: Literal["auto", "softmax", "sampled_softmax", "gbce", "bce"] = key(
        "auto",
        "softmax: over all items; sampled_softmax: over a sample that a step shares; bce: over sampled negatives of "
        f"each position; gbce: the same, calibrated; auto: softmax to {SOFTMAX_ITEMS:,} items, sampled_softmax beyond",
    )
    num_negatives: int = key(
        2048, "sampled_softmax: items per step; bce and gbce: items per position, none of the sequence's own", ge=1
    )
    gbce_t: float = key(0.75, "gbce: 0 is bce, 1 removes the overconfidence of sampling", ge=0, le=1)
    epochs: int = key(200, "largest number of epochs", ge=1)
    batch_size: int | None = key(
        None, f"sequences per step; null for as many as have about {POSITIONS:,} interactions to predict", ge=1
    )
    learning_rate: float = key(1e-3, "learning rate of Adam", gt=0)
    adam_beta2: float = key(
        0.98,
        "how long Adam remembers squared gradients; with .999 gbce's first steps keep it a popularity counter",
        gt=0,
        lt=1,
    )
    weight_decay: float = key(0.0, "weight decay of Adam", ge=0)
    bf16: bool = key(False, "compute in bfloat16; weights and optimizer stay in float32")
    lr_scheduler_type: Literal["constant", "cosine"] = key(
        "constant", "schedule of the learning rate; cosine ends at 0 after the last epoch"
    )
    ema_decay: float = key(
        0.995,
        "what is validated and kept is the average of the weights that decays so per step; 0 for the last",
        ge=0,
        lt=1,
    )
    validation_steps: int | None = key(
        None, f"steps between validations; null for those of an epoch, but at least {VALIDATION_STEPS}", ge=1
    )
    validation_users: int | None = key(
        10_000, "most users who are asked in a validation, drawn by seed; null for all", ge=1
    )
    patience: int | None = key(
        3, "validations in a row that do not raise the best by a hundredth before training stops; null for never", ge=1
    )
    item_dropout: float = key(
        0.2, "share of the items that each step leaves out of a sequence, as if they had not been bought", ge=0, le=0.9
    )
    held_out_prompts: float = key(
        0.0,
        "share of the training users whose last training interaction is kept from SASRec: those whom stage 3 prompts "
        "with the same seed and train_fraction, so that the confidence in it is no memory",
        ge=0,
        le=1,
    )


class HintConfig(Settings):
    """What prompts say of a CF model's ranking; see `hints`. The same values belong in grpo and evaluate."""

    cf_model: str = key(
        "sasrec",
        "CF model that gives confidences and hints: the results' folder of a SASRec under run_dir (sasrec, "
        f"sasrec_release), or one of {', '.join(BASELINES)}, which is fitted when the stage starts",
    )
    cf_hints: int = key(0, "how many of the candidates that cf_model ranks first prompts name; 0 (paper): none", ge=0)


class ConfidenceConfig(HintConfig):
    """Which CF model judges recommended items, and how its scores become confidences."""

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
    "judge",
    "report",
    "logs",
    "wandb",
    "oracle",
    "study",
    "ceiling_text",
    "ceiling_popularity",
    "ceiling_cohort",
)  # folders, variants


class SASRecRecipe(Recipe, SASRecConfig, SASRecTrainerConfig, DeviceConfig):
    """Stage 3a: train SASRec, and evaluate it and the CF baselines."""

    variant: str = key("sasrec", "name of the results: folder under run_dir and under eval/")
    num_seeds: int = key(1, "trainings, with seed, seed + 1, ...; the first one's model gives the rewards", ge=1)
    tune: bool = key(
        False,
        "first choose width and both dropouts on validation, among a handful of settings (SEARCH in sasrec_variant.py)",
    )
    tune_minutes: float = key(60.0, "tune: minutes after which no further setting is begun", gt=0)
    baselines: list[BaselineName] = key(list(BASELINES), "CF models that are evaluated beside SASRec")
    lists: list[RankedList] = key(
        ["uniform", "full"], "lists that are ranked; full is the whole catalogue without the seen items"
    )
    export_scores: str | None = key(
        None, "write the first seed's test scores to this .npz: float32 [users, items]", changes_result=False
    )
    export_top: int | None = key(
        None,
        "export only so many of each user's best items, with their scores; null for all",
        ge=1,
        changes_result=False,
    )

    @rule
    def variant_names_folders(self) -> str | None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.variant):
            return f"variant is {self.variant!r}; it names folders: letters, digits, _ . -"
        name = self.variant.lower()  # some disks take upper and lower case for the same
        beginnings = ("grpo", "sft_", "rationales_", "base_", "stage2", "stage3")
        if name in (*BASELINES, *RECBOLE_MODELS, *_TAKEN) or name.startswith(beginnings):
            return f"variant is {self.variant!r}, the name of a baseline or of another stage's results; choose another"
        return None


class BaselinesRecipe(Recipe, DeviceConfig):
    """Stage 3a, the CF models of the paper's Table 1 that RecBole has: train and evaluate them."""

    models: list[str] = key(list(RECBOLE_MODELS), f"rows that are made, of {', '.join(RECBOLE_MODELS)}")
    minutes: float = key(
        30.0,
        "most minutes of training per model, on a CPU without those in which other work had it; each setting that is "
        "tried gets at most half of what is left",
        gt=0,
    )
    num_settings: int | None = key(
        None, "settings tried per model, RecBole's defaults first; null for all of cf/recbole_models.py", ge=1
    )
    epochs: int = key(300, "largest number of epochs per setting", ge=1)
    patience: int = key(10, "epochs that do not raise the best validation before a setting's training stops", ge=1)
    max_length: int = key(50, "number of most recent items of a history that the models see", ge=1)
    validation_users: int | None = key(
        10_000, "most users who are asked in a validation, drawn by seed as SASRec's; null for all", ge=1
    )
    lists: list[RankedList] = key(
        ["uniform", "full"], "lists that are ranked; full is the whole catalogue without the seen items"
    )
    recbole_python: str = key(
        ".venv-recbole/bin/python",
        "Python of RecBole's environment, made by: VENV=.venv-recbole bash install.sh requirements-recbole.txt",
        changes_result=False,
    )

    @property
    def python_path(self) -> Path:
        """The Python of RecBole's environment; not resolved, since a link to another Python would leave it."""
        return Path(self.recbole_python).expanduser().absolute()

    @rule
    def models_are_known(self) -> str | None:
        unknown = [name for name in self.models if name not in RECBOLE_MODELS]
        why = "".join(f" ({NOT_IN_RECBOLE[name.lower()]})" for name in unknown if name.lower() in NOT_IN_RECBOLE)
        known = ", ".join(RECBOLE_MODELS)
        return f"models names {', '.join(unknown)}{why}; known are {known}" if unknown else None

    @rule
    def models_differ(self) -> str | None:
        if not self.models or len(set(self.models)) < len(self.models):
            return f"models is {self.models}; name at least one model, and each once"
        return None
