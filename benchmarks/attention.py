"""Attention alone, forward and backward, over a prompt and its completions: varlen, and sdpa with masks.

    python benchmarks/attention.py --shape gemma-3-1b --prompt 7000 --samples 16 --completion 300

One row, [prompt, completion 1, completion 2, ...]; the heads are those of the shape, the numbers random bfloat16 (on a
CPU float32, and varlen's reference instead of its kernel, which is there for tests). For a layer with full attention
and one with a sliding window of 512.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reporting import show_line
from shapes import SHAPES, WINDOW
from twice_rec.llm.varlen import Segments, varlen_attention


def times(attend, inputs: tuple[Tensor, ...], repeats: int) -> float:
    """Median milliseconds of a forward and backward, after two that do not count."""
    found = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        attend(*inputs).sum().backward()
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - begun))
    return statistics.median(found[2:])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--prompt", type=int, default=500)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--completion", type=int, default=20)
    parser.add_argument("--kernels", nargs="+", choices=["varlen", "sdpa"], default=["varlen", "sdpa"])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    gpu, shape = torch.cuda.is_available(), SHAPES[options.shape]
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    prompt, length = options.prompt, options.prompt + options.samples * options.completion
    heads, keys, size = (shape[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    torch.manual_seed(0)
    inputs = tuple(
        torch.randn(1, count, length, size, device=device, dtype=dtype, requires_grad=True)
        for count in (heads, keys, keys)
    )
    parts = [((), prompt), *((range(prompt), options.completion) for _ in range(options.samples))]
    segments, order = Segments.of(parts, device), torch.arange(length, device=device)
    branch = torch.where(order < prompt, -1, (order - prompt) // options.completion)  # [L]
    position = torch.where(order < prompt, order, prompt + (order - prompt) % options.completion)  # [L]
    for kind, window in (("full", None), ("sliding", WINDOW)):
        mask = (order <= order[:, None]) & ((branch < 0) | (branch == branch[:, None]))  # [L, L]
        if window is not None:
            mask &= position[:, None] - position < window
        mask = mask[None, None]  # [1, 1, L, L]

        def varlen(query, key, value, window=window):
            return varlen_attention(None, query, key, value, None, sliding_window=window, **segments.keywords())[0]

        def sdpa(query, key, value, mask=mask):
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

        kernels = {"varlen": varlen, "sdpa": sdpa}
        with torch.no_grad():
            expected = sdpa(*inputs).transpose(1, 2)
            error = (varlen(*inputs) - expected).float().norm() / expected.float().norm()
        row: dict[str, object] = {"layer": kind, "shape": options.shape, "prompt": prompt, "samples": options.samples}
        row |= {"completion": options.completion, "difference": float(f"{error:.2g}")}
        for name, kernel in kernels.items():
            if name not in options.kernels:
                continue
            try:
                row[f"{name}_ms"] = round(times(kernel, inputs, options.repeats), 3)
            except Exception as error:  # noqa: BLE001  a kernel that does not take a shape is a result too
                row[f"{name}_ms"] = f"{type(error).__name__}: {str(error)[:120]}"
        show_line("attention", **row)


if __name__ == "__main__":
    main()
