"""SASRec: item and position embeddings, causal self-attention blocks, dot products with the item embeddings.

The architecture is the release's: GELU, post-LayerNorm, one shared item embedding for input and output. Pre-LayerNorm
is a setting. Sequences are padded on the right with 0, so a causal mask alone keeps padding out of every real position.
Everything but the attention itself works on the real positions only, laid end to end: with histories of 5 to 18 items
that is a third of the padded work.
Shapes: B sequences of at most L items, T real positions in them, D = hidden_size, H heads, N items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from twice_rec.catalog import ItemCatalog
from twice_rec.cf.confidence import ConfidenceModel, Histories
from twice_rec.cf.held_out import HeldOut
from twice_rec.cf.recipe import SASRecConfig
from twice_rec.errors import InputError
from twice_rec.files import atomic_path
from twice_rec.item_sequences import ItemSequences


class Dropout(nn.Dropout):
    """Dropout whose draws take a quarter of the time on a CPU, where torch's own take a third of a training step."""

    def forward(self, x: Tensor) -> Tensor:
        """Set a share `p` of the entries to 0, and scale the others by 1 / (1 - p)."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        return x * (torch.rand(x.shape) >= self.p).to(x.dtype).mul_(1 / (1 - self.p))


class Block(nn.Module):
    """Causal self-attention, then a feed-forward layer, each with a residual connection and LayerNorm."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.inner = nn.Linear(width, config.inner_size)
        self.outer = nn.Linear(config.inner_size, width)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, real: Tensor, shape: tuple[int, int]) -> Tensor:
        """Transform the real positions, laid end to end: [T, D] -> [T, D].

        Args:
            real: int64 [T], the place of each position in the flattened [B * L] batch.
            shape: (B, L).
        """
        if self.config.norm == "pre":
            x = x + self.dropout(self._attend(self.attention_norm(x), real, shape))
            return x + self.dropout(self._feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self._attend(x, real, shape)))
        return self.feed_forward_norm(x + self.dropout(self._feed_forward(x)))

    def _attend(self, x: Tensor, real: Tensor, shape: tuple[int, int]) -> Tensor:
        (batch, length), width, heads = shape, x.shape[-1], self.config.num_heads
        # Queries, keys and values go back to their places in the padded batch; only attention needs it.
        padded = x.new_zeros(batch * length, 3 * width).index_copy(0, real, self.query_key_value(x))  # [B * L, 3D]
        q, k, v = padded.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        if self.training and self.config.dropout and x.device.type == "cpu":
            scores = q @ k.transpose(2, 3) * (width // heads) ** -0.5  # [B, H, L, L]
            later = torch.ones(length, length, dtype=torch.bool).triu(1)  # [L, L]
            mixed = self.dropout(scores.masked_fill(later, -torch.inf).softmax(3)) @ v  # [B, H, L, D / H]
        else:
            dropout = self.config.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)  # [B, H, L, D / H]
        return self.output(mixed.transpose(1, 2).reshape(batch * length, width).index_select(0, real))  # [T, D]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.outer(self.dropout(F.gelu(self.inner(x))))


class SASRec(nn.Module):
    """The sequence model (Kang and McAuley, 2018). Items are indices 1..N, 0 is padding."""

    def __init__(self, config: SASRecConfig, num_items: int):
        super().__init__()
        self.config = config
        self.num_items = num_items
        self.item_embedding = nn.Embedding(num_items + 1, config.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)
        self.input_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size) if config.norm == "pre" else nn.Identity()
        self.apply(_initialise)

    def settings(self) -> dict[str, Any]:
        """Return what the model is built from, for a file."""
        return {"num_items": self.num_items, **self.config.values_of(SASRecConfig)}

    def forward(self, items: Tensor) -> Tensor:
        """Return the states after every real item, laid end to end: int64 [B, L], padded with 0 -> float [T, D]."""
        flat = items.reshape(-1)  # [B * L]
        real = (flat > 0).nonzero().squeeze(1)  # [T]
        embedded = self.item_embedding(flat[real]) + self.position_embedding(real % items.shape[1])  # [T, D]
        x = self.dropout(embedded if self.config.norm == "pre" else self.input_norm(embedded))
        for block in self.blocks:
            x = block(x, real, tuple(items.shape))  # [T, D]
        return self.final_norm(x)

    @torch.no_grad()
    def user_states(self, histories: Histories, batch_size: int = 1024) -> Tensor:
        """Return the state after each history's last item: float [B, D]. The most recent `max_length` items count.

        Raises:
            ValueError: for an empty history.
        """
        recent = ItemSequences.of(histories).latest(self.config.max_length)
        if not recent.lengths.all():
            raise ValueError("SASRec needs at least one item of history")
        states, device = [], self.item_embedding.weight.device
        for start in range(0, len(recent), batch_size):
            batch = recent[start : start + batch_size]
            last = torch.from_numpy(batch.lengths.cumsum() - 1).to(device)  # [batch], laid end to end
            states.append(self(torch.from_numpy(batch.padded()).to(device))[last])  # [batch, D]
        return torch.cat(states)


def _initialise(module: nn.Module) -> None:
    """Draw normal weights with standard deviation 0.02; biases and padding are 0 (as BERT, and as RecBole)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])


class SASRecScorer(ConfidenceModel):
    """A trained SASRec: rankings for evaluation, confidences for the reward of stage 3.

    Attributes:
        signs: what stage 3a said of its training, see `checks`.
    """

    def __init__(self, model: SASRec):
        self.model = model.eval()
        self.signs: Sequence[str] = ()

    @torch.inference_mode()
    def scores(self, users: NDArray[np.int64], histories: Histories) -> Tensor:
        """Return z of the whole catalogue: float32 [B, N], column j for index j + 1. See `CFScorer`."""
        return self.model.user_states(histories) @ self.model.item_embedding.weight[1:].T

    @torch.inference_mode()
    def logits(self, histories: Histories, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `ConfidenceModel`. Equal histories are computed once, all in one forward pass."""
        rows: dict[tuple[int, ...], int] = {}
        row_of = [rows.setdefault(tuple(history), len(rows)) for history in histories]
        states = self.model.user_states(list(rows))[torch.tensor(row_of)]  # [B, D]
        embeddings = self.model.item_embedding.weight[
            torch.from_numpy(items.astype(np.int64)).to(states.device)
        ]  # [B, C, D]
        return torch.einsum("bd,bcd->bc", states, embeddings).cpu().numpy()

    @torch.inference_mode()
    def item_means(self, histories: Histories) -> NDArray[np.float32]:
        """See `ConfidenceModel`. z is linear in the state, so the mean state gives the mean z."""
        return (self.model.item_embedding.weight @ self.model.user_states(histories).mean(0)).cpu().numpy()

    @torch.inference_mode()
    def popularity_share(self, histories: Histories) -> float:
        """Return the popularity share of z over B users: the share of its variance that the item alone explains.

        It is the variance over items of the mean z over users, divided by the variance of all z: a number in [0, 1].
        Near 1, the model ranks the same items first for everybody. No [B, N] matrix is made: second moments suffice.
        """
        users = self.model.user_states(histories).double().cpu().numpy()  # [B, D]
        items = self.model.item_embedding.weight[1:].double().cpu().numpy()  # [N, D]
        mean = users.mean(axis=0) @ items.mean(axis=0)  # of all z
        second_moment = np.trace((users.T @ users) @ (items.T @ items)) / (len(users) * len(items))
        return float((items @ users.mean(axis=0)).var() / (second_moment - mean**2))

    def save(self, path: Path, catalog: ItemCatalog) -> None:
        """Write one safetensors file: weights, item means, settings, calibration, the catalogue's fingerprint."""
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        if self.item_mean is not None:
            tensors["item_mean"] = torch.from_numpy(self.item_mean)
        about = {
            "settings": self.model.settings(),
            "calibration": dict(self.calibration),
            "catalog": catalog.fingerprint,
            "held_out": asdict(self.held_out),
            "signs": list(self.signs),
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"sasrec": json.dumps(about)})  # safetensors shuffles keys if there are more

    @classmethod
    def load(cls, path: Path, catalog: ItemCatalog, device: str | torch.device = "cpu") -> SASRecScorer:
        """Read what `save` wrote.

        Raises:
            InputError: for a missing or damaged file, and for a model of another catalogue, naming both.
        """
        if not path.exists():
            raise InputError(f"{path}: no such file; train SASRec first (sasrec.sh)")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["sasrec"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            settings = dict(about["settings"])
            num_items, config = settings.pop("num_items"), SASRecConfig(**settings)
            calibration = {name: tuple(pair) for name, pair in about["calibration"].items()}
            trained_on = about["catalog"]
            held_out, signs = HeldOut(**about.get("held_out", {})), about.get("signs", [])
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: not a SASRec of this project ({error}); train it again (sasrec.sh)") from None
        if trained_on != catalog.fingerprint:
            raise InputError(
                f"{path} was trained on another catalogue: {num_items} items with fingerprint {trained_on[:12]}, but "
                f"this run's catalogue has {len(catalog)} items with fingerprint {catalog.fingerprint[:12]}; train "
                "SASRec on this run's data (sasrec.sh), or use the run_dir it belongs to"
            )
        with torch.random.fork_rng(devices=[]):
            model = SASRec(config, num_items)
        item_mean = tensors.pop("item_mean", None)
        try:
            model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
        except RuntimeError as error:
            fault = f"its weights are not those of its settings: {' '.join(str(error).split())}"[:300]
            raise InputError(f"{path}: {fault}; train it again (sasrec.sh)") from None
        scorer = cls(model.to(device))
        scorer.item_mean = None if item_mean is None else item_mean.numpy()
        scorer.calibration = calibration
        scorer.held_out, scorer.signs = held_out, signs
        return scorer
