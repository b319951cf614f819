"""Tokens a second of stage 2, ours beside plain TRL: the same rows, model and adapter.

    python benchmarks/sft.py
    python benchmarks/sft.py --shape gemma-3-1b --users 32 --peer_users 8 --peers padded packed

Rows are the three tasks for a sample of the released Grocery users: every user asked for the item alone (task 2), three
in four also with a rationale (task 3; the share is that of our own curation), and as many items as users bear (task 1).
Their lengths are real (grocery_lengths.json), their tokens random, and so are the model's weights. Peers are TRL's
SFTTrainer as the release runs it, padded rows with gradient checkpointing; and with TRL's packing, on a GPU on the same
flash kernel as ours and without checkpointing, the fastest that it can do. On a CPU both use sdpa.

On a GPU ours has fused layers (`llm/fused.py`) unless --no_fuse says otherwise, and a peer may get fewer users, since
it takes so much longer. --quick does the same on a CPU, with the reference of the flash kernel, so that nothing of it
rots; its speed says nothing.

A token of a row counts once however often or seldom it is computed: padding counts for nothing, and so does sharing.
`computed` are the tokens that go through the model, padding aside. On a GPU also the peak of torch's memory, and the
model FLOP utilisation: what `llm/flops.py` counts for the computed tokens, a second, as a share of --peak_tflops.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile

import numpy as np
import torch

from reporting import ROOT, add_measure, in_a_process, report, show_line
from shapes import SHAPES, bare_model
from twice_rec.llm import models
from twice_rec.llm.flops import ModelArithmetic, Work
from twice_rec.llm.fused import fuse_layers
from twice_rec.llm.recipe import CHUNKED_SDPA, VARLEN
from twice_rec.sft.collator import PackedCollator
from twice_rec.sft.dataset import Row
from twice_rec.sft.encoding import IGNORED, EncodedRow, alone, pack, share_prefixes

VOCABULARY = 400  # random tokens are below it


def rows_of(users: int, scale: float, seed: int = 0) -> tuple[list[Row], list[EncodedRow]]:
    """The rows of a sample of users, and their tokens; `scale` multiplies all lengths."""
    found, draw = json.loads((ROOT / "benchmarks/grocery_lengths.json").read_text()), np.random.default_rng(seed)
    rows: list[tuple[Row, EncodedRow]] = []

    def tokens(length: int) -> np.ndarray:
        return draw.integers(10, VOCABULARY, max(2, round(length * scale)), dtype=np.int32)

    def add(task: str, prompt: np.ndarray, completion: int, user: str = "") -> None:
        answer = tokens(completion)
        labels = np.concatenate([np.full(len(prompt), IGNORED, dtype=np.int32), answer])
        rows.append((Row(task, [], "", user), {"input_ids": np.concatenate([prompt, answer]), "labels": labels}))

    of_users = [found["users"][i] for i in draw.permutation(len(found["users"]))[:users]]
    for number, (common, direct, item, reasoned) in enumerate(of_users):
        shared = tokens(common)
        add("direct", np.concatenate([shared, tokens(direct)]), item, f"u{number}")
        if number % 4:
            add("rationale", np.concatenate([shared, tokens(reasoned)]), draw.choice(found["rationales"]), f"u{number}")
    for prompt, completion in found["items"][: round(users * len(found["items"]) / len(found["users"]))]:
        add("item_info", tokens(prompt), completion)
    mixed = [rows[i] for i in draw.permutation(len(rows))]
    return [row for row, _ in mixed], [encoded for _, encoded in mixed]


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One epoch, its first steps aside: tokens of rows and computed tokens a second, utilisation, peak MiB of a GPU."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from clock import StepClock
    from tiny_base.model import train_tokenizer
    from twice_rec.sft.trainer import SFTTrainer as Metered

    gpu, ours = torch.cuda.is_available(), options.who == "ours"
    rows, encoded = rows_of(users_of(options.who, options), options.scale)
    packed, budget = options.who == "packed", round(options.pack_tokens * options.scale)
    as_on_gpu = gpu or options.quick
    attention = (VARLEN if as_on_gpu else CHUNKED_SDPA) if ours else VARLEN if as_on_gpu and packed else "sdpa"
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    model = bare_model(options.shape, attention, device, dtype)
    arithmetic = ModelArithmetic.of(model)
    clock, more = StepClock(options.profile if ours else None), {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, report_to="none", use_cpu=not gpu, bf16=gpu, max_length=budget if packed else None,
            per_device_train_batch_size=1 if ours or packed else options.batch_size, packing=packed,
            train_sampling_strategy="random", save_strategy="no", num_train_epochs=1, disable_tqdm=True,
            gradient_checkpointing=switches(options.who, options)["checkpointing"], logging_strategy="no",
        )  # fmt: skip
        dataset = encoded
        if ours:
            dataset, arguments.dataset_kwargs = share_prefixes(rows, encoded), {"skip_prepare_dataset": True}
            dataset = pack(dataset, budget, 0) if as_on_gpu else dataset
            arguments.remove_unused_columns, more = False, {"data_collator": PackedCollator(model)}
            if options.compile:
                models.compile_layers(model)
        trainer = (Metered if ours else SFTTrainer)(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(dataset),
            processing_class=train_tokenizer(["tea and coffee"] * 9, VOCABULARY),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
            **more,
        )
        if ours and options.fuse:
            fuse_layers(trainer.model)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    steps, first = trainer.state.max_steps, min(options.warm_up, len(clock.ends) - 2)
    share = (len(clock.ends) - 1 - first) / steps  # of the steps, and so of the tokens, that are timed
    seconds = (clock.ends[-1] - clock.ends[first]) / share
    work = work_of(rows, encoded, ours, arithmetic)
    return {
        "row_tokens": sum(len(row["input_ids"]) for row in encoded) / seconds,
        "computed_tokens": work.tokens / seconds,
        "mfu": arithmetic.training(work) / seconds / (options.peak_tflops * 1e12),
        "mib": torch.cuda.max_memory_allocated() / 2**20 if gpu else 0,
        "steps": steps,
        **clock.kinds,
    }


def users_of(who: str, options: argparse.Namespace) -> int:
    """How many users a side trains on."""
    return options.users if who == "ours" else options.peer_users or options.users


def switches(who: str, options: argparse.Namespace) -> dict[str, bool]:
    """What a side has of compiled and fused layers and gradient checkpointing; TRL's padded has the last on a GPU."""
    if who == "ours":
        return {name: getattr(options, name) for name in ("compile", "fuse", "checkpointing")}
    return {"compile": False, "fuse": False, "checkpointing": torch.cuda.is_available() and who == "padded"}


def work_of(rows: list[Row], encoded: list[EncodedRow], shared: bool, arithmetic: ModelArithmetic) -> Work:
    """What goes through the model, with the beginnings that rows share computed once or not."""
    groups = share_prefixes(rows, encoded) if shared else alone(encoded)
    segments = []
    for group in groups:
        for common, *rest in group["lengths"]:
            segments += [(0, common), *((common, length) for length in rest)]
    return Work.of(segments, sum(int((row["labels"] != IGNORED).sum()) for row in encoded), arithmetic.windows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--peer_users", type=int, help="users for the peers, if not the same")
    parser.add_argument("--batch_size", type=int, default=2, help="rows of a step for TRL, padded (release: 2)")
    parser.add_argument(
        "--pack_tokens", type=int, default=16384, help="tokens of a step for ours and TRL, packed, on a GPU"
    )
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU, bfloat16 (H100 and H200: 989)")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--peers", nargs="*", choices=["padded", "packed"], default=["padded"])
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing for ours too")
    parser.add_argument("--no_fuse", dest="fuse", action="store_false", help="ours without fused layers")
    parser.add_argument("--compile", action="store_true", help="compiled layers for ours")
    parser.add_argument("--profile", help="file for the kernels that take most of ours' time in a step")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all lengths")
    parser.add_argument("--warm_up", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--quick", action="store_true", help="8 users, a tenth of the lengths, one round, as on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    options = add_measure(parser, measure)
    if options.quick:
        options.users, options.peer_users, options.scale, options.rounds = 8, None, 0.1, 1
    if not torch.cuda.is_available():
        options.compile, options.fuse = False, options.fuse and options.quick
    rows, encoded = rows_of(options.users, options.scale)
    lengths = [len(row["input_ids"]) for row in encoded]
    print(f"{len(rows)} rows, tokens: median {np.median(lengths):,.0f}, longest {max(lengths):,}, all {sum(lengths):,}")
    found: dict[str, list[dict[str, float]]] = {"ours": [], **{peer: [] for peer in options.peers}}
    for _ in range(options.rounds):
        for who, runs in found.items():  # one after another, so that a slow moment of the machine meets all
            runs.append(in_a_process(__file__, argparse.Namespace(**{**vars(options), "who": who})))
            figures = {name: round(value, 3) for name, value in runs[-1].items()}
            how = {name: getattr(options, name) for name in ("shape", "scale", "pack_tokens", "batch_size", "warm_up")}
            show_line("sft_run", who=who, users=users_of(who, options), **how, **switches(who, options), **figures)
    medians = {
        who: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for who, runs in found.items()
    }
    names = ("users", "peer_users", "shape", "scale", "batch_size", "pack_tokens", "fuse", "compile", "checkpointing")
    for peer in options.peers:
        more = {name: getattr(options, name) for name in names} | {"rows": len(rows)}
        for who, side in (("ours", "ours"), (peer, "theirs")):
            more |= {f"{side}_{name}": round(medians[who][name], 3) for name in ("computed_tokens", "mfu", "mib")}
        speeds = [medians[who]["row_tokens"] for who in ("ours", peer)]
        report("sft", f"TRL 1.16.0 SFTTrainer, {peer}", *speeds, "tokens/s", True, **more)


if __name__ == "__main__":
    main()
