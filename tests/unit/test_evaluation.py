"""From scores, likelihoods and votes to ranks and metrics; going on after a kill."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from prompt_formats import prompt_format
from twice_rec.answer_format import render
from twice_rec.catalog import ItemCatalog
from twice_rec.cf.ranking import CFQuestions
from twice_rec.cf.recipe import SASRecRecipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.cf_ranking import evaluate_scorer_variant, export_scores
from twice_rec.evaluation.llm_ranking import (
    answer_rates,
    ask,
    evaluate_language_model,
    question_batches,
    rank_by_votes,
    rationale_of,
    reordered,
)
from twice_rec.evaluation.position import order_metrics, position_of
from twice_rec.evaluation.predictions import metrics_of
from twice_rec.files import read_json, read_records, write_records
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.llm.recipe import PromptConfig
from twice_rec.records import CandidateLists, Example, Interaction, Item, Prediction, UserSequence

CATALOG = ItemCatalog([Item(f"I{i}", f"item {i}") for i in range(1, 7)])
SHOWN = prompt_format()
WRITER = PromptBuilder(CATALOG, SHOWN, None, PromptConfig())
SEQUENCES = [
    UserSequence("u", tuple(map(Interaction, ("I1", "I2", "I3", "I4"))), 2, 2, 3),
    UserSequence("w", (Interaction("I1"), Interaction("I5")), 2, None, None),
    UserSequence("v", tuple(map(Interaction, ("I6", "I1", "I2"))), 1, 1, 2),
]
TEST_LISTS = [
    CandidateLists("u", "I4", {"uniform": ("I5", "I4", "I6")}),
    CandidateLists("v", "I2", {"uniform": ("I2", "I3", "I5")}),
]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    CATALOG.save(folder / dataset.CATALOG)
    write_records(folder / dataset.SEQUENCES, SEQUENCES)
    write_records(folder / dataset.candidates_file("test"), TEST_LISTS)
    dataset.save_prompt_format(folder / dataset.PROMPT, SHOWN)
    return PreparedData(folder)


class TableScorer:
    """Fixed scores a user position."""

    def __init__(self, table):
        self.table = np.array(table, dtype=np.float64)

    def scores(self, users, histories):
        return self.table[users]


SCORES = [[9, 8, 7, 3, 2, 5], [0, 0, 0, 0, 0, 0], [9, 1, 1, 0, 5, 9]]


def test_ranks_of_lists_and_of_the_whole_catalogue(data):
    questions = CFQuestions(data, "test", ["uniform", "full"])
    ranks = questions.ranks(TableScorer(SCORES))
    # u: among I5 (2), I4 (3), I6 (5) the target I4 is second; so it is in the catalogue without I1 to I3.
    # v: among I2 (1), I3 (1), I5 (5) the tie counts against I2; without I6 and I1 in the catalogue too.
    assert {kind: of.tolist() for kind, of in ranks.items()} == {"uniform": [2, 3], "full": [2, 3]}
    assert questions.mean(TableScorer(SCORES), "uniform/mrr") == pytest.approx((1 / 2 + 1 / 3) / 2)
    # v: I2 and I3 are tied at the end, I5 scores 5; in the catalogue I6 and I1 were bought.
    rows = list(questions.predictions(TableScorer(SCORES), seed=1))
    assert [row.ranks for row in rows] == [{"uniform": 2, "full": 2}, {"uniform": 3, "full": 3}]
    assert [row.first for row in rows] == [{"uniform": "I6", "full": "I6"}, {"uniform": "I5", "full": "I5"}]


def test_missing_lists_say_where_to_add_them(data):
    with pytest.raises(InputError, match=r"has the lists uniform, not hard; add it to candidate_lists"):
        CFQuestions(data, "test", ["hard"])
    with pytest.raises(InputError, match="no such file"):
        CFQuestions(data, "valid", ["uniform"])
    write_records(data.folder / dataset.candidates_file("test"), TEST_LISTS[1:])
    with pytest.raises(InputError, match="user u has no stored candidates"):
        CFQuestions(data, "test", ["uniform"])


def test_several_runs_are_averaged(data, tmp_path):
    recipe = SASRecRecipe(run_dir=str(tmp_path), domain="D", seed=7)
    best = [[0, 0, 0, 1, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    scorers = lambda: [TableScorer(SCORES), TableScorer(best)]
    evaluate_scorer_variant(recipe, "sasrec", "table", data, ["uniform"], scorers, [])
    metrics = read_json(tmp_path / "eval" / "table" / "metrics.json")
    assert metrics["uniform/hr@1"] == pytest.approx(2 / 4)
    assert metrics["n"] == 2
    rows = list(read_records(tmp_path / "eval" / "table" / "predictions.jsonl", Prediction))
    assert [(row.user_id, row.seed, row.ranks["uniform"]) for row in rows] == [
        ("u", 7, 2),
        ("v", 7, 3),
        ("u", 8, 1),
        ("v", 8, 1),
    ]


def test_a_finished_variant_is_left_alone(data, tmp_path, caplog):
    recipe = SASRecRecipe(run_dir=str(tmp_path), domain="D", seed=7)
    sequences = tmp_path / "data" / dataset.SEQUENCES
    made = []

    def scorers():
        made.append(TableScorer(SCORES))
        return made

    def evaluate(lists):
        evaluate_scorer_variant(recipe, "sasrec", "table", data, lists, scorers, [sequences], seed=7)

    evaluate(["uniform", "full"])
    manifest = read_json(tmp_path / "eval" / "table" / "manifest.json")
    assert manifest["config"] == {"lists": ["uniform", "full"], "seed": 7}
    assert list(manifest["inputs"]) == [f"data/{dataset.SEQUENCES}"]
    assert manifest["figures"]["uniform/mrr"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert manifest["about"]["recipe"]["domain"] == "D"
    caplog.set_level("INFO")
    evaluate(["uniform", "full"])
    assert "is finished already" in caplog.text
    assert len(made) == 1
    with pytest.raises(InputError, match="lists was"):
        evaluate(["uniform"])


def test_exported_scores_stand_in_the_files_order(data, tmp_path):
    recipe = SASRecRecipe(run_dir=str(tmp_path), domain="D", seed=7, export_scores=str(tmp_path / "s.npz"))
    export_scores(recipe, TableScorer(SCORES), data)
    scores = np.load(tmp_path / "s.npz")["scores"]
    assert scores.dtype == np.float32
    assert scores.tolist() == [SCORES[0], [0.0] * 6, SCORES[2]]


@dataclass
class Given:
    text: str
    mean_logprob: float = -1.0


def item_text(item_id, title=None):
    return render({"item_nm": title or f"item {item_id[1:]}", "item_id": item_id})


EXAMPLE = Example("u", (Interaction("I1"),), ("I5", "I4", "I6"), "I4")


def test_votes_then_log_probability_then_the_list():
    given = [Given(item_text("I6"), -2.0), Given(item_text("I4"), -1.0), Given("junk"), Given(item_text("I1"))]
    assert rank_by_votes(given, EXAMPLE, CATALOG) == (["I4", "I6", "I5"], 1)
    assert rank_by_votes([*given, Given(item_text("I6"))], EXAMPLE, CATALOG) == (["I6", "I4", "I5"], 2)
    assert rank_by_votes([], EXAMPLE, CATALOG) == (["I5", "I4", "I6"], 3)
    assert rank_by_votes([Given(item_text("I6"))], EXAMPLE, CATALOG) == (["I6", "I5", "I4"], 3)
    assert rank_by_votes([Given(item_text("I5"))], EXAMPLE, CATALOG) == (["I5", "I4", "I6"], 3)


@pytest.mark.parametrize(
    ("text", "rationale"),
    [
        ("<think> likes tea </think> <item_nm> x </item_nm>", "likes tea"),
        ("<think> was cut", "was cut"),
        ("no tags at all", "no tags at all"),
        ("<think> a <think> b </think> <item_nm> x", "a  b"),
        ("<think> a <item_nm> x </item_nm>", "a"),
        ("", ""),
    ],
)
def test_rationale_of_whatever_was_written(text, rationale):
    assert rationale_of(text) == rationale
    assert render({"think": rationale_of(text)})


class FakeGenerator:
    """Prefers candidates whose id is high; says what it was asked."""

    def __init__(self, text="<think> tea </think>", fail_at=None):
        self.text, self.asked, self.fail_at = text, [], fail_at

    def generate(self, prompts, num_samples=1, temperature=1.0, top_p=1.0, seed=None):
        if self.fail_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append((len(prompts), num_samples, seed))
        return [[Given(self.text)] * num_samples for _ in prompts]

    def forget(self):
        self.asked.append("forgotten")

    def score(self, prompt, answers):
        assert all(answer.startswith("<think> tea </think> <item_nm>") for answer in answers)
        return [float(answer.partition("<item_id> I")[2][0]) for answer in answers]


CONFIG = SimpleNamespace(  # EvaluateRecipe's
    with_rationale=True, num_samples=5, temperature=0.9, top_p=1.0, seed=3, vote_ties="against_target", permutations=1
)


def test_likelihood_ranks_all_candidates_after_the_rationale():
    (prediction,) = ask(FakeGenerator(), [EXAMPLE], "uniform", WRITER, CONFIG, "likelihood", 1)
    assert prediction.ranking == ("I6", "I5", "I4")
    assert prediction.ranks == {"uniform": 3}
    assert prediction.answers == ("<think> tea </think>",)


def test_if_the_item_comes_first_nothing_is_generated():
    class NoRationale(FakeGenerator):
        def generate(self, *arguments, **others):
            raise AssertionError("the candidates are scored at once")

        def score(self, prompt, answers):
            assert all(answer.startswith("<item_nm>") for answer in answers)
            return [float(answer.partition("<item_id> I")[2][0]) for answer in answers]

    writer = PromptBuilder(CATALOG, SHOWN, None, PromptConfig(item_first=True))
    generator = NoRationale()
    (prediction,) = ask(generator, [EXAMPLE], "uniform", writer, CONFIG, "likelihood", 1)
    assert prediction.ranks == {"uniform": 3}
    assert generator.asked == ["forgotten"]  # whatever was asked before, the rounding is the same


def test_sampled_ranks_by_votes():
    generator = FakeGenerator(item_text("I4"))
    (prediction,) = ask(generator, [EXAMPLE], "hard", WRITER, CONFIG, "sampled", 11)
    assert prediction.ranks == {"hard": 1}
    assert len(prediction.answers) == 5
    assert generator.asked == [(1, 5, 11)]
    assert answer_rates([prediction], CATALOG)["answers/hit"] == 1.0


@pytest.mark.parametrize(("vote_ties", "rank"), [("against_target", 3), ("listed", 2)])
def test_a_target_without_votes_ties_with_the_others(vote_ties, rank):
    config = SimpleNamespace(**{**vars(CONFIG), "vote_ties": vote_ties})
    (prediction,) = ask(FakeGenerator(item_text("I5")), [EXAMPLE], "uniform", WRITER, config, "sampled", 11)
    assert prediction.ranking == ("I5", "I4", "I6")
    assert prediction.ranks == {"uniform": rank}


class ByPlace(FakeGenerator):
    """Likes I4, and the first item of the list 1.5 times as much as it likes the others."""

    def generate(self, prompts, num_samples=1, temperature=1.0, top_p=1.0, seed=None):
        self.asked.append((prompts, num_samples, seed))
        return [[Given(item_text(_listed(prompt)[0]))] * num_samples for prompt in prompts]

    def score(self, prompt, answers):
        first = _listed(prompt)[0]
        likes = {"I4": 4.0, "I5": 3.0, "I6": 1.0}
        ids = ["I" + answer.partition("<item_id> I")[2][0] for answer in answers]
        return [float(np.log(likes[item_id] * (1.5 if item_id == first else 1))) for item_id in ids]


def _listed(prompt):
    """The ids of the candidates, in the order of the prompt."""
    text = prompt[-1]["content"].partition("Candidates:")[2]
    return sorted(("I4", "I5", "I6"), key=lambda item_id: text.index(f"item {item_id[1:]}"))


def asked_in_orders(ranking, writer, **changed):
    config = SimpleNamespace(**{**vars(CONFIG), "permutations": 4, **changed})
    examples = [replace(EXAMPLE, user_id=f"u{i}") for i in range(50)]
    return ask(ByPlace(), examples, "uniform", writer, config, ranking, 11), examples


def test_the_probabilities_of_all_orders_are_averaged():
    writer = PromptBuilder(CATALOG, SHOWN, None, PromptConfig(item_first=True))
    predictions, examples = asked_in_orders("likelihood", writer)
    for prediction, example in zip(predictions, examples, strict=True):
        orders = [reordered(example, number, CONFIG.seed).candidates for number in range(4)]
        mean = dict.fromkeys(example.candidates, 0.0)
        for order in orders:
            likes = {"I4": 4.0, "I5": 3.0, "I6": 1.0}
            likes[order[0]] *= 1.5
            for item_id in mean:
                mean[item_id] += likes[item_id] / sum(likes.values()) / 4
        assert prediction.ranking == tuple(sorted(mean, key=mean.get, reverse=True))
        # I5 comes before I4 where it is listed first, 4.5 to 4; the stored order is such a one.
        assert prediction.choices == tuple("I5" if order[0] == "I5" else "I4" for order in orders)
        assert prediction.choices[0] == "I5"
        assert prediction.places == tuple(map(tuple.index, orders, prediction.choices))
        assert prediction.first == {"uniform": prediction.ranking[0]}
        assert prediction.ranks == {"uniform": 1 + prediction.ranking.index("I4")}
    assert len({reordered(example, 1, 3).candidates for example in examples}) == 6  # all orders of three are drawn
    assert all(sorted(reordered(e, 1, 3).candidates) == ["I4", "I5", "I6"] for e in examples)


def test_the_votes_of_all_orders_count():
    predictions, examples = asked_in_orders("sampled", WRITER)
    for prediction, example in zip(predictions, examples, strict=True):
        firsts = [reordered(example, number, CONFIG.seed).candidates[0] for number in range(4)]
        assert prediction.choices == tuple(firsts)
        assert prediction.places == (0, 0, 0, 0)
        assert len(prediction.answers) == 20
        assert firsts.count(prediction.ranking[0]) == max(map(firsts.count, firsts))
    metrics = order_metrics(predictions)
    shares = [[p.choices.count(item) / 4 for item in set(p.choices)] for p in predictions]
    assert metrics["position/changes"] == pytest.approx(np.mean([len(of) > 1 for of in shares]))
    assert metrics["position/choice_variance"] == pytest.approx(np.mean([1 - sum(x * x for x in of) for of in shares]))
    assert position_of(predictions)["by_place"] == [1.0, 0.0, 0.0]


def test_a_question_without_a_vote_has_no_choice():
    (prediction,) = ask(FakeGenerator("junk"), [EXAMPLE], "uniform", WRITER, CONFIG, "sampled", 11)
    assert (prediction.choices, prediction.places) == (("",), (-1,))
    assert position_of([prediction])["none"] == 1.0
    assert order_metrics([prediction]) == {}


def batches_of(data):
    return [("uniform", [example]) for example in data.examples("test", "uniform")]


def by_likelihood(folder, generator, data):
    """Return the metrics."""
    results = evaluate_language_model({"likelihood": folder}, generator, batches_of(data), WRITER, CONFIG)
    return results["likelihood"][1]


def test_killed_evaluation_goes_on_after_the_last_whole_batch(data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    expected = by_likelihood(whole, FakeGenerator(), data)
    with pytest.raises(KeyboardInterrupt):
        by_likelihood(killed, FakeGenerator(fail_at=1), data)
    with open(killed / "predictions.partial.jsonl", "a") as file:
        file.write('{"user_id": "v", "tar')  # a kill in mid-line
    generator = FakeGenerator()
    found = by_likelihood(killed, generator, data)
    assert len(generator.asked) == 1
    assert found == expected
    assert (killed / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert not (killed / "predictions.partial.jsonl").exists()


def test_more_users_than_there_are_is_said(data, caplog):
    recipe = SimpleNamespace(seed=1, num_users=2, batch_size=1, lists=["uniform"])
    assert [example.user_id for _, [example] in question_batches(recipe, data)] == ["u", "v"]
    assert not caplog.text
    recipe.num_users = 3
    assert len(list(question_batches(recipe, data))) == 2
    assert "num_users is 3, but uniform lists have 2: all are asked" in caplog.text


def test_rows_that_were_not_asked_for_are_no_result(data, tmp_path):
    """What another process would leave if there were no lock: rows of other users, in whole batches."""
    with pytest.raises(KeyboardInterrupt):
        by_likelihood(tmp_path, FakeGenerator(fail_at=1), data)
    partial = tmp_path / "predictions.partial.jsonl"
    partial.write_text(partial.read_text().replace('"user_id": "u"', '"user_id": "x"'))
    with pytest.raises(InputError, match="2 rows that are not the answers to the 2 questions; .* remove it and run"):
        by_likelihood(tmp_path, FakeGenerator(), data)
    assert not (tmp_path / "predictions.jsonl").exists()


def test_whole_predictions_without_a_manifest_are_not_asked_again(data, tmp_path):
    """A kill behind the last answer, or rows of the other ranking that are wrong."""
    expected = by_likelihood(tmp_path, FakeGenerator(), data)
    generator = FakeGenerator()
    assert by_likelihood(tmp_path, generator, data) == expected
    assert generator.asked == []


def test_metrics_are_flat_and_count_users():
    rows = [
        Prediction("u", "I1", {"uniform": 1}),
        Prediction("u", "I1", {"hard": 2}),
        Prediction("v", "I1", {"uniform": 4}),
    ]
    metrics = metrics_of(rows)
    assert (metrics["uniform/hr@1"], metrics["hard/hr@1"], metrics["n"]) == (0.5, 0.0, 2)
    assert json.dumps(metrics)
