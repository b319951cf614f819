"""SASRec: the model, its losses, its training."""

import itertools
import math

import numpy as np
import pytest
import torch

from twice_rec.cf.losses import (
    NegativeSampler,
    gbce_beta,
    sample_negatives,
    sampled_loss,
    sampled_softmax_loss,
    softmax_loss,
)
from twice_rec.cf.recipe import SASRecConfig, SASRecTrainerConfig
from twice_rec.cf.sasrec import Dropout, SASRec
from twice_rec.cf.sasrec_training import SASRecTrainer
from twice_rec.errors import InputError
from twice_rec.item_sequences import ItemSequences

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
    """Plain ones: no average of weights, and a validation after each of three steps."""
    plain = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-2, "patience": None, "ema_decay": 0.0}
    return SASRecTrainerConfig(**{**plain, "validation_steps": 3, **others})


def trainer(config, trainer_config, sequences, validate=lambda model: 0.0, state_file=None):
    return SASRecTrainer(config, trainer_config, NUM_ITEMS, sequences, validate, 5, state_file)


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    ones = torch.ones(400, 250, requires_grad=True)
    dropped = Dropout(0.4)(ones)
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0, 1 / 0.6])
    assert float((dropped == 0).float().mean()) == pytest.approx(0.4, abs=0.01)  # five standard errors are .008
    dropped.sum().backward()
    assert torch.equal(ones.grad, dropped.detach())
    assert torch.equal(Dropout(0.4).eval()(ones), ones)
    assert torch.equal(Dropout(0.0)(ones), ones)


def test_attention_with_dropout_attends_as_without(monkeypatch):
    model = model_of(dropout=0.5)
    items = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    expected = model(items)
    assert not torch.allclose(model.train()(items), expected, atol=1e-3)
    monkeypatch.setattr(Dropout, "forward", lambda self, x: x)
    assert torch.allclose(model.train()(items), expected, atol=1e-6)


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
    assert loss.item() == pytest.approx(expected)


def test_gbce_raises_the_targets_probability_to_beta():
    assert gbce_beta(num_negatives=9, num_items=10, t=0.3) == pytest.approx(1.0)
    assert gbce_beta(num_negatives=1, num_items=101, t=0.0) == pytest.approx(1.0)
    assert gbce_beta(num_negatives=1, num_items=101, t=1.0) == pytest.approx(1 / 100)
    assert gbce_beta(num_negatives=2048, num_items=10, t=0.75) == pytest.approx(1.0)  # there are only 9 others
    states, embedding = torch.tensor([[1.0]]), torch.tensor([[0.0], [2.0], [0.5]])
    loss = sampled_loss(states, torch.tensor([1]), torch.tensor([[2]]), embedding, beta=0.1)
    expected = -math.log((1 / (1 + math.exp(-2))) ** 0.1) - math.log(1 - 1 / (1 + math.exp(-0.5)))
    assert loss.item() == pytest.approx(expected)


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


def test_what_item_dropout_leaves_out_is_no_negative(monkeypatch):
    chosen = settings(loss="gbce", num_negatives=20, item_dropout=0.8)
    training = trainer(shape(), chosen, [[1, 2]])
    drawn = []

    def seen(*given):
        drawn.append(sample_negatives(*given))
        return drawn[-1]

    monkeypatch.setattr("twice_rec.cf.losses.sample_negatives", seen)
    training._backward(0, torch.arange(1, 25).repeat(8, 1))
    assert set(drawn[0].flatten().tolist()) == set(range(25, 31))


def test_a_long_sequence_of_repeats_leaves_negatives():
    assert set(sample_negatives(torch.tensor([[1, 1, 2, 1, 1, 2]]), 50, 5, torch.Generator()).flatten().tolist()) == {
        3, 4, 5,
    }  # fmt: skip


def test_no_negative_left_is_an_error():
    with pytest.raises(InputError, match="holds all 5 items"):
        sample_negatives(torch.tensor([[1, 2, 3, 4, 5]]), 1, 5, torch.Generator())


def test_sampled_softmax_by_hand():
    states, embedding = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [2.0], [0.5], [1.0]])
    targets, negatives, probability = torch.tensor([1, 3]), torch.tensor([2, 3, 3]), torch.tensor([0.5, 0.25, 0.25])
    loss = sampled_softmax_loss(states, targets, negatives, probability.log(), embedding)
    # Of three draws item 2 is expected 1.5 times, item 3 .75 times. For the second position 3 is the target.
    first = -2 + math.log(math.exp(2) + math.exp(0.5) / 1.5 + 2 * math.exp(1) / 0.75)
    second = -2 + math.log(math.exp(2) + math.exp(1) / 1.5)
    assert loss.item() == pytest.approx((first + second) / 2)


def test_sampled_softmax_estimates_the_whole_one():
    """With many draws the sum over the sample is the sum over the catalogue, whatever the draws prefer."""
    torch.manual_seed(0)
    states, embedding, targets = torch.randn(5, 4), torch.randn(31, 4), torch.tensor([1, 7, 7, 30, 12])
    sampler = NegativeSampler(ItemSequences.of([[1] * 50, [7, 12, 30]]), 30)
    drawn = sampler.draw(400_000, torch.Generator().manual_seed(1))
    loss = sampled_softmax_loss(states, targets, drawn, sampler.log_probability[drawn - 1], embedding)
    assert loss.item() == pytest.approx(softmax_loss(states, targets, embedding).item(), rel=5e-3)


def test_negatives_are_drawn_with_the_probability_that_is_said():
    sampler = NegativeSampler(ItemSequences.of([[1, 1, 1], [2]]), 4)
    drawn = sampler.draw(100_000, torch.Generator().manual_seed(0))
    expected = [1 / 8 + 3 / 8, 1 / 8 + 1 / 8, 1 / 8, 1 / 8]
    assert sampler.log_probability.exp().tolist() == pytest.approx(expected)
    assert (torch.bincount(drawn, minlength=5)[1:] / 100_000).tolist() == pytest.approx(expected, abs=5e-3)


def test_batches_hold_everybody_once_an_epoch_and_are_as_long_as_their_longest():
    sequences = [[1] * length for length in (2, 3, 9, 1, 4, 2, 2, 5)]
    training = trainer(shape(max_length=8), settings(batch_size=3), sequences)
    found = list(itertools.islice(training.batches(0), 6))
    for epoch in (found[:3], found[3:]):
        assert sorted((row > 0).sum().item() for batch in epoch for row in batch) == [2, 2, 2, 3, 4, 5, 9]
        assert [len(batch) for batch in epoch] == [3, 3, 1]
        assert all(batch.shape[1] == int((batch > 0).sum(1).max()) for batch in epoch)
    resumed = list(itertools.islice(training.batches(4), 2))
    assert all(torch.equal(*pair) for pair in zip(resumed, found[4:], strict=True))


def test_long_sequences_are_trained_on_in_pieces():
    """Every item but the first of a sequence is predicted exactly once an epoch."""
    training = trainer(shape(max_length=3), settings(), [list(range(1, 12)), [20, 21]])
    rows = sorted(row.tolist() for row in training.sequences)
    assert rows == [[1, 2], [2, 3, 4, 5], [5, 6, 7, 8], [8, 9, 10, 11], [20, 21]]
    assert sorted(item for row in rows for item in row[1:]) == [*range(2, 12), 21]


def test_nothing_to_learn_from():
    with pytest.raises(InputError, match="no user has two training interactions"):
        trainer(shape(), settings(), [[1], [2]])


def test_a_step_has_about_a_thousand_positions_if_the_recipe_does_not_say():
    assert trainer(shape(), settings(batch_size=None), [[1, 2, 3, 4, 5]] * 1000).batch_size == 256
    assert trainer(shape(max_length=3), settings(batch_size=None), [[1, 2, 3, 4, 5, 6, 7]] * 1000).batch_size == 341


def test_the_loss_is_chosen_by_the_size_of_the_catalogue():
    sequences, auto = [[1, 2], [2, 3]], settings(loss="auto")
    few = SASRecTrainer(shape(), auto, 20_000, sequences, lambda model: 0.0, 0)
    many = SASRecTrainer(shape(), auto, 20_001, sequences, lambda model: 0.0, 0)
    assert (few.loss, many.loss) == ("softmax", "sampled_softmax")


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "bce", "gbce"])
def test_training_loss_counts_every_next_item_once(loss):
    """The loss of a padded batch is the mean over its real positions, whatever rows they share."""
    training = trainer(shape(), settings(loss=loss, num_negatives=3), [[1, 2, 3, 4], [5, 6]])
    sequences = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    if loss == "softmax":
        whole = training.training_loss(sequences, torch.Generator())
        first = training.training_loss(sequences[:1], torch.Generator())
        second = training.training_loss(sequences[1:, :2], torch.Generator())
        assert whole.item() == pytest.approx((3 * first.item() + second.item()) / 4, rel=1e-5)
    else:
        training.training_loss(sequences, torch.Generator().manual_seed(1)).backward()
        gradient = training.model.item_embedding.weight.grad
        assert float(gradient[0].abs().sum()) == 0.0
        assert float(gradient[4].abs().sum()) > 0.0


def test_item_dropout_shortens_sequences_but_keeps_order_last_and_one_before():
    training = trainer(shape(), settings(item_dropout=0.5), [[1, 2]])
    whole = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0], [9, 10, 11, 0, 0, 0]]).repeat(200, 1)
    short = training._without_some_items(whole, torch.Generator().manual_seed(0))
    lengths = []
    for before, after in zip(whole.tolist(), short.tolist(), strict=True):
        before, after = [item for item in before if item], [item for item in after if item]
        assert after == sorted(set(after) & set(before))
        assert after[-1] == before[-1]
        assert len(after) >= 2
        lengths.append(len(after) if len(before) == 6 else 0)
    assert sum(lengths) / 200 == pytest.approx(1 + 5 / 2 + 1 / 2**5, abs=0.2)  # one is kept if all five are out


def chains(count, seed=0):
    """Sequences in which item i is followed by i + 1, from random starts."""
    rng = np.random.default_rng(seed)
    return [[int((start + k) % 30) + 1 for k in range(6)] for start in rng.integers(0, 30, count)]


def test_training_learns_what_follows():
    better = itertools.count()  # every validation is better than the one before
    training = trainer(shape(dropout=0.1), settings(epochs=15, ema_decay=0.9), chains(300), lambda model: next(better))
    model = training.run()
    states = model.user_states([[1, 2, 3], [28, 29, 30]])
    best = (states @ model.item_embedding.weight[1:].T).argmax(1) + 1
    assert best.tolist() == [4, 1]
    assert training.log[-1].loss < training.log[0].loss / 3


def test_the_best_validation_is_kept_and_patience_ends():
    values = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.9])
    weights = []

    def validate(model):
        weights.append(model.item_embedding.weight.detach().clone())
        return next(values)

    training = trainer(shape(), settings(epochs=10, patience=3), chains(50), validate)
    model = training.run()
    assert [one.step for one in training.log] == [3, 6, 9, 12, 15]
    assert [one.epochs for one in training.log] == [0.75, 1.5, 2.25, 3.0, 3.75]
    assert training.best_validation.step == 6
    assert torch.equal(model.item_embedding.weight, weights[1])


def test_patience_ends_a_training_that_finds_nothing():
    training = trainer(shape(), settings(epochs=10, patience=2), chains(50), lambda model: 0.0)
    training.run()
    assert [one.step for one in training.log] == [3, 6, 9]


def test_validations_are_an_epoch_apart_but_200_steps_at_least():
    chosen = settings(validation_steps=None, batch_size=1)
    assert trainer(shape(), chosen, chains(50)).validation_steps == 200
    assert trainer(shape(), chosen, chains(450)).validation_steps == 450


def test_what_is_validated_is_the_average_of_the_weights():
    """Step t moves the average by 1 - min(decay, (1 + t) / (10 + t)) towards the weights."""
    seen = []
    decays = [min(0.2, (1 + step) / (10 + step)) for step in range(3)]
    plain = trainer(shape(), settings(epochs=1, validation_steps=1), chains(40), lambda model: 0.0)
    start = plain.model.item_embedding.weight.detach().clone()
    plain.run(lambda one: seen.append(plain.model.item_embedding.weight.detach().clone()))
    expected = start
    for weights, decay in zip(seen, decays, strict=True):
        expected = decay * expected + (1 - decay) * weights
    averaged = trainer(shape(), settings(epochs=1, validation_steps=1, ema_decay=0.2), chains(40))
    averaged.run()
    assert torch.allclose(averaged.average.item_embedding.weight, expected, atol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "gbce"])
def test_resumed_training_ends_with_the_same_weights(tmp_path, loss):
    def training(state_file=None):
        chosen = settings(
            loss=loss, epochs=5, num_negatives=2, lr_scheduler_type="cosine", ema_decay=0.9, item_dropout=0.2
        )
        validate = lambda model: float(model.item_embedding.weight.detach().sum())
        return trainer(shape(dropout=0.3), chosen, chains(80), validate, state_file)

    def kill_after_three(one):
        if one.step == 9:
            raise KeyboardInterrupt

    whole = training()
    expected = whole.run().state_dict()
    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        training(state).run(kill_after_three)
    resumed = training(state)
    found = resumed.run().state_dict()
    assert [(one.step, one.loss, one.validation) for one in resumed.log] == [
        (one.step, one.loss, one.validation) for one in whole.log
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
    assert [one.step for one in again.log] == [3, 6]
    assert f"{state} is damaged" in caplog.text
    assert (tmp_path / "damaged-state.safetensors").read_bytes() == whole[:kept]


def test_a_loss_that_explodes_is_an_error():
    with pytest.raises(InputError, match=r"loss is (nan|inf) before step \d+; lower learning_rate"):
        trainer(shape(), settings(learning_rate=1e25, epochs=20), chains(100)).run()


def test_weights_that_explode_in_the_last_step_are_an_error():
    with pytest.raises(InputError, match="weights are not finite at step 1; lower learning_rate"):
        trainer(shape(), settings(learning_rate=1e39, validation_steps=1), chains(100)).run()


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    trainer(shape(dropout=0.5), settings(epochs=1), chains(20)).run()
    assert torch.equal(torch.random.get_rng_state(), before)
