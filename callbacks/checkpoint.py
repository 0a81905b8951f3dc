"""Checkpoints that count policy updates, not optimizer steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from hcrlhf.errors import InputError


class Checkpoint(ModelCheckpoint):
    """Keeps checkpoints/last.ckpt in the run folder, written whole or not at all.

    Lightning's own counter counts every optimizer step, of which an update may make several.

    Args:
        every_n_updates: training batches between two checkpoints; one more is written at the end
            of training, before the safety test.
    """

    def __init__(self, every_n_updates: int = 50) -> None:
        if every_n_updates < 1:
            raise InputError(f"every_n_updates is a whole number >= 1, got {every_n_updates}")
        super().__init__(save_last=True, save_top_k=0)
        self.every_n_updates = every_n_updates

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % self.every_n_updates == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: validation does not decide when to save."""

    def _save(self, trainer: Trainer) -> None:
        path = Path(str(self.dirpath)) / "last.ckpt"
        temporary = path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, path)
        self.last_model_path = str(path)
