"""What is looked at before a model is loaded and a folder is begun: its files, chat template, layers and attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from twice_rec.errors import InputError
from twice_rec.files import read_json
from twice_rec.llm.recipe import ALL_LINEAR, SHARES_PREFIXES, VARLEN, AdapterConfig
from twice_rec.llm.tokens import first_line, from_pretrained, load_tokenizer
from twice_rec.llm.trial import check_shared_rows
from twice_rec.llm.varlen import check_varlen
from twice_rec.prompts import Message
from twice_rec.recipe import DeviceConfig, TrainerRecipe
from twice_rec.weight_files import SHARDS, fault_of_file, fault_of_shards, fault_of_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONVERT = "load it once with transformers where you trust it and save it again with save_pretrained"


def checked_tokenizer(name: str | Path, recipe: Any) -> PreTrainedTokenizerBase:
    """Look at a model that will be loaded, without loading its weights, and return its tokenizer.

    Args:
        recipe: a `ModelConfig`, and an `AdapterConfig` if the model is to be trained.

    Raises:
        InputError: if Liger is asked for and missing, if its files are not whole, if its chat template does not take
            our prompts, if the adapter names layers that it does not have, or if `check_attention` finds a fault.
    """
    keys = recipe.trainer_keys if isinstance(recipe, TrainerRecipe) else {}
    if keys.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise InputError(
            "use_liger_kernel is true, and Liger is not installed: bash install.sh requirements.txt "
            "requirements-gpu.txt, or --use_liger_kernel false"
        )
    if Path(name).is_dir():
        check_folder(Path(name))
    tokenizer = load_tokenizer(name, recipe.model_revision)
    check_template(tokenizer, name)
    if isinstance(recipe, AdapterConfig) and recipe.use_peft:
        check_layers(name, recipe, recipe.model_revision)
    check_attention(name, recipe)
    return tokenizer


def check_attention(name: str | Path, recipe: Any) -> None:
    """Raise an InputError if the kind of attention does not take the model, its dtype, this machine or shared rows."""
    kind, alone = recipe.attn_implementation, recipe.settings_alone
    if kind != VARLEN and not alone:
        return
    settings = from_pretrained(AutoConfig, name, revision=recipe.model_revision)
    check_shared_rows(name, settings, kind if kind in SHARES_PREFIXES else "sdpa", alone)
    if kind == VARLEN:
        on_cpu = isinstance(recipe, TrainerRecipe) and recipe.trainer_keys.get("use_cpu")
        device = recipe.torch_device() if isinstance(recipe, DeviceConfig) else "cpu" if on_cpu else None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_varlen(settings, getattr(torch, recipe.dtype), device)


def check_folder(folder: Path) -> None:
    """Raise an InputError if a folder does not hold a whole model: sizes and headers are read, no weights."""
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            adapter = read_json(folder / "adapter_config.json")
            base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
            raise InputError(
                f"{folder} holds a LoRA adapter, not a model; name a merged model (the folder merged/ of a stage), or "
                f"the adapter's base{f', {base}' if base else ''}"
            )
        raise InputError(f"{folder} has no config.json, so it is not a model folder; name one, or a model of the hub")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        if (folder / name).exists() and (fault := fault_of_file(folder / name)):
            raise InputError(f"{folder / name} {fault}; fetch the model again")
    index, single = next(iter(sorted(folder.glob(SHARDS))), None), folder / "model.safetensors"
    weights = sorted(folder.glob("*.safetensors")) if index else [single] if single.exists() else []
    if index and (fault := fault_of_shards(index)):
        raise InputError(f"{index} {fault}; fetch the model again")
    if not weights:
        if found := sorted(folder.glob("*.bin")):
            raise InputError(f"{folder} holds weights as {found[0].name} only; safetensors are needed: {_CONVERT}")
        raise InputError(f"{folder} has no weights (model.safetensors); fetch the model again, or name another folder")
    for path in weights:
        if fault := fault_of_weights(path):
            raise InputError(f"{path} {fault}; fetch the model again")


def check_template(tokenizer: PreTrainedTokenizerBase, name: str | Path) -> None:
    """Raise an InputError if the chat template does not take a prompt as ours are: a system and a user message."""
    prompt: list[Message] = [{"role": "system", "content": "instruction"}, {"role": "user", "content": "question"}]
    answered: list[Message] = [*prompt, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        tokenizer.apply_chat_template(answered, tokenize=False)
    except Exception as error:  # noqa: BLE001 - a template raises what it likes
        raise InputError(
            f"{name}: the chat template does not take our prompts, a system and a user message "
            f"({first_line(error)}); use a model whose template has a system role, or change its chat_template"
        ) from None
    if lost := [message["role"] for message in prompt if message["content"] not in text]:
        raise InputError(
            f"{name}: the chat template leaves out the {lost[0]} message; use a model whose template has a system "
            "role, or change its chat_template"
        )


def check_layers(name: str | Path, config: AdapterConfig, revision: str | None = None) -> None:
    """Raise an InputError if the model has not every layer that the adapter names; it is built without weights."""
    wanted = config.target_layers
    if wanted == ALL_LINEAR:
        return
    settings = from_pretrained(AutoConfig, name, revision=revision)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # noqa: BLE001 - what odd settings make of transformers
        raise InputError(f"{name} is no causal language model of transformers: {first_line(error)}") from None
    layers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and not path.endswith("lm_head")  # TRL refuses it
    ]
    missing = [each for each in wanted if not any(f".{path}".endswith(f".{each}") for path in layers)]
    if missing or not wanted:
        known = ", ".join(sorted({path.rpartition(".")[2] for path in layers}))
        raise InputError(
            f"lora_target_modules names {', '.join(missing) or 'nothing'}, and {name} has the layers {known}; name "
            f"some of these, or {ALL_LINEAR}"
        )
