"""Reward truth tables, worked out from the paper's Eqs. 2-5."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twice_rec import rewards
from twice_rec.catalog import ItemCatalog, Outcome
from twice_rec.records import Item
from twice_rec.rewards import REWARDS, RewardSettings, Scored, StepRewards, outcome_rates, score_completions
from twice_rec.tags import parse, render

CATALOG = ItemCatalog([Item(f"I{i}", f"item {i}") for i in range(6)])
PAPER = RewardSettings(lambda_=3.0, tau=0.3)
COMPLETE = "<think> because </think> <item_nm> item 1 </item_nm> <item_id> I1 </item_id>"


def scored(outcome=Outcome.HIT, confidence=0.5, text=COMPLETE):
    return Scored(parse(text), outcome, confidence)


@pytest.mark.parametrize(
    ("outcome", "confidence", "collaborative", "match", "cf"),
    [
        (Outcome.HIT, 0.9, 1 + 3 * 0.9, 1, 0.9),
        (Outcome.HIT, 0.3, 1 + 3 * 0.3, 1, 0.3),  # at tau
        (Outcome.HIT, 0.29, 1, 1, 0.29),
        (Outcome.HIT, 0.0, 1, 1, 0.0),
        (Outcome.MISS, 0.9, 0.9, 0, 0.9),
        (Outcome.MISS, 0.3, 0.3, 0, 0.3),
        (Outcome.MISS, 0.29, 0, 0, 0.29),
        (Outcome.OUTSIDE, 0.0, 0, 0, 0),
        (Outcome.MALFORMED, 0.0, 0, 0, 0),
    ],
)
def test_item_rewards(outcome, confidence, collaborative, match, cf):
    entry = scored(outcome, confidence)
    assert rewards.collaborative(entry, PAPER) == pytest.approx(collaborative)
    assert rewards.match(entry, PAPER) == match
    assert rewards.cf(entry, PAPER) == cf


@pytest.mark.parametrize(("lambda_", "expected"), [(0, 1.0), (1, 1.5), (5, 3.5)])
def test_lambda_weighs_the_confidence_of_a_hit(lambda_, expected):
    assert rewards.collaborative(scored(confidence=0.5), RewardSettings(lambda_, 0.3)) == expected


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


@given(st.text(), st.sampled_from(list(Outcome)), st.floats(0, 1), st.floats(0, 5), st.floats(0, 1))
def test_rewards_are_bounded_for_any_text(text, outcome, confidence, lambda_, tau):
    entry, settings = scored(outcome, confidence, text), RewardSettings(lambda_, tau)
    for name, reward in REWARDS.items():
        assert 0 <= reward(entry, settings) <= {"collaborative": 1 + lambda_, "tags_release": 1.5}.get(name, 1), name


class FixedConfidences:
    """Item index / 10 for everybody; counts how often it is asked."""

    def __init__(self):
        self.asked = []

    def confidences(self, histories, candidates, kind, debiased):
        self.asked.append((len(histories), kind, debiased))
        return (candidates / 10).astype(np.float32)


def answer(item_id, title):
    return render({"think": "r", "item_nm": title, "item_id": item_id})


def test_a_step_is_scored_with_one_question_to_the_cf_model():
    model = FixedConfidences()
    texts = [answer("I1", "item 1"), answer("I4", "item 4"), answer("I5", "item 5"), "nothing", answer("I1", "item 2")]
    found = score_completions(
        texts,
        [["I4", "I1"]] * 3 + [["I2", "I3"]] * 2,
        ["I1"] * 5,
        [["I0"]] * 3 + [["I0"]] * 2,
        CATALOG,
        model,
        "sigmoid",
        False,
    )
    assert [entry.outcome for entry in found] == [
        Outcome.HIT, Outcome.MISS, Outcome.OUTSIDE, Outcome.MALFORMED, Outcome.OUTSIDE,
    ]  # fmt: skip
    assert [entry.confidence for entry in found] == pytest.approx([0.2, 0.5, 0, 0, 0])  # indices are 1..6
    assert model.asked == [(2, "sigmoid", False)]


def test_functions_for_the_trainer():
    model, logged = FixedConfidences(), {}
    step = StepRewards(["collaborative", "structure"], PAPER, CATALOG, model, "softmax", True)
    assert [function.__name__ for function in step.functions] == ["collaborative", "structure"]
    completions = [[{"role": "assistant", "content": text}] for text in (answer("I3", "item 3"), "x")]
    columns = {"candidates": [["I3", "I4"]] * 2, "target": ["I3"] * 2, "history": [["I0"]] * 2}
    call = {"prompts": None, "completions": completions, "log_metric": logged.__setitem__, **columns}
    assert [function(**call) for function in step.functions] == [[pytest.approx(1 + 3 * 0.4), 0], [1, 0]]
    assert model.asked == [(1, "softmax", True)]
    assert logged["outcome/hit"] == 0.5
    assert logged["confidence/hit"] == pytest.approx(0.4)
    step.functions[0](**{**call, "completions": list(completions)})
    assert len(model.asked) == 2


def test_failures_of_the_cf_model_are_not_rewards():
    class Broken:
        def confidences(self, *args):
            raise RuntimeError("CUDA error")

    step = StepRewards(["match"], PAPER, CATALOG, Broken(), "sigmoid", False)
    with pytest.raises(RuntimeError, match="CUDA error"):
        step.functions[0](
            prompts=None, completions=[[{"content": "x"}]], candidates=[["I1", "I2"]], target=["I1"], history=[["I0"]]
        )


def test_outcome_rates():
    rates = outcome_rates([scored(Outcome.HIT, 0.8), scored(Outcome.MISS, 0.2), scored(Outcome.MISS, 0.4)])
    assert rates == pytest.approx(
        {
            "outcome/hit": 1 / 3,
            "outcome/miss": 2 / 3,
            "outcome/outside": 0,
            "outcome/malformed": 0,
            "confidence/hit": 0.8,
            "confidence/miss": 0.3,
        }
    )
