"""Reward truth tables worked out from the paper's Eqs. 2-5; gold answers; any text; the release's formulas."""

import math
import random
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import release_rewards
from prompt_formats import prompt_format
from twice_rec.answer_format import parse, render
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.cf.recipe import SASRecConfig
from twice_rec.cf.sasrec import SASRec, SASRecScorer
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.evaluation.llm_ranking import ask
from twice_rec.files import write_records
from twice_rec.grpo import rewards
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rewards import REWARDS, RewardConfig, ScoredCompletion
from twice_rec.grpo.scoring import StepRewards, score_completions
from twice_rec.item_sequences import ItemSequences
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.llm.recipe import PromptConfig
from twice_rec.prompts import rationale_answer
from twice_rec.records import CandidateLists, Example, Interaction, Item, UserSequence

ROOT = Path(__file__).parents[2]
CATALOG = ItemCatalog([Item(f"I{i}", f"item {i}") for i in range(6)])
PAPER = RewardConfig(reward_lambda=3.0, reward_tau=0.3, reward_rank="reciprocal_rank")
COMPLETE = "<think> because </think> <item_nm> item 1 </item_nm> <item_id> I1 </item_id>"


def scored(outcome=Outcome.HIT, confidence=0.5, text=COMPLETE, target_rank=None):
    return ScoredCompletion(text, parse(text), outcome, confidence, target_rank)


@pytest.mark.parametrize("lambda_", range(6))
@pytest.mark.parametrize(
    ("outcome", "confidence", "base", "times_lambda", "match", "cf"),
    [
        (Outcome.HIT, 9 / 10, 1, 9 / 10, 1, 9 / 10),
        (Outcome.HIT, 3 / 10, 1, 3 / 10, 1, 3 / 10),  # at tau
        (Outcome.HIT, 29 / 100, 1, 0, 1, 29 / 100),
        (Outcome.HIT, 0, 1, 0, 1, 0),
        (Outcome.MISS, 9 / 10, 9 / 10, 0, 0, 9 / 10),
        (Outcome.MISS, 3 / 10, 3 / 10, 0, 0, 3 / 10),  # at tau
        (Outcome.MISS, 29 / 100, 0, 0, 0, 29 / 100),
        (Outcome.MISS, 0, 0, 0, 0, 0),
        (Outcome.OUTSIDE, 0, 0, 0, 0, 0),
        (Outcome.MALFORMED, 0, 0, 0, 0, 0),
    ],
)
def test_item_rewards(outcome, confidence, base, times_lambda, match, cf, lambda_):
    entry, settings = scored(outcome, confidence), RewardConfig(reward_lambda=float(lambda_), reward_tau=0.3)
    assert rewards.collaborative(entry, settings) == pytest.approx(base + lambda_ * times_lambda)
    assert rewards.match(entry, settings) == match
    assert rewards.cf(entry, settings) == cf


@pytest.mark.parametrize(
    ("text", "structure", "tags", "tags_release", "only_expected"),
    [
        (COMPLETE, 1, 1.0, 1.5, 1),
        ("<item_nm> a </item_nm> <item_id> I1 </item_id>", 0, 0.5, 1.0, 1),
        ("<think> a </think>", 0, 0.5, 0.5, 1),
        ("<think> a", 0, 0.25, 0.25, 1),
        ("", 0, 0, 0, 1),
        ("<think> a </think> <think> b </think> <item_nm> a </item_nm> <item_id> I1 </item_id>", 0, 0.5, 1.0, 1),
        (COMPLETE + " <b>", 1, 1.0, 1.5, 0),
        (COMPLETE + " <item_info>", 1, 1.0, 1.5, 0),
        ("<think> </think> <item_nm> a </item_nm> <item_id> I1 </item_id>", 0, 1.0, 1.5, 1),
    ],
)
def test_format_rewards(text, structure, tags, tags_release, only_expected):
    entry = scored(text=text)
    assert rewards.structure(entry, PAPER) == structure
    assert rewards.tags(entry, PAPER) == tags
    assert rewards.tags_release(entry, PAPER) == tags_release
    assert rewards.only_expected_tags(entry, PAPER) == only_expected


@pytest.mark.parametrize(
    ("target_rank", "reciprocal", "ndcg"),
    [(1, 1, 1), (2, 1 / 2, 1 / math.log2(3)), (3, 1 / 3, 1 / 2), (30, 1 / 30, 1 / math.log2(31)), (None, 0, 0)],
)
def test_rank(target_rank, reciprocal, ndcg):
    entry = scored(target_rank=target_rank)
    assert rewards.rank(entry, RewardConfig(reward_rank="reciprocal_rank")) == pytest.approx(reciprocal)
    assert rewards.rank(entry, RewardConfig(reward_rank="ndcg")) == pytest.approx(ndcg)


class FixedConfidences:
    """Item index / 10 for everybody; counts how often it is asked."""

    def __init__(self):
        self.asked = []

    def confidences(self, histories, candidates, kind, debiased):
        self.asked.append((len(histories), kind, debiased))
        return (candidates / 10).astype(np.float32)


class HashPolicy:
    """Scores that depend on every letter of prompt and answer."""

    def __init__(self):
        self.asked = 0

    def certainties(self, prompt, completions):
        self.asked += 1
        return [float(sum(ids)) for ids in completions]

    def score(self, prompt, answers):
        self.asked += 1
        return [-float(zlib.crc32((prompt[0]["content"] + answer).encode()) % 7) for answer in answers]


def answer(item_id, title):
    return render({"think": "r", "item_nm": title, "item_id": item_id})


def data_of(catalog):
    """Item 1 has one training interaction, item 2 has two, and so on."""
    histories = ItemSequences.of([[i] * i for i in range(1, len(catalog) + 1)])
    return SimpleNamespace(catalog=catalog, training_histories=lambda: histories)


def recipe_of(names, **keys):
    return GRPORecipe(run_dir="r", domain="D", seed=1, reward_funcs=names, reward_weights=[1.0] * len(names), **keys)


def step_rewards(names, model=None, policy=None, **keys):
    return StepRewards(recipe_of(names, **keys), data_of(CATALOG), model or FixedConfidences(), policy)


def call(texts, candidates, targets, histories=None, **others):
    """A reward call as TRL makes it."""
    return {
        "prompts": [[{"role": "user", "content": "?"}]] * len(texts),
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [[1]] * len(texts),
        "trainer_state": None,
        "candidates": candidates,
        "target": targets,
        "history": histories or [["I0"]] * len(texts),
        **others,
    }


def test_the_gold_answer_earns_full_marks():
    gold = rationale_answer("They like item 0.", CATALOG["I5"])
    names = [name for name in REWARDS if name != "certainty"]  # that one is the policy's own
    step = step_rewards(names, policy=SimpleNamespace(score=lambda _, texts: ["I5" in text for text in texts]))
    earned = {f.__name__: f(**call([gold], [["I3", "I5", "I4"]], ["I5"]))[0] for f in step.functions}
    assert earned == pytest.approx(
        {
            "collaborative": 1 + 3 * 6 / 10,
            "match": 1,
            "cf": 6 / 10,
            "structure": 1,
            "tags": 1,
            "tags_release": 3 / 2,
            "only_expected_tags": 1,
            "rank": 1,
        }
    )


FRAGMENTS = [
    "<think>", "</think>", "<item_nm>", "</item_nm>", "<item_id>", "</item_id>", "<item_info>", "<b>", " ",
    *(text for item in CATALOG for text in (item.item_id, item.title)), COMPLETE,
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=12).map("".join)
LISTS = st.lists(st.sampled_from(CATALOG.ids), min_size=1, unique=True)


@given(st.data(), st.lists(TEXTS, min_size=1, max_size=6), LISTS, st.floats(0, 5), st.floats(0, 1))
def test_rewards_of_any_text_and_any_list_stay_in_their_range_in_any_order(data, texts, shown, lambda_, tau):
    targets = data.draw(st.lists(st.sampled_from(shown), min_size=len(texts), max_size=len(texts)))
    order = data.draw(st.permutations(range(len(texts))))
    keys = {"reward_lambda": lambda_, "reward_tau": tau}
    keys["reward_rank"] = data.draw(st.sampled_from(["reciprocal_rank", "ndcg"]))
    step = step_rewards(list(REWARDS), policy=HashPolicy(), **keys)
    whole = call(texts, [shown] * len(texts), targets)
    shuffled = call([texts[i] for i in order], [shown] * len(texts), [targets[i] for i in order])
    for function in step.functions:
        earned = function(**whole)
        highest = {"collaborative": 1 + lambda_, "tags_release": 1.5}.get(function.__name__, 1)
        assert all(math.isfinite(reward) and 0 <= reward <= highest for reward in earned), function.__name__
        assert function(**shuffled) == [earned[i] for i in order]


def test_a_step_is_scored_with_one_question_to_the_cf_model():
    model = FixedConfidences()
    texts = [answer("I1", "item 1"), answer("I4", "item 4"), answer("I5", "item 5"), "nothing", answer("I1", "item 2")]
    columns = {
        "candidates": [["I4", "I1"]] * 3 + [["I2", "I3"]] * 2,
        "target": ["I1"] * 5,
        "history": [["I0"]] * 5,
        "completion_ids": [[7] * length for length in range(5)],
    }
    found = score_completions(texts, columns, CATALOG, model, recipe_of(["match"]))
    assert [entry.outcome for entry in found] == [
        Outcome.HIT, Outcome.MISS, Outcome.OUTSIDE, Outcome.MALFORMED, Outcome.OUTSIDE,
    ]  # fmt: skip
    assert [entry.confidence for entry in found] == pytest.approx([0.2, 0.5, 0, 0, 0])  # indices are 1..6
    assert model.asked == [(2, "sigmoid", False)]
    assert [(entry.text, entry.num_tokens) for entry in found] == list(zip(texts, range(5), strict=True))
    del columns["completion_ids"]
    uncounted = score_completions(texts, columns, CATALOG, model, recipe_of(["match"]))
    assert {entry.num_tokens for entry in uncounted} == {None}


def test_a_reward_is_one_function():
    """Registering is all it takes: it is called with text, length and settings like the others."""

    @rewards.reward()
    def brevity(completion, config):
        return config.reward_lambda - completion.num_tokens / len(completion.text)

    try:
        step = step_rewards(["match"], reward_lambda=2.0)
        step.functions = [step._named("brevity")]
        asked = {**call(["abcd", "ab"], [["I1", "I2"]] * 2, ["I1"] * 2), "completion_ids": [[1, 2], [3]]}
        assert step.functions[0](**asked) == [2 - 2 / 4, 2 - 1 / 2]
        assert REWARDS["brevity"] == rewards.Reward(brevity, depends_on_item=False, needs_policy=None)
    finally:
        del REWARDS["brevity"]
    assert [name for name, reward in REWARDS.items() if reward.depends_on_item] == ["collaborative", "match", "cf"]
    asking = {name: reward.needs_policy for name, reward in REWARDS.items() if reward.needs_policy}
    assert asking == {"rank": "target_rank", "certainty": "self_certainty"}


def test_functions_for_the_trainer():
    model, kept = FixedConfidences(), {}
    step = step_rewards(["collaborative", "structure"], model=model, confidence="softmax", confidence_debiased=True)
    assert [function.__name__ for function in step.functions] == ["collaborative", "structure"]
    columns = {"policy_version": [3, 3], "truncated": [False, True], "log_extra": kept.__setitem__}
    asked = call([answer("I3", "item 3"), "x"], [["I3", "I4"]] * 2, ["I3"] * 2, **columns)
    assert [function(**asked) for function in step.functions] == [[pytest.approx(1 + 3 * 0.4), 0], [1, 0]]
    assert model.asked == [(1, "softmax", True)]
    assert math.isnan(kept["log_popularity"].pop())
    assert kept == {
        "outcome": ["hit", "malformed"],
        "target": ["I3", "I3"],
        "recommended": ["I3", ""],
        "confidence": [pytest.approx(0.4), 0],
        "log_popularity": [pytest.approx(math.log(1 + 4))],
        "policy_version": [3, 3],
        "truncated": [False, True],
    }
    step.functions[0](**{**asked, "completions": list(asked["completions"])})
    assert len(model.asked) == 2


def test_failures_of_the_cf_model_are_not_rewards():
    class Broken:
        def confidences(self, *args):
            raise RuntimeError("CUDA error")

    step = step_rewards(["match"], model=Broken())
    with pytest.raises(RuntimeError, match="CUDA error"):
        step.functions[0](**call(["x"], [["I1", "I2"]], ["I1"]))


def test_the_policy_is_asked_only_where_a_recipe_names_rank():
    policy = HashPolicy()
    asked = call([COMPLETE, "no rationale"], [["I1", "I2"]] * 2, ["I1"] * 2)
    step_rewards(["match"], policy=policy).functions[0](**asked)
    assert policy.asked == 0
    ranked = step_rewards(["match", "rank"], policy=policy)
    assert ranked.functions[1](**asked)[1] == 0
    ranked.functions[0](**asked)
    assert policy.asked == 1
    with pytest.raises(ValueError, match="rank needs the policy"):
        step_rewards(["rank"])


def test_certainty_is_asked_for_once_per_prompt_and_needs_no_right_answer():
    policy = HashPolicy()
    prompts = [[{"role": "user", "content": text}] for text in "abab"]
    texts = [COMPLETE, "no answer", answer("I2", "item 2"), "x"]
    asked = call(texts, [["I1", "I2"]] * 4, ["I1"] * 4, completion_ids=[[1], [2, 3], [7, 1, 1], [4]])
    step = step_rewards(["certainty", "structure"], policy=policy)
    assert step.functions[0](**{**asked, "prompts": prompts}) == [1, 5, 9, 4]
    assert policy.asked == 2  # prompts, and no candidate
    with pytest.raises(ValueError, match="certainty needs the policy"):
        step_rewards(["certainty"])


def test_rank_is_that_of_evaluation_by_likelihood():
    """The same generated text, the same ranking, in training and in evaluation; ties against the target."""
    writer = PromptBuilder(CATALOG, prompt_format(), None, PromptConfig())
    policy, ranks = HashPolicy(), []
    for number in range(40):
        text = rationale_answer(f"Reason {number} <odd>", CATALOG["I1"])
        example = Example("u", (Interaction("I0"),), ("I1", "I2", "I3", "I4", "I5"), f"I{1 + number % 5}")
        generator = SimpleNamespace(
            score=policy.score, generate=lambda prompts, text=text: [[SimpleNamespace(text=text)] for _ in prompts]
        )
        config = SimpleNamespace(with_rationale=True, seed=0, permutations=1)
        (predicted,) = ask(generator, [example], "uniform", writer, config, "likelihood", 0)
        asked = call([text], [list(example.candidates)], [example.target])
        asked["prompts"] = [writer.recommend(example, with_rationale=True)]
        (reward,) = step_rewards(["rank"], policy=policy).functions[0](**asked)
        assert reward == 1 / predicted.ranks["uniform"]
        ranks.append(predicted.ranks["uniform"])
    assert len(set(ranks)) == 5


def test_rewards_of_a_recipe(tmp_path):
    """Tau as a quantile of the validation candidates' confidences, popularity counted in the training parts."""
    CATALOG.save(tmp_path / dataset.CATALOG)
    bought = tuple(map(Interaction, ("I0", "I1", "I2", "I3")))
    write_records(
        tmp_path / dataset.SEQUENCES, [UserSequence("u", bought, 2, 2, 3), UserSequence("w", bought, 2, 2, 3)]
    )
    for split, target in (("train", "I1"), ("valid", "I2")):
        lists = [CandidateLists(user, target, {"uniform": ("I1", "I2", "I3", "I4", "I5")}) for user in "uw"]
        write_records(tmp_path / dataset.candidates_file(split), lists)
    model, kept = FixedConfidences(), {}
    keys = {"reward_tau": None, "reward_tau_quantile": 0.75, "confidence": "softmax", "reward_lambda": 2.0}
    recipe = recipe_of(["match", "cf"], reward_rank="ndcg", **keys)
    step = StepRewards(recipe, PreparedData(tmp_path), model, HashPolicy())
    assert (step.config.reward_lambda, step.config.reward_rank) == (2.0, "ndcg")
    assert step.config.reward_tau == pytest.approx(5 / 10)  # of 2/10, 3/10, 4/10, 5/10, 6/10
    assert model.asked == [(2, "softmax", False)]
    assert [function.__name__ for function in step.functions] == ["match", "cf"]
    step.functions[0](**call([answer("I1", "item 1")], [["I1", "I2"]], ["I1"], log_extra=kept.__setitem__))
    assert kept["log_popularity"] == [pytest.approx(math.log(1 + 2))]
    fixed = StepRewards(recipe_of(["match"], reward_tau=0.25), PreparedData(tmp_path), model, HashPolicy())
    assert fixed.config.reward_tau == 0.25
    assert len(model.asked) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The paper recipe against the release's formulas

SHOP = ItemCatalog(
    [Item(f"B{i:03}", f"product {i}") for i in range(56)]
    + [Item(f"S{i}", f"shared {i // 2}") for i in range(4)]  # S0 and S1 have one title, S2 and S3 another
)
SHARED = ["S0", "S2"]  # stand in every candidate list

# Kind of completion -> the rewards in which we differ from the release (PAPER, section 5), and why. The kinds without
# an entry earn the same.
DIFFERENCES = {
    "outside the list": ({"collaborative"}, "an item outside the candidate list earns no item reward"),
    "invented id": ({"collaborative"}, "the id decides, and no candidate has it; the release looks at the title"),
    "no id": ({"collaborative"}, "the id decides; without one an answer is malformed"),
    "contradiction": ({"collaborative"}, "a title of another item makes an answer malformed"),
    "shared title": ({"collaborative"}, "the confidence is that of the id, not of another item with its title"),
    "unknown title": ({"collaborative"}, "the release fails on it and calls that 0; the id decides"),
    "two items": ({"collaborative", "structure"}, "one item per answer"),
    "repeated tag": ({"structure"}, "nor is a rationale that is opened twice one complete element"),
}
KINDS = ("hit", "miss", "no rationale", "cut off", "nothing", "extra tag", *DIFFERENCES)


def recorded_completion(kind, shown, target, rng):
    """One completion of a kind, as a policy may write it."""
    outside = [item for item in SHOP if item.item_id not in shown]
    miss = rng.choice([SHOP[item_id] for item_id in shown if item_id != target and item_id not in SHARED])
    item = miss if kind != "hit" and rng.random() < 0.5 else SHOP[target]
    if kind in ("miss", "contradiction"):
        item = miss
    if kind == "outside the list":
        item = rng.choice(outside)
    if kind == "shared title":
        item = SHOP[rng.choice(SHARED)]
    name, item_id, think = item.title, item.item_id, f"<think> They bought tea {rng.randint(1, 99)} times. </think>"
    if kind == "invented id":
        item_id = "X" + item_id
    if kind == "contradiction":
        name = rng.choice(outside).title
    if kind == "unknown title":
        name += " (new)"
    named = f"<item_nm> {name} </item_nm>"
    recommended = f"{named} <item_id> {item_id} </item_id>"
    return {
        "no rationale": recommended,
        "cut off": think[:20],
        "nothing": "I recommend tea.",
        "extra tag": f"<b> {think} {recommended}",
        "repeated tag": f"<think> {think} {recommended}",
        "no id": f"{think} {named}",
        "two items": f"{think} {recommended} <item_nm> {miss.title} </item_nm> <item_id> {miss.item_id} </item_id>",
    }.get(kind, f"{think} {recommended}")


def test_the_paper_recipe_earns_what_the_release_pays_but_for_the_listed_differences():
    recipe = yaml.safe_load((ROOT / "recipes" / "grocery" / "grpo.yaml").read_text())
    names, lambda_, tau = recipe["reward_funcs"], recipe["reward_lambda"], recipe["reward_tau"]
    assert (names, recipe["confidence"], recipe["confidence_debiased"]) == (
        ["collaborative", "structure", "tags_release", "only_expected_tags"],
        "sigmoid",
        False,
    )
    torch.manual_seed(0)
    config = SASRecConfig(hidden_size=16, inner_size=16, num_layers=1, dropout=0.0, max_length=5)
    model = SASRec(config, len(SHOP)).eval()
    torch.nn.init.normal_(model.item_embedding.weight[1:], std=0.4)
    rng, rows = random.Random(1), []
    for _ in range(20):
        history = rng.sample(SHOP.ids[:40], 3)
        shown = rng.sample(SHOP.ids[40:56], 8) + SHARED
        with torch.no_grad():
            logits = (model.item_embedding.weight @ model.user_states([SHOP.indices(history)])[0]).tolist()[1:]
        for _ in range(10):
            kind = KINDS[len(rows) % len(KINDS)]
            target = rng.choice(SHARED if kind == "shared title" else shown[:8])
            text = recorded_completion(kind, shown, target, rng)
            rows.append((kind, text, shown, target, history, dict(zip(SHOP.ids, logits, strict=True))))
    assert len(rows) == 200

    config = recipe_of(names, reward_lambda=lambda_, reward_tau=tau, reward_rank=recipe["reward_rank"])
    step = StepRewards(config, data_of(SHOP), SASRecScorer(model), None)
    columns = list(zip(*rows, strict=True))
    ours = [function(**call(*columns[1:5])) for function in step.functions]
    differing = {kind: set() for kind in DIFFERENCES}
    seen = set()
    titles = {item.item_id: item.title for item in SHOP}
    for (kind, text, _, target, _, logits), earned in zip(rows, zip(*ours, strict=True), strict=True):
        paid = {
            "collaborative": release_rewards.collaborative(text, target, logits, titles, lambda_, tau),
            "structure": release_rewards.structure(text),
            "tags_release": release_rewards.tags(text),
            "only_expected_tags": release_rewards.only_expected_tags(text),
        }
        for name, reward in zip(names, earned, strict=True):
            if reward == pytest.approx(paid[name], abs=1e-5):
                continue
            assert kind in DIFFERENCES, (kind, name, reward, paid[name], text)
            differing[kind].add(name)
        if kind == "hit":
            seen.add(paid["collaborative"] > 1)
        if kind == "miss":
            seen.add(paid["collaborative"] > 0)
    assert differing == {kind: where for kind, (where, _) in DIFFERENCES.items()}
    assert seen == {True, False}  # confidences on both sides of tau
