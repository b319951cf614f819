"""The CF models of RecBole: what goes out to its process, what comes in, and how it may fail; and the process's loop.

The process is a small script here; `tests/servers/test_recbole.py` has the real one.
"""

import json
import sys

import numpy as np
import pytest
import torch

from recbole_data import CATALOG, ITEMS, write_circle
from twice_rec.catalog import ItemCatalog
from twice_rec.cf import recbole, recbole_runner
from twice_rec.cf.ranking import CFQuestions
from twice_rec.cf.recbole_models import RECBOLE_MODELS
from twice_rec.cf.recipe import BaselinesRecipe
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation.tables import in_order
from twice_rec.records import Item
from twice_rec.stages import stage3a_baselines

# Knows that item i is followed by i + 1; keeps what it was given.
FAKE = """
import json, shutil, sys
import numpy as np
from safetensors.numpy import save_file
exchange, results = sys.argv[1:]
work = json.load(open(f"{exchange}/work.json"))
items = int(np.load(f"{exchange}/data.npz")["num_items"])
say = lambda **what: print(json.dumps(what), flush=True)
if work["trains"]:
    %(train)s
    for name in ("data.npz", "work.json"):
        shutil.copy(f"{exchange}/{name}", results)
    say(setting=0, epoch=1, loss=1.5, validation=1.0)
    save_file({"a": np.zeros(1)}, f"{results}/model.safetensors", {"settings": "{}"})
    row = {"settings": {}, "validation": 1.0, "epochs": 1, "ended": "patience", "seconds": 2.0, "passed_seconds": 1.0}
    open(f"{results}/tuning.jsonl", "w").write(json.dumps(row) + "\\n")
    say(tried={**row, "validations": [1.0]})
say(ready=True)
while sys.stdin.read(1):
    asked = np.load(f"{exchange}/questions.npz")
    last = asked["history_items"][asked["history_ends"] - 1]
    scores = np.zeros((len(last), items), dtype=np.float32)
    scores[np.arange(len(last)), last %% items] = 1
    %(score)s
    np.save(f"{exchange}/scores.npy", scores)
    say(scored=len(scores))
"""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs the stage with a script in place of the runner; returns its exit status."""
    sequences = write_circle(tmp_path / "run" / "data")

    def run(*flags, train="pass", score="pass", models=("gru4rec",), python=sys.executable):
        script = tmp_path / "fake.py"
        script.write_text(FAKE % {"train": train, "score": score})
        monkeypatch.setattr(recbole, "RUNNER", script)
        recipe = tmp_path / "baselines.yaml"
        keys = {"run_dir": str(tmp_path / "run"), "domain": "D", "seed": 1, "recbole_python": str(python)}
        recipe.write_text(json.dumps({**keys, "models": list(models)}))
        return stage3a_baselines.main([str(recipe), *flags])

    run.sequences, run.path = sequences, tmp_path / "run"
    return run


def test_scores_come_in_and_are_ranked_here(stage, capfd):
    assert stage() == 0
    metrics = json.loads((stage.path / "eval/gru4rec/metrics.json").read_text())
    assert metrics["n"] == 200  # the user with one training interaction too
    assert metrics["uniform/hr@1"] == metrics["full/hr@1"] == 1.0
    manifest = json.loads((stage.path / "gru4rec/manifest.json").read_text())
    figures = {"class": "GRU4Rec", "valid/full/ndcg@10": 1.0, "tried": 1, "train_seconds": 2.0, "passed_seconds": 1.0}
    assert figures.items() <= manifest["figures"].items()
    said = capfd.readouterr().err
    assert said.count("RecBole 1.2.1 does not have it: no row") == 1
    assert "DFM" in said
    assert "3 settings were not tried" in said


def test_the_process_is_given_no_test_target(stage):
    assert stage("--max_length", "15") == 0
    given = np.load(stage.path / "gru4rec/data.npz")
    pieces = {
        name: [part.tolist() for part in np.split(given[f"{name}_items"], given[f"{name}_ends"][:-1])]
        for name in ("train", "valid")
    }
    assert pieces["train"] == pieces["valid"] == [sequence[:-2] for sequence in stage.sequences]
    assert given["valid_targets"].tolist() == [sequence[-2] for sequence in stage.sequences]
    work = json.loads((stage.path / "gru4rec/work.json").read_text())
    assert work["max_length"] == recbole.SHORTEST  # the longest history has 4 items
    assert work["settings"][0] == {}
    assert len(work["settings"]) == 4


def test_test_targets_are_in_no_array(stage):
    """Nothing that is written for the process changes if the test targets do."""
    assert stage() == 0
    before = dict(np.load(stage.path / "gru4rec/data.npz"))
    lines = (stage.path / "data/sequences.jsonl").read_text().splitlines()
    for number, line in enumerate(lines):
        row = json.loads(line)
        row["interactions"][-1]["item_id"] = "I01"
        lines[number] = json.dumps(row)
    (stage.path / "data/sequences.jsonl").write_text("\n".join(lines) + "\n")
    assert stage("--overwrite", "true", "--lists", "full") == 0
    after = np.load(stage.path / "gru4rec/data.npz")
    assert before.keys() == set(after.files)
    for name, array in before.items():
        assert np.array_equal(array, after[name]), name


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("scores = scores[:, 1:]", "gave scores of the shape (200, 19), expected [users, items] = (200, 20)"),
        ("scores[0, 0] = np.nan", "gru4rec: 1 scores of RecBole's process are NaN"),
    ],
)
def test_scores_that_cannot_be_used(stage, capfd, score, message):
    assert stage(score=score) == 2
    assert message in capfd.readouterr().err
    assert not (stage.path / "eval/gru4rec/metrics.json").exists()


def test_a_process_that_dies_is_one_row_less(stage, capfd):
    dies = 'if work["class"] == "SINE": raise ValueError("no memory for this")'
    assert stage(train=dies, models=["sine", "gru4rec"]) == 1
    said = capfd.readouterr().err
    log = stage.path / "logs/recbole_sine.log"
    assert f"sine: RecBole's process ended with status 1: ValueError: no memory for this; its log is {log}" in said
    assert "no row of sine" in said
    assert "Traceback" not in said
    assert "Traceback" in log.read_text()
    assert (stage.path / "eval/gru4rec/metrics.json").exists()
    assert stage(models=["sine", "gru4rec"]) == 0  # the same command goes on
    assert (stage.path / "eval/sine/metrics.json").exists()


def test_a_process_that_dies_while_it_scores(stage, capfd):
    assert stage(score='sys.exit("killed")') == 1
    assert "gru4rec: RecBole's process ended with status 1: killed; its log is" in capfd.readouterr().err


def test_an_environment_without_recbole(stage, capfd):
    assert stage(train="import recbole_is_not_here") == 1
    assert "VENV=" in capfd.readouterr().err


def test_a_missing_environment_is_one_line(stage, capfd):
    python = stage.path / "nowhere" / "bin" / "python"
    assert stage(python=python) == 2
    command = f"VENV={stage.path}/nowhere bash install.sh requirements-recbole.txt"
    assert f"recbole_python is {python}: no such file; make RecBole's environment: {command}" in capfd.readouterr().err
    assert not (stage.path / "gru4rec").exists()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["bert5rec"], "models names bert5rec; known are fossil, transrec, "),
        (["gru4rec", "DFM"], "models names DFM .DFM is a row of the paper's Table 1, and RecBole 1.2.1 does not have"),
        (["gru4rec", "gru4rec"], "name at least one model, and each once"),
        ([], "name at least one model"),
    ],
)
def test_unknown_models(models, message):
    with pytest.raises(ValueError, match=message):
        BaselinesRecipe(run_dir="a", domain="D", seed=0, models=models)


def test_rows_have_their_place_in_tables():
    assert in_order(["base", "sasrec", "s3rec", "ease", "fossil", "zebra"]) == [
        "ease", "fossil", "s3rec", "sasrec", "base", "zebra",
    ]  # fmt: skip


def test_every_model_begins_with_recboles_defaults():
    assert set(RECBOLE_MODELS) == {
        "bert4rec", "s3rec", "nextitnet", "sine", "transrec", "lightsans", "fossil", "gru4rec",
    }  # fmt: skip
    for name, model in RECBOLE_MODELS.items():
        assert model.recbole_class.lower() == name
        assert model.settings[0] == {}
        texts = [json.dumps(settings, sort_keys=True) for settings in model.settings]
        assert len(set(texts)) == len(texts)


def test_attributes_of_items():
    """Categories, brands and members of the details that two items have, and not more than half; the frequent first."""
    items = [
        Item("A", "a", brand="Yogi", categories=("Tea",), details='"Size": "16 oz", "Color": "Red"'),
        Item("B", "b", brand="Yogi", categories=("Tea", "Green"), details='"Size": "16 oz", "Flav'),
        Item("C", "c", categories=("Tea", "Green")),
        Item("D", "d", brand="Other", details='"Color": "Red"'),
        Item("E", "e", categories=("Green",)),
        Item("F", "f"),
    ]
    table, count = recbole.item_attributes(ItemCatalog(items))
    # three items: green, tea; two: yogi, 16 oz, red
    assert count == 5
    assert table.shape == (7, 3 + 1)
    assert [sum(row > 0) for row in table] == [0, 4, 4, 2, 1, 1, 0]
    assert table[3].tolist()[:2] == [1, 2]
    assert table[5].tolist()[0] == 1
    table, count = recbole.item_attributes(ItemCatalog(items), most=2)
    assert count == 2
    assert table.shape == (7, 2)
    assert recbole.item_attributes(ItemCatalog(items[-1:]))[1] == 1


class Bigrams:
    """A stand-in for a model of RecBole: a table of which item follows which."""

    name, batch_size, learning_rate, weight_decay, pretrain_epochs = "GRU4Rec", 100, 0.1, 0.0, 0
    device = torch.device("cpu")

    def __init__(self, work, changed, shapes):
        self.module = torch.nn.Embedding(shapes.item_num, shapes.item_num)
        self.length, self.learning_rate = work["max_length"], changed.get("learning_rate", 0.1)

    def finetune(self):
        pass

    def loss(self, sequences, users, places):
        before = torch.from_numpy(sequences.items[places - 1])
        return torch.nn.functional.cross_entropy(self.module(before), torch.from_numpy(sequences.items[places]))

    @torch.no_grad()
    def scores(self, users, sequences, rows):
        return self.module(torch.from_numpy(sequences.items[sequences.ends[rows] - 1]))[:, 1:]


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """The arrays of a circle, and `train` with the stand-in."""
    write_circle(tmp_path / "data")
    data = PreparedData(tmp_path / "data")
    valid = CFQuestions(data, "valid", ["full"])
    recipe = BaselinesRecipe(run_dir=str(tmp_path), domain="D", seed=1)
    variant = recbole.RecBoleVariant(recipe, "gru4rec", data, valid)
    variant._exchange = tmp_path
    variant._write_work(trains=True)
    monkeypatch.setattr(recbole_runner, "Model", Bigrams)
    changed = {"device": "cpu", "epochs": 6, "settings": [{}, {"learning_rate": 0.3}]}
    work = json.loads((tmp_path / "work.json").read_text()) | changed

    def train(name, **changed):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        recbole_runner.train({**work, **changed}, np.load(tmp_path / "data.npz"), folder)
        return [json.loads(line) for line in (folder / "tuning.jsonl").read_text().splitlines()]

    train.path, train.valid = tmp_path, valid
    return train


def without_times(rows):
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def test_settings_are_tried_and_the_best_one_is_kept(runner):
    rows = runner("a")
    assert [row["settings"] for row in rows] == [{}, {"learning_rate": 0.3}]
    assert all(row["ended"] == "epochs" and row["epochs"] == 6 for row in rows)
    best = max(rows, key=lambda row: row["validation"])
    weights = recbole_runner.load_file(runner.path / "a/model.safetensors")["weight"]

    class Scorer:
        def scores(self, users, histories):
            return weights[[int(history[-1]) for history in histories]][:, 1:]

    assert runner.valid.mean(Scorer()) == pytest.approx(best["validation"], abs=1e-6)
    assert best["validation"] > 0.9
    assert not (runner.path / "a/state.pt").exists()


def test_a_killed_training_goes_on_as_it_would_have(runner, monkeypatch):
    whole, validation, calls = runner("a"), recbole_runner.Training.validation, []

    def killed(self):
        calls.append(1)
        if len(calls) == 10:  # in the fourth epoch of the second setting
            raise KeyboardInterrupt
        return validation(self)

    monkeypatch.setattr(recbole_runner.Training, "validation", killed)
    with pytest.raises(KeyboardInterrupt):
        runner("b")
    assert len((runner.path / "b/tuning.jsonl").read_text().splitlines()) == 1
    assert without_times(runner("b")) == without_times(whole)
    assert len(calls) == 13  # three epochs more: nothing was trained twice
    one, other = (recbole_runner.load_file(runner.path / name / "model.safetensors") for name in "ab")
    assert torch.equal(one["weight"], other["weight"])


def test_minutes_and_patience_end_a_training(runner):
    (row,) = runner("a", minutes=1e-9)
    assert row["ended"] == "minutes"
    assert row["epochs"] == 1  # of one step, and validated
    rows = runner("b", epochs=500, patience=2)
    assert {row["ended"] for row in rows} == {"patience"}
    assert all(row["epochs"] == row["best_epoch"] + 2 for row in rows)


def test_a_clock_does_not_count_what_others_computed(monkeypatch):
    now = {"monotonic": 100.0, "process_time": 10.0}
    monkeypatch.setattr(recbole_runner.time, "monotonic", lambda: now["monotonic"])
    monkeypatch.setattr(recbole_runner.time, "process_time", lambda: now["process_time"])
    clocks = [recbole_runner.Clock(torch.device(name)) for name in ("cpu", "cuda")]
    now |= {"monotonic": 160.0, "process_time": 15.0}
    assert [clock.seconds() for clock in clocks] == [5.0, 60.0]
    now["process_time"] = 200.0  # several threads
    assert [clock.seconds() for clock in clocks] == [60.0, 60.0]
    assert clocks[0].passed() == 60.0


def test_a_loss_that_is_not_finite_ends_a_setting(runner, monkeypatch):
    monkeypatch.setattr(Bigrams, "loss", lambda self, *batch: self.module.weight.sum() * float("nan"))
    with pytest.raises(SystemExit, match="no setting could be trained: the loss is nan"):
        runner("a")


def test_padded_histories():
    sequences = recbole_runner.Sequences(np.array([1, 2, 3, 4]), np.array([0, 1, 4]), np.array([3, 4, 4]))
    items, lengths = sequences.padded(np.array([0, 1, 2]), np.array([3, 4, 4]), 3)
    assert items.tolist() == [[1, 2, 3], [2, 3, 4], [0, 0, 0]]
    assert lengths.tolist() == [3, 3, 1]
    items, lengths = sequences.padded(np.array([0, 1]), np.array([2, 4]), 2)
    assert items.tolist() == [[1, 2], [3, 4]]
    assert lengths.tolist() == [2, 2]


def test_what_a_training_predicts(runner):
    """Every training item but a user's first, from what is before it; a user with one item gives nothing."""
    work = json.loads((runner.path / "work.json").read_text()) | {"device": "cpu"}
    training = recbole_runner.Training(work, np.load(runner.path / "data.npz"), 0, 60, runner.path / "state.pt")
    assert len(training._places) == 199 * 3
    assert 0 not in training._owners
    items, starts = training._train.items, training._train.starts
    assert (training._places - starts[training._owners]).tolist() == [1, 2, 3] * 199
    assert all(items[place] == items[place - 1] % ITEMS + 1 for place in training._places)


def test_the_catalog_of_these_tests_has_attributes():
    assert recbole.item_attributes(CATALOG)[1] == 7


def test_no_user_with_two_training_interactions(tmp_path):
    write_circle(tmp_path / "data", users=1)
    data = PreparedData(tmp_path / "data")
    recipe = BaselinesRecipe(run_dir=str(tmp_path), domain="D", seed=1)
    variant = recbole.RecBoleVariant(recipe, "gru4rec", data, CFQuestions(data, "valid", ["full"]))
    with pytest.raises(InputError, match="gru4rec has nothing to learn from"):
        variant.train(lambda values: None)
