"""The lines that gpu.sh wrote, as the table of README.md and REPRODUCTION.md; results/fill.py writes it there.

A line with a note was measured in another way, which the note says, and is left out. A peer's ratio is against the
newest line of ours for the same work on the same card, without gradient checkpointing and without compiled layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twice_rec.markdown import markdown_table

Line = Mapping[str, Any]  # of gpu.jsonl

_HEADER = ["work", "who", "speed", "ours is faster", "share of the card's peak", "memory, MiB", "card"]
_PEERS = {"padded": "TRL, padded", "packed": "TRL, packed", "theirs": "TRL"}
_SWITCHES = {"fuse": "fused layers", "compile": "compiled layers", "checkpointing": "gradient checkpointing"}


def gpu_table(lines: Sequence[Line], words: Sequence[str]) -> str:
    """Return all lines as one table, or those of the named shapes only."""
    kept = [line for line in lines if "note" not in line and (not words or line.get("shape") in words)]
    rows = [row for name, rows_of in _ROWS.items() for row in rows_of([line for line in kept if line["name"] == name])]
    return markdown_table(_HEADER, rows, texts=2)


def _stage_2(lines: Sequence[Line]) -> list[list[str]]:
    """Tokens of rows a second: a token counts once however often it is computed."""
    rates = [line["row_tokens"] for line in lines]
    return _rows(lines, lambda line: f"stage 2, {line['shape']}", rates, [f"{rate:,.0f} tokens/s" for rate in rates])


def _stage_3(lines: Sequence[Line]) -> list[list[str]]:
    rates = [1 / line["seconds"] for line in lines]
    return _rows(lines, _step, rates, [f"{line['seconds']:.3f} s" for line in lines])


def _step(line: Line) -> str:
    prompts = line.get("accumulation") or 1
    loss = f", {line['loss']}" if line.get("loss", "grpo") != "grpo" else ""
    size = f"{line['prompt']:,} + {line['samples']} x {line['completion']} tokens"
    return f"stage 3, a step on {f'{prompts} x ({size})' if prompts > 1 else size}{loss}, {line['shape']}"


def _rows(
    lines: Sequence[Line], work: Callable[[Line], str], rates: Sequence[float], speeds: Sequence[str]
) -> list[list[str]]:
    ours: dict[tuple[str, str], float] = {}  # (work, card) -> the newest rate
    for line, rate in zip(lines, rates, strict=True):
        if line["who"] == "ours" and not line["checkpointing"] and not line["compile"]:
            ours[work(line), line["gpu"]] = rate
    rows = []
    for line, rate, speed in zip(lines, rates, speeds, strict=True):
        how = [text for switch, text in _SWITCHES.items() if line.get(switch)]
        of_ours = ours.get((work(line), line["gpu"])) if line["who"] != "ours" else None
        rows.append([
            work(line), ", ".join([_PEERS.get(line["who"], "ours"), *how]), speed,
            f"{of_ours / rate:.1f} times" if of_ours else "-", f"{100 * line['mfu']:.1f} %" if "mfu" in line else "-",
            f"{line['mib']:,.0f}", line["gpu"],
        ])  # fmt: skip
    return rows


def _attention(lines: Sequence[Line]) -> list[list[str]]:
    rows = []
    for line in lines:
        work = f"attention alone, {line['layer']} layer, {line['shape']}"
        kernels = {name.removesuffix("_ms"): time for name, time in line.items() if name.endswith("_ms")}
        for kernel, time in kernels.items():
            slower = f"{time / kernels['varlen']:.1f} times" if kernel != "varlen" else "-"
            who = f"ours, {kernel}" if kernel == "varlen" else f"{kernel} with a mask"
            rows.append([work, who, f"{time:.1f} ms", slower, "-", "-", line["gpu"]])
    return rows


_ROWS = {"sft_run": _stage_2, "shared_prefix_run": _stage_3, "attention": _attention}
