"""The synthetic domain: its schema, its determinism, and that no half of its signals is enough."""

import json

import numpy as np
import pytest

from twice_rec import metrics
from twice_rec.cf.baselines import ItemSimilarityScorer, interaction_matrix, knn_similarity
from twice_rec.data.sequences import assemble
from twice_rec.data.sources.amazon import SCHEMA_2023, AmazonSource
from twice_rec.data.sources.synthetic import BRANDS, DIETS, MAX_ITEMS, PRODUCT_TYPES, World, WorldSettings
from twice_rec.errors import InputError

STRENGTHS = {"taste": 2.2, "complement": 2.4, "cohort": 2.6, "popularity": 0.5, "brand": 1.0}


def world_of(users=400, items=200, seed=3, **strengths):
    return World(WorldSettings(users=users, items=items, seed=seed, **{**STRENGTHS, **strengths}))


@pytest.fixture(scope="module")
def world():
    return world_of()


@pytest.fixture(scope="module")
def raw(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    world.write(folder, "World")
    return folder


def test_raw_files_have_the_2023_schema(raw):
    review = json.loads((raw / "World.jsonl").read_text().splitlines()[0])
    assert list(review) == [
        "rating", "title", "text", "images", "asin", "parent_asin", "user_id", "timestamp", "helpful_vote",
        "verified_purchase",
    ]  # fmt: skip
    assert isinstance(review["rating"], float)
    assert isinstance(review["timestamp"], int)
    assert isinstance(review["verified_purchase"], bool)
    item = json.loads((raw / "meta_World.jsonl").read_text().splitlines()[0])
    assert list(item) == [
        "main_category", "title", "average_rating", "rating_number", "features", "description", "price", "images",
        "videos", "store", "categories", "details", "parent_asin", "bought_together",
    ]  # fmt: skip
    assert isinstance(item["description"], list)
    assert set(item["details"]) == {"Brand", "Diet", "Category"}


def test_the_same_seed_gives_the_same_files(raw, tmp_path):
    world_of().write(tmp_path, "World")
    for name in ("World.jsonl", "meta_World.jsonl"):
        assert (tmp_path / name).read_bytes() == (raw / name).read_bytes()
    world_of(seed=4).write(tmp_path, "World")
    assert (tmp_path / "World.jsonl").read_bytes() != (raw / "World.jsonl").read_bytes()


def test_items_do_not_depend_on_the_number_of_users(world):
    assert world_of(users=50).item_ids == world.item_ids


def test_titles_are_never_used_twice():
    assert len({item["title"] for item in world_of(users=1, items=MAX_ITEMS).metadata()}) == MAX_ITEMS
    with pytest.raises(InputError, match=f"world_items is {MAX_ITEMS + 1:,}"):
        world_of(users=1, items=MAX_ITEMS + 1)


def test_every_file_is_read_without_a_problem(raw, world):
    source = AmazonSource(raw, "World", SCHEMA_2023)
    catalog, sequences = assemble(source, "drop", 1, 6, None)
    assert source.problems.counts == {}
    assert len(sequences) == 400
    assert len(catalog) <= 200
    assert catalog.ambiguous_titles == 0
    lengths = [len(sequence.interactions) for sequence in sequences]
    assert (min(lengths), max(lengths)) == (6, 15)
    position = {item_id: j for j, item_id in enumerate(world.item_ids)}
    bought = [[position[entry.item_id] for entry in sequence.interactions] for sequence in sequences]
    assert bought == world.purchases


def test_texts_show_taste_and_complements_but_no_cohort(world):
    categories = list(PRODUCT_TYPES)
    for j, item in enumerate(world.metadata()):
        assert item["title"].startswith(f"{DIETS[world.diet[j]]} ")
        assert item["store"] == BRANDS[world.brand[j]]
        called_for = {categories[c] for c in np.flatnonzero(world.complements[world.category[j]])}
        assert called_for == set(item["description"][0].split("Goes well with ")[1].rstrip(".").split(" and "))
    assert "cohort" not in json.dumps([*world.metadata(), *world.reviews()]).lower()


def test_reviews_agree_with_taste(world):
    user_at = {user_id: i for i, user_id in enumerate(world.user_ids)}
    item_at = {item_id: j for j, item_id in enumerate(world.item_ids)}
    ratings = {-2: [], -1: [], 0: [], 1: [], 2: []}
    for review in world.reviews():
        user, item = user_at[review["user_id"]], item_at[review["parent_asin"]]
        ratings[int(world.taste(np.array([user]))[0, item])].append(review["rating"])
        liked = [DIETS[d] for d in np.flatnonzero(world.diet_taste[user] > 0)]
        liked += [BRANDS[b] for b in np.flatnonzero(world.brand_taste[user] > 0)]
        if "I usually buy" in review["text"]:
            assert review["text"].split("I usually buy ")[1].rstrip(".") in liked
    means = [np.mean(ratings[t]) for t in (-1, 0, 1, 2)]
    assert means == sorted(means)
    assert means[-1] - means[0] > 1.5


def test_log_probabilities_are_a_distribution_over_what_is_left(world):
    logs = world.next_item_log_probabilities([0, 1], [[], [5, 7]])
    assert np.exp(logs).sum(axis=1) == pytest.approx([1.0, 1.0], rel=1e-4)
    assert np.isneginf(logs[1, [5, 7]]).all()
    assert np.isfinite(logs[0]).all()


def test_purchases_follow_the_probabilities():
    """Many users with the same hidden state: the first purchase's frequencies match the formula."""
    world = world_of(users=20_000, items=50, taste=0.0, complement=0.0, cohort=0.0, popularity=1.0, brand=0.0)
    expected = np.exp(world.next_item_log_probabilities([0], [[]])[0])
    found = np.bincount([history[0] for history in world.purchases], minlength=50) / 20_000
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / 20_000)


def test_oracle_scores_stand_in_the_files_order(raw, world):
    catalog, sequences = assemble(AmazonSource(raw, "World", SCHEMA_2023), "drop", 1, 6, None)
    scores = world.test_log_probabilities(sequences, catalog)
    assert scores.shape == (400, len(catalog))
    row = 17
    history = world.purchases[row][:-1]
    histories = [bought[:-1] for bought in world.purchases]  # all at once: a batch of one rounds otherwise
    expected = world.next_item_log_probabilities(np.arange(400), histories)[row]
    assert scores[row, 3] == expected[world.item_ids.index(catalog.ids[3])]
    assert np.isneginf(scores[row, catalog.index(world.item_ids[history[0]]) - 1])


@pytest.fixture(scope="module")
def hit_rates():
    """HR@1 among ten uniform candidates of counting models that see a part of the world, and of the oracle."""
    world = world_of(users=4000, items=300, seed=1)
    users = np.arange(1500)
    histories = [history[:-1] for history in world.purchases[:1500]]
    targets = np.array([history[-1] for history in world.purchases[:1500]])
    rng = np.random.default_rng(0)
    others = [rng.choice(np.setdiff1d(np.arange(300), h), 9, replace=False) for h in world.purchases[:1500]]
    shown = np.concatenate([targets[:, None], np.stack(others)], axis=1)

    def hit_rate(scores):
        jitter = 1e-9 * rng.random(scores.shape)  # ties are broken at random
        return metrics.hit_rate(
            metrics.ranks_from_scores(np.take_along_axis(scores + jitter, shown, 1), np.zeros(1500, int)), 1
        ).mean()

    # Interactions only: item-kNN on everybody's training part.
    training = [[1 + item for item in history[:-2]] for history in world.purchases]
    knn = ItemSimilarityScorer(knn_similarity(interaction_matrix(training, 300), 20.0), 0.9)
    by_interactions = knn.scores(users, [[1 + item for item in history] for history in histories])

    # Text only: how often diet and brand were bought and how they were rated, and what the last item goes well with.
    reviews = iter(world.reviews())
    by_text = np.zeros((1500, 300))
    for user, whole in enumerate(world.purchases[:1500]):
        diets, brands = np.zeros(len(DIETS)), np.zeros(len(BRANDS))
        rated = [next(reviews)["rating"] for _ in whole]
        for item, rating in zip(histories[user], rated, strict=False):
            weight = 0.3 + (rating - 3.4) / 1.2
            diets[world.diet[item]] += weight
            brands[world.brand[item]] += weight
        by_text[user] = 0.3 * diets[world.diet] + 0.5 * brands[world.brand]
        by_text[user] += 2.0 * world.complements[world.category[histories[user][-1]]][world.category]

    popularity = np.bincount([item - 1 for history in training for item in history], minlength=300)
    return {
        "oracle": hit_rate(world.next_item_log_probabilities(users, histories)),
        "interactions": hit_rate(by_interactions),
        "text": hit_rate(by_text),
        "both": hit_rate(by_text + 10 * by_interactions),
        "popularity": hit_rate(np.tile(popularity.astype(float), (1500, 1))),
    }


def test_text_alone_and_interactions_alone_fall_clearly_short_of_the_oracle(hit_rates):
    # Standard error of a hit rate here: at most sqrt(.25 / 1500) = .013; clearly means .1.
    assert hit_rates["text"] < hit_rates["oracle"] - 0.1
    assert hit_rates["interactions"] < hit_rates["oracle"] - 0.1
    assert min(hit_rates["text"], hit_rates["interactions"]) > hit_rates["popularity"] + 0.05


def test_text_and_interactions_together_beat_either(hit_rates):
    assert hit_rates["both"] > max(hit_rates["text"], hit_rates["interactions"]) + 0.03
