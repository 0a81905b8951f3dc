"""Checkpoints that count policy updates, not optimizer steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from hcrlhf.errors import InputError
from hcrlhf.hashing import replace_durably
from hcrlhf.resume import FILE, read
from hcrlhf.safety import SafetyTestable
from hcrlhf.text import one_line


class Checkpoint(ModelCheckpoint):
    """Keeps checkpoints/last.ckpt in the run folder, written whole or not at all.

    Lightning's own counter counts every optimizer step, of which an update may make several.

    Args:
        every_n_updates: training batches between two checkpoints. One more is written after every
            epoch and, where a safety test follows, at the end of training. Other stages write
            their folder there, which Lightning would not ask of a fit that is resumed and over:
            one that is broken then is repeated from the checkpoint before.
    """

    def __init__(self, every_n_updates: int = 50) -> None:
        if every_n_updates < 1:
            raise InputError(f"every_n_updates is a whole number >= 1, got {every_n_updates}")
        super().__init__(save_last=True, save_top_k=0)
        self.every_n_updates = every_n_updates
        self._read_back = False  # whether one was, in this process

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str((Path(trainer.default_root_dir) / FILE).parent)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Never between two batches whose gradients are added up: gradients are not kept. Nor after
        # an epoch's last batch: resumed from there, its validation would be left out.
        period = math.lcm(self.every_n_updates, trainer.accumulate_grad_batches)
        due = (batch_idx + 1) % period == 0 and not trainer.is_last_batch
        if due and trainer.global_step != trainer.max_steps:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        over = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        over = over or trainer.global_step == trainer.max_steps
        if isinstance(pl_module, SafetyTestable) or not over:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: Lightning would write last.ckpt once more, in place."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: validation does not decide when to save."""

    def state_dict(self) -> dict[str, Any]:
        return {}  # Lightning's names the folder, and complains of a run that was moved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(str(self.dirpath)) / FILE.name
        temporary = path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            if not self._read_back:
                require_readable(temporary)
                self._read_back = True
            replace_durably(temporary, path)
        self.last_model_path = str(path)


def require_readable(path: Path) -> None:
    """
    Raises:
        InputError: the checkpoint holds what no later run would read.
    """
    try:
        read(path)
    except InputError as error:
        cause = one_line(error.__cause__ or error)
        raise InputError(
            f"this checkpoint could not be read again ({cause}); the state_dict of every "
            "callback in the config may hold plain numbers, texts, lists, dicts and tensors alone"
        ) from error
