"""What the policy writes, for people to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hcrlhf.errors import InputError
from hcrlhf.safety import SafetyTestable


class Completions(Callback):
    """Writes responses as JSON lines: some validation prompts while fitting, all on `predict`.

    Never safety prompts: their responses must not be looked at.

    Args:
        count: validation prompts per validation, written to completions.jsonl.
        predictions: file name of what `predict` writes.

    Both files lie in the run folder.
    """

    def __init__(self, count: int = 8, predictions: str = "predictions.jsonl") -> None:
        if count < 0:
            raise InputError(f"count is a whole number >= 0, got {count}")
        self.count = count
        self.predictions = predictions

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, SafetyTestable):
            raise InputError(
                f"Completions writes what a policy answers, and {type(pl_module).__name__} is "
                "none; remove callbacks.Completions from the config"
            )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx > 0 or self.count == 0 or trainer.sanity_checking:
            return
        records = pl_module.predict_step(batch, 0)[: self.count]
        update = getattr(pl_module, "updates", trainer.global_step)
        self._append(trainer, "completions.jsonl", [{"update": update, **r} for r in records])

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (Path(trainer.default_root_dir) / self.predictions).unlink(missing_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._append(trainer, self.predictions, outputs)

    @staticmethod
    def _append(trainer: Trainer, name: str, records: list[dict[str, Any]]) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
