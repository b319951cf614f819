"""Tokens a second of stage 2, ours beside plain TRL with padding: the same rows, model and adapter.

    python benchmarks/sft.py --data runs/grocery/data

Rows are the three tasks for a sample of the data's users in their real proportions: every user asked for the item alone
(task 2), three in four also with a rationale of 146 words (task 3; the length is the release's mean, the share that of
our own curation), and as many items as users bear (task 1). The model has Gemma 3's architecture, small and with random
weights; --shape gemma-3-1b is the real one's, for a GPU:

    python benchmarks/sft.py --data runs/grocery/data --shape gemma-3-1b --users 24 --batch_size 4

A token of a row counts once however often or seldom it is computed: padding counts for nothing, and so does sharing. On
a GPU (bfloat16, gradient checkpointing for both) also the peak of torch's memory, and the model FLOP utilisation: the
tokens really computed, neither padding nor recomputation, times 4 operations a weight (forward and backward through
frozen weights), a second, as a share of --peak_tflops.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from reporting import paired, report
from tiny_base.model import train_tokenizer
from twice_rec.data.dataset import PreparedData
from twice_rec.llm.attention import CHUNKED_SDPA
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.llm.recipe import PromptConfig
from twice_rec.records import Rationale
from twice_rec.sft.collator import SharedPrefixCollator
from twice_rec.sft.dataset import Row, training_rows
from twice_rec.sft.encoding import EncodedRow, encode_rows, share_prefixes
from twice_rec.sft.recipe import TaskMixConfig

ROOT = Path(__file__).parents[1]
SHAPES = {
    "small": {
        "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 4096,
    },
    "gemma-3-1b": {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    },
}  # fmt: skip


def rows_of(data: PreparedData, users: int, tokenizer, seed: int = 0) -> tuple[list[Row], list[EncodedRow]]:
    """The rows of a sample of users, and their tokens."""
    examples = list(data.training_examples())
    chosen = [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[:users]]
    text = " ".join(["because"] * 146)
    reasons = [Rationale(e.user_id, e.target, text, "relevant", (), 1.0, "none") for e in chosen[: users * 3 // 4]]
    items = round(users * len(data.catalog) / len(examples))
    builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, PromptConfig())
    rows = training_rows(builder, chosen, reasons, TaskMixConfig(item_info_rows=items), seed)
    return rows, encode_rows(tokenizer, rows, None)


def train(rows: list[Row], encoded: list[EncodedRow], shape: dict, batch_size: int, sharing: bool) -> dict[str, float]:
    """One epoch, its first step aside: tokens of rows and computed tokens a second, weights, peak MiB of a GPU."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, *arguments, **others):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    config = Gemma3TextConfig(**shape, sliding_window=512, max_position_embeddings=32768, pad_token_id=0)
    config._attn_implementation = CHUNKED_SDPA if sharing and not gpu else "sdpa"
    with torch.device("cuda" if gpu else "cpu"):
        model = Gemma3ForCausalLM(config).to(torch.bfloat16 if gpu else torch.float32)
    weights = model.num_parameters()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    clock, more = Clock(), {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, report_to="none", use_cpu=not gpu, bf16=gpu, per_device_train_batch_size=batch_size,
            max_length=None, save_strategy="no", num_train_epochs=1, gradient_checkpointing=gpu, disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        dataset = encoded
        if sharing:
            dataset, arguments.dataset_kwargs = share_prefixes(rows, encoded), {"skip_prepare_dataset": True}
            arguments.remove_unused_columns, more = False, {"data_collator": SharedPrefixCollator(model)}
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(dataset),
            processing_class=TOKENIZER[0],
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
            **more,
        )
        trainer.train()
    steps = len(clock.ends)
    seconds = (clock.ends[-1] - clock.ends[0]) * steps / (steps - 1)
    return {
        "row_tokens": sum(len(row["input_ids"]) for row in encoded) / seconds,
        "computed_tokens": sum(len(row["input_ids"]) for row in dataset) / seconds,
        "weights": weights,
        "mib": torch.cuda.max_memory_allocated() / 2**20 if gpu else 0,
    }


TOKENIZER: list = []


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "runs/tiny/data", help="prepared data (prepare.sh)")
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=2, help="rows of a step for TRL (release: 2)")
    parser.add_argument("--users_per_batch", type=int, default=1, help="users of a step for ours")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU, bfloat16 (H100 and H200: 989)")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--quick", action="store_true", help="8 users, one round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.users, arguments.rounds = 8, 1
    data = PreparedData(arguments.data)
    texts = (f"{item.title} {item.description} {item.details}" for item in data.catalog)
    TOKENIZER.append(train_tokenizer(texts, 4000))
    rows, encoded = rows_of(data, arguments.users, TOKENIZER[0])
    lengths = [len(row["input_ids"]) for row in encoded]
    print(f"{len(rows)} rows, tokens: median {np.median(lengths):,.0f}, longest {max(lengths):,}")
    shape = SHAPES[arguments.shape]
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}

    def measure(who: str, batch_size: int) -> float:
        found[who].append(train(rows, encoded, shape, batch_size, sharing=who == "ours"))
        return found[who][-1]["row_tokens"]

    pair = paired(
        lambda: measure("ours", arguments.users_per_batch),
        lambda: measure("theirs", arguments.batch_size),
        arguments.rounds,
    )
    more = {
        "data": str(arguments.data),
        "rows": len(rows),
        "shape": arguments.shape,
        "batch_size": arguments.batch_size,
        "users_per_batch": arguments.users_per_batch,
    }
    if torch.cuda.is_available():
        more["gpu"] = torch.cuda.get_device_name()
        for who, runs in found.items():
            rate = np.median([4 * run["weights"] * run["computed_tokens"] for run in runs])
            more[f"{who}_mfu"] = round(rate / (arguments.peak_tflops * 1e12), 3)
            more[f"{who}_mib"] = round(float(np.median([run["mib"] for run in runs])))
    report("sft", "TRL 1.16.0 SFTTrainer, padded", *pair, "tokens/s", True, **more)


if __name__ == "__main__":
    main()
