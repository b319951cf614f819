"""Ranks of CF models by brute force, their questions as arrays, and what is held out from them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from twice_rec.catalog import ItemCatalog
from twice_rec.cf import ranking
from twice_rec.cf.baselines import PrecomputedScorer
from twice_rec.cf.checks import signs_of_poor_training, simple_models
from twice_rec.cf.held_out import HeldOut, prompted, without_prompted
from twice_rec.cf.ranking import CFQuestions
from twice_rec.cf.recipe import SASRecRecipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.cf_ranking import export_scores, require_space
from twice_rec.files import write_records
from twice_rec.item_sequences import ItemSequences
from twice_rec.records import SPLITS, CandidateLists, Interaction, Item, UserSequence

USERS, ITEMS, SHOWN = 60, 40, 8
CATALOG = ItemCatalog([Item(f"I{i:02}", f"item {i}") for i in range(1, ITEMS + 1)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Users of 1 to 12 interactions, some with repeats, some without a target; lists in another order of users."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    sequences = []
    for user in range(USERS):
        length = int(rng.integers(1, 13))
        items = [f"I{i:02}" for i in rng.integers(1, ITEMS + 1, length)]
        test = length - 1 if length >= 3 else None
        valid = length - 2 if length >= 3 and user % 5 else None
        texts = {"review_text": "ünï “text”\n" * user, "rating": 4.0}
        interactions = tuple(Interaction(item, 10 * place, **texts) for place, item in enumerate(items))
        sequences.append(UserSequence(f"u{user}", interactions, max(1, length - 2), valid, test))
    CATALOG.save(folder / dataset.CATALOG)
    write_records(folder / dataset.SEQUENCES, sequences)
    for split in SPLITS:
        rows = []
        for sequence in sequences:
            if sequence.target_position(split) is not None:
                target = sequence.target(split).item_id
                others = [f"I{i:02}" for i in rng.permutation(ITEMS) + 1 if f"I{i:02}" != target]
                lists = {}
                for kind in ("uniform", "hard"):
                    shown = [target, *rng.permutation(others)[: SHOWN - 1].tolist()]
                    lists[kind] = tuple(rng.permutation(shown).tolist())
                rows.append(CandidateLists(sequence.user_id, target, lists))
        write_records(folder / dataset.candidates_file(split), rows[::-1])
    return PreparedData(folder)


@pytest.mark.parametrize("split", SPLITS)
def test_arrays_are_what_the_records_are(data, split):
    asked = data.questions(split, ["hard", "uniform"])
    with_target = [(i, s) for i, s in enumerate(data.sequences) if s.target_position(split) is not None]
    lists = {entry.user_id: entry for entry in data.candidates(split)}
    assert asked.users.tolist() == [position for position, _ in with_target]
    assert list(asked.user_ids) == [sequence.user_id for _, sequence in with_target]
    for row, (_, sequence) in enumerate(with_target):
        assert asked.histories[row].tolist() == CATALOG.indices(e.item_id for e in sequence.history(split))
        assert asked.targets[row] == CATALOG.index(sequence.target(split).item_id)
        for kind in ("hard", "uniform"):
            assert asked.candidates[kind][row].tolist() == CATALOG.indices(lists[sequence.user_id].lists[kind])
    trained = [CATALOG.indices(e.item_id for e in s.interactions[: s.num_train]) for s in data.sequences]
    assert [one.tolist() for one in data.training_histories()] == trained


class Scores:
    """Scores with many ties."""

    def __init__(self, as_tensor=False):
        self.table = np.random.default_rng(1).integers(0, 6, (USERS, ITEMS)).astype(np.float64)
        self.as_tensor = as_tensor

    def scores(self, users, histories):
        return torch.from_numpy(self.table[users]) if self.as_tensor else self.table[users]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_ranks_by_brute_force(data, as_tensor, monkeypatch):
    """Ties count against the target; seen items are left out, but for the target itself; blocks change nothing."""
    scorer, expected = Scores(as_tensor), {"uniform": [], "full": []}
    questions = CFQuestions(data, "test", ["uniform", "full"])
    for row, user in enumerate(questions.asked.users):
        scores, target = scorer.table[user], questions.asked.targets[row]
        seen = set(questions.asked.histories[row].tolist()) - {target}
        others = [i for i in range(1, ITEMS + 1) if i not in seen and i != target]
        expected["full"].append(1 + sum(scores[i - 1] >= scores[target - 1] for i in others))
        shown = questions.asked.candidates["uniform"][row]
        expected["uniform"].append(int(sum(scores[i - 1] >= scores[target - 1] for i in shown)))
    monkeypatch.setattr(ranking, "_BLOCK", 7 * ITEMS)
    assert {kind: of.tolist() for kind, of in questions.ranks(scorer).items()} == expected


def test_a_score_that_is_no_number_is_an_error(data):
    scorer, questions = Scores(), CFQuestions(data, "test", ["full"])
    scorer.table[questions.asked.users[3], 3] = np.nan
    with pytest.raises(ValueError, match="1 of .* scores are NaN"):
        questions.ranks(scorer)


def test_a_sample_of_the_users_is_asked(data):
    whole = CFQuestions(data, "valid", ["uniform"])
    some = CFQuestions(data, "valid", ["uniform"], max_users=10, seed=1)
    assert len(some.asked.users) == 10
    assert set(some.asked.users.tolist()) < set(whole.asked.users.tolist())
    again, other = (CFQuestions(data, "valid", ["uniform"], max_users=10, seed=seed) for seed in (1, 2))
    assert again.asked.users.tolist() == some.asked.users.tolist() != other.asked.users.tolist()
    chosen = np.isin(whole.asked.users, some.asked.users)
    assert some.ranks(Scores())["uniform"].tolist() == whole.ranks(Scores())["uniform"][chosen].tolist()


@pytest.mark.parametrize("top", [None, 5, 1000])
def test_exported_scores_come_back(data, tmp_path, top):
    """With the best items only, a target among them has its rank, and any other the last one."""
    path = tmp_path / "out" / "scores.npz"
    recipe = SASRecRecipe(run_dir=str(tmp_path), domain="D", seed=1, export_scores=str(path), export_top=top)
    require_space(recipe, data)
    scorer, questions = Scores(), CFQuestions(data, "test", ["uniform", "full"])
    scorer.table += np.random.default_rng(2).random((USERS, ITEMS))  # no ties
    export_scores(recipe, scorer, data)
    assert [file.name for file in path.parent.iterdir()] == ["scores.npz"]
    found, expected = questions.ranks(PrecomputedScorer(path, USERS, ITEMS)), questions.ranks(scorer)
    if top == 5:
        best = np.argsort(-scorer.table, axis=1)[:, :5] + 1  # [users, 5]
        among = np.array([t in best[u] for u, t in zip(questions.asked.users, questions.asked.targets, strict=True)])
        assert found["uniform"][among].tolist() == expected["uniform"][among].tolist()
        assert (found["uniform"][~among] == SHOWN).all()
    else:
        assert {kind: of.tolist() for kind, of in found.items()} == {k: of.tolist() for k, of in expected.items()}


def test_an_export_that_does_not_fit_is_refused(data, tmp_path, monkeypatch):
    recipe = SASRecRecipe(run_dir=str(tmp_path), domain="D", seed=1, export_scores=str(tmp_path / "scores.npz"))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2 * USERS * 4 * ITEMS - 1))
    with pytest.raises(InputError, match=r"60 users and 40 items .* set export_top, or name another disk"):
        require_space(recipe, data)
    require_space(recipe.model_copy(update={"export_top": 5}), data)


def test_precomputed_top_of_another_shape(tmp_path):
    path = tmp_path / "scores.npz"
    np.savez(path, scores=np.zeros((2, 3)), items=np.ones((2, 4), dtype=int))
    with pytest.raises(InputError, match=r"shape \(2, 3\).*or \[users, top\]"):
        PrecomputedScorer(path, 2, 9)
    np.savez(path, scores=np.zeros((2, 3)), items=np.full((2, 3), 10))
    with pytest.raises(InputError, match="items are 10 to 10 of 9"):
        PrecomputedScorer(path, 2, 9)


@pytest.mark.parametrize(
    ("file", "line", "change", "message"),
    [
        (dataset.SEQUENCES, 4, lambda row: row["interactions"][0].update(item_id="?"), r"line 4: item \? of user u3"),
        (dataset.SEQUENCES, 4, lambda row: row.pop("num_train"), r"line 4: not a UserSequence: num_train"),
        (dataset.SEQUENCES, 4, lambda row: row.update(test=99), "targets lie beyond the user's interactions"),
        ("candidates.test.jsonl", 2, lambda row: row["lists"]["uniform"].append("I01"), "lists of different lengths"),
        ("candidates.test.jsonl", 2, lambda row: row["lists"].pop("uniform"), "lists of different lengths"),
        ("candidates.test.jsonl", 2, lambda row: row["lists"].update(uniform=3), r"line 2: not a CandidateLists"),
        ("candidates.test.jsonl", 2, lambda row: row.update(user_id="x"), "has no stored candidates"),
    ],
)
def test_damaged_files_are_named(data, tmp_path, file, line, change, message):
    for path in data.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = (tmp_path / file).read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[line - 1])
    change(row)
    lines[line - 1] = json.dumps(row)
    (tmp_path / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        PreparedData(tmp_path).questions("test", ["uniform"])


def test_a_file_that_is_cut_off_is_named(data, tmp_path):
    for path in data.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / dataset.SEQUENCES).read_bytes()
    (tmp_path / dataset.SEQUENCES).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"sequences\.jsonl, line \d+: (broken JSON|not UTF-8)"):
        PreparedData(tmp_path).training_histories()


def test_what_stage_3_asks_about_is_held_out():
    """Only prompted users lose their last training item; users of one interaction are no examples."""
    histories = ItemSequences.of([[1], [2, 3], [4, 5, 6], [7, 8], [9, 10]])
    asked = prompted(4, 0.5, seed=3).tolist()  # of the users 1, 2, 3, 4
    found = [one.tolist() for one in without_prompted(histories, HeldOut(0.5, 3))]
    whole = [one.tolist() for one in histories]
    assert found == [one[:-1] if user - 1 in asked else one for user, one in enumerate(whole)]
    assert [one.tolist() for one in without_prompted(histories, HeldOut())] == whole
    assert prompted(1000, 0.1, seed=3).tolist() == prompted(1000, 0.3, seed=3)[:100].tolist()


@pytest.mark.parametrize(
    ("held_out", "prompts", "covered"),
    [((0.2, 1), (0.2, 1), True), ((0.2, 1), (0.1, 1), True), ((0.2, 1), (0.3, 1), False), ((0.2, 1), (0.2, 2), False)],
)
def test_what_covers_the_prompts(held_out, prompts, covered):
    assert HeldOut(*held_out).covers(HeldOut(*prompts)) is covered


def test_signs_of_poor_training():
    fine = {"sasrec": {"full/ndcg@10": 0.1, "uniform/ndcg@5": 0.5}, "popularity": {"full/ndcg@10": 0.1}}
    assert signs_of_poor_training(True, False, 0.9, fine) == []
    assert signs_of_poor_training(True, True, 0.3, fine) == []
    (sign,) = signs_of_poor_training(False, True, 0.3, fine)
    assert "still learning when epochs ended" in sign
    (sign,) = signs_of_poor_training(True, False, 0.95, fine)
    assert "popularity share is 0.95" in sign
    (sign,) = signs_of_poor_training(True, False, 0.3, {**fine, "itemknn": {"uniform/ndcg@5": 0.6}})
    assert sign == "on validation it is below itemknn in uniform/ndcg@5: 0.5000 against 0.6000"


def test_simple_models_leave_out_what_does_not_fit(monkeypatch):
    histories = ItemSequences.of([[1, 2], [2, 3]])
    assert list(simple_models(histories, 3)) == ["popularity", "itemknn"]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    assert list(simple_models(histories, 3)) == ["popularity"]


def test_a_prompts_target_is_held_out_wherever_the_user_bought_it():
    histories = ItemSequences.of([[7, 3, 7], [4, 5], [7, 7], [6]])
    everything = HeldOut(1.0, 0)  # the prompts' targets are 7, 5 and 7
    assert [part.tolist() for part in without_prompted(histories, everything)] == [[3], [4], [], [6]]
    assert [part.tolist() for part in without_prompted(histories, HeldOut())] == [[7, 3, 7], [4, 5], [7, 7], [6]]
