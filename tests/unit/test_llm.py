"""The tiny base, loading and merging, generation and scoring."""

import shutil
import string

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from tiny_base.model import build_model, train_tokenizer
from tiny_models import base_shape
from twice_rec.errors import InputError
from twice_rec.files import hash_file
from twice_rec.llm import generation
from twice_rec.llm.generation import TransformersGenerator
from twice_rec.llm.models import load_model, lora_config, saved_weights, write_merged
from twice_rec.llm.recipe import AdapterConfig, ModelConfig
from twice_rec.llm.tokens import encode_chat, load_tokenizer, stop_token_ids

FLOAT32 = ModelConfig(dtype="float32")
PROMPT = [{"role": "system", "content": "You know tea."}, {"role": "user", "content": " Which one? "}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base in a folder, as base.sh leaves one."""
    folder = tmp_path_factory.mktemp("base")
    texts = ["green tea and black tea, which one do you like?"] * 50 + [string.printable]
    tokenizer = train_tokenizer(texts, 300)
    model = build_model(tokenizer, base_shape(), seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def test_chat_template_is_gemmas(base):
    tokenizer = load_tokenizer(base)
    text = tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    assert text == ("<bos><start_of_turn>user\nYou know tea.\n\nWhich one?<end_of_turn>\n<start_of_turn>model\n")
    whole = tokenizer.apply_chat_template([*PROMPT, {"role": "assistant", "content": "A "}], tokenize=False)
    assert whole == text + "A<end_of_turn>\n"


def test_exactly_one_bos(base):
    tokenizer = load_tokenizer(base)
    ids = encode_chat(tokenizer, PROMPT, "green tea")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_tags_are_one_token_and_ids_come_in_pairs():
    tokenizer = train_tokenizer(["B0 Oat green tea"] * 50, 1700)
    assert [tokenizer.decode([i]) for i in tokenizer("<think> B0X7K1234Z Oat 8</item_id>")["input_ids"]] == [
        "<think>", " ", "B0", "X7", "K1", "23", "4Z", " Oat", " ", "8", "</item_id>",
    ]  # fmt: skip


def test_any_text_comes_back(base):
    tokenizer = load_tokenizer(base)
    text = "é <item_nm> Tea\n3 </item_nm>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_stop_tokens_are_eos_and_end_of_turn(base):
    tokenizer = load_tokenizer(base)
    stop = stop_token_ids(load_model(base, FLOAT32), tokenizer)
    assert {tokenizer.convert_ids_to_tokens(i) for i in stop} == {"<eos>", "<end_of_turn>"}


def test_same_seed_same_weights():
    tokenizer = train_tokenizer(["tea"], 300)
    a, b = (build_model(tokenizer, base_shape(), seed=1).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_missing_folder_and_missing_template(base, tmp_path):
    with pytest.raises(InputError, match=r"runs/none/merged: no such model folder"):
        load_model("runs/none/merged", FLOAT32)
    shutil.copytree(base, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        load_tokenizer(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty has no config.json"):
        load_model(tmp_path / "empty", FLOAT32)


def test_a_soft_cap_that_is_left_out_is_told(tmp_path, caplog):
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    Gemma2ForCausalLM(Gemma2Config(vocab_size=20, num_key_value_heads=1, **shape)).save_pretrained(tmp_path)
    for kind, says in (("sdpa", True), ("chunked_sdpa", True), ("eager", False)):
        caplog.clear()
        load_model(tmp_path, ModelConfig(dtype="float32", attn_implementation=kind))
        assert (f"{kind} leaves out the soft cap of this model's attention; eager has it" in caplog.text) == says


ADAPTER = AdapterConfig(lora_r=4, lora_alpha=8, lora_target_modules=["q_proj", "up_proj"])


def test_merge_leaves_the_base_as_it_was(base, tmp_path):
    before = hash_file(base)
    model = get_peft_model(load_model(base, FLOAT32), lora_config(ADAPTER))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    load_tokenizer(base).save_pretrained(tmp_path / "adapter")
    write_merged(base, tmp_path / "adapter", tmp_path / "merged", FLOAT32)
    assert hash_file(base) == before
    ids = torch.arange(5, 40)[None]
    merged = load_model(tmp_path / "merged", FLOAT32)
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model.eval()(ids).logits, atol=1e-4)
        assert not torch.allclose(merged(ids).logits, load_model(base, FLOAT32)(ids).logits, atol=1e-2)
    assert load_tokenizer(tmp_path / "merged").chat_template
    assert [path.name for path in saved_weights(tmp_path / "adapter")] == [
        "adapter_model.safetensors",
        "adapter_config.json",
    ]


def test_a_wholly_trained_model_is_copied(base, tmp_path):
    write_merged("not read", base, tmp_path / "merged", FLOAT32)
    a, b = (load_model(base, FLOAT32).state_dict(), load_model(tmp_path / "merged", FLOAT32).state_dict())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [path.name for path in saved_weights(base)] == ["model.safetensors", "config.json"]


def test_lora_config_of_a_recipe():
    config = lora_config(ADAPTER)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, {"q_proj", "up_proj"})
    assert lora_config(AdapterConfig(use_peft=False)) is None


@pytest.fixture(scope="module")
def generator(base):
    return TransformersGenerator(load_model(base, FLOAT32), load_tokenizer(base), max_new_tokens=12)


def greedy_by_hand(generator, prompt):
    ids, chosen, logs = encode_chat(generator.tokenizer, prompt), [], []
    while len(chosen) < generator.max_new_tokens:
        with torch.no_grad():
            step = torch.log_softmax(generator.model(torch.tensor([[*ids, *chosen]])).logits[0, -1], -1)
        chosen.append(int(step.argmax()))
        logs.append(float(step.max()))
        if chosen[-1] in stop_token_ids(generator.model, generator.tokenizer):
            break
    return chosen, logs


def test_greedy_batches_equal_one_by_one(generator):
    prompts = [PROMPT, [{"role": "user", "content": "tea " * 20}], [{"role": "user", "content": "x"}]]
    for prompt, (answer,) in zip(prompts, generator.generate(prompts), strict=True):
        chosen, logs = greedy_by_hand(generator, prompt)
        stopped = chosen[-1] in stop_token_ids(generator.model, generator.tokenizer)
        text = generator.tokenizer.decode(chosen[:-1] if stopped else chosen, skip_special_tokens=True)
        assert answer.text == text
        assert answer.mean_logprob == pytest.approx(sum(logs) / len(logs), rel=1e-3)
        assert answer.truncated == (not stopped)


def test_sampling_follows_its_seed_and_leaves_the_global_state(generator):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    a = generator.generate([PROMPT], 3, 1.0, 1.0, seed=5)
    assert a == generator.generate([PROMPT], 3, 1.0, 1.0, seed=5)
    assert a != generator.generate([PROMPT], 3, 1.0, 1.0, seed=6)
    assert len({answer.text for answer in a[0]}) > 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_prompts_asked_again_are_read_once(generator, monkeypatch):
    """Greedily, sampled, scored: with the values of a generator that reads them each time."""
    answers, read = ["green tea", "which"], generation.read_prompts
    expected = generator.generate([PROMPT]), generator.generate([PROMPT], 2, seed=5), generator.score(PROMPT, answers)
    counted = []
    monkeypatch.setattr(generation, "read_prompts", lambda *given: counted.append(given[1]) or read(*given))
    again = TransformersGenerator(generator.model, generator.tokenizer, max_new_tokens=12)
    assert (again.generate([PROMPT]), again.generate([PROMPT], 2, seed=5)) == expected[:2]
    assert again.score(PROMPT, answers) == pytest.approx(expected[2], abs=1e-4)
    assert len(counted) == 1
    again.generate([PROMPT, PROMPT[1:]])
    assert len(counted) == 2


def test_several_samples_need_a_seed(generator):
    with pytest.raises(ValueError, match="greedy decoding gives one completion"):
        generator.generate([PROMPT], 2)


def test_scores_differ_as_the_plain_log_probabilities(generator):
    answers = ["green tea", "green tea and black", "which"]
    found = generator.score(PROMPT, answers)
    expected = []
    for answer in answers:
        ids = torch.tensor([encode_chat(generator.tokenizer, PROMPT, answer)])
        start = len(encode_chat(generator.tokenizer, PROMPT))
        with torch.no_grad():
            logs = torch.log_softmax(generator.model(ids).logits[0], -1)
        expected.append(float(logs[start - 1 : -1].gather(1, ids[0, start:, None]).sum()))
    assert found[1] - found[0] == pytest.approx(expected[1] - expected[0], abs=1e-3)
    assert found[2] - found[0] == pytest.approx(expected[2] - expected[0], abs=1e-3)


def test_a_quantised_base_needs_bitsandbytes(base, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"quantization is 8bit, but bitsandbytes is not installed; .*requirements-gpu"
    ):
        load_model(base, ModelConfig(), quantization="8bit")
