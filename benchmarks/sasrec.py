"""Users a second of SASRec's training, ours beside a peer's on the same sequences, width, depth, limit and batch.

    python benchmarks/sasrec.py --peer rectools --data runs/grocery/data
    python benchmarks/sasrec.py --peer padded --data runs/grocery/data

`rectools`: RecTools' SASRecModel with full softmax, in an environment of its own (see requirements-rectools.txt).
`padded`: our re-creation of the loop that pmixer/SASRec.pytorch published: every batch is 128 sequences padded on the
left to 50, width 50, two blocks, one head, binary cross-entropy with one negative. It is a generous one: negatives are
drawn for a whole batch at once, where the original draws them item by item in worker processes.

Only training counts, neither validation nor the making of the tables. The first epoch of each is a warm-up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from reporting import paired, report
from twice_rec.cf.losses import sample_negatives
from twice_rec.cf.recipe import SASRecConfig, SASRecTrainerConfig
from twice_rec.cf.sasrec_training import SASRecTrainer
from twice_rec.data.dataset import PreparedData

ROOT = Path(__file__).parents[1]
MAX_LENGTH, BATCH, DROPOUT, LEARNING_RATE = 50, 128, 0.2, 1e-3


def ours(sequences: list[list[int]], num_items: int, width: int, heads: int, loss: str, epochs: int) -> float:
    """Users a second of our training."""
    config = SASRecConfig(
        hidden_size=width, inner_size=width, num_heads=heads, dropout=DROPOUT, norm="pre", max_length=MAX_LENGTH
    )
    trainer_config = SASRecTrainerConfig(
        loss=loss, num_negatives=1, epochs=1 + epochs, batch_size=BATCH, learning_rate=LEARNING_RATE, patience=None,
        validation_steps=-(-len(sequences) // BATCH), ema_decay=0.0, item_dropout=0.0,
    )  # fmt: skip
    trainer = SASRecTrainer(config, trainer_config, num_items, sequences, lambda model: 0.0, seed=0)
    trainer.run()
    return len(sequences) * epochs / sum(epoch.seconds for epoch in trainer.log[1:])


class PaddedSASRec(nn.Module):
    """The peer's model: pre-LayerNorm on the queries alone, ReLU, one shared item embedding."""

    def __init__(self, num_items: int, width: int):
        super().__init__()
        self.items = nn.Embedding(num_items + 1, width, padding_idx=0)
        self.positions = nn.Embedding(MAX_LENGTH + 1, width, padding_idx=0)
        self.dropout = nn.Dropout(DROPOUT)
        self.attention_norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-8) for _ in range(2))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, 1, DROPOUT) for _ in range(2))
        self.forward_norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-8) for _ in range(2))
        self.forwards = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, width, 1),
                nn.Dropout(DROPOUT),
                nn.ReLU(),
                nn.Conv1d(width, width, 1),
                nn.Dropout(DROPOUT),
            )
            for _ in range(2)
        )
        self.last_norm = nn.LayerNorm(width, eps=1e-8)

    def forward(self, items: Tensor) -> Tensor:
        """int64 [B, L], padded with 0 on the left -> float [B, L, D]."""
        length = items.shape[1]
        x = self.items(items) * self.items.embedding_dim**0.5
        x = self.dropout(x + self.positions(torch.arange(1, length + 1) * (items > 0)))
        future = ~torch.ones(length, length, dtype=torch.bool).tril()
        for norm, attention, forward_norm, forward in zip(
            self.attention_norms, self.attentions, self.forward_norms, self.forwards, strict=True
        ):
            by_position = x.transpose(0, 1)
            queries = norm(by_position)
            mixed, _ = attention(queries, by_position, by_position, attn_mask=future, need_weights=False)
            x = forward_norm((queries + mixed).transpose(0, 1))
            x = x + forward(x.transpose(1, 2)).transpose(1, 2)
        return self.last_norm(x)


def padded(sequences: list[list[int]], num_items: int, width: int, epochs: int) -> float:
    """Users a second of the padded loop."""
    table = torch.zeros(len(sequences), MAX_LENGTH + 1, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        recent = sequence[-(MAX_LENGTH + 1) :]
        table[row, -len(recent) :] = torch.tensor(recent)
    generator = torch.Generator().manual_seed(0)
    model = PaddedSASRec(num_items, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    bce = nn.BCEWithLogitsLoss()
    start = 0.0
    for epoch in range(1 + epochs):
        if epoch == 1:
            start = time.perf_counter()
        for rows in torch.randperm(len(table), generator=generator).split(BATCH):
            batch = table[rows]
            inputs, following = batch[:, :-1], batch[:, 1:]
            negatives = sample_negatives(batch, 1, num_items, generator).squeeze(-1)
            states, real = model(inputs), following > 0
            positive_logits = (states * model.items(following)).sum(-1)[real]
            negative_logits = (states * model.items(negatives)).sum(-1)[real]
            loss = bce(positive_logits, torch.ones_like(positive_logits))
            loss = loss + bce(negative_logits, torch.zeros_like(negative_logits))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return len(sequences) * epochs / (time.perf_counter() - start)


def rectools(sequences: list[list[int]], width: int, heads: int, epochs: int, python: Path) -> float:
    """Users a second of RecTools, in its own interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sequences.json").write_text(json.dumps(sequences))
        settings = {"n_factors": width, "n_heads": heads, "session_max_len": MAX_LENGTH, "batch_size": BATCH}
        settings |= {"dropout_rate": DROPOUT, "lr": LEARNING_RATE, "epochs": 1 + epochs}
        words = [str(python), str(ROOT / "benchmarks" / "rectools_sasrec.py"), folder, json.dumps(settings)]
        done = subprocess.run([*words, str(torch.get_num_threads())], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return len(sequences) * epochs / float(done.stdout.split()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["rectools", "padded"], default="padded")
    parser.add_argument("--data", type=Path, default=ROOT / "runs/tiny/data", help="prepared data (prepare.sh)")
    parser.add_argument("--users", type=int, help="only the first so many users; default: all")
    parser.add_argument("--quick", action="store_true", help="2,000 users, one round")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    data = PreparedData(arguments.data)
    num_items = len(data.catalog)
    sequences = [sequence for sequence in data.training_histories() if len(sequence) >= 2]
    if arguments.quick:
        arguments.users, arguments.rounds = 2000, 1
    sequences = sequences[: arguments.users]
    more = {"data": str(arguments.data), "users": len(sequences), "items": num_items}
    epochs = arguments.epochs
    if arguments.peer == "padded":
        pair = paired(
            lambda: ours(sequences, num_items, 50, 1, "bce", epochs),
            lambda: padded(sequences, num_items, 50, epochs),
            arguments.rounds,
        )
        report("sasrec_bce", "padded loop", *pair, "users/s", True, **more)
        return
    environment = ROOT / ".venv-rectools"
    install = ["bash", str(ROOT / "install.sh"), "benchmarks/requirements-rectools.txt"]
    subprocess.run(["env", f"VENV={environment}", *install], check=True)
    pair = paired(
        lambda: ours(sequences, num_items, 64, 2, "softmax", epochs),
        lambda: rectools(sequences, 64, 2, epochs, environment / "bin" / "python"),
        arguments.rounds,
    )
    report("sasrec_softmax", "RecTools 0.19.0 SASRecModel", *pair, "users/s", True, **more)


if __name__ == "__main__":
    main()
