"""A progress bar that shows the figures that matter, and plain lines where there is no terminal."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class Progress(TQDMProgressBar):
    """Lightning's progress bar with short figures.

    Where the error stream is not a terminal, about `lines` plain lines take the bar's place.

    Args:
        lines: plain lines per epoch.
    """

    def __init__(self, lines: int = 10) -> None:
        super().__init__()
        self.lines = max(lines, 1)
        self.plain = not sys.stderr.isatty()
        if self.plain:
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items = trainer.progress_bar_metrics
        return {name: f"{value:.3g}" for name, value in items.items()}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        total = int(trainer.num_training_batches)
        done = batch_idx + 1
        mine = self.plain and trainer.is_global_zero
        if mine and (done == total or done % max(total // self.lines, 1) == 0):
            metrics = self.get_metrics(trainer, pl_module)
            figures = " ".join(f"{name}={value}" for name, value in metrics.items())
            print(f"  {done:>5}/{total}  {figures}", file=sys.stderr, flush=True)
