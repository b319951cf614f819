"""Stage 1 against a real vLLM server on the CPU, with a tiny model of random weights."""

import json
from collections import Counter

import pytest

from servers.processes import NEEDS_VLLM, ROOT, vllm_server
from tiny_base import stage as base_model
from twice_rec.rationales.answers import VERDICTS

pytestmark = [pytest.mark.server, pytest.mark.slow, NEEDS_VLLM]
ROWS = 6


@pytest.fixture(scope="module")
def model(prepared):
    """A model that knows nothing, with the tokenizer of the domain."""
    sizes = ["--vocab_size", "1000", "--hidden_size", "64", "--num_hidden_layers", "2"]
    sizes += ["--steps", "0", "--exam_documents", "1", "--publish_dir", "null"]
    words = ["--config", str(ROOT / "tiny_base" / "recipe.yaml"), "--run_dir", str(prepared), *sizes]
    assert base_model.main(words) == 0
    return prepared / "base"


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """Its server."""
    with vllm_server(model, tmp_path_factory.mktemp("vllm"), "--max-model-len", "8192", "--max-num-seqs", "8") as url:
        yield url


@pytest.fixture(scope="module")
def closing_tokens(model):
    """The ids of what ends strings and objects: favoured, a random model finishes its JSON."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    return {str(vocabulary[token]): bias for token, bias in (('"', 12), ("}", 6), ("]", 6))}


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize("structured", ["true", "false"])
def test_end_to_end(new_run, url, closing_tokens, stream, structured):
    flags = ["--model", "served", "--api_key_env", "null", "--max_rationales", str(ROWS), "--concurrency", "4"]
    flags += [
        "--stream",
        stream,
        "--structured_outputs",
        structured,
        "--max_tokens",
        "600",
        "--max_reasks",
        "1",
        "--max_attempts",
        "2",
    ]
    flags += [
        "--min_words",
        "1",
        "--accepted_verdicts",
        *VERDICTS,
        "--extra_body",
        json.dumps({"logit_bias": closing_tokens}),
    ]
    run = new_run(url, *flags)
    assert run.stage() == 0
    outcomes = Counter()
    for name in ("accepted", "rejected"):
        for line in (run.path / "rationales" / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            outcomes[row.get("reason", "accepted").partition(":")[0]] += 1
            assert "no complete JSON object" not in row.get("reason", "") or structured == "false"
    assert outcomes.total() == ROWS
    assert outcomes.keys() <= {"accepted", "malformed answer", "cut off", "too short", "too long"}
    if structured == "true":  # the model says nothing sensible, but it says it in the schema
        assert outcomes["cut off"] < ROWS
        assert outcomes["accepted"] + outcomes["too short"] + outcomes["malformed answer"] > 0
    answers = [
        json.loads(line)["answer"] for line in (run.path / "answers" / "rationales.jsonl").read_text().splitlines()
    ]
    assert all(answer["prompt_tokens"] > 1000 and answer["completion_tokens"] > 0 for answer in answers)
    assert {answer["finish"] for answer in answers} <= {"stop", "length"}


def test_unknown_model_is_told_from_a_known_one(new_run, url, capfd):
    run = new_run(url, "--model", "gemma", "--api_key_env", "null")
    assert run.stage() == 2
    assert f"model 'gemma' is not served at {url}; it has served" in capfd.readouterr().err
