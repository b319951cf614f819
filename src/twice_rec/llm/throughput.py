"""How fast a trainer trains, in its log: tokens per second, and the share of the GPU's peak that its arithmetic has.

The operations are those of `flops`, as in the estimates: what gradient checkpointing computes again does not count.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from twice_rec.llm.flops import ModelArithmetic, Work
from twice_rec.llm.footprint import Shape

logger = logging.getLogger(__name__)

# Part of the name that torch gives a GPU -> its peak in TFLOP/s, bfloat16 on tensor cores without sparsity; of two that
# fit, the first counts. From the makers' data sheets, which mostly print twice as much, with sparsity.
PEAK_TFLOPS = {
    "B200": 2250,  # NVIDIA DGX B200 data sheet
    "GH200": 989,  # NVIDIA GH200 data sheet
    "H200 NVL": 835,  # NVIDIA H200 data sheet
    "H200": 989,
    "H800": 989,  # as H100
    "H100 PCIe": 756,  # NVIDIA H100 data sheet
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,  # NVIDIA A100 data sheet
    "A800": 312,  # as A100
    "A30": 165,  # NVIDIA A30 data sheet
    "A40": 149.7,  # NVIDIA A40 data sheet
    "L40S": 362,  # NVIDIA L40S data sheet
    "L40": 181,  # NVIDIA L40 data sheet
    "L4": 121,  # NVIDIA L4 data sheet
    "RTX 4090": 165.2,  # NVIDIA Ada architecture paper, sums in float32
    "RTX 3090": 71,  # NVIDIA GA102 architecture paper, sums in float32
    "MI300X": 1307,  # AMD Instinct MI300X data sheet
}
_OTHER_PEAK = re.compile(r"\b(MIG|Laptop|Mobile|Max-Q|Ti|SUPER|4090 D|\d+[QC])\b", re.IGNORECASE)


def peak_tflops(name: str) -> float | None:
    """Return the peak of a GPU by the name that torch gives it; None if it is not among `PEAK_TFLOPS`.

    A part of a card (MIG, or a profile of a virtual GPU such as 48Q), and cards of a like name, have another peak.
    """
    if _OTHER_PEAK.search(name):
        return None
    words = f" {name.replace('-', ' ')} "
    return next((peak for part, peak in PEAK_TFLOPS.items() if f" {part} " in words), None)


class Meter(TrainerCallback):
    """Counts what goes through a model, and the seconds of the steps; `log` takes the figures since the last call.

    Nothing waits for the GPU but the end of a step. A step begins when its batches are loaded; in stage 3 its rollouts
    and rewards are in it. Checkpoints and samples are not.

    Args:
        arithmetic: of the model; None if its operations cannot be counted.
        adapter: whether all weights but an adapter's are frozen.
        peak: of the GPU in TFLOP/s; None leaves the utilisation out.
    """

    def __init__(self, arithmetic: ModelArithmetic | None, adapter: bool, peak: float | None):
        self._arithmetic, self._adapter, self._peak = arithmetic, adapter, peak
        self._windows: list[int | None] = list(dict.fromkeys(arithmetic.windows)) if arithmetic else []
        self._forget()

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel) -> Meter:
        """Return the meter of a model that is trained, and say once if the utilisation will be missing, and why."""
        adapted = isinstance(model, PeftModel)
        arithmetic, peak, missing = None, None, ""
        try:  # the shape, for weights may be packed or sharded
            arithmetic = Shape.of((model.get_base_model() if adapted else model).config).arithmetic
        except (ValueError, AttributeError) as error:
            missing = f"the operations of this model are not counted ({error})"
        if not torch.cuda.is_available():
            missing = missing or "this machine has no GPU"
        elif (peak := peak_tflops(torch.cuda.get_device_name())) is None:
            missing = missing or f"the bfloat16 peak of {torch.cuda.get_device_name()} is not known"
        if missing:
            logger.info("the log has tokens per second, no model FLOP utilisation: %s", missing)
        return cls(arithmetic, adapted, peak)

    def _forget(self) -> None:
        self._counts: dict[bool, Any] = {True: 0, False: 0}  # training or forward alone -> int64 [3 + windows], or 0
        self._seconds, self._begun = 0.0, None

    def begin_step(self) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop the clock when the GPU has done the step; the trainer calls this."""
        if self._begun is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds, self._begun = self._seconds + time.perf_counter() - self._begun, None

    def count(
        self,
        positions: Tensor,
        predicted: Tensor | int,
        real: Tensor | None = None,
        rows: Tensor | int | None = None,
        training: bool = True,
    ) -> None:
        """Add a forward, with its backward in training.

        Args:
            positions: int64 [R, L], how many tokens each token sees before it, a window aside.
            predicted: number of tokens whose logits are needed.
            real: bool [R, L], False at padding; None without padding.
            rows: number of tokens of the rows; None if the tokens of a row are neighbours and, of rows that share their
                beginning, all but the first come without it (see `sft.encoding.share_prefixes`).
        """
        here = torch.ones_like(positions) if real is None else real.to(positions.dtype)  # [R, L]
        tokens = here.sum()
        if rows is None:
            begins = positions.diff(dim=1, prepend=positions.new_full((len(positions), 1), -2)) != 1  # [R, L]
            rows = tokens + (here * begins * positions).sum()
        seen = positions + 1  # by each token, itself included
        pairs = [(here * (seen if window is None else seen.clamp(max=window))).sum() for window in self._windows]
        values = [torch.as_tensor(value, device=positions.device) for value in (rows, tokens, predicted, *pairs)]
        self._counts[training] = self._counts[training] + torch.stack(values)

    def count_batch(self, batch: Mapping[str, Any]) -> None:
        """Add a batch of rows with labels: packed, with `position_ids`, or padded, with `attention_mask`, [R, L]."""
        mask = batch.get("attention_mask")
        real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        positions = batch["position_ids"] if "position_ids" in batch else (mask.cumsum(1) - 1).clamp(min=0)
        self.count(positions, (batch["labels"] != -100).sum(), real)

    def figures(self, accelerator: Any) -> dict[str, float]:
        """Return the log's figures since the last call, of all processes together; all of them must call this."""
        counts, seconds, processes = self._counts, self._seconds, accelerator.num_processes
        self._forget()
        if not isinstance(counts[True], Tensor) or not seconds:
            return {}
        none = torch.zeros_like(counts[True])
        both = torch.stack([counts[True], none if isinstance(counts[False], int) else counts[False]])
        trained, alone = accelerator.reduce(both, "sum").tolist()
        figures = {"tokens_per_second": trained[0] / seconds, "computed_tokens_per_second": trained[1] / seconds}
        if self._arithmetic is not None and self._peak is not None:
            flops = self._arithmetic.training(self._work(trained), self._adapter)
            flops += self._arithmetic.forward(self._work(alone))
            figures["mfu"] = flops / (seconds * processes * self._peak * 1e12)
        return figures

    def _work(self, counts: list[int]) -> Work:
        _, tokens, predicted, *pairs = counts
        return Work(tokens, predicted, dict(zip(self._windows, pairs, strict=True)))


class Metered:
    """A trainer of transformers whose log has the figures of a `Meter`; inherit this first, then the trainer.

    `tokens_per_second` are those of the rows that are trained on, however often one is computed;
    `computed_tokens_per_second` those that go through the model in training; `mfu` is the model FLOP utilisation.
    """

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.meter = Meter.of(self.model)  # type: ignore[attr-defined]
        self.add_callback(self.meter)  # type: ignore[attr-defined]

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        """Load the batches of a step, and start its clock; see `Trainer`."""
        self.meter.begin_step()
        return super().get_batch_samples(*arguments, **keywords)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures to a line of the log; see `Trainer`."""
        if "loss" in logs:
            logs.update(self.meter.figures(self.accelerator))  # type: ignore[attr-defined]
        super().log(logs, start_time)  # type: ignore[misc]
