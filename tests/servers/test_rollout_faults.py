"""The trainer against rollout servers that are wrong, misbehave or go away; no vLLM needed."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from servers.fake_vllm import FakeVLLM
from servers.processes import ROOT, free_port, is_alive
from stages.pipeline import run
from twice_rec.errors import InputError
from twice_rec.grpo.rollout import vllm as server_rollout
from twice_rec.grpo.rollout.vllm import Patience, ServerGone
from twice_rec.grpo.rollout.vllm_client import PolicyServer, ServerDown, base_name
from twice_rec.stages import stage3c_grpo, stage6_study
from twice_rec.study.places import Places

pytestmark = [pytest.mark.slow, pytest.mark.server]
STOP = 4  # <end_of_turn> of the tiny tokenizer
STEP = (
    "--num_generations 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --max_completion_length 12 "
    "--max_steps 3 --save_steps 5"
)


@pytest.fixture(scope="module")
def stage2(tmp_path_factory):
    """A run up to stage 2 and SASRec."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    for stage in ("prepare", "base", "rationales", "sft", "sasrec"):
        assert run(stage, run_dir, run_dir / "base") == 0, stage
    return run_dir


@pytest.fixture
def run_dir(stage2, tmp_path):
    path = tmp_path / "tiny"
    shutil.copytree(stage2, path)
    return path


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(server_rollout, "RETRY_SECONDS", 0.05)


@pytest.fixture
def fake(run_dir):
    with FakeVLLM(base_name(run_dir / "sft" / "merged"), [10, 11, 12, STOP]) as server:
        yield server


def train(run_dir, addresses, *flags):
    """Exit status of stage 3c."""
    words = ["--config", str(ROOT / "recipes" / "tiny" / "grpo_server.yaml"), "--run_dir", str(run_dir)]
    return stage3c_grpo.main([*words, "--rollout_servers", str(addresses), *STEP.split(), *flags])


def history(run_dir):
    rows = json.loads((run_dir / "grpo_server" / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "reward" in row]


def test_each_step_asks_for_its_own_policy(run_dir, fake):
    with FakeVLLM(fake.base, [20] * 12) as other:
        assert train(run_dir, [fake.address, other.address], "--rollout_seeds", "true") == 0
        requests = [server.called("/v1/completions") for server in (fake, other)]
    for server, (trial, *asked) in zip((fake, other), requests, strict=True):
        assert trial["top_k"] == 1
        assert [body["n"] for body in asked] == [2] * 3  # one group a step each, whole
        assert [body["model"].rpartition("-")[2] for body in asked] == ["0", "1", "2"]
        assert server.adapters == {}  # unloaded at the end
        for body in asked:
            sent = {name: body[name] for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p")}
            assert sent == {"max_tokens": 12, "temperature": 0.9, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
            assert body["repetition_penalty"] == 1.0
            assert STOP in body["stop_token_ids"]
            assert all(isinstance(token, int) for token in body["prompt"])
    seeds = [body["seed"] for asked in requests for body in asked[1:]]
    assert len(set(seeds)) == len(seeds) == 6
    rows = history(run_dir)
    assert [row["rollout/policy_version"] for row in rows] == [0, 1, 2]
    assert [row["completions/clipped_ratio"] for row in rows] == [0.5] * 3  # told apart by the stop token
    assert all(row["rollout/logprob_gap"] > 1 for row in rows)  # the fake says probability 1 of everything
    log = (run_dir / "logs" / "grpo.log").read_text()
    assert log.count("above rollout_logprob_gap 0.05") == 1
    assert not (run_dir / "grpo_server" / "policy").exists()


def test_a_server_that_ends_in_a_step_is_waited_for_and_asked_again(run_dir, fake):
    fake.dies_after = 4  # the trial, both groups of the first step, one of the second

    def revive_when_missed():
        while "does not answer" not in (run_dir / "logs" / "grpo.log").read_text():
            time.sleep(0.05)
        fake.calls.append(("revived", None))
        fake.revive()

    (run_dir / "logs" / "grpo.log").touch()
    helper = threading.Thread(target=revive_when_missed)
    helper.start()
    assert train(run_dir, [fake.address]) == 0
    helper.join()
    back = [path for path, _ in fake.calls].index("revived")
    first = next(body for path, body in fake.calls[back:] if path == "/v1/load_lora_adapter")
    asked = fake.called("/v1/completions")
    assert first["lora_name"] == asked[3]["model"]  # the same version again, before anything is asked
    versions = [body["model"].rpartition("-")[2] for body in asked[1:]]
    assert versions == ["0", "0", "1", "1", "2", "2"]
    assert len({json.dumps(body["prompt"]) for body in asked[1:]}) == 6  # nothing twice
    assert [row["rollout/policy_version"] for row in history(run_dir)] == [0, 1, 2]


def test_a_server_gone_for_good_leaves_a_checkpoint_to_resume_from(run_dir, fake, capfd, monkeypatch):
    whole = run_dir.with_name("whole")
    shutil.copytree(run_dir, whole)
    assert train(whole, [fake.address]) == 0
    fake.calls.clear()
    fake.dies_after = 6
    monkeypatch.setattr("sys.argv", ["stage3c_grpo", "--config", "mine.yaml", "--seed", "1"])
    assert train(run_dir, [fake.address], "--rollout_wait_seconds", "0.3") == 2
    error = capfd.readouterr().err
    assert f"no rollout server at {fake.address} for 0.3 s" in error
    assert "Step 2 is saved. Start the server again with grpo_step1.sh and " in error
    assert "go on with: bash grpo_step2.sh mine.yaml --seed 1\n" in error
    assert "Traceback" not in error
    assert (run_dir / "grpo_server" / "checkpoint-2" / "optimizer.pt").exists()
    fake.revive()
    fake.calls.clear()
    assert train(run_dir, [fake.address]) == 0
    loads = [body["lora_name"].rpartition("-")[2] for body in fake.called("/v1/load_lora_adapter")]
    assert loads == ["0", "2"]  # the trial's, then the resumed policy's before its first answers
    assert {body["model"].rpartition("-")[2] for body in fake.called("/v1/completions")[1:]} == {"2"}
    same = ("loss", "reward", "rollout/policy_version", "grad_norm", "learning_rate")
    for before, after in zip(history(whole), history(run_dir), strict=True):
        assert [before[name] for name in same] == [after[name] for name in same]


def test_two_processes_share_a_group_and_end_together(run_dir, fake):
    """Four answers a step, two in each process; then the server is gone for both."""

    def launch(*flags):
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
        words += [str(free_port()), "-m", "twice_rec.stages.stage3c_grpo", "--config"]
        words += [str(ROOT / "recipes" / "tiny" / "grpo_server.yaml"), "--run_dir", str(run_dir)]
        words += ["--rollout_servers", str([fake.address, other.address]), *STEP.split()]
        words += ["--num_generations", "4", "--per_device_train_batch_size", "2", *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=600)

    with FakeVLLM(fake.base, fake.answer) as other:
        fake.dies_after = 2 + 2 + 1  # a trial by each process, the first step, one of two in the second
        done = launch("--rollout_wait_seconds", "0.3")
        assert done.returncode != 0
        assert (run_dir / "grpo_server" / "checkpoint-1" / "trainer_state.json").exists(), done.stderr
        assert done.stderr.count("Step 1 is saved") == 2  # both say why they end
        fake.revive()
        done = launch()
        assert done.returncode == 0, done.stderr
        asked = [body for body in fake.called("/v1/completions") if body["top_k"] == 0]
        assert not [body for body in other.called("/v1/completions") if body["top_k"] == 0]
    versions = [body["model"].rpartition("-")[2] for body in asked]
    assert versions[:2] == ["0", "0"]
    assert versions[-4:] == ["1", "1", "2", "2"]
    assert {body["n"] for body in asked} == {2}
    assert all(one["prompt"] == two["prompt"] for one, two in zip(asked[-4::2], asked[-3::2], strict=True))
    assert [row["rollout/policy_version"] for row in history(run_dir)] == [0, 1, 2]


# What is wrong with the server -> what the user is told.
PREFLIGHT = {
    "another base": ({"base": "base-0123"}, "serves 'base-0123', the trainer's base model is 'base-"),
    "no lora": ({"lora": False}, "HTTP 404, no /v1/load_lora_adapter"),
    "rank": (
        {"load_error": (500, "LoRA rank 32 is greater than max_lora_rank 16.")},
        "LoRA rank 32 is greater than max_lora_rank 16.. It must run with LoRA on and a rank limit of at least lora_r",
    ),
    "folder": (
        {"load_error": (404, "No adapter found for /here")},
        "No adapter found for /here. It must run with LoRA on and a rank limit of at least lora_r, as grpo_step1.sh "
        "starts it with this recipe, and see this folder under the same name",
    ),
    "too short": ({"max_model_len": 100}, "takes 100 tokens, but the longest prompt has "),
    "raw log-probabilities": ({"first_value": -0.7}, "start it with --logprobs-mode processed_logprobs"),
    "another program": ({"answers_as": "policy-other-3"}, "answered as 'policy-other-3', asked for 'policy-"),
}


@pytest.mark.parametrize("case", PREFLIGHT)
def test_what_does_not_fit_is_told_before_the_first_step(run_dir, fake, capfd, case):
    changes, words = PREFLIGHT[case]
    for name, value in changes.items():
        setattr(fake, name, value)
    assert train(run_dir, [fake.address]) == 2
    error = capfd.readouterr().err
    assert words in error
    assert fake.address in error
    assert "Traceback" not in error
    assert "/3 [" not in error  # no progress bar: no step was begun
    assert len(fake.called("/v1/completions")) <= 1


def test_no_server_at_all(run_dir, capfd):
    address = f"127.0.0.1:{free_port()}"
    assert train(run_dir, [address], "--rollout_wait_seconds", "0.2") == 2
    error = capfd.readouterr().err
    assert f"no rollout server at {address} for 0.2 s: http://{address}/health: [Errno 111]" in error
    assert "Start it with grpo_step1.sh" in error


def test_something_else_at_the_address(run_dir, fake, capfd):
    fake._respond = lambda path, body: (200, {"hello": "there"})
    assert train(run_dir, [fake.address]) == 2
    assert f"what answers at {fake.address} is no vLLM server" in capfd.readouterr().err


def test_group_size_must_divide_the_batch(run_dir, fake, capfd):
    assert train(run_dir, [fake.address], "--num_generations", "3") == 2
    assert "must be divisible by" in capfd.readouterr().err
    assert not fake.calls


@pytest.mark.parametrize(
    ("answer", "reason", "error", "words"),
    [
        (
            [7, 8],
            "stop",
            InputError,
            "ended a completion with token 8 after 2 tokens, which is not one of the stop tokens",
        ),
        ([7, 8], "abort", ServerDown, "ended a completion with 'abort'"),
        ([7], "length", InputError, "after 1 tokens"),
    ],
)
def test_answers_that_end_as_they_should_not(answer, reason, error, words):
    with FakeVLLM("base", answer, finish_reason=reason, adapters={"p": "/p"}) as fake:
        server = PolicyServer(fake.address, 10)
        with pytest.raises(error, match=words):
            server.complete("p", [3, 4], 2, {1, STOP}, {"max_tokens": 5})


def test_answers_come_in_order_with_their_values():
    with FakeVLLM("base", [7, 8, STOP, 9], first_value=-0.25, adapters={"p": "/p"}) as fake:
        server = PolicyServer(fake.address, 10)
        whole, cut = (server.complete("p", [3], 2, {STOP}, {"max_tokens": n}) for n in (3, 2))
        assert [(a.token_ids, a.logprobs, a.truncated) for a in whole] == [([7, 8, 4], [-0.25, 0, 0], False)] * 2
        assert [(a.token_ids, a.truncated) for a in cut] == [([7, 8], True)] * 2
        with pytest.raises(ServerDown, match="HTTP 404"):
            server.complete("gone", [3], 1, {STOP}, {"max_tokens": 1})


def test_patience_has_a_limit_and_says_so_once(caplog):
    tries = []

    def fail():
        tries.append(time.monotonic())
        raise ServerDown("the server's words")

    with pytest.raises(ServerGone, match=r"no rollout server at h:1 for 0.3 s: the server's words"):
        Patience(0.3).retry("h:1", fail)
    assert len(tries) > 3
    assert sum("does not answer (the server's words); waiting up to 0.3 s" in text for text in caplog.messages) == 1


def test_a_study_starts_the_servers_of_its_runs_and_ends_them(run_dir, tmp_path, monkeypatch):
    """Its servers are a vLLM by name that is the fake, which they alone find before any real one."""
    package = tmp_path / "stand_in" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(
        "import os, pathlib, sys, threading\n"
        "from servers.fake_vllm import FakeVLLM\n"
        "value = lambda flag: sys.argv[sys.argv.index(flag) + 1]\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        f"FakeVLLM(value('--served-model-name'), [10, 11, 12, {STOP}], int(value('--port')))\n"
        "threading.Event().wait()\n"
    )
    found_first = os.pathsep.join(map(str, (tmp_path / "stand_in", ROOT / "src", ROOT / "tests")))
    plain = Places.environment_of_servers
    monkeypatch.setattr(
        Places, "environment_of_servers", lambda self, taken: {**plain(self, taken), "PYTHONPATH": found_first}
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    flags = iter(STEP.split())
    step = {name.removeprefix("--"): int(value) for name, value in zip(flags, flags, strict=True)}
    words = [str(ROOT / "recipes" / "tiny" / "study.yaml"), "--run_dir", str(run_dir), "--seeds", "1", "--parts", "[]"]
    words += ["--recipes_dir", str(ROOT / "recipes" / "tiny"), "--overrides", json.dumps({"grpo": step})]
    words += ["--runs", json.dumps([{"stage": "grpo", "recipe": "grpo_server.yaml"}])]
    assert stage6_study.main(words) == 0
    assert [row["rollout/policy_version"] for row in history(run_dir)] == [0, 1, 2]
    (row,) = json.loads((run_dir / "study" / "study.json").read_text())["runs"]
    assert (row["what"], row["state"]) == ("stage3_server", "done")
    assert not is_alive(int((tmp_path / "pid").read_text()))
