"""A LightningModule with a layer of this library, trained by truncated back-propagation.

    pip install lightning
    python examples/integrations/lightning_module.py

The task is to tell the majority of about the last fifty votes, of which the window shows eight. The
sequences are cut into batches; the state is carried from one to the next, without its gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from longctx_layers import DPASSM, detach_state

DECAY = 0.98  # of a vote's weight per token


class Tagger(L.LightningModule):
    def __init__(self, d_model: int = 32, window_size: int = 8, learning_rate: float = 5e-3):
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(2, d_model)
        self.norm = nn.RMSNorm(d_model)
        self.layer = DPASSM(d_model, 2, window_size=window_size, ssm_state_dim=16)
        self.head = nn.Sequential(nn.RMSNorm(d_model), nn.Linear(d_model, 2))
        self.state: Any = None

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Map tokens `[B, T]` to logits `[B, T, 2]`, and return the state after them."""
        h = self.embed(x)
        y, state = self.layer(self.norm(h), state)
        return self.head(h + y), state

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        votes, labels = batch
        logits, state = self(votes, self.state)
        self.state = detach_state(state)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_start(self) -> None:
        self.state = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"])


class Votes(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches of consecutive random votes, with the majority of about the last 50 as labels."""

    def __init__(self, rows: int = 16, length: int = 64, pieces: int = 20) -> None:
        self.rows = rows
        self.length = length
        self.pieces = pieces

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        total = torch.zeros(self.rows, 1)
        age = torch.arange(1, self.length + 1)
        for _ in range(self.pieces):
            votes = torch.randint(0, 2, (self.rows, self.length), generator=draw)
            added = ((2 * votes - 1) / DECAY**age).cumsum(1)
            totals = (total + added) * DECAY**age
            total = totals[:, -1:]
            yield votes, (totals > 0).long()


def main(epochs: int = 12, **trainer: Any) -> Tagger:
    L.seed_everything(0, verbose=False)
    model = Tagger()
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", **trainer}
    fit = L.Trainer(max_epochs=epochs, gradient_clip_val=1.0, **options)
    fit.fit(model, DataLoader(Votes(), batch_size=None))
    print(f"loss {fit.callback_metrics['train_loss']:.3f} (chance 0.693)")
    return model


if __name__ == "__main__":
    main()
