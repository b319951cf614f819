"""SASRec: the model, its losses, its training."""

import itertools
import math

import numpy as np
import pytest
import torch

from twice_rec.cf.recipe import SASRecConfig, SASRecTrainerConfig
from twice_rec.cf.sasrec import SASRec, pad_right
from twice_rec.cf.sasrec_training import (
    SASRecTrainer,
    batches,
    gbce_beta,
    sample_negatives,
    sampled_loss,
    softmax_loss,
    training_loss,
    training_table,
)
from twice_rec.errors import InputError

NUM_ITEMS = 30


def shape(**others):
    return SASRecConfig(**{"hidden_size": 16, "inner_size": 16, "dropout": 0.0, "max_length": 8, **others})


def model_of(**others):
    torch.manual_seed(0)
    model = SASRec(shape(**others), NUM_ITEMS).eval()
    for parameter in model.parameters():  # far from the start, so that nothing is near zero by chance
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def settings(**others):
    return SASRecTrainerConfig(**{"epochs": 3, "batch_size": 16, "learning_rate": 1e-2, "patience": None, **others})


def trainer(config, trainer_config, sequences, validate=lambda model: 0.0, state_file=None):
    return SASRecTrainer(config, trainer_config, NUM_ITEMS, sequences, validate, 5, state_file)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_state_depends_on_the_past_only(norm):
    model = model_of(norm=norm)
    a, b = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[1, 2, 9, 8]]))
    assert torch.allclose(a[:2], b[:2], atol=1e-6)
    assert not torch.allclose(a[2:], b[2:], atol=1e-3)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_padding_changes_nothing(norm):
    model = model_of(norm=norm)
    histories = [[3], [4, 5, 6, 7, 8, 9], [1, 2], [11, 3, 5]]
    together = model.user_states(histories)
    for row, history in enumerate(histories):
        assert torch.allclose(together[row], model.user_states([history])[0], atol=1e-5)


def test_only_the_most_recent_items_count():
    model = model_of(max_length=3)
    assert torch.equal(model.user_states([[9, 8, 1, 2, 3]]), model.user_states([[1, 2, 3]]))


def test_empty_history_is_refused():
    with pytest.raises(ValueError, match="at least one item"):
        model_of().user_states([[1], []])


def test_pad_right():
    assert pad_right([[1], [2, 3, 4]]).tolist() == [[1, 0, 0], [2, 3, 4]]


def test_softmax_loss_is_cross_entropy_over_the_items():
    states, embedding = torch.randn(3, 4), torch.randn(6, 4)
    targets = torch.tensor([1, 5, 3])
    logits = states @ embedding.T
    expected = -sum(
        math.log(math.exp(logits[i, t]) / sum(math.exp(logits[i, j]) for j in range(1, 6)))
        for i, t in enumerate([1, 5, 3])
    )
    assert softmax_loss(states, targets, embedding).item() == pytest.approx(expected / 3, rel=1e-5)


def test_bce_loss_by_hand():
    states, embedding = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, -1.0], [0.0, 1.0]])
    loss = sampled_loss(states, torch.tensor([1]), torch.tensor([[2, 3]]), embedding, beta=1.0)
    expected = math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(2.0))
    assert loss.item() == pytest.approx(expected / 3)


def test_gbce_raises_the_targets_probability_to_beta():
    assert gbce_beta(num_negatives=9, num_items=10, t=0.3) == pytest.approx(1.0)
    assert gbce_beta(num_negatives=1, num_items=101, t=0.0) == pytest.approx(1.0)
    assert gbce_beta(num_negatives=1, num_items=101, t=1.0) == pytest.approx(1 / 100)
    states, embedding = torch.tensor([[1.0]]), torch.tensor([[0.0], [2.0], [0.5]])
    loss = sampled_loss(states, torch.tensor([1]), torch.tensor([[2]]), embedding, beta=0.1)
    expected = -math.log((1 / (1 + math.exp(-2))) ** 0.1) - math.log(1 - 1 / (1 + math.exp(-0.5)))
    assert loss.item() == pytest.approx(expected / 2)


@pytest.mark.parametrize("num_items", [20, 5000])
def test_negatives_are_never_the_users_own(num_items):
    generator = torch.Generator().manual_seed(0)
    sequences = torch.stack([torch.randperm(15)[:10] + 1 for _ in range(64)])
    sequences[::3, 7:] = 0
    negatives = sample_negatives(sequences, 4, num_items, generator)
    assert negatives.shape == (64, 9, 4)
    assert int(negatives.min()) >= 1
    assert int(negatives.max()) <= num_items
    for row, own in zip(negatives, sequences, strict=True):
        assert not set(row.flatten().tolist()) & set(own.tolist())


def test_no_negative_left_is_an_error():
    with pytest.raises(InputError, match="holds all 5 items"):
        sample_negatives(torch.tensor([[1, 2, 3, 4, 5]]), 1, 5, torch.Generator())


def test_batches_hold_everybody_once_and_are_as_long_as_their_longest():
    sequences = [[1] * length for length in (2, 3, 9, 4, 2, 2, 5)]
    found = list(batches(training_table(sequences, max_length=6), 3, torch.Generator().manual_seed(0)))
    assert sorted((row > 0).sum().item() for batch in found for row in batch) == [2, 2, 2, 3, 4, 5, 7]
    assert [len(batch) for batch in found] == [3, 3, 1]
    assert all(batch.shape[1] == int((batch > 0).sum(1).max()) for batch in found)


def test_nothing_to_learn_from():
    with pytest.raises(InputError, match="no user has two training interactions"):
        training_table([[1], [2]], 5)


@pytest.mark.parametrize("loss", ["softmax", "bce", "gbce"])
def test_training_loss_counts_every_next_item_once(loss):
    """The loss of a padded batch is the mean over its real positions, whatever rows they share."""
    model = model_of()
    sequences = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    if loss == "softmax":
        whole = training_loss(model, sequences, settings(loss=loss), torch.Generator())
        first = training_loss(model, sequences[:1], settings(loss=loss), torch.Generator())
        second = training_loss(model, sequences[1:, :2], settings(loss=loss), torch.Generator())
        assert whole.item() == pytest.approx((3 * first.item() + second.item()) / 4, rel=1e-5)
    else:
        value = training_loss(model, sequences, settings(loss=loss, num_negatives=3), torch.Generator().manual_seed(1))
        value.backward()
        assert float(model.item_embedding.weight.grad[0].abs().sum()) == 0.0
        assert float(model.item_embedding.weight.grad[4].abs().sum()) > 0.0


def chains(count, seed=0):
    """Sequences in which item i is followed by i + 1, from random starts."""
    rng = np.random.default_rng(seed)
    return [[int((start + k) % 30) + 1 for k in range(6)] for start in rng.integers(0, 30, count)]


def test_training_learns_what_follows():
    epochs = itertools.count()  # every epoch is better than the one before
    training = trainer(shape(dropout=0.1), settings(epochs=15), chains(300), lambda model: next(epochs))
    model = training.run()
    states = model.user_states([[1, 2, 3], [28, 29, 30]])
    best = (states @ model.item_embedding.weight[1:].T).argmax(1) + 1
    assert best.tolist() == [4, 1]
    assert training.log[-1].loss < training.log[0].loss / 3


def test_the_best_epoch_is_kept_and_patience_ends():
    values = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.9])
    weights = []

    def validate(model):
        weights.append(model.item_embedding.weight.detach().clone())
        return next(values)

    training = trainer(shape(), settings(epochs=10, patience=3), chains(50), validate)
    model = training.run()
    assert [epoch.number for epoch in training.log] == [1, 2, 3, 4, 5]
    assert training.best_epoch.number == 2
    assert torch.equal(model.item_embedding.weight, weights[1])


@pytest.mark.parametrize("loss", ["softmax", "gbce"])
def test_resumed_training_ends_with_the_same_weights(tmp_path, loss):
    def training(state_file=None):
        chosen = settings(loss=loss, epochs=5, num_negatives=2, lr_scheduler_type="cosine")
        validate = lambda model: float(model.item_embedding.weight.detach().sum())
        return trainer(shape(dropout=0.3), chosen, chains(80), validate, state_file)

    def kill_after_three(epoch):
        if epoch.number == 3:
            raise KeyboardInterrupt

    whole = training()
    expected = whole.run().state_dict()
    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        training(state).run(kill_after_three)
    resumed = training(state)
    found = resumed.run().state_dict()
    assert [(e.number, e.loss, e.validation) for e in resumed.log] == [
        (e.number, e.loss, e.validation) for e in whole.log
    ]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_state_of_other_settings_is_not_resumed(tmp_path, caplog):
    state = tmp_path / "state.safetensors"
    trainer(shape(), settings(epochs=2), chains(40), state_file=state).run()
    other = trainer(shape(), settings(epochs=2, learning_rate=0.1), chains(40), state_file=state)
    other.run()
    assert "left by a run with other settings" in caplog.text
    assert len(other.log) == 2


@pytest.mark.parametrize("kept", [0, 6, 300, -1])
def test_a_damaged_state_is_set_aside_and_training_starts_anew(tmp_path, caplog, kept):
    state = tmp_path / "state.safetensors"
    trainer(shape(), settings(epochs=2), chains(40), state_file=state).run()
    whole = state.read_bytes()
    state.write_bytes(whole[:kept])
    again = trainer(shape(), settings(epochs=2), chains(40), state_file=state)
    again.run()
    assert [epoch.number for epoch in again.log] == [1, 2]
    assert f"{state} is damaged" in caplog.text
    assert (tmp_path / "damaged-state.safetensors").read_bytes() == whole[:kept]


def test_a_loss_that_explodes_is_an_error():
    with pytest.raises(InputError, match=r"loss is (nan|inf) in epoch \d+; lower learning_rate"):
        trainer(shape(), settings(learning_rate=1e25, epochs=20), chains(100)).run()


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    trainer(shape(dropout=0.5), settings(epochs=1), chains(20)).run()
    assert torch.equal(torch.random.get_rng_state(), before)
