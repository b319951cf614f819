"""The synthetic domain: its schema, its determinism, and that no half of its signals is enough."""

import json

import numpy as np
import pytest

from prepared import assemble
from twice_rec import metrics
from twice_rec.cf.baselines import ItemSimilarityScorer, interaction_matrix, knn_similarity
from twice_rec.data.recipe import PrepareRecipe
from twice_rec.data.sequences import SequenceConfig
from twice_rec.data.sources import SOURCES
from twice_rec.data.sources.amazon import Amazon2023
from twice_rec.data.sources.synthetic import (
    BRANDS,
    CATEGORIES,
    DIETS,
    MAX_ITEMS,
    PRODUCT_TYPES,
    SyntheticConfig,
    SyntheticDomain,
    SyntheticSource,
)
from twice_rec.recipe_reader import load_recipe

SEQUENCES = SequenceConfig(k_core=1, min_history=6, max_history=None)


def config_of(users=400, items=200, **strengths):
    """The defaults of the recipe, at another size."""
    keys = {"users": users, "items": items, **strengths}
    return SyntheticConfig(**{f"synthetic_{name}": value for name, value in keys.items()})


def domain_of(seed=3, **keys):
    return SyntheticDomain(config_of(**keys), seed)


@pytest.fixture(scope="module")
def domain():
    return domain_of()


@pytest.fixture(scope="module")
def raw(domain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    domain.write(folder, "World")
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
    domain_of().write(tmp_path, "World")
    for name in ("World.jsonl", "meta_World.jsonl"):
        assert (tmp_path / name).read_bytes() == (raw / name).read_bytes()
    domain_of(seed=4).write(tmp_path, "World")
    assert (tmp_path / "World.jsonl").read_bytes() != (raw / "World.jsonl").read_bytes()


def test_items_do_not_depend_on_the_number_of_users(domain):
    assert domain_of(users=50).item_ids == domain.item_ids


def test_titles_are_never_used_twice():
    assert len({item["title"] for item in domain_of(users=1, items=MAX_ITEMS).metadata()}) == MAX_ITEMS
    with pytest.raises(ValueError, match=f"synthetic_items\n.*less than or equal to {MAX_ITEMS}"):
        domain_of(users=1, items=MAX_ITEMS + 1)


def test_every_file_is_read_without_a_problem(raw, domain):
    source = Amazon2023(raw, "World")
    catalog, sequences = assemble(source, SEQUENCES)
    assert source.problems.counts == {}
    assert len(sequences) == 400
    assert len(catalog) <= 200
    assert catalog.ambiguous_titles == 0
    lengths = [len(sequence.interactions) for sequence in sequences]
    assert (min(lengths), max(lengths)) == (6, 15)
    position = {item_id: j for j, item_id in enumerate(domain.item_ids)}
    bought = [[position[entry.item_id] for entry in sequence.interactions] for sequence in sequences]
    assert bought == domain.histories


def test_texts_show_taste_and_complements_but_no_cohort(domain):
    categories = list(PRODUCT_TYPES)
    for j, item in enumerate(domain.metadata()):
        assert item["title"].startswith(f"{DIETS[domain.diet[j]]} ")
        assert item["store"] == BRANDS[domain.brand[j]]
        called_for = {categories[c] for c in np.flatnonzero(domain.complements[domain.category[j]])}
        assert called_for == set(item["description"][0].split("Goes well with ")[1].rstrip(".").split(" and "))
    assert "cohort" not in json.dumps([*domain.metadata(), *domain.reviews()]).lower()


def test_reviews_agree_with_taste(domain):
    user_at = {user_id: i for i, user_id in enumerate(domain.user_ids)}
    item_at = {item_id: j for j, item_id in enumerate(domain.item_ids)}
    ratings = {-2: [], -1: [], 0: [], 1: [], 2: []}
    for review in domain.reviews():
        user, item = user_at[review["user_id"]], item_at[review["parent_asin"]]
        ratings[int(domain.taste(np.array([user]))[0, item])].append(review["rating"])
        liked = [DIETS[d] for d in np.flatnonzero(domain.diet_taste[user] > 0)]
        liked += [BRANDS[b] for b in np.flatnonzero(domain.brand_taste[user] > 0)]
        if "I usually buy" in review["text"]:
            assert review["text"].split("I usually buy ")[1].rstrip(".") in liked
    means = [np.mean(ratings[t]) for t in (-1, 0, 1, 2)]
    assert means == sorted(means)
    assert means[-1] - means[0] > 1.5


def test_log_probabilities_are_a_distribution_over_what_is_left(domain):
    logs = domain.next_item_log_probabilities([0, 1], [[], [5, 7]])
    assert np.exp(logs).sum(axis=1) == pytest.approx([1.0, 1.0], rel=1e-4)
    assert np.isneginf(logs[1, [5, 7]]).all()
    assert np.isfinite(logs[0]).all()


def test_interactions_follow_the_probabilities():
    """Many users with the same hidden state: the first interaction's frequencies match the formula."""
    domain = domain_of(users=20_000, items=50, taste=0.0, complement=0.0, cohort=0.0, popularity=1.0, brand=0.0)
    expected = np.exp(domain.next_item_log_probabilities([0], [[]])[0])
    found = np.bincount([history[0] for history in domain.histories], minlength=50) / 20_000
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / 20_000)


def test_oracle_scores_stand_in_the_files_order(raw, domain):
    catalog, sequences = assemble(Amazon2023(raw, "World"), SEQUENCES)
    scores = domain.test_log_probabilities(sequences, catalog)
    assert scores.shape == (400, len(catalog))
    row = 17
    history = domain.histories[row][:-1]
    histories = [bought[:-1] for bought in domain.histories]  # all at once: a batch of one rounds otherwise
    expected = domain.next_item_log_probabilities(np.arange(400), histories)[row]
    assert scores[row, 3] == expected[domain.item_ids.index(catalog.ids[3])]
    assert np.isneginf(scores[row, catalog.index(domain.item_ids[history[0]]) - 1])


def test_as_a_source_it_writes_its_files_and_knows_the_oracle(raw, domain, tmp_path):
    source = SyntheticSource(config_of(), "World", 3)
    assert source.files == []
    source.generate(tmp_path)
    for name in ("World.jsonl", "meta_World.jsonl"):
        assert (tmp_path / name).read_bytes() == (raw / name).read_bytes()
    catalog, sequences = assemble(source, SEQUENCES)
    expected = domain.test_log_probabilities(sequences, catalog)
    assert np.array_equal(source.oracle_scores(sequences, catalog), expected)
    assert Amazon2023(raw, "World").oracle_scores(sequences, catalog) is None


def test_true_reasons_are_those_that_the_next_item_was_drawn_by(raw, domain):
    """Held against the formula: the log-probability of an item moves by the strengths times the reasons for it."""
    catalog, sequences = assemble(Amazon2023(raw, "World"), SEQUENCES)
    reasons = {row.user_id: row for row in domain.test_reasons(sequences)}
    assert list(reasons) == [sequence.user_id for sequence in sequences if sequence.test is not None]
    scores = domain.test_log_probabilities(sequences, catalog)
    for sequence, logs in list(zip(sequences, scores, strict=True))[:40]:
        true, user = reasons[sequence.user_id], domain.user_ids.index(sequence.user_id)
        assert (len(true.likes), len(true.dislikes), len(true.calls_for)) == (5, 3, 2)
        expected = []
        for item_id in catalog.ids:
            j = domain.item_ids.index(item_id)
            diet_and_brand = (DIETS[domain.diet[j]], BRANDS[domain.brand[j]])
            taste = sum((name in true.likes) - (name in true.dislikes) for name in diet_and_brand)
            utility = 2.2 * taste + 2.4 * (CATEGORIES[domain.category[j]] in true.calls_for) + domain.appeal[j]
            expected.append(utility + 2.6 * (domain.cohort[j] == domain.user_cohort[user]))
        left = np.isfinite(logs)
        gap = (logs - np.array(expected))[left]
        assert np.abs(gap - gap[0]).max() < 1e-4  # all but the constant of the softmax
    assert Amazon2023(raw, "World").true_reasons(sequences) is None


def test_sources_of_a_recipe(tmp_path):
    assert list(SOURCES) == ["synthetic", "amazon2023", "amazon2014", "amazon2023_5core", "recbole", "release"]
    path = tmp_path / "prepare.yaml"
    path.write_text("run_dir: r\ndomain: D\nseed: 5\nsource: world\nworld_users: 30\n")  # the names of before
    source = load_recipe(path, PrepareRecipe).open_source()
    assert isinstance(source, SyntheticSource)
    source.generate(tmp_path)
    assert len(source.interactions().users) == 30


@pytest.fixture(scope="module")
def hit_rates():
    """HR@1 among ten uniform candidates of counting models that see a part of the domain, and of the oracle."""
    domain = domain_of(users=4000, items=300, seed=1)
    users = np.arange(1500)
    histories = [history[:-1] for history in domain.histories[:1500]]
    targets = np.array([history[-1] for history in domain.histories[:1500]])
    rng = np.random.default_rng(0)
    others = [rng.choice(np.setdiff1d(np.arange(300), h), 9, replace=False) for h in domain.histories[:1500]]
    shown = np.concatenate([targets[:, None], np.stack(others)], axis=1)

    def hit_rate(scores):
        jitter = 1e-9 * rng.random(scores.shape)  # ties are broken at random
        return metrics.hit_rate(
            metrics.ranks_from_scores(np.take_along_axis(scores + jitter, shown, 1), np.zeros(1500, int)), 1
        ).mean()

    # Interactions only: item-kNN on everybody's training part.
    training = [[1 + item for item in history[:-2]] for history in domain.histories]
    knn = ItemSimilarityScorer(knn_similarity(interaction_matrix(training, 300), 20.0), 0.9)
    by_interactions = knn.scores(users, [[1 + item for item in history] for history in histories])

    # Text only: how often diet and brand were bought and how they were rated, and what the last item goes well with.
    reviews = iter(domain.reviews())
    by_text = np.zeros((1500, 300))
    for user, whole in enumerate(domain.histories[:1500]):
        diets, brands = np.zeros(len(DIETS)), np.zeros(len(BRANDS))
        rated = [next(reviews)["rating"] for _ in whole]
        for item, rating in zip(histories[user], rated, strict=False):
            weight = 0.3 + (rating - 3.4) / 1.2
            diets[domain.diet[item]] += weight
            brands[domain.brand[item]] += weight
        by_text[user] = 0.3 * diets[domain.diet] + 0.5 * brands[domain.brand]
        by_text[user] += 2.0 * domain.complements[domain.category[histories[user][-1]]][domain.category]

    popularity = np.bincount([item - 1 for history in training for item in history], minlength=300)
    return {
        "oracle": hit_rate(domain.next_item_log_probabilities(users, histories)),
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
