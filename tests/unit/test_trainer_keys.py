"""Keys of TRL's configurations that cannot work in our stages are refused, with what to use instead."""

import dataclasses

import pytest

from twice_rec.errors import InputError
from twice_rec.grpo.recipe import OF_TRL_ROLLOUTS, GRPORecipe
from twice_rec.recipe_reader import load_recipe
from twice_rec.sft.recipe import SDPORecipe, SFTRecipe

SECRET = "hf_abcdefghijklmnop"
STAGES = {
    SFTRecipe: "run_dir: r\ndomain: D\nseed: 1\nmodel_name_or_path: m\nuse_cpu: true\nbf16: false\n",
    GRPORecipe: "run_dir: r\ndomain: D\nseed: 1\nuse_cpu: true\nbf16: false\n",
    SDPORecipe: "run_dir: r\ndomain: D\nseed: 1\nuse_cpu: true\nbf16: false\n",
}


def load(folder, recipe, text, *flags):
    path = folder / "r.yaml"
    path.write_text(STAGES[recipe] + text)
    return load_recipe(path, recipe, flags)


@pytest.mark.parametrize("recipe", STAGES)
def test_refused_keys_are_keys_of_trl_and_all_are_refused(tmp_path, recipe):
    assert recipe.OWNED.keys() <= {field.name for field in dataclasses.fields(recipe.trainer_config())}
    own = recipe.model_fields
    names = [name for name in recipe.OWNED if name not in own]
    with pytest.raises(InputError) as caught:
        load(tmp_path, recipe, "".join(f"{name}: 1\n" for name in names))
    assert len(str(caught.value).splitlines()) == 1 + len(names)
    for name in names:
        assert f"{name} is set by the stage: {recipe.OWNED[name]}" in str(caught.value)


@pytest.mark.parametrize("recipe", STAGES)
def test_a_token_is_refused_and_not_repeated(tmp_path, recipe):
    for text, flags in [(f"hub_token: {SECRET}\n", []), ("", ["--hub_token", SECRET])]:
        with pytest.raises(InputError, match="hub_token .*recipes hold no tokens") as caught:
            load(tmp_path, recipe, text, *flags)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (recipe, name)
        for recipe, names in {
            SFTRecipe: ("completion_only_loss", "chat_template_path", "dataset_kwargs", "eval_strategy", "push_to_hub"),
            GRPORecipe: ("chat_template_kwargs", "eval_steps", "push_to_hub", "vllm_server_host", "vllm_mode"),
        }.items()
        for name in names
    ],
)
def test_keys_that_would_do_nothing_are_refused(tmp_path, recipe, name):
    with pytest.raises(InputError, match=f"line \\d+: {name} is set by the stage: "):
        load(tmp_path, recipe, f"{name}: null\n")


@pytest.mark.parametrize("ours", ["share_prefixes: true", "pack_tokens: 512", "curriculum: true"])
@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_packs_of_ours_and_of_trl_exclude_each_other(tmp_path, ours, name):
    with pytest.raises(InputError, match=f"{name} is true, but {ours.partition(':')[0]} .*set it to false"):
        load(tmp_path, SFTRecipe, f"{ours}\n{name}: true\nmax_length: 512\n")
    assert load(tmp_path, SFTRecipe, f"{ours}\n{name}: false\n").trainer_keys[name] is False
    assert load(tmp_path, SFTRecipe, f"{name}: true\nmax_length: 512\n").trainer_keys[name] is True


@pytest.mark.parametrize("recipe", STAGES)
def test_no_steps_are_refused_since_trl_would_take_one(tmp_path, recipe):
    for value in (0, -2):
        with pytest.raises(InputError, match=f"max_steps is {value}; it must be at least 1, or -1 for as many"):
            load(tmp_path, recipe, f"max_steps: {value}\n")
    for value in (-1, 1):
        assert load(tmp_path, recipe, f"max_steps: {value}\n").trainer_keys["max_steps"] == value


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.9), ("top_k", 5), ("min_p", 0.1), ("repetition_penalty", 1.1)])
def test_samplings_that_the_trainer_cannot_do_itself_are_refused(tmp_path, name, value):
    with pytest.raises(InputError, match=f"{name} is {value}; with rollout: transformers only .* is possible"):
        load(tmp_path, GRPORecipe, f"{name}: {value}\n")
    assert load(tmp_path, GRPORecipe, f"{name}: {value}\nrollout: vllm_server\n").trainer_keys[name] == value


def test_a_curriculum_keeps_its_order(tmp_path):
    with pytest.raises(InputError, match="train_sampling_strategy is random, but a curriculum keeps"):
        load(tmp_path, SFTRecipe, "curriculum: true\ntrain_sampling_strategy: random\n")
    load(tmp_path, SFTRecipe, "curriculum: true\ntrain_sampling_strategy: sequential\n")


@pytest.mark.parametrize(("name", "kinds"), OF_TRL_ROLLOUTS.items())
def test_keys_of_another_rollout_are_refused(tmp_path, name, kinds):
    value = {"vllm_enable_sleep_mode": "true", "vllm_model_impl": "vllm", "vllm_structured_outputs_regex": "a"}
    text = f"{name}: {value.get(name, 9)}\n"
    with pytest.raises(InputError, match=f"{name} is for rollout {kinds[0]}.*, found rollout transformers"):
        load(tmp_path, GRPORecipe, text)
    for kind in kinds:
        assert name in load(tmp_path, GRPORecipe, f"{text}rollout: {kind}\n").trainer_keys
