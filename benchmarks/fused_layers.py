"""Operations of one decoder layer in LoRA training, and what they read and write: fused layers beside PEFT's.

    python benchmarks/fused_layers.py

Counted on a CPU, forward and backward under bfloat16 autocast, as a stand-in for kernels on a GPU: each operation but
views and allocations, and the bytes of its tensors. torch's fused norm counts as one operation each way, as it is on
GPUs; on a CPU it would be ten. The figures are those of three layers less those of two, per token.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reporting import report
from shapes import SHAPES, bare_model
from twice_rec.llm import fused

FREE = (
    "view",
    "_unsafe_view",
    "t.",
    "transpose",
    "permute",
    "detach",
    "expand",
    "slice",
    "unsqueeze",
    "select",
    "alias",
)
PRODUCTS = ("mm", "attention")


@torch.library.custom_op("twice_rec_benchmarks::norm", mutates_args=())
def norm(x: Tensor, eps: float) -> Tensor:
    """Stand in for torch's fused norm: `x / sqrt(mean(x^2) + eps)`."""
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@torch.library.custom_op("twice_rec_benchmarks::norm_backward", mutates_args=())
def norm_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Stand in for its backward; the values do not count here."""
    return gradient.clone()


def keep_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward reads."""
    ctx.save_for_backward(inputs[0])


norm.register_autograd(lambda ctx, dy: (norm_backward(dy, *ctx.saved_tensors), None), setup_context=keep_input)


class Count(TorchDispatchMode):
    """Operations, and the bytes that they read and write: of matrix products with attention, and of all others."""

    def __init__(self):
        super().__init__()
        self.operations, self.products, self.others = 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and count it."""
        out = function(*args, **(kwargs or {}))
        name = str(function).partition(".")[2]
        if not name.startswith((*FREE, "empty", "zeros")):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            count = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.operations += 1
            if any(word in name for word in PRODUCTS):
                self.products += count
            else:
                self.others += count
        return out


def counted(options: argparse.Namespace, layers: int, parts: tuple[str, ...]) -> tuple[int, float, float]:
    """Operations, and KiB per token of products and of others, of a model with so many layers."""
    SHAPES["counted"] = {**SHAPES[options.shape], "num_hidden_layers": layers, "vocab_size": 512}
    model = bare_model("counted", "sdpa", "cpu", torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    plain = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    if "lora" in parts:
        fused.fuse_layers(model)
    for name, module in plain.items():  # put back or taken alone
        model.set_submodule(name, (fused.fused_norm(module) if "norm" in parts else None) or module)
    ids = torch.randint(3, 90, (1, options.tokens))
    with Count() as count:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    return count.operations, count.products / 1024 / options.tokens, count.others / 1024 / options.tokens


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gemma-3-1b")
    parser.add_argument("--tokens", type=int, default=1024, help="of the only row")
    parser.add_argument("--quick", action="store_true", help="the small shape, 64 tokens")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.tokens = "small", 64
    fused.normalized = norm
    found = {}
    for parts in ((), ("lora",), ("norm",), ("lora", "norm")):
        three, two = (counted(options, layers, parts) for layers in (3, 2))
        found[parts] = operations, products, others = [a - b for a, b in zip(three, two, strict=True)]
        name = " and ".join(parts) or "nothing"
        print(f"{name} fused: {operations} operations, KiB per token {others:,.0f} and {products:,.0f} in products")
    (theirs, *of_theirs), (ours, *of_ours) = found[()], found["lora", "norm"]
    more = {"ours_kib": round(sum(of_ours)), "theirs_kib": round(sum(of_theirs)), "shape": options.shape}
    report("fused_layers", "PEFT 0.21.2, transformers 5.17", ours, theirs, "operations/layer", False, **more)


if __name__ == "__main__":
    main()
