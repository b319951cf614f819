"""A model whose rows cannot share a row is refused in one line, with the setting that works, before it is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, FalconConfig, GPTJConfig, Qwen3Config

from tiny_models import gemma3, llama, mistral, qwen3
from twice_rec.errors import InputError
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.llm.model_check import check_attention, checked_tokenizer
from twice_rec.llm.recipe import SHARES_PREFIXES
from twice_rec.llm.shared_prefix import continuation_logprobs
from twice_rec.llm.trial import _small, check_shared_rows
from twice_rec.recipe_reader import load_recipe
from twice_rec.sft.recipe import SDPORecipe, SFTRecipe

ROOT = Path(__file__).parents[2]
BASE = ROOT / "assets" / "tiny_base"
ALONE = ["share_prefixes false", "pack_tokens null"]
SIZES = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
WITH_WINDOWS = {**SIZES, "sliding_window": 500}
GPT = {"vocab_size": 500, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}


@pytest.mark.parametrize("attention", SHARES_PREFIXES)
@pytest.mark.parametrize("make", [gemma3, qwen3, llama, mistral])
def test_models_that_may(make, attention):
    check_shared_rows("m", make().config, attention, ALONE)


@pytest.mark.parametrize(
    ("config", "attention", "end"),
    [
        (AutoConfig.for_model("stablelm", **SIZES), "varlen", "no segments reach the model's attention; use {} sdpa"),
        (AutoConfig.for_model("nemotron", **SIZES), "varlen", "no segments reach the model's attention; use {} sdpa"),
        (FalconConfig(**SIZES), "varlen", "KeyError: 'varlen'; use {} sdpa"),
        (GPTJConfig(**GPT), "varlen", "KeyError: 'varlen'; use {} eager"),
        (AutoConfig.for_model("codegen", **GPT), "varlen", "use {} eager"),
        (AutoConfig.for_model("phimoe", **WITH_WINDOWS), "varlen", "wrong by .*; use {} sdpa"),  # loses its windows
        (BloomConfig(**GPT), "varlen", "too many values to unpack .*; use {} eager, share_prefixes false, pack_.*"),
        (BloomConfig(**GPT), "eager", "too many values to unpack .*; use share_prefixes false, pack_tokens null"),
        (AutoConfig.for_model("mpt", d_model=64, n_heads=4, n_layers=2), "eager", "use share_prefixes false, pack_.*"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_models_that_may_not(config, attention, end):
    with pytest.raises(InputError, match=f"{end.format('attn_implementation')}$") as caught:
        check_shared_rows("m", config, attention, ALONE)
    assert str(caught.value).startswith("m: rows of this model cannot share a beginning or a pack with attn_implementa")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
def test_a_recurrent_model_whose_configuration_does_not_say_so(attention):
    config = AutoConfig.for_model("recurrent_gemma", **WITH_WINDOWS, head_dim=16)
    use = "use attn_implementation sdpa, share" if attention == "varlen" else "use share"
    with pytest.raises(InputError, match=f"logprobs were wrong by .*; {use}_prefixes false, pack_tokens null$"):
        check_shared_rows("m", config, attention, ALONE)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (AutoConfig.for_model("lfm2", **SIZES, layer_types=["conv", "full_attention", "conv"]), "conv"),
        (AutoConfig.for_model("llama4_text", **SIZES), "chunked_attention"),
        (
            Qwen3Config(**SIZES, layer_types=["full_attention", "linear_attention", "full_attention"]),
            "linear_attention",
        ),
    ],
    ids=["lfm2", "llama4", "linear"],
)
def test_layers_of_kinds_that_no_mask_fits(config, kind):
    for attention, more in (("sdpa", ""), ("varlen", "attn_implementation sdpa, ")):
        with pytest.raises(InputError, match=f"of the kind {kind}; use {more}share_prefixes false, pack_tokens null$"):
            check_shared_rows("m", config, attention, ALONE)


def test_a_model_that_cannot_be_tried_is_not_taken_for_one_that_may():
    config = Qwen3Config(**{**SIZES, "num_attention_heads": 3})  # two key heads for three
    with pytest.raises(
        InputError, match=r"no small copy of it runs \(.*\); use share_prefixes false, pack_tokens null$"
    ):
        check_shared_rows("m", config, "sdpa", ALONE)


def test_a_small_copy_keeps_what_attention_is_of():
    values = json.loads((ROOT / "recipes" / "shapes" / "gemma-3-1b-it.json").read_text())
    whole = AutoConfig.for_model(values.pop("model_type"), **values)
    few, every_layer = _small(whole)
    assert few.layer_types == ["sliding_attention", "full_attention"]
    assert every_layer.layer_types == whole.layer_types
    for small in (few, every_layer):
        for name in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "rope_parameters"):
            assert getattr(small, name) == getattr(whole, name)
        assert (small.vocab_size, small.intermediate_size, small.sliding_window) == (64, 64, 8)


def test_without_a_list_of_kinds_a_layer_that_is_built_otherwise_is_one():
    config = AutoConfig.for_model("deepseek_v3", **SIZES | {"num_hidden_layers": 9}, first_k_dense_replace=2)
    assert next(_small(config)).num_hidden_layers == 3  # the third has experts
    assert next(_small(llama().config)).num_hidden_layers == 1


def test_the_layers_raise_if_segments_do_not_reach_them():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("stablelm", **SIZES), attn_implementation="varlen")
    with pytest.raises(InputError, match="no segments reach the model's attention; use attn_implementation sdpa$"):
        continuation_logprobs(model, [5, 6, 7], [[8], [9]])
    model(input_ids=torch.tensor([[5, 6, 7]]))  # without segments it is sdpa


def test_dropout_is_not_lost():
    model = qwen3("varlen", attention_dropout=0.5)
    continuation_logprobs(model.eval(), [5, 6, 7], [[8], [9]])
    with pytest.raises(InputError, match="varlen has no dropout, the model's attention has; use .* sdpa$"):
        continuation_logprobs(model.train(), [5, 6, 7], [[8], [9]])


def recipe(kind, name, *flags):
    return load_recipe(ROOT / "recipes" / "tiny" / f"{name}.yaml", kind, list(flags))


@pytest.fixture
def hybrid(tmp_path):
    """A model folder with convolutions between its attention."""
    folder = Path(shutil.copytree(BASE, tmp_path / "hybrid"))
    values = AutoConfig.for_model("lfm2", **SIZES, layer_types=["conv", "full_attention", "conv"]).to_dict()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


ALL_OFF = ("--share_prefixes", "false", "--sample_every", "null")


@pytest.mark.parametrize(
    ("kind", "name", "flags", "use"),
    [
        (SFTRecipe, "sft", (), "share_prefixes false, sample_every null"),
        (SFTRecipe, "sft", (*ALL_OFF, "--pack_tokens", "99"), "pack_tokens null"),
        (GRPORecipe, "grpo", ("--rollout", "transformers"), "share_prefixes false, rollout vllm_server"),
        (SDPORecipe, "sdpo", (), "another model"),
        (EvaluateRecipe, "evaluate", (), "another model"),
    ],
)
def test_every_stage_names_the_settings_that_work(kind, name, flags, use, hybrid):
    found = recipe(kind, name, *flags)
    if kind is not EvaluateRecipe:  # layers of Gemma's names, which it has not, are not what is looked at
        found = found.model_copy(update={"use_peft": False})
    with pytest.raises(InputError, match=f"no mask for layers of the kind conv; use {use}$"):
        checked_tokenizer(hybrid, found)


def test_rows_of_their_own_need_no_trial(hybrid):
    checked_tokenizer(hybrid, recipe(SFTRecipe, "sft", *ALL_OFF))


def test_a_reward_that_asks_the_policy_shares_rows():
    asking = recipe(GRPORecipe, "grpo", "--share_prefixes", "false", "--rollout", "vllm_server")
    assert asking.settings_alone == []
    asking = asking.model_copy(update={"reward_funcs": ["rank", "structure"]})
    assert asking.settings_alone == ["reward_funcs without rank"]


@pytest.mark.parametrize(("kind", "name"), [(SFTRecipe, "sft"), (GRPORecipe, "grpo"), (EvaluateRecipe, "evaluate")])
def test_varlen_without_a_gpu_is_told_before_any_work(kind, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"varlen needs a GPU that torch can use; use .* chunked_sdpa$"):
        check_attention(BASE, recipe(kind, name, "--attn_implementation", "varlen"))
