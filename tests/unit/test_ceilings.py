"""The ceilings of the synthetic domain: in order, without the target, and by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from twice_rec.data import ceilings
from twice_rec.data.ceilings import CEILINGS, Ceiling, ceiling_scores, shown_histories
from twice_rec.data.sources.synthetic import BRANDS, COHORTS, DIETS, SyntheticConfig, SyntheticDomain
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.prompts import PromptFormat
from twice_rec.records import Interaction, UserSequence
from twice_rec.stages import stage4_evaluate

SHOWN = PromptFormat(prompt_history_items=6)  # review titles and ratings


def domain_of(users, items, seed=1, **strengths):
    keys = {"users": users, "items": items, **strengths}
    return SyntheticDomain(SyntheticConfig(**{f"synthetic_{name}": value for name, value in keys.items()}), seed)


def sequences_of(domain, count):
    """The first users' sequences, split as the recipes do."""
    return [
        UserSequence(user_id, tuple(Interaction(domain.item_ids[i]) for i in h), len(h) - 2, len(h) - 2, len(h) - 1)
        for user_id, h in zip(domain.user_ids[:count], domain.histories, strict=False)
    ]


class Catalog:
    """All items in the domain's order."""

    def __init__(self, domain):
        self.ids = domain.item_ids


def test_every_kind_of_knowledge_adds():
    users, items = 3000, 300
    domain = domain_of(users, items)
    rng, rows = np.random.default_rng(0), np.arange(users)
    others = [rng.choice(np.setdiff1d(np.arange(items), h), 9, replace=False) for h in domain.histories]
    lists = np.array([[h[-1], *negatives] for h, negatives in zip(domain.histories, others, strict=True)])  # [U, 10]
    oracle = domain.next_item_log_probabilities(rows, [h[:-1] for h in domain.histories])
    scores = {**dict(ceiling_scores(domain, sequences_of(domain, users), Catalog(domain), SHOWN, 3)), "oracle": oracle}
    assert list(scores) == ["ceiling_text", "ceiling_popularity", "ceiling_cohort", "oracle"]
    hits = {}
    for name, of in scores.items():
        shown = np.take_along_axis(of, lists, axis=1)  # [U, 10], the target first
        hits[name] = (shown[:, 0] > shown[:, 1:].max(axis=1)).astype(float)
    for less, more in itertools.pairwise(scores):
        difference = hits[more] - hits[less]
        assert difference.mean() > 4 * difference.std() / math.sqrt(users), (less, more)
    assert hits["ceiling_text"].mean() > 0.45  # ten candidates: chance is .1


def test_the_target_is_not_looked_at():
    domain = domain_of(60, 100)
    sequences = sequences_of(domain, 60)
    before = dict(ceiling_scores(domain, sequences, Catalog(domain), SHOWN, 3))
    for user, history in enumerate(domain.histories):  # another target: an item that the user has not had
        history[-1] = next(i for i in np.roll(np.arange(100), user) if i not in history)
    others = [
        dataclasses.replace(s, interactions=(*s.interactions[:-1], Interaction(domain.item_ids[h[-1]])))
        for s, h in zip(sequences, domain.histories, strict=True)
    ]
    assert [s.target("test") for s in sequences] != [s.target("test") for s in others]
    after = dict(ceiling_scores(domain, others, Catalog(domain), SHOWN, 3))
    for name in CEILINGS:
        assert np.array_equal(before[name], after[name])


def test_scores_rank_all_items_and_what_is_shown_comes_last():
    domain = domain_of(40, 100)
    for _, scores in ceiling_scores(domain, sequences_of(domain, 40), Catalog(domain), SHOWN, 3):
        assert np.array_equal(np.sort(scores, axis=1), np.tile(np.arange(100), (40, 1)))
        for row, history in zip(scores, domain.histories, strict=False):
            had = history[:-1][-6:]
            assert sorted(row[had]) == list(range(len(had)))


def one_item_per_diet_and_brand(**strengths):
    """A domain in which every normaliser is the same, since every taste finds as many items that it likes."""
    domain = domain_of(1, len(DIETS) * len(BRANDS), complement=0.0, popularity=0.0, **strengths)
    domain.diet, domain.brand = np.divmod(np.arange(len(DIETS) * len(BRANDS)), len(BRANDS))
    return domain


def shown_review(domain, item, title, rating=5, text_of=0):
    """What a prompt shows of a user who had one item."""
    codes = [[(rating, title, text_of, 1)] * len(domain.histories[0])]
    domain.review_codes = lambda: codes
    domain.histories[0] = [item]
    sequence = UserSequence(domain.user_ids[0], (Interaction(domain.item_ids[item]),), 1, None, None)
    return [sequence]


def below(value):
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


def test_one_review_by_hand():
    """A rating of 5 and a title that praises the diet: so the diet is liked, and the brand is judged by the rating."""
    taste = 0.7
    domain = one_item_per_diet_and_brand(taste=taste, cohort=0.0, brand=0.0)
    sequences = shown_review(domain, 0, 2)  # the first diet and the first brand
    scores = Ceiling(domain, popularity=True, cohorts=False).scores(shown_histories(domain, sequences, SHOWN))
    up, down = math.exp(taste), math.exp(-taste)
    # The rating's mean is 3.4 + 1.2 * (1 + feeling), and 5 is all above 4.5; a liked brand might have been praised.
    like = 3 / 16 * up * below(1.3 / 0.6) / 2
    cold = 11 / 16 * below(0.1 / 0.6)
    dislike = 2 / 16 * down * below(-1.1 / 0.6)
    total = like + cold + dislike
    own_brand = (like * up + cold + dislike * down) / total
    own_diet, other_diet = up, (up + down + 3) / 5  # of the five others one is liked, one disliked
    liked, disliked = ((3 * total - like) / 15 / total, (2 * total - dislike) / 15 / total)  # of another brand
    other_brand = 1 + liked * (up - 1) + disliked * (down - 1)
    expected = np.log(np.outer([own_diet, *[other_diet] * 5], [own_brand, *[other_brand] * 15])).ravel()
    assert scores[0, 0] == -np.inf
    assert scores[0, 1:] - scores[0, 1] == pytest.approx(expected[1:] - expected[1], abs=1e-4)


def test_a_text_tells_a_taste():
    domain = one_item_per_diet_and_brand(taste=0.7, cohort=0.0, brand=0.0)
    sequences = shown_review(domain, 0, 0, rating=4, text_of=len(DIETS) + 5)  # "I usually buy" the sixth brand
    told = PromptFormat(prompt_review_fields=["review_text"])
    silent = PromptFormat(prompt_review_fields=["review_title"])
    of_told, of_silent = (
        Ceiling(domain, True, False).scores(shown_histories(domain, sequences, shown))[0] for shown in (told, silent)
    )
    other = (2 * (math.exp(0.7) + math.exp(-0.7)) + 11) / 15  # of the other 15 two are liked and two disliked
    assert of_told[5] - of_told[6] == pytest.approx(0.7 - math.log(other), abs=0.03)
    assert of_silent[5] == pytest.approx(of_silent[6], abs=1e-5)


def test_a_cohort_is_inferred():
    """One choice of cohort 2, where an eighth of the items has each: it is the user's with e^K / (e^K + 7)."""
    strength = 1.5
    domain = one_item_per_diet_and_brand(taste=0.0, cohort=strength, brand=0.0)
    domain.cohort = np.arange(96) % COHORTS
    scores = Ceiling(domain, True, True).scores(shown_histories(domain, shown_review(domain, 2, 0), SHOWN))[0]
    factor = math.exp(strength)
    own, other = (factor * factor + 7) / (factor + 7), (2 * factor + 6) / (factor + 7)
    assert scores[10] - scores[11] == pytest.approx(math.log(own / other), abs=1e-3)
    assert scores[11] == pytest.approx(scores[12], abs=1e-4)


def test_a_brand_of_unknown_popularity_gains_by_being_chosen():
    """Nobody likes or dislikes anything: a chosen brand is popular by E[e^2f / Z^2] to E[e^f / Z^2], roughly e^1."""
    domain = one_item_per_diet_and_brand(taste=0.0, cohort=0.0, brand=1.0)
    sequences = shown_review(domain, 0, 0)
    shown = shown_histories(domain, sequences, SHOWN)
    known, unknown = (Ceiling(domain, popularity, False).scores(shown)[0] for popularity in (True, False))
    draws = np.exp(np.random.default_rng(0).standard_normal((400_000, 16)))  # [draws, brands]
    z = draws.mean(axis=1)
    chosen = draws[:, 0] / z
    gained = math.log((chosen * draws[:, 0] / z).mean() / (chosen * draws[:, 1] / z).mean())
    assert unknown[16] - unknown[1] == pytest.approx(gained, abs=0.1)  # the first brand with another diet
    assert known[16] - known[1] == pytest.approx(domain.appeal[16] - domain.appeal[1], abs=1e-4)


def enumerated(domain, user, cohorts):
    """The log-probabilities of the next item without any approximation, by all 2.6 million tastes: float64 [N]."""
    config, own, n = domain.config, domain.cohort, len(domain.item_ids)
    both = itertools.product(itertools.combinations(range(16), 3), itertools.combinations(range(16), 2))
    sets = [(liked, disliked) for liked, disliked in both if not {*liked} & {*disliked}]
    brands = np.zeros((len(sets), 16))  # [560 * 78, B]
    for row, (liked, disliked) in zip(brands, sets, strict=True):
        row[list(liked)], row[list(disliked)] = 1, -1
    diets = ceilings._DIET_STATES
    of_diet, of_brand = np.exp(config.synthetic_taste * diets), np.exp(config.synthetic_taste * brands)
    past = domain.histories[user][:-1]
    shown = past[-6:]
    logs = np.zeros((len(diets), len(brands)))
    for item, (rating, title, _, _) in zip(shown, domain.review_codes()[user][len(past) - len(shown) :], strict=False):
        table = np.log(np.maximum(ceilings.review_probabilities()[rating - 1, title], 1e-300))  # [3, 3]
        logs += table[1 - diets[:, domain.diet[item]]][:, (1 - brands[:, domain.brand[item]]).astype(int)]
        logs += config.synthetic_taste * (diets[:, [domain.diet[item]]] + brands[:, domain.brand[item]])
    total = np.zeros(n)
    for cohort in range(COHORTS if cohorts else 1):
        pull = domain.appeal + (config.synthetic_cohort * (own == cohort) if cohorts else 0.0)  # [N]
        weights, had = logs + (config.synthetic_cohort * (own[shown] == cohort).sum() if cohorts else 0.0), []
        for step, before in enumerate([None, *shown]):
            called = domain.complements[domain.category[before]][domain.category] if step else np.zeros(n)
            left = np.exp(pull + config.synthetic_complement * called)
            left[had] = 0
            cells = np.zeros((6, 16))
            np.add.at(cells, (domain.diet, domain.brand), left)
            weights = weights - np.log(of_diet @ cells @ of_brand.T)
            had = shown[: step + 1]
        total += (of_diet.T @ np.exp(weights) @ of_brand)[domain.diet, domain.brand] * left
    return np.log(total)


@pytest.mark.parametrize("cohorts", [False, True])
def test_the_approximations_are_close(cohorts):
    domain, users = domain_of(400, 500), 3 if not cohorts else 1
    asked = shown_histories(domain, sequences_of(domain, users), SHOWN)
    scores = Ceiling(domain, popularity=True, cohorts=cohorts).scores(asked)
    with np.errstate(divide="ignore"):
        exact = np.stack([enumerated(domain, user, cohorts) for user in range(users)])
    found = []
    for mine, true in zip(scores, exact, strict=True):
        likely = np.argsort(-true)[:100]
        found.append(np.std(mine[likely] - true[likely]))
        assert true[mine.argmax()] > true.max() - 0.2
    assert np.mean(found) < 0.2


def test_ceilings_rank_only_lists_that_favour_no_item(tmp_path, monkeypatch):
    """Elsewhere the likeliest item is not the likeliest target; a score file of others ranks what the recipe names."""
    asked = {}

    def keep(recipe, stage, name, data, lists, *_):
        asked[name] = lists

    monkeypatch.setattr(stage4_evaluate, "evaluate_scorer_variant", keep)
    (tmp_path / "data").mkdir()
    for name in ("oracle", "ceiling_text", "mine"):
        (tmp_path / "data" / f"{name}.npz").touch()
    lists = ["uniform", "popularity", "hard", "full"]
    recipe = EvaluateRecipe.model_construct(
        domain="D",
        run_dir=str(tmp_path),
        precomputed_scores={"mine": str(tmp_path / "data" / "mine.npz")},
        score_lists=lists,
    )
    for name in ("oracle", "ceiling_text", "mine"):
        stage4_evaluate._score_file(recipe, None, name, [])
    assert asked == {"oracle": ["uniform", "full"], "ceiling_text": ["uniform", "full"], "mine": lists}
