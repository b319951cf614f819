"""A variant's name never leads into the folder of other results."""

from pathlib import Path

import pytest

from twice_rec.cf.recipe import SASRecRecipe
from twice_rec.errors import InputError
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.recipe_reader import load_recipe

TINY = Path(__file__).parents[2] / "recipes" / "tiny"


@pytest.mark.parametrize(
    "name", ["rationales", "Rationales", "wandb", "base_sampled", "grpo_x", "../data", "ease", "S3Rec"]
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
