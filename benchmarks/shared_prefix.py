r"""A GRPO step with the prompt computed once a group, beside TRL's own: seconds and peak memory, the same batch.

    python benchmarks/shared_prefix.py [--curve]
    python benchmarks/shared_prefix.py --shape gemma-3-1b --device cuda --dtype bfloat16 --gradient_checkpointing \
        --attention flex_attention --prompt 7000 --completion 300

Both run real training steps of their trainer class on given completions, so sampling is left out for both: the
reference's log-probabilities (KL), the loss, its gradients, clipping and the optimizer's step on a LoRA adapter. Each
measurement is a process of its own. Memory is what the process (on a GPU: torch's allocator) held at most while
training, model included, above what it held before the model was built. `limit` is the ratio of the arithmetic alone;
`cpu_s` is the processor's time in a step, for machines that do other work at the same time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from reporting import paired, report
from sft import SHAPES as REAL_SHAPES

WINDOW = 512
SHAPES = {
    "small": {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 4096,
    },
    "gemma-3-1b": REAL_SHAPES["gemma-3-1b"],
}  # fmt: skip


def measure(who: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, by the clock and of this process's CPU, and the peak of the memory in MiB."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from tiny_base.model import train_tokenizer
    from twice_rec.grpo.trainer import SharedPrefixGRPOTrainer

    gpu, shape, draw = options.device == "cuda", SHAPES[options.shape], random.Random(0)

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds, self.cpu_seconds = [], []

        def on_step_begin(self, *arguments, **others):
            self.begun = time.perf_counter(), time.process_time()

        def on_step_end(self, *arguments, **others):
            if gpu:
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.begun[0])
            self.cpu_seconds.append(time.process_time() - self.begun[1])

    def some_tokens(count: int) -> list[int]:
        return [draw.randrange(10, 400) for _ in range(count)]

    def rollouts(prompts, trainer):
        prompt = some_tokens(options.prompt)
        completions = [some_tokens(options.completion) for _ in prompts]
        return {"prompt_ids": [prompt for _ in prompts], "completion_ids": completions, "logprobs": None}

    warm_up = 2 if gpu else 0
    tokenizer = train_tokenizer(["tea and coffee"] * 9, 400)
    before = reset_peak(gpu)
    torch.manual_seed(0)
    config = Gemma3TextConfig(**shape, sliding_window=WINDOW, max_position_embeddings=32768, pad_token_id=0)
    config._attn_implementation = options.attention if who == "ours" else options.peer_attention
    with torch.device(options.device):
        model = Gemma3ForCausalLM(config).to(getattr(torch, options.dtype))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, report_to="none", use_cpu=not gpu, bf16=options.dtype == "bfloat16", save_strategy="no",
            num_generations=options.samples, per_device_train_batch_size=options.samples,
            max_steps=options.steps + warm_up,
            max_completion_length=options.completion, temperature=0.9, beta=0.04, loss_type="grpo", disable_tqdm=True,
            gradient_checkpointing=options.gradient_checkpointing, logging_strategy="no",
        )  # fmt: skip
        trainer = (SharedPrefixGRPOTrainer if who == "ours" else GRPOTrainer)(
            model=model,
            args=arguments,
            reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
            train_dataset=Dataset.from_list([{"prompt": "tea"}] * (options.steps + warm_up)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            rollout_func=rollouts,
            callbacks=[clock],
        )
        trainer.train()
    return {
        "seconds": statistics.median(clock.seconds[warm_up:]),
        "cpu_s": statistics.median(clock.cpu_seconds[warm_up:]),
        "mib": (peak(gpu) - before) / 2**20,
    }


def reset_peak(gpu: bool) -> int:
    """Forget the peak so far; bytes held now."""
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return peak(gpu)


def peak(gpu: bool) -> int:
    """Most bytes held since then."""
    if gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def operations(shape: dict, rows: int, prompt: int, completions: int, length: int) -> float:
    """Multiplications of a forward: linear layers, attention within its window, logits of the completions."""
    tokens = rows * (prompt + completions * length)
    heads = shape["num_attention_heads"] * shape["head_dim"]
    linear = 2 * heads + 2 * shape["num_key_value_heads"] * shape["head_dim"] + 3 * shape["intermediate_size"]
    total = tokens * shape["hidden_size"] * linear * shape["num_hidden_layers"]
    for layer in range(1, shape["num_hidden_layers"] + 1):
        window = prompt + length if layer % 6 == 0 else WINDOW
        seen = sum(min(i + 1, window) for i in range(prompt))
        seen += completions * sum(min(prompt + i + 1, window) for i in range(length))
        total += 2 * heads * rows * seen
    return total + rows * completions * length * shape["hidden_size"] * shape["vocab_size"]


def in_a_process(who: str, options: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own."""
    given = {**vars(options), "who": who}
    command = [sys.executable, __file__, "--measure", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> dict[str, float]:
    """Medians over the rounds, for one length of prompt."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}

    def seconds(who: str) -> float:
        runs[who].append(in_a_process(who, options))
        return runs[who][-1]["seconds"]

    ours, theirs = paired(lambda: seconds("ours"), lambda: seconds("theirs"), options.rounds)
    shape, samples, length = SHAPES[options.shape], options.samples, options.completion
    limit = operations(shape, samples, options.prompt, 1, length) / operations(
        shape, 1, options.prompt, samples, length
    )
    more = {
        f"{who}_{name}": round(statistics.median(run[name] for run in of_one), 1)
        for who, of_one in runs.items()
        for name in ("cpu_s", "mib")
    }
    return {"prompt": options.prompt, "ours": ours, "theirs": theirs, "limit": round(limit, 2), **more}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens")
    parser.add_argument("--samples", type=int, default=16, help="completions of a prompt, all in one micro-batch")
    parser.add_argument("--completion", type=int, default=80, help="tokens of each")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--attention", choices=["sdpa", "chunked_sdpa", "eager", "flex_attention"], default="chunked_sdpa", help="ours"
    )
    parser.add_argument("--peer_attention", default="sdpa", help="theirs")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="as the release; for both")
    parser.add_argument("--steps", type=int, default=1, help="of a process; on a GPU after two that do not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curve", action="store_true", help="also prompts of a quarter, half and twice the length")
    parser.add_argument("--quick", action="store_true", help="500 + 4 x 20 tokens, one round of one step")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        given = argparse.Namespace(**json.loads(options.measure))
        print(json.dumps(measure(given.who, given)))
        return
    if options.quick:
        options.prompt, options.samples, options.completion, options.steps, options.rounds = 500, 4, 20, 1, 1
    lengths = [options.prompt // 4, options.prompt // 2, options.prompt * 2] if options.curve else []
    found = []
    for length in [*lengths, options.prompt]:
        found.append(compare(argparse.Namespace(**{**vars(options), "prompt": length})))
        row = found[-1]
        print(
            f"{length:>6,} + {options.samples} x {options.completion} tokens: ours {row['ours']:.3f} s, "
            f"{row['ours_mib']:,} MiB; TRL {row['theirs']:.3f} s, {row['theirs_mib']:,} MiB; "
            f"{row['theirs'] / row['ours']:.2f} times as fast, arithmetic {row['limit']}",
            flush=True,
        )
    last = found[-1]
    more = {
        name: getattr(options, name) for name in ("samples", "completion", "shape", "dtype", "gradient_checkpointing")
    }
    more |= {name: value for name, value in last.items() if name not in ("ours", "theirs")}
    if options.device == "cuda":
        more |= {"gpu": torch.cuda.get_device_name(), "attention": options.attention}
    report(
        "shared_prefix", "TRL 1.16.0 GRPOTrainer", last["ours"], last["theirs"], "s/step", False, **more,
        **({"curve": found} if options.curve else {}),
    )  # fmt: skip


if __name__ == "__main__":
    main()
