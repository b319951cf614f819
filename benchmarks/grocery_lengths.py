"""Write grocery_lengths.json: the numbers of tokens in stage 2's rows for a sample of the released Grocery users.

    python benchmarks/grocery_lengths.py --data runs/grocery/data --samples FILE --tokenizer FOLDER

The file holds numbers only; the GPU benchmarks draw random tokens of these lengths, so they need no data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from reporting import ROOT
from twice_rec.data.dataset import PreparedData
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.llm.recipe import PromptConfig
from twice_rec.llm.tokens import encode_text, load_tokenizer
from twice_rec.records import Rationale
from twice_rec.sft.dataset import TaskMixConfig, training_rows
from twice_rec.sft.encoding import IGNORED, encode_rows, share_prefixes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared data (prepare.sh)")
    parser.add_argument("--samples", type=Path, required=True, help="the release's rows with rationales")
    parser.add_argument("--tokenizer", required=True, help="a folder or a name on the hub")
    parser.add_argument("--users", type=int, default=300)
    options = parser.parse_args()
    data, tokenizer = PreparedData(options.data), load_tokenizer(options.tokenizer)
    examples = list(data.training_examples())
    chosen = [examples[i] for i in np.random.default_rng(0).permutation(len(examples))[: options.users]]
    reasons = [Rationale(e.user_id, e.target, "Because.", "relevant", (), 1.0, "none") for e in chosen]
    items = round(options.users * len(data.catalog) / len(examples))
    builder = PromptBuilder(data.catalog, data.prompt_format, tokenizer, PromptConfig())
    rows = training_rows(builder, chosen, reasons, TaskMixConfig(item_info_rows=items), seed=0)
    encoded = encode_rows(tokenizer, rows, None)
    found: dict[str, list] = {"users": [], "items": []}
    for group in share_prefixes(rows, encoded):
        ((common, *rest),), prompt_and_completion = group["lengths"], []
        start = common
        for length in rest:
            ignored = sum(label == IGNORED for label in group["labels"][start : start + length])
            prompt_and_completion.append((ignored, length - ignored))
            start += length
        if len(rest) == 1:
            found["items"].append([common + prompt_and_completion[0][0], prompt_and_completion[0][1]])
        else:  # the row without the rationale is the one with the shorter completion
            (direct, item), (reasoned, _) = sorted(prompt_and_completion, key=lambda part: part[1])
            found["users"].append([common, direct, item, reasoned])
    outputs = [row["output"] for row in json.loads(options.samples.read_text(encoding="utf-8"))]
    found["rationales"] = [len(encode_text(tokenizer, text)) for text in outputs]
    path = ROOT / "benchmarks/grocery_lengths.json"
    path.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    print(
        f"{len(found['users'])} users, {len(found['items'])} items, {len(outputs)} completions with rationales: {path}"
    )


if __name__ == "__main__":
    main()
