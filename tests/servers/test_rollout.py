"""Stage 3 through its two launchers: a real vLLM on the CPU and a trainer, each in a process of its own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from peft import PeftModel

from servers.processes import NEEDS_VLLM, ROOT, START_SECONDS, free_port, is_alive, is_up
from stages.pipeline import run
from twice_rec.grpo.rollout.vllm_client import PolicyServer
from twice_rec.grpo.rollout.vllm_command import addresses_here
from twice_rec.llm.generation import sample_completions
from twice_rec.llm.models import load_model
from twice_rec.llm.recipe import ModelConfig
from twice_rec.llm.tokens import load_tokenizer, stop_token_ids
from twice_rec.stages import stage3c_grpo

pytestmark = [pytest.mark.server, pytest.mark.slow, NEEDS_VLLM]
STEPS = 3


class Launched:
    """A launcher as a user starts it, its output in a file."""

    def __init__(self, name, run_dir, address, *flags):
        self.log, self.address = run_dir / f"{name}.log", address
        words = [str(ROOT / "recipes" / "tiny" / "grpo_server.yaml"), "--run_dir", str(run_dir)]
        words += ["--rollout_servers", f"[{address}]", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / f"{name}.sh"), *words], stdout=out, stderr=out, env=environment
            )

    def wait_for(self, sign, seconds=START_SECONDS):
        """Wait until `sign()` is true while the launcher runs."""
        deadline = time.monotonic() + seconds
        while not sign():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.02)

    def is_ready(self):
        return is_up(f"http://{self.address}/health")

    def everything(self):
        """The server, which the launcher has become, and the processes that descend from it."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found


def wait_for_the_end(pids):
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "something of the server outlived it"
        time.sleep(0.2)


def trainer_flags():
    flags = f"--max_steps {STEPS} --save_steps 1 --save_total_limit 9 --num_generations 4 --max_completion_length 96"
    flags += " --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --learning_rate 0.02 --warmup_steps 0"
    return flags.split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in which the server was killed in the second step: (run folder, address, server that was started again)."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    for stage in ("prepare", "base", "rationales", "sft", "sasrec"):  # vLLM's kernels want heads of 32
        flags = ["--head_dim", "32", "--num_attention_heads", "2"] if stage == "base" else []
        assert run(stage, run_dir, run_dir / "base", *flags) == 0, stage
    address = f"127.0.0.1:{free_port()}"
    server = Launched("grpo_step1", run_dir, address)
    trainer = None
    try:
        trainer = Launched("grpo_step2", run_dir, address, *trainer_flags())  # it waits for the server
        out = run_dir / "grpo_server"
        trainer.wait_for(lambda: list(out.glob("policy/policy-*-0")))
        everything = server.everything()
        then = "start the training with: bash grpo_step2.sh"
        assert then in server.log.read_text()
        trainer.wait_for(lambda: list(out.glob("policy/policy-*-1/adapter_model.safetensors")))
        server.process.kill()
        assert not (out / "completions" / "completions_00002.parquet").exists(), "the second step was over already"
        assert len(everything) > 1
        assert server.process.wait(60) == -signal.SIGKILL
        wait_for_the_end(everything)
        server = Launched("grpo_step1", run_dir, address)
        server.wait_for(server.is_ready)
        assert trainer.process.wait(START_SECONDS) == 0, trainer.log.read_text()[-4000:]
        yield run_dir, address, server
    finally:
        for launched in filter(None, (trainer, server)):
            launched.process.kill()
            launched.process.wait()


@pytest.fixture(scope="module")
def prompts(trained):
    """Two prompts with a long common beginning."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(20, 400, (300,), generator=generator).tolist()
    return [[2, *shared, *torch.randint(20, 400, (n,), generator=generator).tolist()] for n in (40, 9)]


def history(run_dir):
    rows = json.loads((run_dir / "grpo_server" / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "reward" in row]


def test_training_goes_on_with_the_right_versions(trained):
    run_dir, address, _ = trained
    rows = history(run_dir)
    assert [row["rollout/policy_version"] for row in rows] == list(range(STEPS))
    before, after = (run_dir / "grpo_step2.log").read_text().split("the rollout servers take the adapter")
    for part in (before, after):  # the server was not there yet, and no longer
        assert f"the rollout server at {address} does not answer" in part
    # The trainer's own likelihood of every token, to rounding: only the policy that was asked for can have said so.
    assert all(row["rollout/logprob_gap"] < 1e-5 for row in rows)
    assert all(row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4) for row in rows)
    assert all(row["rollout/sync_seconds"] > 0 for row in rows)
    for step, row in enumerate(rows, start=1):
        path = run_dir / "grpo_server" / "completions" / f"completions_{step:05}.parquet"
        table = pyarrow.parquet.read_table(path).to_pydict()
        assert table["policy_version"] == [row["rollout/policy_version"]] * 8
        assert set(table["truncated"]) <= {True, False}
    assert (run_dir / "grpo_server" / "merged" / "model.safetensors").exists()
    assert PolicyServer(address, 60).facts().adapters == {}


@torch.no_grad()
def test_each_step_adapter_says_the_same_on_the_server(trained, prompts):
    """Asked in turn for the same prompts, so that each would find the others' prefixes in a cache that took them."""
    run_dir, address, _ = trained
    base = run_dir / "sft" / "merged"
    tokenizer, server, answers = load_tokenizer(base), PolicyServer(address, 120), {}
    sampling = {"max_tokens": 16, "temperature": 0.0}
    for _ in range(2):
        for step in range(1, STEPS + 1):
            server.load(f"step-{step}", run_dir / "grpo_server" / f"checkpoint-{step}")
            for number, prompt in enumerate(prompts):
                model = PeftModel.from_pretrained(
                    load_model(base, ModelConfig(dtype="float32")), run_dir / "grpo_server" / f"checkpoint-{step}"
                ).eval()
                stop = stop_token_ids(model, tokenizer)
                ((here,),) = sample_completions(model, [prompt], [1], stop, 16)
                (there,) = server.complete(f"step-{step}", prompt, 1, stop, sampling)
                assert there.token_ids == here.token_ids
                assert there.logprobs == pytest.approx(here.logprobs, abs=1e-4)
                answers[step, number] = there.logprobs
            server.unload(f"step-{step}")
    for one, other in ((1, 2), (2, 3)):  # another version would have been noticed
        assert answers[one, 0] != pytest.approx(answers[other, 0], abs=1e-2)


def test_several_answers_of_one_request_differ_and_stop(trained, prompts):
    run_dir, address, _ = trained
    server, every_token = PolicyServer(address, 120), range(len(load_tokenizer(run_dir / "sft" / "merged")))
    server.load("policy", run_dir / "grpo_server" / "checkpoint-1")
    sampling = {"max_tokens": 12, "temperature": 1.5}
    answers = server.complete("policy", prompts[0], 8, {1, 4}, sampling)
    ended = server.complete("policy", prompts[0], 8, every_token, sampling)
    server.unload("policy")
    assert len({tuple(answer.token_ids) for answer in answers}) == 8
    assert all(answer.truncated == (answer.token_ids[-1] not in {1, 4}) for answer in answers)
    assert [(len(answer.token_ids), answer.truncated) for answer in ended] == [(1, False)] * 8


def other_base(run_dir):
    other = shutil.copytree(run_dir / "sft" / "merged", run_dir.parent / "other")
    with open(other / "config.json", "a") as file:
        file.write("\n")
    return ["--model_name_or_path", str(other)]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (other_base, ["the trainer's base model is 'base-"]),
        (lambda run_dir: ["--lora_r", "64"], ["LoRA rank 64 is greater than max_lora_rank 8", "at least lora_r"]),
        (lambda run_dir: ["--max_completion_length", "4000"], ["takes 4096 tokens, but the longest prompt has "]),
    ],
    ids=["another base", "rank", "length"],
)
def test_preflight_against_the_real_server(trained, tmp_path, capfd, prepare, words):
    whole, address, _ = trained
    run_dir = tmp_path / "tiny"
    for folder in ("data", "sft", "sasrec"):
        shutil.copytree(whole / folder, run_dir / folder)
    recipe = ROOT / "recipes" / "tiny" / "grpo_server.yaml"
    flags = ["--run_dir", str(run_dir), "--rollout_servers", f"[{address}]", *trainer_flags(), *prepare(run_dir)]
    assert stage3c_grpo.main(["--config", str(recipe), *flags]) == 2
    error = capfd.readouterr().err
    assert all(text in error for text in words), error
    assert "Traceback" not in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_signal_to_the_launcher_ends_all_of_the_server(trained, number):
    run_dir, address, server = trained
    if server.process.poll() is not None:  # ended by this test for another signal
        server = Launched("grpo_step1", run_dir, address)
    try:
        server.wait_for(server.is_ready)
        everything = server.everything()
        server.process.send_signal(number)
        server.process.wait(60)
        wait_for_the_end(everything)
    finally:
        server.process.kill()
        server.process.wait()
    assert addresses_here([address]) == [address]  # the port is free again
