"""The prompts of stage 3, with what the rewards need beside a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twice_rec.cf.held_out import prompted
from twice_rec.llm.prompt_builder import PromptBuilder
from twice_rec.records import Example


def prompt_rows(
    builder: PromptBuilder, examples: Sequence[Example], fraction: float, seed: int
) -> list[dict[str, Any]]:
    """Draw a share of the examples by seed and write the prompt of task 3 for each.

    Returns:
        One row per example: `prompt` (messages), `candidates` and `history` (item ids), and `target` (item id).
    """
    return [
        {
            "prompt": builder.recommend(example, with_rationale=True),
            "candidates": list(example.candidates),
            "target": example.target,
            "history": [interaction.item_id for interaction in example.history],
        }
        for example in (examples[position] for position in prompted(len(examples), fraction, seed))
    ]
