"""A model that cannot be trained is refused in one line, before anything is loaded or begun."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from twice_rec.errors import InputError
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.llm.model_check import check_folder, check_layers, check_template, checked_tokenizer
from twice_rec.llm.models import load_model, lora_config
from twice_rec.llm.recipe import AdapterConfig, ModelConfig
from twice_rec.llm.tokens import from_pretrained, load_tokenizer
from twice_rec.recipe_reader import load_recipe
from twice_rec.sft.recipe import SFTRecipe

BASE = Path(__file__).parents[2] / "assets" / "tiny_base"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8\n"


class Both(ModelConfig, AdapterConfig):
    """What the check reads of a recipe."""


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(BASE, tmp_path / "model-403"))


def weights(model):
    return model / "model.safetensors"


DAMAGES = {
    "pointer of Git LFS": lambda model: weights(model).write_text(POINTER),
    "its header says": lambda model: weights(model).write_bytes(weights(model).read_bytes()[:-9]),
    "is empty": lambda model: weights(model).write_bytes(b""),
    "has no weights": lambda model: weights(model).unlink(),
    "pytorch_model.bin only": lambda model: weights(model).rename(model / "pytorch_model.bin"),
    "has no config.json": lambda model: (model / "config.json").unlink(),
    r"tokenizer.json is a pointer": lambda model: (model / "tokenizer.json").write_text(POINTER),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_folders(model, message):
    DAMAGES[message](model)
    with pytest.raises(InputError, match=message):
        checked_tokenizer(model, Both())
    with pytest.raises(InputError, match=message):
        load_model(model, ModelConfig(dtype="float32"))


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(InputError, match="holds a LoRA adapter, not a model.*owner/base"):
        check_folder(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", "null"])
def test_a_damaged_adapter_is_no_model_either(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=r"holds a LoRA adapter, not a model.*the adapter's base$"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, "68 are missing or have another shape, such as model.embed_tokens.weight"),
        ({"tie_word_embeddings": False}, "1 are missing or have another shape, such as lm_head.weight"),
        ({"model_type": "bert"}, "config.json and weights belong to different models"),
        ({"num_hidden_layers": 9}, r"Class validation error .* must be equal to the number of `layer_types` \(6\)"),
        ({"rope_parameters": {"rope_type": "x"}}, "cannot be loaded: AttributeError: "),
        ({"hidden_activation": "nope"}, "cannot be loaded: KeyError: 'nope'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "cannot be loaded: TypeError: "),
    ],
)
def test_a_configuration_that_is_not_that_of_the_weights(model, change, message):
    """Weights that are missing would be random numbers otherwise."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message) as caught:
        load_model(model, ModelConfig(dtype="float32"))
    assert "\n" not in str(caught.value)


def test_weights_whose_header_does_not_fit(model):
    whole = weights(model).read_bytes()
    weights(model).write_bytes(whole.replace(b'"F32"', b'"F16"', 1))
    with pytest.raises(InputError, match="cannot be loaded: SafetensorError: "):
        load_model(model, ModelConfig(dtype="float32"))


def test_a_tokenizer_that_loads_and_does_not_work(model):
    settings = json.loads((model / "tokenizer.json").read_text())
    settings["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    (model / "tokenizer.json").write_text(json.dumps(settings | {"post_processor": None}))
    with pytest.raises(InputError, match="the tokenizer does not work"):
        load_tokenizer(model)


def test_memory_that_is_used_up_is_not_the_models_fault():
    class Factory:
        def from_pretrained(self, name):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(RuntimeError, match="out of memory"):
        from_pretrained(Factory(), "owner/model")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves out the sys",
        ),
        ("{% for m in messages %}", "does not take our prompts"),
    ],
)
def test_templates(template, message):
    tokenizer = load_tokenizer(BASE)
    check_template(tokenizer, BASE)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message):
        check_template(tokenizer, BASE)


def test_layers_of_the_adapter():
    check_layers(BASE, AdapterConfig())
    with pytest.raises(InputError, match=r"names c_attn, and .*q_proj"):
        check_layers(BASE, AdapterConfig(lora_target_modules=["q_proj", "c_attn"]))
    with pytest.raises(InputError, match="names nothing"):
        check_layers(BASE, AdapterConfig(lora_target_modules=[]))
    for given in ("all-linear", ["all-linear"]):
        config = AdapterConfig(lora_target_modules=given)
        check_layers(BASE, config)
        assert lora_config(config).target_modules == "all-linear"


def test_only_the_hub_says_that_a_model_is_gated(model):
    class Factory:
        def __init__(self, text):
            self.text = text

        def from_pretrained(self, name):
            raise OSError(self.text)

    with pytest.raises(InputError, match="cannot be loaded"):
        from_pretrained(Factory(f"{model}: damaged"), model)
    with pytest.raises(InputError, match="cannot be loaded"):
        from_pretrained(Factory("owner/model-403 is not there"), "owner/model-403")
    for text in ("You are trying to access a gated repo.", "403 Client Error: Forbidden for url"):
        with pytest.raises(InputError, match="is gated"):
            from_pretrained(Factory(text), "owner/model")


@pytest.mark.parametrize(
    ("recipe", "stage", "key", "value"),
    [
        (GRPORecipe, "grpo", "temperature", 0.0),
        (GRPORecipe, "grpo", "loss_type", "nonsense"),
        (GRPORecipe, "grpo", "scale_rewards", "nonsense"),
        (GRPORecipe, "grpo", "per_device_train_batch_size", -8),
        (GRPORecipe, "grpo", "max_completion_length", 0),
        (SFTRecipe, "sft", "per_device_train_batch_size", -1),
        (SFTRecipe, "sft", "gradient_accumulation_steps", 0),
        (SFTRecipe, "sft", "learning_rate", -1e-3),
        (SFTRecipe, "sft", "num_train_epochs", 0),
        (SFTRecipe, "sft", "max_length", 0),
    ],
)
def test_values_that_trl_stumbles_over_later(recipe, stage, key, value):
    path = Path(__file__).parents[2] / "recipes" / "tiny" / f"{stage}.yaml"
    with pytest.raises(InputError, match=f"--{key}: {key} is .*{value}.*; it must be"):
        load_recipe(path, recipe, [f"--{key}", str(value)])


def test_liger_is_missed_before_the_work(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = SFTRecipe(run_dir="r", domain="D", seed=1, model_name_or_path="m")
    recipe.trainer_keys["use_liger_kernel"] = True
    with pytest.raises(InputError, match="use_liger_kernel is true, and Liger is not installed"):
        checked_tokenizer("m", recipe)
