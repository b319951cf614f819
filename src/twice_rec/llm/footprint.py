"""What training takes: memory of a GPU by part, and time. Operations are counted by `flops`; nothing is loaded here.

The constants are of one H100 at Gemma-3-1B's shape (benchmarks/results/gpu.jsonl): there the memory comes out within a
tenth. That other shapes behave alike is assumed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from twice_rec.errors import InputError
from twice_rec.files import read_json
from twice_rec.llm.flops import ModelArithmetic, used_matrices
from twice_rec.llm.recipe import AdapterConfig, EstimateConfig

GIB = 2**30
USABLE = 0.95  # share of a card's memory that a process can count on
ACTIVATION_BYTES = 3.2  # kept for the backward, per input and output of each matrix and token; measured unfused
TILE_TOKENS = 1024  # whose logits exist at a time, in float32 with their gradients
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5}


class Shape(NamedTuple):
    """What decides a model's memory."""

    arithmetic: ModelArithmetic
    parameters: int  # all weights; a tied head counts once
    widths: int  # inputs and outputs of all matrices that a token goes through, added up
    hidden: int  # width of a layer
    depth: int  # number of layers
    vocabulary: int  # number of tokens

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the shape of a configuration of transformers."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = model.config.get_text_config()
        total, arithmetic = sum(parameter.numel() for parameter in model.parameters()), ModelArithmetic.of(model)
        widths = sum(map(sum, used_matrices(model)))
        return cls(arithmetic, total, widths, text.hidden_size, text.num_hidden_layers, text.vocab_size)


def read_shape(name: str | Path | None, config: EstimateConfig) -> Shape:
    """Return the shape of a model by its folder or name, without a network: from this machine or `model_shape`.

    Args:
        name: None if the model is not made yet; then `model_shape` stands for it.

    Raises:
        InputError: if neither has it, or its operations are not counted.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    found = None
    if name is not None:
        with contextlib.suppress(OSError, ValueError):
            found = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    if found is not None:
        try:
            return Shape.of(found)
        except (ValueError, AttributeError) as error:
            raise InputError(f"{name}: the operations of this model are not counted ({error}); no estimate") from None
    if config.model_shape is not None:
        values = read_json(Path(config.model_shape))
        try:
            stands_for = values.pop("_name_or_path", None)
            if name is None or stands_for == str(name):
                return Shape.of(transformers.AutoConfig.for_model(values.pop("model_type"), **values))
        except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
            fault = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            raise InputError(
                f"model_shape is {config.model_shape}, which is no config.json of a language model ({fault}); "
                "recipes/shapes has some"
            ) from None
    missing, first = (name, "fetch it") if name else ("the stage-2 model", "run sft.sh")
    raise InputError(
        f"the config.json of {missing} is not on this machine, and model_shape is "
        f"{config.model_shape}; {first} first, or set model_shape to a file like it that names it as "
        "_name_or_path (recipes/shapes has some)"
    )


def memory(
    shape: Shape,
    config: AdapterConfig,
    tokens: int,
    weights: str,
    checkpointing: bool,
    zero: int = 0,
    gpus: int = 1,
    tile: int = TILE_TOKENS,
) -> dict[str, float]:
    """Return part -> GiB of each GPU's memory in a training step.

    Args:
        tokens: that go through the model at once, a shared beginning counted once.
        weights: a key of `WEIGHT_BYTES`.
        zero: stage of DeepSpeed's ZeRO, 0 for none; it divides what it shards by `gpus`.
        tile: tokens whose logits exist at a time.
    """
    trained = config.lora_r * shape.widths if config.use_peft else shape.parameters  # an adapter on all matrices
    wide = 2.0 if weights == "float32" else 1.0
    shards = [gpus if zero >= stage else 1 for stage in (1, 2, 3)]  # of optimizer, gradients, weights
    kept = ACTIVATION_BYTES * wide * tokens * shape.widths
    if checkpointing:  # the inputs of all layers, and one layer whole
        kept = kept / shape.depth + 2 * wide * tokens * shape.hidden * shape.depth
    parts = {
        "weights": WEIGHT_BYTES[weights] * shape.parameters / shards[2],
        "adapter" if config.use_peft else "gradients": (8.0 if config.use_peft else 4.0) * trained / shards[1],
        "optimizer": 8.0 * trained / shards[0],
        "activations": kept,
        "logits": 8.0 * min(tokens, tile) * shape.vocabulary,
    }
    return {part: size / GIB for part, size in parts.items()}


def gpu_hours(flops: float, config: EstimateConfig) -> float:
    """Return the hours of one GPU that so many operations take at the assumed utilisation."""
    return flops / (config.gpu_tflops * 1e12 * config.gpu_utilization) / 3600


def this_gpu() -> int:
    """Return the number of the GPU on which this process trains: accelerate tells each process its own."""
    return int(os.environ.get("LOCAL_RANK", 0))


def card_gib(config: EstimateConfig) -> tuple[float, str]:
    """Return the memory of this process's GPU in GiB, and where the figure comes from."""
    if config.gpu_memory_gib is not None:
        return config.gpu_memory_gib, "gpu_memory_gib"
    if torch.cuda.is_available():
        device = this_gpu()
        return torch.cuda.get_device_properties(device).total_memory / GIB, torch.cuda.get_device_name(device)
    return 80.0, "assumed, since this machine has no GPU"
