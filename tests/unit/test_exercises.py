"""The exercises of the tiny base: answers that the text itself gives, and the training on them."""

import re

import numpy as np
import pytest
import torch

from tiny_base import exercises
from tiny_base.exercises import ExerciseWriter, Lengths
from tiny_base.model import build_model, train_tokenizer
from tiny_base.pretraining import Muon, encode_conversation, orthogonalised, pretrain, schedule
from tiny_base.probe import greedy_answers, obeys
from tiny_base.recipe import PretrainingConfig, ShapeConfig
from tiny_models import gemma3
from twice_rec.answer_format import parse
from twice_rec.catalog import ItemCatalog
from twice_rec.data.sources.synthetic import PRODUCT_TYPES, SyntheticConfig, SyntheticDomain
from twice_rec.prompts import PromptFormat
from twice_rec.rationales.reading import called_for, last_note, opinion, review_note
from twice_rec.records import Interaction, Item
from twice_rec.sft.encoding import IGNORED

SHOWN = PromptFormat(
    prompt_history_items=6, prompt_history_fields=["title", "category"],
    prompt_review_fields=["review_title", "rating"],
    prompt_candidate_fields=["brand", "title", "item_id", "category"], prompt_description_chars=99,
    prompt_details_chars=99, prompt_review_chars=60,
)  # fmt: skip


@pytest.fixture(scope="module")
def catalog():
    domain = SyntheticDomain(SyntheticConfig(synthetic_users=1, synthetic_items=200), 1)
    return ItemCatalog(
        Item(row["parent_asin"], row["title"], row["description"][0], categories=tuple(row["categories"]))
        for row in domain.metadata()
    )


@pytest.fixture(scope="module")
def documents(catalog):
    """Documents as a reader sees them: (candidate lines, purchase lines, turns)."""
    writer, rng = ExerciseWriter(catalog, SHOWN), np.random.default_rng(1)
    found = []
    for _ in range(60):
        document = writer.document(rng, 6, 10, 12)
        past, _, shown = document.prompt[1]["content"].partition("Candidates:")
        lines = [
            [line for line in part.splitlines() if re.match(r"\d+\. (title|brand)", line)]
            for part in (past, shown.split("\n\n")[0])
        ]
        found.append((lines[1], lines[0], document.turns))
    return found


def turns_like(documents, pattern):
    """(candidate lines, purchase lines, match of the question, answer) of the questions that match."""
    for candidates, purchases, turns in documents:
        for turn in turns:
            match = re.match(pattern, turn.question)
            if match:
                yield candidates, purchases, match, turn.answer


def test_every_question_is_asked_and_none_twice_in_a_document(documents):
    questions = [turn.question for _, _, turns in documents for turn in turns]
    for beginning in (
        "Give all candidates.", "Give candidate", "Which candidate has", "Which candidates have",
        "Which candidate fits best", "What does each", "What does review", "What was bought last", "How was purchase",
        "What do the purchases",
    ):  # fmt: skip
        assert any(question.startswith(beginning) for question in questions), beginning
    for _, _, turns in documents:
        assert len({turn.question for turn in turns}) == len(turns) == 12


def test_copies_are_the_candidates_own(documents):
    count = 0
    for candidates, _, match, answer in turns_like(documents, r"Give candidate (\d+)\."):
        parsed, line = parse(answer), candidates[int(match[1]) - 1]
        assert f"title: {parsed.title} | id: {parsed.item_id} |" in line
        count += 1
    assert count > 20


def test_attributes_single_out_one_candidate(documents):
    for candidates, _, match, answer in turns_like(documents, r"Which candidate has (.*)\?"):
        names = match[1].split(" and ")
        fitting = [line for line in candidates if all(name in line for name in names)]
        own = [line for line in candidates if parse(answer).item_id in line]
        assert len(own) == 1
        assert own[0] in fitting
    for candidates, _, match, answer in turns_like(documents, r"Which candidates have (.*)\?"):
        asked = f"category: {match[1]}" if match[1] in PRODUCT_TYPES else match[1]  # Rice Crackers are no Rice
        verdicts = re.findall(r"(\d+) ([^.]*) (yes|no)\.", answer)
        assert [int(number) for number, _, _ in verdicts] == list(range(1, len(candidates) + 1))
        for line, (_, name, verdict) in zip(candidates, verdicts, strict=True):
            assert name in line
            assert verdict == ("yes" if asked in line else "no")


def test_what_fits_best_has_the_highest_score(documents):
    count = 0
    for candidates, _, match, answer in turns_like(
        documents, r"Which candidate fits best\? (.*) Last was [^,]*, so (.*)\."
    ):
        likes = set(re.findall(r"\d likes ([^.]+)\.", match[1]))
        dislikes = set(re.findall(r"\d dislikes ([^.]+)\.", match[1]))
        assert not likes & dislikes
        scores = []
        for line in candidates:
            texts = line.partition(" | id")[0]
            score = sum(name in texts for name in likes) - sum(name in texts for name in dislikes)
            category = line.rpartition("category: ")[2]
            scores.append(score + 1.5 * (category in match[2].split(" or ")))
        assert parse(answer).item_id in candidates[int(np.argmax(scores))]
        assert scores.count(max(scores)) == 1
        count += 1
    assert count > 20


def test_reviews_are_read_as_they_stand(documents):
    for _, purchases, match, answer in turns_like(documents, r"What does review (\d+) say"):
        line = purchases[int(match[1]) - 1]
        if "says nothing" in answer:
            assert not re.search(r"Love that|look for|Always happy|not for me|do not like|Never again", line)
        else:
            verb, name = re.match(r"\d+ (likes|dislikes) (.*)\.", answer).groups()
            assert name in line.partition("review: ")[2]
            assert (verb == "likes") == bool(re.search(r"rating: (Okay|Good|Excellent)", line))
    for _, purchases, match, answer in turns_like(documents, r"How was purchase (\d+) rated"):
        assert purchases[int(match[1]) - 1].endswith(f"rating: {answer.rstrip('.')}")


def test_held_out_items_are_never_trained_on(catalog):
    def made(held_out):
        writer, rng = ExerciseWriter(catalog, SHOWN, held_out), np.random.default_rng(2)
        items = [writer.item(rng) for _ in range(3000)]
        return {(item.brand, item.title.partition(",")[0]) for item in items}

    trained, examined = made(False), made(True)
    assert not trained & examined
    assert len(examined) > 100


def test_opinions():
    item = Item("B1", "Alder Vegan Penne", details='"Brand": "Alder", "Diet": "Vegan"', categories=("Food", "Pasta"))
    assert opinion(Interaction("B1", rating=5.0, review_title="Love that it is Vegan"), item) == ("Vegan", True)
    assert opinion(Interaction("B1", rating=2.0, review_title="Alder is not for me"), item) == ("Alder", False)
    assert opinion(Interaction("B1", rating=2.0, review_title="Just okay"), item) is None
    assert opinion(Interaction("B1", review_title="Vegan!"), item) is None
    assert [review_note(3, o) for o in (("Vegan", True), ("Alder", False), None)] == [
        "3 likes Vegan.", "3 dislikes Alder.", "3 says nothing.",
    ]  # fmt: skip
    tea = Item("B2", "Chai", "Goes well with Sweets and Bread.", categories=("Food", "Tea"))
    assert called_for(tea, ["Bread", "Tea", "Sweets", "Rice"]) == ["Sweets", "Bread"]
    assert last_note(tea, ["Sweets", "Bread"]) == "Last was Tea, so Sweets or Bread."
    assert last_note(tea, []) == "Last was Tea."


def test_lists_grow():
    longest = Lengths(6, 10)
    assert [longest.at(p) for p in (0, 0.4, 0.7, 1, 2)] == [
        Lengths(1, 3),
        Lengths(2, 4),
        Lengths(3, 6),
        longest,
        longest,
    ]


@pytest.fixture(scope="module")
def learner(catalog):
    """(tokenizer, a small model, encoded documents)."""
    writer, rng = ExerciseWriter(catalog, SHOWN), np.random.default_rng(3)
    made = [writer.document(rng, 1, 3, 3) for _ in range(6)]
    tokenizer = train_tokenizer([m["content"] for d in made for m in d.prompt], 1700)
    shape = ShapeConfig(
        vocab_size=1700, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=64, full_attention_every=2, max_position_embeddings=2048,
    )  # fmt: skip
    model = build_model(tokenizer, shape, seed=1)
    turns = [[(turn.question, turn.answer) for turn in document.turns] for document in made]
    return (
        tokenizer,
        model,
        [encode_conversation(tokenizer, d.prompt, t) for d, t in zip(made, turns, strict=True)],
        turns,
    )


def test_labels_are_the_answers_and_the_ends_of_turns(learner):
    tokenizer, _, encoded, turns = learner
    for (ids, labels), asked in zip(encoded, turns, strict=True):
        assert len(ids) == len(labels)
        assert ids.count(tokenizer.bos_token_id) == 1
        text = tokenizer.decode([label for label in labels if label != IGNORED])
        assert text == "".join(f"{answer}<end_of_turn>" for _, answer in asked)
        whole = tokenizer.decode(ids)
        assert (
            f"<start_of_turn>user\n{asked[1][0]}<end_of_turn>\n<start_of_turn>model\n{asked[1][1]}<end_of_turn>"
            in whole
        )


def test_it_learns_and_a_resumed_training_is_the_same(learner, tmp_path):
    _, model, encoded, _ = learner
    start = {name: value.clone() for name, value in model.state_dict().items()}
    config = PretrainingConfig(
        steps=12, tokens_per_step=1500, learning_rate=2e-2, warmup_steps=2, decay_fraction=0.3, weight_decay=0.0,
        save_steps=6,
    )  # fmt: skip
    losses = pretrain(model, lambda step: encoded[step % 2 :: 2], config, tmp_path / "a")
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    assert [step for step, _ in losses] == [12]
    assert losses[0][1] < 6.5 < np.log(1700)

    class Killed(Exception):
        pass

    def until_nine(step):
        if step == 9:
            raise Killed
        return encoded[step % 2 :: 2]

    model.load_state_dict(start)
    with pytest.raises(Killed):
        pretrain(model, until_nine, config, tmp_path / "b")
    model.load_state_dict(start)
    pretrain(model, lambda step: encoded[step % 2 :: 2], config, tmp_path / "b")
    assert all(torch.equal(trained[name], value) for name, value in model.state_dict().items())


def test_a_greedy_answer_is_what_generation_gives():
    model = gemma3()
    prompt = [2, 5, 9, 14]
    with torch.no_grad():
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, 4:].tolist()
    labels = [IGNORED] * 4 + answer
    assert greedy_answers(model, prompt + answer, labels) == [[(token, token) for token in answer]]
    wrong = [*answer[:-1], (answer[-1] + 1) % 99]
    behind = [7, 8]
    twice = [IGNORED] * 4 + wrong + [IGNORED] * 2 + wrong
    first, second = greedy_answers(model, prompt + wrong + behind + wrong, twice)
    assert first == list(zip(answer, wrong, strict=True))
    assert [right for _, right in second] == wrong


def test_muon_moves_along_orthogonal_updates():
    singular = torch.linalg.svdvals(orthogonalised(torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(1))))
    assert ((singular > 0.6) & (singular < 1.3)).all()
    tall = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(orthogonalised(tall), orthogonalised(tall.mT).mT, atol=1e-5)
    parameter = torch.nn.Parameter(torch.zeros(8, 20))
    parameter.grad = torch.randn(8, 20, generator=torch.Generator().manual_seed(3))
    Muon([parameter], lr=0.1, weight_decay=0.0).step()
    assert torch.linalg.svdvals(parameter.detach()).max() < 0.1 * 0.2 * 20**0.5 * 1.3
    assert (parameter * parameter.grad).sum() < 0


def test_learning_rate_rises_stays_and_falls():
    config = PretrainingConfig(steps=100, learning_rate=1.0, warmup_steps=10, decay_fraction=0.2)
    assert [schedule(step, config) for step in (0, 9, 50, 80, 90, 99)] == [0.1, 1.0, 1.0, 1.0, 0.5, 0.05]


def test_questions_stand_behind_the_lists():
    (system, user) = exercises.exercise(["a", "b"], "What?")
    assert user["content"] == "a\nb\n\nWhat?"
    assert system["role"] == "system"
    assert exercises.with_format("What?", ("item_id",)).splitlines() == [
        "What?", "Answer in this form:", "<item_id> id of the recommended item </item_id>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "obeyed"),
    [
        ("<think> other words </think> <item_nm> B </item_nm> <item_id> 2 </item_id>", True),
        ("<item_nm> B </item_nm> <item_id> 2 </item_id> <think> other words </think>", False),
        ("<item_nm> B </item_nm> <item_id> 2 </item_id>", False),
        ("<think> x </think> <item_nm> B </item_nm> <item_id> 3 </item_id>", False),
        ("<think> x </think> <item_nm> B </item_nm> <item_id> </item_id>", False),
        ("<think> x </think> <item_nm> B </item_nm> <item_id> 2 </item_id> <item_id> 2 </item_id>", False),
        ("<think> x <b> </think> <item_nm> B </item_nm> <item_id> 2 </item_id>", False),
        ("<think> x <item_nm> B </item_nm> <item_id> 2 </item_id>", False),
        ("", False),
    ],
)
def test_a_form_is_obeyed_whichever_candidate_is_named(text, obeyed):
    right = "<think> words </think> <item_nm> A </item_nm> <item_id> 1 </item_id>"
    assert obeys(text, right, ("1", "2")) == obeyed
    assert obeys(right, right, ("1", "2"))
