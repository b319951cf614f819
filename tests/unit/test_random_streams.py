"""Draws of different purposes have nothing to do with each other, whatever seed they share."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import twice_rec
from prompt_formats import prompt_format
from twice_rec.catalog import ItemCatalog
from twice_rec.evaluation.llm_ranking import question_batches
from twice_rec.grpo.dataset import prompt_rows
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.llm.recipe import PromptConfig
from twice_rec.random_streams import id_hashes, random_stream, random_streams, stream_seed
from twice_rec.records import Example, Interaction, Item, Rationale
from twice_rec.sft.dataset import TaskMixConfig, training_rows
from twice_rec.sft.recipe import SFTRecipe
from twice_rec.stages.stage1_rationales import _drawn

USERS, DRAWN = 1000, 200
CATALOG = ItemCatalog([Item("B1", "tea"), Item("B2", "milk"), *(Item(f"u{n}", f"item {n}") for n in range(USERS))])
BUILDER = PromptBuilder(CATALOG, prompt_format(), None, PromptConfig())
# A user's one item is called as the user, since the rows of stage 3 have the history and not the user.
EXAMPLES = [Example(f"u{n}", (Interaction(f"u{n}"),), ("B1", "B2"), "B2") for n in range(USERS)]
SOURCE = Path(twice_rec.__file__).parent


class Data:
    folder = Path("data")

    def training_examples(self):
        return iter(EXAMPLES)

    def examples(self, split, kind):
        return iter(EXAMPLES)


def annotated(seed):
    asked, _, _ = _drawn(SimpleNamespace(annotator="offline", seed=seed, max_rationales=DRAWN), Data())
    return {example.user_id for example in asked}


def trained(seed):
    mix = TaskMixConfig(item_info_rows=0, direct_rows=DRAWN, rationale_rows=0)
    return {row.user_id for row in training_rows(BUILDER, EXAMPLES, [], mix, seed)}


def explained(seed):
    mix = TaskMixConfig(item_info_rows=0, direct_rows=0, rationale_rows=DRAWN)
    rationales = [Rationale(example.user_id, example.target, "so", "relevant", (), 1.0, "rule") for example in EXAMPLES]
    return {row.user_id for row in training_rows(BUILDER, EXAMPLES, rationales, mix, seed)}


def prompted(seed):
    return {row["history"][0] for row in prompt_rows(BUILDER, EXAMPLES, DRAWN / USERS, seed)}


def evaluated(seed):
    recipe = SimpleNamespace(seed=seed, num_users=DRAWN, batch_size=8, lists=["uniform"])
    return {example.user_id for _, examples in question_batches(recipe, Data()) for example in examples}


@pytest.mark.parametrize(
    ("one", "other"), itertools.combinations([annotated, trained, explained, prompted, evaluated], 2)
)
def test_draws_of_users_overlap_as_chance_says(one, other):
    if {one, other} == {trained, explained}:
        return  # the same purpose; that users with rationales come first is asked for
    expected, seeds = DRAWN**2 / USERS, range(5)
    spread = np.sqrt(expected * (1 - DRAWN / USERS) ** 2)  # of the hypergeometric distribution, nearly
    for seed in seeds:
        assert len(one(seed)) == len(other(seed)) == DRAWN
    overlaps = [len(one(seed) & other(seed)) for seed in seeds]
    assert abs(np.mean(overlaps) - expected) < 4 * spread / np.sqrt(len(seeds)), overlaps


def test_a_stream_depends_on_seed_and_purpose_and_on_nothing_else():
    draws = [
        random_stream(*name).random(4).tolist()
        for name in [(1, "a"), (2, "a"), (1, "b"), (1, "a", 1), (1, "a", 2), (11, "a"), (1, "1a")]
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert random_stream(1, "a").random(4).tolist() == draws[0]
    assert random_stream(42, "evaluated users").permutation(6).tolist() == [3, 5, 2, 4, 1, 0]  # on every machine
    assert len({stream_seed(1, "a", n) for n in range(1000)}) == 1000
    assert all(0 <= stream_seed(n, "a") < 2**31 for n in range(100))


def test_streams_of_many_ids_are_the_same_on_every_machine():
    streams = random_streams(42, id_hashes(["u", "v"]), "test", "uniform")
    assert (streams.random(0, 3) * 1000).astype(int).tolist() == [[652, 694, 514], [723, 232, 834]]
    assert (random_streams(0, id_hashes([]), "x").random(0, 3)).shape == (0, 3)


def test_a_number_depends_on_its_stream_and_place_only():
    hashes = id_hashes([f"u{n}" for n in range(50)])
    streams = random_streams(1, hashes, "test", "uniform")
    whole = streams.random(0, 20)
    assert np.array_equal(streams.random(5, 10), whole[:, 5:15])
    assert np.array_equal(streams.take(np.array([7, 3])).random(0, 20), whole[[7, 3]])
    assert np.array_equal(random_streams(1, hashes[10:20], "test", "uniform").random(0, 20), whole[10:20])
    assert np.array_equal(streams.random_at(np.array([3, 0])), whole[:, [3, 0]])


def test_numbers_are_uniform_and_streams_independent():
    hashes = id_hashes([f"u{n}" for n in range(2000)])
    purposes = [(1, "test", "uniform"), (2, "test", "uniform"), (1, "valid", "uniform"), (1, "test", "popularity")]
    drawn = [random_streams(seed, hashes, *purpose).random(0, 100) for seed, *purpose in purposes]
    first = random_streams(1, hashes, "test", "uniform")
    drawn += [first.apart(1).random(0, 100), first.apart(2).random(0, 100)]
    for numbers in drawn:
        assert 0 <= numbers.min() < 1e-4
        assert 1 - 1e-4 < numbers.max() < 1
        counts = np.histogram(numbers, bins=50, range=(0, 1))[0]  # 4,000 each
        assert ((counts - 4000) ** 2 / 4000).sum() < 49 + 5 * np.sqrt(2 * 49)  # chi-square of 49 degrees of freedom
        for other in [numbers[:, 1:], numbers[1:]]:  # the next place, the next user
            assert abs(np.corrcoef(numbers[: len(other), : other.shape[1]].ravel(), other.ravel())[0, 1]) < 0.012
    for one, other in itertools.combinations(drawn, 2):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.012
    assert len(np.unique(np.concatenate(drawn))) == 6 * 200_000


def test_the_trainers_of_two_stages_have_seeds_of_their_own(tmp_path):
    recipes = [
        SFTRecipe(run_dir="r", domain="D", seed=1, model_name_or_path="m"),
        GRPORecipe(run_dir="r", domain="D", seed=1),
    ]
    for recipe in recipes:
        recipe.trainer_keys.update(use_cpu=True, bf16=False)
    first, second = (recipe.trainer_arguments(tmp_path).seed for recipe in recipes)
    assert len({first, second, 1}) == 3


# Generators that no recipe's seed enters, or that take a stream's seed. Everything else asks `random_stream`.
OTHERS = {
    "cf/recbole_runner.py",
    "random_streams.py",
    "data/sources/synthetic.py",  # it spawns its own from one SeedSequence
    "rationales/duplicates.py",  # fixed hash functions
    "rationales/client.py",  # how long to wait
}


def test_no_other_module_makes_a_generator_from_a_seed():
    makes = re.compile(
        r"default_rng\(|SeedSequence\(|random\.Random\(|manual_seed\((?!stream_seed\(|seed\b)|set_seed\("
    )
    paths = {str(path.relative_to(SOURCE)): path for path in SOURCE.rglob("*.py")}
    assert paths.keys() >= OTHERS
    for name in paths.keys() - OTHERS:
        assert not makes.search(paths[name].read_text()), name
