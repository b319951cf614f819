"""Training an adapter in fewer passes over memory: PEFT's LoRA layers, and norms, with the same values and gradients.

On a GPU most of a training step went into small operations that read and write whole activations: PEFT computes an
adapter through float32 copies of a layer's input, and transformers a norm as ten operations in float32. Here an adapter
is added by the matrix product itself, and a norm is torch's fused one. No compiler is needed. Weights, their names and
what is saved stay those of PEFT and transformers.

Shapes: N tokens, r the adapter's rank.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear


def fuse_on_gpu(model: nn.Module, device: torch.device) -> None:
    """Fuse the layers of a model that is trained on a GPU; elsewhere nothing changes."""
    if device.type == "cuda":
        fuse_layers(model)


def fuse_layers(model: nn.Module) -> None:
    """Let a model's LoRA layers and its frozen norms compute as described above, from now on."""
    for name, module in list(model.named_modules()):
        if type(module) is Linear:
            module.__class__ = FusedLoraLinear
        elif (fused := fused_norm(module)) is not None:
            model.set_submodule(name, fused)


class FusedLoraLinear(Linear):
    """PEFT's LoRA layer. What is not a plain adapter on a frozen plain layer is computed by PEFT's own code."""

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Return the layer's output with the adapter's added, [..., out] of [..., in]."""
        if arguments or keywords or not self._is_plain(x):
            return super().forward(x, *arguments, **keywords)
        (name,), base, device = self.active_adapters, self.base_layer, x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        factors = (self.lora_A[name].weight, self.lora_B[name].weight)
        rows = x.to(dtype).reshape(-1, x.shape[-1])  # [N, in]
        y = _LoraProduct.apply(rows, base.weight, base.bias, *factors, self.scaling[name])  # [N, out]
        return y.view(*x.shape[:-1], y.shape[-1])

    def _is_plain(self, x: Tensor) -> bool:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (name,), base = self.active_adapters, self.base_layer
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return False
        dropout = self.lora_dropout[name]
        if self.training and getattr(dropout, "p", 0) > 0:
            return False
        parts, autocast = (base, self.lora_A[name], self.lora_B[name]), torch.is_autocast_enabled(x.device.type)
        return (
            all(_is_bare_linear(part) for part in parts)
            and not any(parameter.requires_grad for parameter in base.parameters())
            and (autocast or x.dtype == base.weight.dtype)
        )


def _is_bare_linear(module: nn.Module) -> bool:
    """Return whether a call would do nothing but multiply: not quantised, sharded, offloaded or watched."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    bare = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return bare and not any(hooks) and "forward" not in vars(module)


class _LoraProduct(torch.autograd.Function):
    """x W' + bias + scale (x A') B', with W, A and B taken to x's type; no gradient for W and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        a, b = down.to(x.dtype), up.to(x.dtype)  # [r, in], [out, r]
        y = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))  # [N, out]
        inner = x @ a.T  # [N, r]
        y.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scale, ctx.types = scale, (down.dtype, up.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, inner, weight, a, b = ctx.saved_tensors
        d_inner = dy @ b  # [N, r], without the scale
        dx = d_down = d_up = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight.to(x.dtype)).addmm_(d_inner, a, alpha=ctx.scale)  # [N, in]
        if ctx.needs_input_grad[3]:
            d_down = _scaled(d_inner.T @ x, ctx.scale, ctx.types[0])  # [r, in]
        if ctx.needs_input_grad[4]:
            d_up = _scaled(dy.T @ inner, ctx.scale, ctx.types[1])  # [out, r]
        return dx, None, None, d_down, d_up, None


def _scaled(product: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return torch.mul(product, scale, out=torch.empty_like(product, dtype=dtype))  # one kernel for scale and type


class FusedNorm(nn.Module):
    """RMSNorm, `x / sqrt(mean(x^2) + eps) * (weight + offset)`, by torch's kernel, which is fused on GPUs.

    Args:
        offset: 1 if the weight is stored as the difference from 1, as Gemma does, else 0.
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: int):
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm, of the shape and type of `x`; the statistics are float32."""
        if x.dim() == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
            # heads before tokens: the kernel would copy them
            return self.forward(x.transpose(1, 2)).transpose(1, 2)
        normed = normalized(x, self.eps)
        return _TimesOneMore.apply(normed, self.weight.to(x.dtype)) if self.offset else self.weight * normed


def normalized(x: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps)` over the last dimension; one kernel on GPUs, and one backward."""
    # not torch.nn.functional.rms_norm, which gives float32 under autocast
    normed: Tensor = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], None, eps)[0]
    return normed


class _TimesOneMore(torch.autograd.Function):
    """x (1 + weight), where 1 + weight is not rounded to their type; no gradient for the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.addcmul(x, x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return torch.addcmul(dy, dy, ctx.saved_tensors[0]), None


def fused_norm(module: nn.Module) -> FusedNorm | None:
    """Return the fused form of a frozen RMSNorm, or None for all other modules; a trial decides which kind it is.

    A norm whose forward takes more than one argument, such as a gate, stays: the model may call it with all of them.
    """
    eps, weight = getattr(module, "variance_epsilon", getattr(module, "eps", None)), getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or "forward" in vars(module):  # as Liger's norms
        return None
    if not isinstance(eps, float) or not isinstance(weight, nn.Parameter) or weight.requires_grad or not weight.numel():
        return None
    if weight.ndim != 1 or len(inspect.signature(module.forward).parameters) != 1:
        return None
    trial = torch.linspace(-2, 3, weight.numel(), dtype=torch.float32, device=weight.device)  # [width]
    trial = torch.stack([trial, 1e-3 * trial])[None]  # [1, 2, width]; in the second row eps counts
    with torch.no_grad():
        try:
            expected = module(trial)
        except Exception:  # noqa: BLE001 - it is no norm over the last dimension
            return None
        for offset in (0, 1):
            found = FusedNorm(weight, eps, offset)(trial)
            if torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
                return FusedNorm(weight, eps, offset)
    return None
