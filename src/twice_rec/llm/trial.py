"""Try, before a model is loaded, whether rows that share a beginning get the values of rows of their own.

No configuration says how layers look at tokens: recurrent ones see all that came before, whatever a mask says, and some
families do not hand segments on to their attention. So a small copy of the model, with few and narrow layers and random
weights, computes a few tokens both ways. This takes a second, at 8B four, and needs no weights and no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from twice_rec.errors import InputError
from twice_rec.llm.attention import layer_windows
from twice_rec.llm.recipe import ANOTHER_MODEL, VARLEN
from twice_rec.llm.shared_prefix import Group, SharedRows
from twice_rec.llm.tokens import first_line
from twice_rec.random_streams import stream_seed

_ENDS = ((41, 6, 13), (41, 6, 37, 4), (28,), (41, 10, 22, 9, 33))
_GROUPS: tuple[Group, ...] = (((5, 17, 3, 29, 11, 8, 23, 2, 14, 31, 7, 19), _ENDS), ((12, 30, 1, 4), _ENDS[:2]))
_DISTANCE = 1e-3  # of logprobs in float32; layouts that fit differ by 1e-5 and less, others by 0.1 and more
# Numbers of a configuration that do not decide how tokens see each other -> their limit in a small copy. A window is
# made shorter than a row, so that it counts.
_LIMITS = {
    r"vocab_size": 64,
    r"_token_id$": 0,
    r"intermediate_size$|^n_inner$|^ffn_(dim|hidden_size)$": 64,
    r"^(sliding_window|window_size|attention_window_size)$": 8,
    r"^num_kv_shared_layers$": 0,
}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_shared_rows(name: str | Path, config: PreTrainedConfig, attention: str, alone: Sequence[str]) -> None:
    """Look whether a model's rows may be laid out together with this kind of attention.

    Args:
        attention: one of `recipe.SHARES_PREFIXES`.
        alone: settings with which no rows share a row; empty if none do.

    Raises:
        InputError: if they may not, with the settings that work.
    """
    instead = [*(["attn_implementation sdpa"] if attention == VARLEN and ANOTHER_MODEL not in alone else []), *alone]
    try:
        layer_windows(config.get_text_config())
        trial = _Trial(config)
    except ValueError as error:
        raise _refusal(name, attention, str(error), instead) from error
    if (fault := trial.fault(attention, together=True)) is None:
        return
    for other in ("sdpa", "eager"):
        if other != attention and trial.fault(other, together=bool(alone)) is None:
            raise _refusal(name, attention, fault, [f"attn_implementation {other}"])
    kinds = [kind for kind in (attention, "sdpa", "eager") if kind != VARLEN and trial.fault(kind, False) is None]
    if kinds and ANOTHER_MODEL not in alone:
        instead = [*([] if kinds[0] == attention else [f"attn_implementation {kinds[0]}"]), *alone]
    raise _refusal(name, attention, fault, instead)


def _refusal(name: str | Path, attention: str, fault: str, use: Sequence[str]) -> InputError:
    what = f"{name}: rows of this model cannot share a beginning or a pack with attn_implementation {attention}"
    return InputError(f"{what}: {fault}; use {', '.join(use or [ANOTHER_MODEL])}")


class _Trial:
    """A small copy of a model, and its values of rows of their own.

    Raises:
        ValueError: if no copy runs.
    """

    def __init__(self, config: PreTrainedConfig):
        error: Exception | None = None
        for small in _small(config):
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(stream_seed(0, "weights of a trial"))
                    self._model = _build(small)
                    for parameter in self._model.parameters():
                        if parameter.ndim == 2:  # what a token does must show in others
                            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
                self._config, self._expected = small, _values(self._model, together=False)
            except Exception as caught:  # noqa: BLE001 - what odd settings make of transformers
                error = caught
            else:
                return
        raise ValueError(f"it cannot be tried here, for no small copy of it runs ({first_line(error or Exception())})")

    def fault(self, attention: str, together: bool) -> str | None:
        """Return what is wrong with rows that share a row, or with rows of their own; None if nothing is."""
        try:
            model = _build(self._config, attn_implementation=attention)
            model.load_state_dict(self._model.state_dict(), assign=True)
            found = _values(model, together)
        except Exception as error:  # noqa: BLE001 - layers stumble over what they do not know in many ways
            return re.split(r"; |\. ", str(error) if isinstance(error, InputError) else first_line(error))[0]
        distance = float((found - self._expected).abs().max())
        return None if distance < _DISTANCE else f"in a trial their logprobs were wrong by {distance:.1g}"


def _build(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    return model.eval()


@torch.no_grad()
def _values(model: PreTrainedModel, together: bool) -> Tensor:
    """Return the logprob of every token of the continuations, [N]."""
    if together:
        rows = SharedRows.of(_GROUPS, model)
        logits = model(**rows.inputs(model), use_cache=False).logits[rows.row, rows.column]  # [M, V]
        return torch.log_softmax(logits, dim=-1).gather(1, rows.targets[:, None])[rows.places, 0]
    found = []
    for prompt, continuations in _GROUPS:
        for continuation in continuations:
            ids = torch.tensor([[*prompt, *continuation]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]  # [tokens, V]
            found.append(torch.log_softmax(logits, dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(found)


def _small(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Return copies with a layer of each kind, and with all layers; both are narrow, but their attention is not."""
    count = config.get_text_config().num_hidden_layers
    for kept in (_kinds_of_layers(config), range(count)):
        yield type(config).from_dict(_shrunk(config.to_dict(), kept, count))


def _kinds_of_layers(config: PreTrainedConfig) -> Sequence[int]:
    """Return the first layer of each of `layer_types`; without these, all up to the last that is built otherwise."""
    text = config.get_text_config()
    if kinds := getattr(text, "layer_types", None):
        return sorted(map(kinds.index, set(kinds)))
    with torch.device("meta"):
        modules = AutoModelForCausalLM.from_config(config).modules()
    lists = (part for part in modules if isinstance(part, torch.nn.ModuleList) and len(part) == text.num_hidden_layers)
    layers: Any = next(lists, ())
    built = [tuple((name, type(part)) for name, part in layer.named_modules()) for layer in layers]
    return range(max(map(built.index, built), default=text.num_hidden_layers - 1) + 1)


def _shrunk(values: Mapping[str, Any], kept: Sequence[int], count: int) -> dict[str, Any]:
    """Return the values of a configuration with these of its `count` layers, and small numbers where that is safe."""
    small = {}
    for key, value in values.items():
        limit = next((limit for pattern, limit in _LIMITS.items() if re.search(pattern, key)), None)
        if key == "quantization_config":
            continue
        if isinstance(value, Mapping) and key.endswith("_config"):
            small[key] = _shrunk(value, kept, count)
        elif isinstance(value, list) and limit is not None:
            small[key] = [min(each, limit) for each in value][: len(kept)]
        elif isinstance(value, list) and len(value) == count:
            small[key] = [value[number] for number in kept]
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(value, len(kept) if key in _DEPTHS else value if limit is None else limit)
        else:
            small[key] = value
    return small
