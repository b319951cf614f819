"""Recipes: the settings of every stage.

A recipe is a flat YAML file. Each room of the package declares its settings once, as a `Settings` class; a stage's
recipe inherits the groups it needs, and the code takes the same class. `recipe_reader` reads the files.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from twice_rec.errors import InputError
from twice_rec.masking import BY_VARIABLE, secret_keys
from twice_rec.progress import is_log
from twice_rec.random_streams import stream_seed

Rule = Callable[[Any], "str | None"]


def key(default: Any, says: str, *, changes_result: bool = True, hidden: bool = False, **bounds: float) -> Any:
    """Declare a recipe key: its default, its line in `--help`, and whether another value makes another result.

    Args:
        hidden: a wrong value is not repeated in errors, since people put secrets there that look like anything.
        bounds: `ge`, `gt`, `le`, `lt` of a number; None is allowed if the type allows it.
    """
    extra = {"changes_result": changes_result, "hidden": hidden}
    return Field(default, description=says, json_schema_extra=extra, **bounds)  # type: ignore[arg-type]


def required(says: str, *, changes_result: bool = True, **bounds: float) -> Any:
    """Declare a recipe key without a default."""
    return key(..., says, changes_result=changes_result, **bounds)


def one_of(names: Iterable[str]) -> Any:
    """Return the type of a key whose choices are the names in a registry."""
    return Literal[tuple(names)]


def is_named(name: str, stem: str) -> bool:
    """Whether a name is STEM or STEM_NAME; names that evaluation gives to second rankings are left to it."""
    return re.fullmatch(rf"{stem}(?:_[A-Za-z0-9.-]+)*(?<!_sampled)(?<!_likelihood)", name) is not None


def rule(function: Rule) -> Rule:
    """Mark a method as a condition across keys: it returns a message if the condition is broken, else None."""
    function.is_rule = True  # type: ignore[attr-defined]
    return function


class Settings(BaseModel):
    """A group of settings, frozen. The code that needs them takes this class; recipes inherit it."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), validate_default=False,
        hide_input_in_errors=True,
    )  # fmt: skip

    def values_of(self, group: type[Settings]) -> dict[str, Any]:
        """Return the settings of one inherited group, to be stored or handed on."""
        return {name: getattr(self, name) for name in group.model_fields}

    @classmethod
    def rules(cls) -> list[Rule]:
        """Return all rules, those of inherited groups first."""
        members = {name: member for owner in reversed(cls.__mro__) for name, member in vars(owner).items()}
        return [member for member in members.values() if getattr(member, "is_rule", False)]

    @rule
    def no_key_holds_a_secret(self) -> str | None:
        found = list(secret_keys(self.values_of(type(self))))
        return f"{', '.join(found)} {BY_VARIABLE}" if found else None

    @model_validator(mode="after")
    def _obey_rules(self) -> Settings:
        if messages := [message for check in self.rules() if (message := check(self))]:
            raise ValueError("\n".join(messages))
        return self


class DeviceConfig(Settings):
    """Where tensors are computed."""

    device: str = key(
        "auto", "where to compute: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one", changes_result=False
    )

    def torch_device(self) -> str:
        """Return the name of a torch device.

        Raises:
            InputError: if a GPU is asked for and torch sees none.
        """
        import torch

        available = torch.cuda.is_available()
        if self.device == "auto":
            return "cuda" if available else "cpu"
        if self.device.startswith("cuda") and not available:
            raise InputError(f"device is {self.device}, but torch {torch.__version__} sees no GPU; use --device cpu")
        return self.device


class Recipe(Settings):
    """The keys of every stage."""

    run_dir: str = required("folder of all results; {domain} in it is replaced by the domain", changes_result=False)
    domain: str = required("name of the domain, as in the paper")
    seed: int = required("seed of everything that this stage draws", ge=0)
    overwrite: bool = key(False, "replace finished results that were made with other settings", changes_result=False)
    wandb: Literal["none", "offline", "online"] = key(
        "none", "how to log to Weights & Biases; offline needs no account", changes_result=False
    )
    wandb_project: str = key("twice_rec", "project in Weights & Biases", changes_result=False)
    wandb_group: str | None = key(None, "group in Weights & Biases; null for the name of run_dir", changes_result=False)
    wandb_run_name: str | None = key(
        None, "name of the run in Weights & Biases; null for the stage's", changes_result=False
    )

    RENAMED: ClassVar[Mapping[str, str]] = {}  # old name of a key -> its name now; the old one works in this version
    RENAMED_VALUES: ClassVar[Mapping[tuple[str, str], str]] = {}  # (key, old value) -> the value now

    @rule
    def the_results_have_a_folder(self) -> str | None:
        if not self.run_dir.strip():
            return "run_dir is empty; name a folder for all results, such as runs/mine"
        return None

    @property
    def run_path(self) -> Path:
        """The folder of all results: `run_dir` with the domain filled in."""
        return Path(self.run_dir.replace("{domain}", self.domain)).expanduser()

    def settings(self) -> dict[str, Any]:
        """Return the keys that change the result, for the manifest."""
        return {name: getattr(self, name) for name, field in type(self).model_fields.items() if _changes_result(field)}

    @classmethod
    def defaults(cls, names: Iterable[str]) -> dict[str, Any]:
        """Return the defaults of those keys that have one: what earlier versions did that had no such key."""
        fields = {name: cls.model_fields[name] for name in names if name in cls.model_fields}
        return {name: field.get_default() for name, field in fields.items() if not field.is_required()}

    @classmethod
    def under_present_names(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings that an earlier version stored, under the names that keys and values have now."""
        renamed = {cls.RENAMED.get(name, name): value for name, value in settings.items()}
        return {n: cls.RENAMED_VALUES.get((n, v), v) if isinstance(v, str) else v for n, v in renamed.items()}

    def everything(self) -> dict[str, Any]:
        """Return all keys, for the manifest to tell."""
        return self.model_dump()


class TrainerRecipe(Recipe):
    """A recipe in which the keys of one of TRL's configurations stand beside ours."""

    LIBRARY: ClassVar[str] = "TRL"
    TRAINER_CONFIG: ClassVar[str]  # name of TRL's configuration
    OWNED: ClassVar[Mapping[str, str]] = {  # keys of it that the stage sets itself -> what to use instead
        "output_dir": "results go to a folder of run_dir",
        "report_to": "use wandb: none, offline or online",
        "run_name": "use wandb_run_name",
        "resume_from_checkpoint": "a checkpoint in the results' folder is resumed by itself",
        "model_init_kwargs": "use dtype, attn_implementation and model_revision",
        "trust_remote_code": "code in a model's folder is never run; choose a model that transformers knows",
        "remove_unused_columns": "it knows which columns its trainer needs; leave the key out",
        **dict.fromkeys(
            (
                "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push",
                "hub_revision",
            ),
            "results stay in run_dir, and recipes hold no tokens; upload the finished model with share.sh and its "
            "hub_model_id, which takes the token of `hf auth login` or HF_TOKEN",
        ),
        **dict.fromkeys(
            (
                "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
                "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics",
                "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "prediction_loss_only",
                "include_for_metrics", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
            ),
            "training has no evaluation set; leave the key out, and use evaluate.sh",
        ),
        **dict.fromkeys(
            ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "use wandb and its keys"
        ),
    }  # fmt: skip

    KNOWN_VALUES: ClassVar[Mapping[str, Iterable[Any]]] = {}  # keys of it that its trainer checks late -> what it takes
    LOWEST: ClassVar[Mapping[str, float]] = {  # keys of it that it does not check -> the least value
        **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), 1),
        **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"), 0),
    }
    ABOVE_ZERO: ClassVar[tuple[str, ...]] = ("num_train_epochs", "logging_steps", "save_steps", "save_total_limit")
    ONE_OR_ALL: ClassVar[tuple[str, ...]] = ("max_steps",)  # TRL takes 0 as well, and trains one step

    _trainer_keys: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def trainer_keys(self) -> dict[str, Any]:
        """The keys of TRL's configuration that the recipe gives; the reader fills them in."""
        return self._trainer_keys

    def trainer_value(self, name: str) -> Any:
        """Return the value of one of TRL's keys, its default if the recipe does not give it."""
        return self._trainer_keys.get(name, getattr(self.trainer_config(), name, None))

    def trainer_faults(self, keys: Mapping[str, Any]) -> dict[str, str]:
        """Return key of TRL's -> what is wrong with it, if TRL takes it at first and stumbles over it when it trains.

        A recipe adds the keys that do not go with its own. `keys` are the given ones.
        """
        faults = {}
        for name, value in keys.items():
            is_number = isinstance(value, (int, float))
            if name in self.KNOWN_VALUES and value not in self.KNOWN_VALUES[name]:
                faults[name] = f"it must be one of {', '.join(map(str, self.KNOWN_VALUES[name]))}"
            elif is_number and name in self.LOWEST and value < self.LOWEST[name]:
                faults[name] = f"it must be at least {self.LOWEST[name]:g}"
            elif is_number and name in self.ABOVE_ZERO and value <= 0:
                faults[name] = "it must be above 0"
            elif name in self.ONE_OR_ALL and value != -1 and value < 1:
                faults[name] = "it must be at least 1, or -1 for as many as num_train_epochs takes"
        return {name: f"{name} is {keys[name]!r}; {limit}" for name, limit in faults.items()}

    @classmethod
    def trainer_config(cls) -> type:
        """Return TRL's configuration class; imports TRL."""
        return getattr(importlib.import_module("trl"), cls.TRAINER_CONFIG)

    def settings(self) -> dict[str, Any]:
        """Return the keys that change the result, TRL's included."""
        return {**super().settings(), **self._trainer_keys}

    def everything(self) -> dict[str, Any]:
        """Return all keys, TRL's included."""
        return {**super().everything(), **self._trainer_keys}

    def trainer_arguments(self, folder: Path, **others: Any) -> Any:
        """Return TRL's configuration: the recipe's keys, those of `OWNED`, and others."""
        return self.trainer_config()(
            output_dir=str(folder),
            seed=stream_seed(self.seed, f"first weights, order and dropout of {self.TRAINER_CONFIG}"),
            report_to="none" if self.wandb == "none" else "wandb",
            run_name=os.environ.get("WANDB_NAME"),
            **{"disable_tqdm": is_log(), **self._trainer_keys},
            **others,
        )


def _changes_result(field: Any) -> bool:
    return (field.json_schema_extra or {}).get("changes_result", True)
