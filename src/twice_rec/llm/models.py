"""Language models: load one, give it an adapter, merge the adapter into a copy of its base, find checkpoints."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from twice_rec.errors import InputError
from twice_rec.llm.model_check import check_folder
from twice_rec.llm.recipe import VARLEN, AdapterConfig, ComputeConfig, ModelConfig
from twice_rec.llm.tokens import from_pretrained, load_tokenizer
from twice_rec.llm.varlen import check_varlen

logger = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def load_model(
    name: str | Path, config: ModelConfig, device: str | None = None, quantization: str = "none"
) -> PreTrainedModel:
    """Load a causal language model from a folder or the hub: safetensors only, no code from the hub.

    Args:
        config: `model_revision` counts for a model of the hub only.
        quantization: `8bit` or `4bit` (NF4) by bitsandbytes, for a frozen base on a GPU.

    Raises:
        InputError: if there is no such model, if its files are not whole, if it is gated, if bitsandbytes is needed but
            not installed, or if the kind of attention does not take the model.
    """
    if Path(name).is_dir():
        check_folder(Path(name))
    dtype = getattr(torch, config.dtype)
    options = {"dtype": dtype, "attn_implementation": config.attn_implementation, "use_safetensors": True}
    if quantization != "none":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(
                f"quantization is {quantization}, but bitsandbytes is not installed; pip install -r "
                "requirements-gpu.txt, or use --quantization none"
            )
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit",
            load_in_4bit=quantization == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = from_pretrained(AutoModelForCausalLM, name, revision=config.model_revision, **options)
    if wrong := sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]):
        raise InputError(
            f"{name}: config.json and weights belong to different models: of the weights, {len(wrong)} are missing or "
            f"have another shape, such as {wrong[0]}; fetch the model again"
        )
    if config.attn_implementation == VARLEN:
        check_varlen(model.config, model.dtype, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind, layers = config.attn_implementation, model.config.get_text_config()
    if "sdpa" in kind and getattr(layers, "attn_logit_softcapping", None):
        logger.warning("attn_implementation %s leaves out the soft cap of this model's attention; eager has it", kind)
    return model.to(device) if device else model


def load_for_training(name: str | Path, model: ModelConfig, compute: ComputeConfig, **options: Any) -> PreTrainedModel:
    """Load a model as `load_model` does, with its layers to be compiled if the recipe says so."""
    loaded = load_model(name, model, **options)
    if compute.compile_layers:
        compile_layers(loaded)
    return loaded


def compile_layers(model: PreTrainedModel) -> None:
    """Let torch compile the decoder layers, each as one piece of code for all lengths, at their first call.

    What lies between the matrix products of a layer (norms, rotations, activations, an adapter's additions) becomes a
    few kernels. The layers of a kind share their code, so this takes about a minute, and weights keep their names.
    """
    torch._dynamo.config.recompile_limit = 64  # kinds of layers, times with and without adapter, gradients, checkpoints
    for layer in model.base_model.layers:
        layer.compile(dynamic=True)


def lora_config(config: AdapterConfig) -> LoraConfig | None:
    """Return PEFT's settings of the adapter; None if all weights are trained."""
    if not config.use_peft:
        return None
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_layers,
        task_type="CAUSAL_LM",
    )


def write_merged(base: str | Path, trained: Path, out: Path, config: ModelConfig) -> None:
    """Write what a trainer left in `trained` as a plain model with its tokenizer.

    An adapter is merged into a fresh copy of the base; the base's own files stay as they are. If all weights were
    trained, they are only copied. `out` appears when it is complete.
    """
    plain = ModelConfig(model_revision=config.model_revision, dtype=config.dtype)
    if (trained / ADAPTER_FILES[0]).exists():
        model = PeftModel.from_pretrained(load_model(base, plain), str(trained)).merge_and_unload()
    else:
        model = load_model(trained, plain)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    load_tokenizer(trained).save_pretrained(temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def save_merged(base: str | Path, trained: Path, config: ModelConfig) -> list[Path]:
    """Write `trained/merged/`, see `write_merged`; return the files and folders that later stages rely on."""
    write_merged(base, trained, trained / "merged", config)
    return [*saved_weights(trained), trained / "trainer_state.json", trained / "merged"]


def saved_weights(trained: Path) -> list[Path]:
    """Return the files in which a trainer left its weights: those of an adapter, or of a whole model."""
    adapter = [trained / name for name in ADAPTER_FILES]
    return adapter if adapter[0].exists() else [*sorted(trained.glob("model*.safetensors")), trained / "config.json"]
