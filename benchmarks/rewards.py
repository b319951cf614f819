"""Seconds to get the CF confidences of one GRPO step, 64 prompts with 16 completions each.

    python benchmarks/rewards.py --data runs/grocery/data

Ours: one forward pass for the step's prompts, every completion's confidence looked up. The peer: one forward pass for
each completion, as the authors' release does. Both give the same numbers, which is checked. The model has the release's
shape (width 128, two layers) and random weights; the completions are random candidates.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from reporting import paired, report
from twice_rec.cf.recipe import SASRecConfig
from twice_rec.cf.sasrec import SASRec, SASRecScorer
from twice_rec.data.dataset import PreparedData
from twice_rec.grpo.recipe import GRPORecipe
from twice_rec.grpo.scoring import score_completions
from twice_rec.prompts import item_answer

ROOT = Path(__file__).parents[1]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "runs/tiny/data", help="prepared data (prepare.sh)")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    data = PreparedData(arguments.data)
    catalog = data.catalog
    examples = list(data.training_examples())[: arguments.prompts]
    torch.manual_seed(0)
    scorer = SASRecScorer(SASRec(SASRecConfig(hidden_size=128), len(catalog)))
    rng = np.random.default_rng(0)
    histories = [catalog.indices(entry.item_id for entry in example.history) for example in examples]
    shown = np.array([catalog.indices(example.candidates) for example in examples])
    prompt = np.repeat(np.arange(len(examples)), arguments.completions)
    column = rng.integers(shown.shape[1], size=len(prompt))
    results = {}

    def ours() -> float:
        start = time.perf_counter()
        results["ours"] = scorer.confidences(histories, shown, "sigmoid")[prompt, column]
        return time.perf_counter() - start

    def one_each() -> float:
        start = time.perf_counter()
        results["theirs"] = np.array(
            [
                scorer.confidences([histories[p]], shown[p : p + 1, c : c + 1], "sigmoid")[0, 0]
                for p, c in zip(prompt, column, strict=True)
            ]
        )
        return time.perf_counter() - start

    ours(), one_each()  # warm-up
    pair = paired(ours, one_each, 1 if arguments.quick else arguments.rounds)
    np.testing.assert_allclose(results["ours"], results["theirs"], atol=1e-5)
    texts = [item_answer(catalog[examples[p].candidates[c]]) for p, c in zip(prompt, column, strict=True)]
    asked = [examples[p] for p in prompt]
    start = time.perf_counter()
    columns = {
        "candidates": [example.candidates for example in asked],
        "target": [example.target for example in asked],
        "history": [[interaction.item_id for interaction in example.history] for example in asked],
    }
    score_completions(texts, columns, catalog, scorer, GRPORecipe(run_dir="", domain="benchmark", seed=0))
    whole = time.perf_counter() - start
    more = {"completions": len(prompt), "whole_step_with_parsing": whole}
    report("confidences", "one forward pass a completion", *pair, "s", False, **more)


if __name__ == "__main__":
    main()
