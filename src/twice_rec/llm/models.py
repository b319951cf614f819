"""Loading models and tokenizers, LoRA settings, merging an adapter into a copy of its base.

Nothing here knows which model it is: chat templates, end-of-turn tokens and layer kinds come from the model's files.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from twice_rec.config import ModelKeys
from twice_rec.errors import InputError
from twice_rec.llm import attention  # noqa: F401  registers chunked_sdpa

logger = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the left as generation needs it.

    Raises:
        InputError: where there is none, it is gated, or it has no chat template.
    """
    tokenizer = _from_pretrained(AutoTokenizer, name, revision=revision, padding_side="left")
    if not tokenizer.chat_template:
        raise InputError(
            f"{name}: the tokenizer has no chat template, so prompts cannot be written; use an instruction-tuned model "
            "(gemma-3-1b-it, Qwen3-0.6B), or add a chat_template to its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str | Path,
    dtype: str,
    attn_implementation: str,
    revision: str | None = None,
    device: str | None = None,
    quantization: str = "none",
) -> PreTrainedModel:
    """A causal language model from a folder or the hub, safetensors only, without code from the hub.

    Args:
        quantization: `8bit` or `4bit` (NF4) for a frozen base on a GPU, by bitsandbytes.

    Raises:
        InputError: where there is none, it is gated, or it is to be quantised without bitsandbytes.
    """
    options = {}
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
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    model = _from_pretrained(
        AutoModelForCausalLM,
        name,
        revision=revision,
        dtype=getattr(torch, dtype),
        attn_implementation=attn_implementation,
        use_safetensors=True,
        **options,
    )
    return model.to(device) if device else model


def _from_pretrained(factory, name: str | Path, **options):
    looks_local = str(name).startswith((".", "/")) or str(name).count("/") != 1
    if looks_local and not Path(name).is_dir():
        raise InputError(f"{name}: no such model folder; make it first, or name a model of the hub (owner/name)")
    try:
        return factory.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        text = str(error)
        if "401" in text or "403" in text or "gated" in text:
            raise InputError(
                f"{name} is gated: accept its licence on the hub and log in (`hf auth login`, or HF_TOKEN), or use an "
                "ungated model such as Qwen/Qwen3-0.6B"
            ) from error
        raise InputError(f"{name}: cannot be loaded: {text.splitlines()[0]}") from error


def lora_config(keys: ModelKeys) -> LoraConfig | None:
    """The adapter of a recipe; None where all weights are trained."""
    if not keys.use_peft:
        return None
    return LoraConfig(
        r=keys.lora_r,
        lora_alpha=keys.lora_alpha,
        lora_dropout=keys.lora_dropout,
        target_modules=list(keys.lora_target_modules),
        task_type="CAUSAL_LM",
    )


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an answer: the tokenizer's EOS, and those of the model's generation settings.

    Gemma ends a turn with 106 while its tokenizer's EOS is 1; only both together tell a finished answer from one that
    was cut off.
    """
    ids = {tokenizer.eos_token_id}
    declared = model.generation_config.eos_token_id
    ids.update(declared if isinstance(declared, list) else [declared])
    return sorted(index for index in ids if index is not None)


def write_merged(base: str | Path, trained: Path, out: Path, dtype: str, revision: str | None = None) -> None:
    """Write what a trainer left in `trained` as a plain model with its tokenizer.

    An adapter is merged into a fresh copy of the base, whose files and weights stay as they are. Where all weights
    were trained they are only copied.
    """
    if (trained / ADAPTER_FILES[0]).exists():
        model = load_model(base, dtype, "sdpa", revision)
        model = PeftModel.from_pretrained(model, str(trained)).merge_and_unload()
    else:
        model = load_model(trained, dtype, "sdpa")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    load_tokenizer(trained).save_pretrained(temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def saved_weights(trained: Path) -> list[Path]:
    """The files in which a trainer left its weights: an adapter's, or a whole model's."""
    adapter = [trained / name for name in ADAPTER_FILES]
    return adapter if adapter[0].exists() else [*sorted(trained.glob("model*.safetensors")), trained / "config.json"]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete `checkpoint-N` of a trainer; incomplete ones, left by a kill in mid-save, are removed.

    A trainer writes `trainer_state.json` last of all.
    """
    complete = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            complete.append((int(path.name.rpartition("-")[2]), path))
        except (OSError, ValueError):
            logger.warning("%s is incomplete, left by an interrupted save; it is removed", path)
            shutil.rmtree(path)
    return max(complete)[1] if complete else None


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], answer: str = "") -> list[int]:
    """Token ids of a prompt, opened for the model's turn, and of the beginning of its answer.

    The chat template writes the BOS token itself, so nothing is added to its text. Prompt and answer are encoded apart,
    since that is how a model meets them: the prompt's last token never depends on the answer.
    """
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return [*encode_text(tokenizer, text), *encode_text(tokenizer, answer)]


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template writes behind an answer, up to the first special token: what a model learns to stop with.

    `<end_of_turn>` for Gemma, `<|im_end|>` for Qwen; the EOS token where the template writes no special one.
    """
    mark = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    behind = encode_text(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)[2])
    special = set(tokenizer.all_special_ids)
    first = next((i for i, token in enumerate(behind) if token in special), None)
    return [tokenizer.eos_token_id] if first is None else behind[: first + 1]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, nothing added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
