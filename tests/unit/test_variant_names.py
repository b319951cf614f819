"""A variant's name never leads into the folder of other results."""

from pathlib import Path

import pytest

from twice_rec.cf.recipe import SASRecRecipe
from twice_rec.errors import InputError
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.recipe_reader import load_recipe
from twice_rec.sft.recipe import SFTRecipe

TINY = Path(__file__).parents[2] / "recipes" / "tiny"


@pytest.mark.parametrize(
    "name",
    [
        "rationales",
        "Rationales",
        "judge",
        "wandb",
        "base_sampled",
        "grpo_x",
        "sft_x",
        "rationales_x",
        "../data",
        "ease",
        "S3Rec",
        "study",
    ],
)
def test_a_sasrec_has_a_folder_of_its_own(name):
    with pytest.raises(InputError, match="variant is"):
        load_recipe(TINY / "sasrec.yaml", SASRecRecipe, ["--variant", name, "--overwrite", "true"])


@pytest.mark.parametrize(
    "name", ["sasrec", "itemknn", "bert4rec", "GRU4Rec", "stage2_sampled", "../data", ".locks", "a/b"]
)
def test_precomputed_scores_have_a_folder_of_their_own(name):
    with pytest.raises(InputError, match="precomputed_scores has the name"):
        load_recipe(TINY / "evaluate.yaml", EvaluateRecipe, ["--precomputed_scores", f"{{'{name}': a.npz}}"])
    load_recipe(TINY / "evaluate.yaml", EvaluateRecipe, ["--precomputed_scores", "{mine: a.npz}"])


@pytest.mark.parametrize(
    ("variant", "folder"), [("stage2", "sft"), ("stage2_no_rationale", "sft_no_rationale"), ("stage2_sft", "sft_sft")]
)
def test_a_stage_2_has_a_folder_by_its_name(variant, folder):
    assert load_recipe(TINY / "sft.yaml", SFTRecipe, ["--variant", variant]).folder == folder


@pytest.mark.parametrize("name", ["sft", "stage3", "stage2_", "stage2_a/b", "stage2_sampled", "stage2_a_likelihood"])
def test_a_stage_2_is_not_named_like_other_results(name):
    with pytest.raises(InputError, match="variant is .* it must be stage2 or stage2_NAME"):
        load_recipe(TINY / "sft.yaml", SFTRecipe, ["--variant", name])


def test_a_suffix_is_added_to_the_names_of_language_models():
    flags = ["--variants", "stage2_x", "--suffix", "item_only", "--rankings", "likelihood", "sampled"]
    recipe = load_recipe(TINY / "evaluate.yaml", EvaluateRecipe, flags)
    assert recipe.result_name("stage2_x", "likelihood") == "stage2_x_item_only"
    assert recipe.result_name("stage2_x", "sampled") == "stage2_x_item_only_sampled"
    plain = load_recipe(TINY / "evaluate.yaml", EvaluateRecipe, ["--rankings", "sampled", "likelihood"])
    assert plain.result_name("stage3", "sampled") == "stage3"
    assert plain.result_name("stage3", "likelihood") == "stage3_likelihood"


@pytest.mark.parametrize("suffix", ["", "a/b", "../x", "sampled", "x_likelihood", "a b"])
def test_a_suffix_leads_nowhere_else(suffix):
    with pytest.raises(InputError, match="suffix is"):
        load_recipe(TINY / "evaluate.yaml", EvaluateRecipe, [f"--suffix={suffix!r}"])
