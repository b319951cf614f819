"""Loss on the answer and its end of turn only, for the chat templates of the tiny base, Gemma and Qwen."""

import functools

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny_base.model import train_tokenizer
from tiny_models import gemma3, llama, qwen3
from twice_rec.errors import InputError
from twice_rec.llm.tokens import encode_chat, end_of_turn_ids
from twice_rec.sft.collator import PackedCollator
from twice_rec.sft.dataset import Row
from twice_rec.sft.encoding import IGNORED, alone, encode_rows, length_table, pack, share_prefixes

TEXTS = ["You recommend tea. <think> they like it </think> <item_nm> Green tea </item_nm> <item_id> B1 </item_id>"] * 9

# What the two families' templates do, as far as it concerns a system turn, a question and an answer.
GEMMA = (
    "{{ bos_token }}"
    "{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ system if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "<think>\n{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' }}\n</think>\n\n"
    "{{ parts[-1].lstrip() }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def family(template, special, end, bos):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*TEXTS, "answer question user model system assistant"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=special[0], bos_token=bos)
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.chat_template = template
    return fast


def gemma():
    return family(GEMMA, ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<bos>")


def qwen():
    return family(QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", None)


FAMILIES = {
    "tiny": (lambda: train_tokenizer(TEXTS, 300), "<end_of_turn>", 1),
    "gemma": (gemma, "<end_of_turn>", 1),
    "qwen": (qwen, "<|im_end|>", 0),
}
PROMPT = [{"role": "system", "content": "You recommend tea."}, {"role": "user", "content": "Which one?"}]
ANSWER = "<think> they like it </think> <item_nm> Green tea </item_nm> <item_id> B1 </item_id>"
ROWS = [Row("rationale", PROMPT, ANSWER), Row("direct", PROMPT[1:], "B1")]


@pytest.fixture(params=FAMILIES)
def named(request):
    make, end, bos_count = FAMILIES[request.param]
    return make(), end, bos_count


def test_labels_are_the_answer_and_the_end_of_turn(named):
    tokenizer, end, _ = named
    for row, encoded in zip(ROWS, encode_rows(tokenizer, ROWS, None), strict=True):
        ids, labels = encoded["input_ids"].tolist(), encoded["labels"].tolist()
        learned = [label for label in labels if label != IGNORED]
        assert tokenizer.decode(learned[:-1]) == row.completion
        assert tokenizer.convert_ids_to_tokens(learned[-1]) == end
        start = labels.index(learned[0])
        assert labels == [IGNORED] * start + ids[start:]
        assert ids[:start] == encode_chat(tokenizer, row.prompt), "training sees another prompt than generation"


def test_one_bos_at_the_front_where_the_family_has_one(named):
    tokenizer, _, bos_count = named
    for encoded in encode_rows(tokenizer, ROWS, None):
        ids = encoded["input_ids"].tolist()
        assert ids.count(tokenizer.bos_token_id) == bos_count
        assert not bos_count or ids[0] == tokenizer.bos_token_id


def test_prompts_are_what_grpo_will_tokenize(named):
    """TRL's GRPOTrainer applies the chat template with a generation prompt and tokenizes in one go."""
    tokenizer, _, _ = named
    theirs = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert encode_chat(tokenizer, PROMPT) == theirs["input_ids"]


def test_the_answer_never_changes_the_prompts_tokens(named):
    tokenizer, _, _ = named
    for answer in ("\n\n", " x", "model\n", ANSWER):
        prompt = encode_chat(tokenizer, PROMPT)
        assert encode_chat(tokenizer, PROMPT, answer)[: len(prompt)] == prompt


def test_a_template_without_special_tokens_ends_with_eos():
    tokenizer = gemma()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert end_of_turn_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_row_that_is_too_long_is_refused_with_its_numbers():
    tokenizer = gemma()
    length = len(encode_rows(tokenizer, ROWS[:1], None)[0]["input_ids"])
    assert encode_rows(tokenizer, ROWS[:1], length)
    with pytest.raises(
        InputError, match=rf"row of task rationale has \d+ tokens .* {length} in all, but max_length is"
    ):
        encode_rows(tokenizer, ROWS[:1], length - 1)


def test_lengths_by_task():
    rows = [Row("direct", PROMPT, "B" * n) for n in range(1, 101)]
    encoded = [{"labels": np.array([IGNORED] * 7 + [1] * n)} for n in range(1, 101)]
    assert length_table(rows, encoded) == [["direct", "100", "7", "7", "7", "7", "50", "90", "99", "100"]]


USERS_ROWS = [
    Row("direct", [*PROMPT[:1], {"role": "user", "content": "Which one of these? Item only."}], "B1", "u"),
    Row("item_info", PROMPT[1:], "It is tea."),
    Row("direct", PROMPT, "B2", "v"),
    Row("rationale", [*PROMPT[:1], {"role": "user", "content": "Which one of these? Reason first."}], ANSWER, "u"),
]


def test_groups_hold_the_common_beginning_once(named):
    tokenizer, _, _ = named
    encoded = encode_rows(tokenizer, USERS_ROWS, None)
    groups = share_prefixes(USERS_ROWS, encoded)
    assert [len(group["lengths"][0]) for group in groups] == [
        3,
        2,
        2,
    ]  # users u and v, and the item, in the rows' order
    for group, members in zip(groups, ([0, 3], [1], [2]), strict=True):
        ((common, *lengths),) = group["lengths"]
        assert set(group["labels"][:common]) == {IGNORED}
        start = common
        for length, member in zip(lengths, members, strict=True):
            whole = group["input_ids"][:common] + group["input_ids"][start : start + length]
            labels = group["labels"][:common] + group["labels"][start : start + length]
            assert whole == encoded[member]["input_ids"].tolist()
            assert labels == encoded[member]["labels"].tolist()
            assert labels[common] == IGNORED
            start += length
    u = groups[0]
    ((common, first, _),) = u["lengths"]
    assert u["input_ids"][common] != u["input_ids"][common + first], "more is in common"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 9))
def test_packs_hold_every_group_once_and_keep_to_their_size(lengths, max_tokens, seed):
    groups = alone([{"input_ids": np.full(n, i), "labels": np.full(n, -i)} for i, n in enumerate(lengths)])
    packs = pack(groups, max_tokens, seed)
    assert packs == pack(groups, max_tokens, seed)
    found = []
    for one in packs:
        assert len(one["labels"]) <= max_tokens or len(one["lengths"]) == 1
        ids, labels = iter(one["input_ids"]), iter(one["labels"])
        for (length,) in one["lengths"]:
            of_group = {next(ids) for _ in range(length)} | {-next(labels) for _ in range(length)}
            found.append((*of_group, length))
        assert not [*ids, *labels]
    assert sorted(found) == list(enumerate(lengths))
    half_full = [one for one in packs if 2 * len(one["labels"]) <= max_tokens]
    assert len(half_full) <= 1, "two packs fit into one"


def trainer_of(kind, make, tokenizer, folder):
    """A trainer with all four rows in one batch: padded or packed as TRL does, or shared prefixes or packs of ours."""
    from trl import SFTConfig, SFTTrainer

    rows, sharing = encode_rows(tokenizer, USERS_ROWS, None), {}
    arguments = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=1 if "packed" in kind else 4, report_to="none",
        use_cpu=True, bf16=False, train_sampling_strategy="sequential", packing=kind == "packed", max_length=2048,
    )  # fmt: skip
    model = make(vocab_size=len(tokenizer), max_position_embeddings=2048)
    if kind in ("shared", "shared, packed", "alone, packed"):
        rows = alone(rows) if "alone" in kind else share_prefixes(USERS_ROWS, rows)
        rows = pack(rows, 2048, 0) if "packed" in kind else rows
        arguments.dataset_kwargs = {"skip_prepare_dataset": True}
        arguments.remove_unused_columns, sharing = False, {"data_collator": PackedCollator(model)}
    return SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **sharing
    )


@pytest.mark.slow
def test_the_trainer_takes_the_labels_as_they_are(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    (batch,) = list(trainer_of("padded", gemma3, tokenizer, tmp_path).get_train_dataloader())
    for row, expected in zip(batch["labels"].tolist(), encode_rows(tokenizer, USERS_ROWS, None), strict=True):
        padding = len(row) - len(expected["labels"])
        assert row == [*expected["labels"].tolist(), *[IGNORED] * padding]


@pytest.mark.slow
@pytest.mark.parametrize("make", [gemma3, qwen3, llama])
@pytest.mark.parametrize("attention", ["sdpa", "chunked_sdpa", "eager", "varlen"])
def test_packing_and_shared_prefixes_change_neither_loss_nor_gradients(tmp_path, monkeypatch, make, attention):
    monkeypatch.setattr("twice_rec.llm.attention._CHUNK", 16)
    tokenizer, found = train_tokenizer(TEXTS, 300), {}
    others = ("packed", "shared", "shared, packed", "alone, packed")
    for kind in ("padded", *others):
        trainer = trainer_of(kind, functools.partial(make, attention), tokenizer, tmp_path)
        (batch,) = list(trainer.get_train_dataloader())
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=(batch["labels"] != IGNORED).sum())
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        found[kind] = (loss.item(), gradients, batch["input_ids"].numel())
    for kind in others:
        assert found[kind][0] == pytest.approx(found["padded"][0], abs=1e-5)
        assert found[kind][1].keys() == found["padded"][1].keys()
        for name, gradient in found[kind][1].items():
            assert (gradient - found["padded"][1][name]).abs().max() < 1e-5, name
    shared, packed = found["shared"][2], found["packed"][2]
    assert shared == found["shared, packed"][2] < packed == found["alone, packed"][2] < found["padded"][2]
