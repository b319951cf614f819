r"""A GRPO step with the prompt computed once a group, beside TRL's own: seconds and peak memory, the same batch.

    python benchmarks/shared_prefix.py [--curve 500 1000 4000]
    python benchmarks/shared_prefix.py --shape gemma-3-1b --prompt 7000 --completion 300
    python benchmarks/shared_prefix.py --shape gemma-3-1b --prompt 7000 --completion 300 --alone --checkpointing \
        --loss bnpo --accumulation 8

Both run real training steps of their trainer class on given completions, so sampling is left out for both: the
reference's log-probabilities (KL), the loss, its gradients, clipping and the optimizer's step on a LoRA adapter. Each
measurement is a process of its own. Memory is what the process (on a GPU: torch's allocator) held at most while
training, model included, above what it held before the model was built. `limit` is the ratio of the arithmetic alone
(`llm/flops.py`); `cpu_s` is the processor's time in a step, for machines that do other work at the same time. On a GPU
the weights are bfloat16, TRL uses gradient checkpointing, as the release does, and `mfu` is the share of
--peak_tflops at which the step's arithmetic is done: two forwards, of reference and policy, and a backward.

With `--accumulation` a step has so many prompts and micro-batches. Under `--loss bnpo`, the paper's, TRL's shuffle puts
completions of several prompts into one micro-batch (see `grpo.trainer`), which decides the memory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path

import torch

from reporting import add_measure, in_a_process, paired, report, show_line
from shapes import SHAPES, bare_model
from twice_rec.grpo.estimate import shuffled_prompts
from twice_rec.llm import models
from twice_rec.llm.flops import ModelArithmetic, Work
from twice_rec.llm.fused import fuse_layers

_HOW = ("shape", "prompt", "samples", "completion", "loss", "accumulation", "steps", "warm_up")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, by the clock and of this process's CPU, and the peak of the memory in MiB."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from clock import StepClock
    from tiny_base.model import train_tokenizer
    from twice_rec.grpo.trainer import SharedPrefixGRPOTrainer

    gpu, draw, ours = torch.cuda.is_available(), random.Random(0), options.who == "ours"

    def some_tokens(count: int) -> list[int]:
        return [draw.randrange(10, 400) for _ in range(count)]

    def rollouts(prompts, trainer):
        groups = [some_tokens(options.prompt) for _ in range(len(prompts) // options.samples)]
        completions = [some_tokens(options.completion) for _ in prompts]
        ids = [groups[position // options.samples] for position in range(len(prompts))]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    steps = options.warm_up + options.steps + bool(ours and options.profile)
    tokenizer = train_tokenizer(["tea and coffee"] * 9, 400)
    before = reset_peak(gpu)
    attention = options.attention if ours else options.peer_attention
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    model = bare_model(options.shape, attention, device, dtype)
    if ours and options.compile:
        models.compile_layers(model)
    arithmetic, clock = ModelArithmetic.of(model), StepClock(options.profile if ours else None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, report_to="none", use_cpu=not gpu, bf16=gpu, save_strategy="no",
            num_generations=options.samples, per_device_train_batch_size=options.samples,
            gradient_accumulation_steps=options.accumulation, max_steps=steps,
            max_completion_length=options.completion, temperature=0.9, beta=0.04, loss_type=options.loss,
            gradient_checkpointing=switches(options.who, options)["checkpointing"], logging_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = (SharedPrefixGRPOTrainer if ours else GRPOTrainer)(
            model=model,
            args=arguments,
            reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
            train_dataset=Dataset.from_list([{"prompt": "tea"}] * (steps * options.accumulation)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            rollout_func=rollouts,
            callbacks=[clock],
        )
        if ours and options.fuse:
            fuse_layers(trainer.model)
        trainer.train()
    seconds, work = statistics.median(clock.seconds[options.warm_up :]), step_work(options, ours, arithmetic)
    return {
        "seconds": seconds,
        "cpu_s": statistics.median(clock.cpu_seconds[options.warm_up :]),
        "mib": (peak(gpu) - before) / 2**20,
        "flops": arithmetic.forward(work) + arithmetic.training(work),
        **clock.kinds,
    }


def step_work(options: argparse.Namespace, shared: bool, arithmetic: ModelArithmetic) -> Work:
    """The tokens that go through the model in a step's pass, with a prompt once or with each completion.

    Those of the reference under bnpo are less, since its pass comes before the shuffle; that is left out.
    """
    together, of_step = 1.0, options.samples * options.accumulation
    if options.loss == "bnpo":
        together = shuffled_prompts(options.samples, options.samples, of_step)
    prompts = [(0, options.prompt)] * round(options.accumulation * together if shared else of_step)
    completions = [(options.prompt, options.completion)] * of_step
    return Work.of([*prompts, *completions], of_step * options.completion, arithmetic.windows)


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


def switches(who: str, options: argparse.Namespace) -> dict[str, object]:
    """What a side has of attention, compiled and fused layers, and gradient checkpointing: TRL's the last on a GPU."""
    if who == "ours":
        return {name: getattr(options, name) for name in ("attention", "compile", "fuse", "checkpointing")}
    without = {"compile": False, "fuse": False, "checkpointing": torch.cuda.is_available()}
    return {"attention": options.peer_attention, **without}


def run(options: argparse.Namespace, who: str) -> dict[str, float]:
    """What one process of ours or theirs finds, printed too."""
    found = in_a_process(__file__, argparse.Namespace(**{**vars(options), "who": who}))
    found["mfu"] = found["flops"] / found["seconds"] / (options.peak_tflops * 1e12)
    how = {name: getattr(options, name) for name in _HOW}
    how |= switches(who, options)
    show_line("shared_prefix_run", who=who, **how, **found)
    return found


def compare(options: argparse.Namespace) -> dict[str, float]:
    """Medians over the rounds, for one length of prompt."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}

    def seconds(who: str) -> float:
        runs[who].append(run(options, who))
        return runs[who][-1]["seconds"]

    ours, theirs = paired(lambda: seconds("ours"), lambda: seconds("theirs"), options.rounds)
    found = {"prompt": options.prompt, "ours": ours, "theirs": theirs}
    found["limit"] = round(runs["theirs"][0]["flops"] / runs["ours"][0]["flops"], 2)
    for who, of_one in runs.items():
        of_side = {"cpu_s": 1, "mib": 1, "mfu": 3}  # -> digits
        found |= {f"{who}_{n}": round(statistics.median(run[n] for run in of_one), d) for n, d in of_side.items()}
    return found


def main() -> None:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens")
    parser.add_argument("--samples", type=int, default=16, help="completions of a prompt, all in one micro-batch")
    parser.add_argument("--completion", type=int, default=80, help="tokens of each")
    parser.add_argument("--shape", choices=SHAPES, default="small-deep")
    parser.add_argument(
        "--attention",
        choices=["sdpa", "chunked_sdpa", "eager", "varlen"],
        help="ours; if left out varlen on a GPU and with --quick, else chunked_sdpa",
    )
    parser.add_argument("--peer_attention", default="sdpa", help="theirs")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing for ours too")
    parser.add_argument("--no_fuse", dest="fuse", action="store_false", help="ours without fused layers, on a GPU")
    parser.add_argument("--loss", choices=["grpo", "bnpo"], default="grpo", help="TRL's loss_type; the paper's is bnpo")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches and prompts of a step")
    parser.add_argument("--alone", action="store_true", help="ours only")
    parser.add_argument("--compile", action="store_true", help="compiled layers for ours")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU, bfloat16 (H100 and H200: 989)")
    parser.add_argument("--profile", help="file for the kernels that take most of ours' time in a step")
    parser.add_argument("--steps", type=int, default=1, help="of a process that are timed")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before those, on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curve", type=int, nargs="+", default=[], help="also prompts of these lengths")
    parser.add_argument("--quick", action="store_true", help="500 + 4 x 20 tokens, one step, as on a GPU")
    options = add_measure(parser, measure)
    if options.quick:
        options.prompt, options.samples, options.completion, options.steps, options.rounds = 500, 4, 20, 1, 1
    if not gpu:
        options.fuse, options.warm_up = options.fuse and options.quick, 0
    options.attention = options.attention or ("varlen" if gpu or options.quick else "chunked_sdpa")
    if options.alone:
        run(options, "ours")
        return
    found = []
    for length in [*options.curve, options.prompt]:
        found.append(compare(argparse.Namespace(**{**vars(options), "prompt": length})))
        row = found[-1]
        print(
            f"{length:>6,} + {options.samples} x {options.completion} tokens: ours {row['ours']:.3f} s, "
            f"{row['ours_mib']:,} MiB; TRL {row['theirs']:.3f} s, {row['theirs_mib']:,} MiB; "
            f"{row['theirs'] / row['ours']:.2f} times as fast, arithmetic {row['limit']}",
            flush=True,
        )
    last = found[-1]
    names = ("samples", "completion", "shape", "attention", "peer_attention", "fuse", "compile", "checkpointing")
    more = {name: getattr(options, name) for name in names}
    more |= {name: value for name, value in last.items() if name not in ("ours", "theirs")}
    report(
        "shared_prefix", "TRL 1.16.0 GRPOTrainer", last["ours"], last["theirs"], "s/step", False, **more,
        **({"curve": found} if options.curve else {}),
    )  # fmt: skip


if __name__ == "__main__":
    main()
