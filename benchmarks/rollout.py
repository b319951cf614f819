"""Tokens a second of rollouts: vLLM's server beside answers in process, ours and `model.generate`; and the cost of a
new policy.

    python benchmarks/rollout.py [--shape gemma-3-1b] [--quick]

A step is --prompts prompts of --prompt_tokens tokens, --copies answers of --answer_tokens each, sampled at temperature
0.9. The server is started here, as grpo_step1.sh starts it. The model has Gemma 3's architecture, small and with
random weights; --shape gemma-3-1b is the real one's, for a GPU. `ratio` is the server's tokens a second over ours in
process; `generate` is what TRL does without a server, which computes every prompt --copies times.

Before each of --steps steps an adapter of rank 8 with new weights is saved, loaded under a new name, and the old one
unloaded; `sync_share` is the share that takes of rollouts and training step together, the latter a forward and a
backward of the same tokens. For a model of 1B parameters `sync_share_1b` is worked out: see `one_billion`.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM

from reporting import report
from shapes import SHAPES, bare_model
from tiny_base.model import train_tokenizer
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.rollout.vllm_client import PolicyServer, ServerDown
from twice_rec.grpo.rollout.vllm_command import server_command, server_environment
from twice_rec.llm.generation import sample_completions

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, TEMPERATURE = 8, 0.9
# What one_billion assumes of a machine with a GPU for the server and one for the trainer.
DISK_BYTES_PER_SECOND, STEP_SECONDS_1B = 200e6, 30.0


def lora_parameters(shape: dict, rank: int) -> int:
    """Of an adapter on all seven projections: rank x (inputs + outputs) each."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    sides = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    sides += [(hidden, inner), (hidden, inner), (inner, hidden)]
    return shape["num_hidden_layers"] * rank * sum(a + b for a, b in sides)


def one_billion(overhead: float) -> dict:
    """Seconds and share of a synchronisation at gemma-3-1b's shape.

    The adapter's bytes (float32, as PEFT trains it) are written once and read once by each server, at the speed of a
    slow disk; to it comes what a request and the bookkeeping of tensors cost, `overhead`, which was measured here at
    a size where bytes do not matter (the fastest of the steps), once a layer. The step's length is an assumption, and
    a low one: 128 answers of 300 tokens to prompts of some 7,000 take a trainer on one GPU longer.
    """
    size = 4 * lora_parameters(SHAPES["gemma-3-1b"], RANK)
    layers = SHAPES["gemma-3-1b"]["num_hidden_layers"] / SHAPES["small-wide"]["num_hidden_layers"]
    seconds = 2 * size / DISK_BYTES_PER_SECOND + overhead * layers
    share = round(seconds / (seconds + STEP_SECONDS_1B), 4)
    return {"adapter_mb_1b": round(size / 1e6, 1), "sync_seconds_1b": round(seconds, 3), "sync_share_1b": share}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["small-wide", "gemma-3-1b"], default="small-wide")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=1000)
    parser.add_argument("--answer_tokens", type=int, default=100)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two prompts of 300 tokens, four answers of 30, two steps")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prompts, arguments.copies, arguments.steps = 2, 4, 2
        arguments.prompt_tokens, arguments.answer_tokens = 300, 30
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Write a model, serve it, and print the last line."""
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    longest = arguments.prompt_tokens + arguments.answer_tokens
    base, adapters = folder / "model", folder / "adapters"
    bare_model(arguments.shape, "sdpa", "cpu", dtype).save_pretrained(base)
    train_tokenizer(["a text of words and words"] * 9, 300).save_pretrained(base)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    recipe = GRPORecipe(
        run_dir=str(folder), domain="benchmark", seed=0, dtype=str(dtype).removeprefix("torch."), lora_r=RANK,
        rollout="vllm_server", rollout_max_model_len=longest, rollout_cpu_kvcache_gib=2,
        rollout_gpu_memory_utilization=0.4, rollout_server_args={} if gpu else {"enforce_eager": True},
    )  # fmt: skip
    model = Gemma3ForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="sdpa")
    model = get_peft_model(model.to("cuda" if gpu else "cpu"), LoraConfig(r=RANK, target_modules=TARGETS))
    prompts = torch.randint(5, 4000, (arguments.prompts, arguments.prompt_tokens)).tolist()
    environment = {**server_environment(recipe, 0, 1), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(server_command(recipe, address, base), env=environment)
    try:
        server = PolicyServer(address, 600)
        await_server(server, process)
        rows = [step(arguments, model, server, adapters, prompts, number) for number in range(arguments.steps + 1)]
    finally:
        process.terminate()
        process.wait()
    rows = rows[1:]  # the first one warms up
    served, ours, generate, train, sync, request = (statistics.median(values) for values in zip(*rows, strict=True))
    more = {
        "generate": round(generate, 1),
        "train_seconds": round(train, 2),
        "sync_seconds": round(sync, 4),
        "sync_share": round(sync / (sync + request + train), 4),
        "adapter_mb": round(4 * lora_parameters(SHAPES[arguments.shape], RANK) / 1e6, 2),
        **one_billion(min(row[4] for row in rows)),
        "shape": arguments.shape,
        "prompts": f"{arguments.prompts} x {arguments.prompt_tokens}",
        "answers": f"{arguments.copies} x {arguments.answer_tokens}",
        "cpus": len(os.sched_getaffinity(0)),
    }
    report(
        "rollout", "in process, the prompt computed once", round(served, 1), round(ours, 1), "tokens/s", True, **more
    )


def await_server(server: PolicyServer, process) -> None:
    """Until it answers."""
    while True:
        try:
            server.facts()
            return
        except ServerDown:
            if process.poll() is not None:
                raise SystemExit("vLLM ended") from None
            time.sleep(0.5)


def step(arguments, model, server: PolicyServer, adapters: Path, prompts: list[list[int]], number: int) -> list[float]:
    """Tokens a second of the server, ours in process and `generate`; seconds of training, synchronising, rollouts."""
    copies, length = arguments.copies, arguments.answer_tokens
    total = len(prompts) * copies * length
    with torch.no_grad():  # a new policy
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    started = time.perf_counter()
    model.save_pretrained(adapters / f"policy-{number}")
    server.load(f"policy-{number}", adapters / f"policy-{number}")
    if number:
        server.unload(f"policy-{number - 1}")
    sync = time.perf_counter() - started
    sampling = {"max_tokens": length, "temperature": TEMPERATURE, "ignore_eos": True, "min_tokens": length}
    started = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(
            pool.map(lambda prompt: server.complete(f"policy-{number}", prompt, copies, [], sampling), prompts)
        )
    request = time.perf_counter() - started
    assert sum(len(answer.token_ids) for group in answers for answer in group) == total
    model.eval()
    generator = torch.Generator(model.device).manual_seed(number)
    started = time.perf_counter()
    sample_completions(model, prompts, [copies] * len(prompts), [], length, TEMPERATURE, generator)
    ours = time.perf_counter() - started
    ids = torch.tensor(prompts, device=model.device).repeat_interleave(copies, 0)
    started = time.perf_counter()
    with torch.no_grad():
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=TEMPERATURE, top_k=0,
            max_new_tokens=length, min_new_tokens=length, pad_token_id=0,
        )  # fmt: skip
    generate = time.perf_counter() - started
    model.train()
    started = time.perf_counter()
    for prompt, group in zip(prompts, answers, strict=True):
        rows = torch.tensor([prompt + answer.token_ids for answer in group], device=model.device)
        logits = model(input_ids=rows, logits_to_keep=length + 1).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, -length:].flatten()).backward()
        model.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    train = time.perf_counter() - started
    print(f"step {number}: server {total / request:,.1f}, ours {total / ours:,.1f}, generate {total / generate:,.1f} "
          f"tokens/s; synchronised in {sync:.3f} s, trained in {train:.2f} s", flush=True)  # fmt: skip
    return [total / request, total / ours, total / generate, train, sync, request]


if __name__ == "__main__":
    main()
