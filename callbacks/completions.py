"""What the policy writes, for people to read."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from hcrlhf.completions import COLUMNS, console_table, table_rows
from hcrlhf.errors import InputError
from hcrlhf.examples import EncodesExamples
from hcrlhf.safety import HoldsSafetyPrompts, SafetyTestable

FILE = "completions.jsonl"


class Completions(Callback):
    """Shows what the policy answers while it learns; writes all answers on `predict`.

    While fitting, the same few validation prompts are answered every `every_n_updates` updates
    and after the last one, each with the same random numbers, so that what changes is the policy.
    Training is not touched by it. Never safety prompts: their responses must not be looked at.

    Args:
        every_n_updates: updates between two tables.
        count: validation prompts that are answered, the first ones that fit; 0 for none. They go
            to completions.jsonl, to TensorBoard and to W&B, where these are on.
        console: of them, how many are printed.
        predictions: file name of what `predict` writes.

    Both files lie in the run folder.
    """

    def __init__(
        self,
        every_n_updates: int = 25,
        count: int = 8,
        console: int = 2,
        predictions: str = "predictions.jsonl",
    ) -> None:
        if every_n_updates < 1:
            raise InputError(f"every_n_updates is a whole number >= 1, got {every_n_updates}")
        for name, value in (("count", count), ("console", console)):
            if value < 0:
                raise InputError(f"{name} is a whole number >= 0, got {value}")
        self.every_n_updates = every_n_updates
        self.count = count
        self.console = console
        self.predictions = predictions
        self._batch: Any = None
        self._predicted = 0  # answers of one predict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, SafetyTestable):
            raise InputError(
                f"Completions writes what a policy answers, and {type(pl_module).__name__} is "
                "none; remove callbacks.Completions from the config"
            )

    # -- while fitting -------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(EncodesExamples, pl_module)
        data = cast(HoldsSafetyPrompts, cast(Any, trainer).datamodule)
        encoded = (module.encode(prompt) for prompt in data.validation_prompts)
        chosen = list(islice((e for e in encoded if e is not None), self.count))
        self._batch = module.collate(chosen).to(pl_module.device) if chosen else None
        self._forget(trainer, cast(SafetyTestable, pl_module).updates)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        update = cast(SafetyTestable, pl_module).updates
        due = trainer.is_last_batch or update % self.every_n_updates == 0
        if self._batch is None or not due:
            return
        records = pl_module.predict_step(self._batch, 0)
        self._append(trainer, FILE, [{"update": update, **r} for r in records])
        for logger in trainer.loggers:
            # W&B's signature, which our TensorBoard logger follows.
            if hasattr(logger, "log_text"):
                logger.log_text(
                    key="completions", columns=list(COLUMNS), data=table_rows(records), step=update
                )
        if shown := records[: self.console]:
            width = shutil.get_terminal_size((100, 24)).columns
            table = console_table(f"answers after {update} updates", shown, width)
            # Through the progress bar, where one is drawn.
            pl_module.print(table, file=sys.stderr)

    # -- predict -------------------------------------------------------------------------------

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove(trainer, self.predictions)
        self._predicted = 0

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
        self._predicted += len(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(trainer.default_root_dir) / self.predictions
        rank_zero_info(f"{self._predicted} answers written to {path}")

    # -- files ---------------------------------------------------------------------------------

    def _forget(self, trainer: Trainer, updates: int) -> None:
        """Removes what was written after the checkpoint that a run goes on from."""
        path = Path(trainer.default_root_dir) / FILE
        if updates == 0:
            self._remove(trainer, FILE)
        if not trainer.is_global_zero or not path.is_file():
            return
        # The last line may have been cut off, and other ends of lines stand inside of texts.
        *lines, _ = path.read_bytes().split(b"\n")
        kept = [line + b"\n" for line in lines if json.loads(line)["update"] <= updates]
        path.write_bytes(b"".join(kept))

    @staticmethod
    def _remove(trainer: Trainer, name: str) -> None:
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / name).unlink(missing_ok=True)

    @staticmethod
    def _append(trainer: Trainer, name: str, records: list[dict[str, Any]]) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
