"""LightningCLI as this project uses it: one-line errors, run folders, exit codes.

Apart from `cli.py` and `__main__.py` this is the only file in this folder that knows Lightning
and the three folders beside it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# Before anything can import a tokenizer: they warn about forking otherwise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

# What YAML may name without a second thought: importing registers the classes.
from callbacks import Checkpoint, Completions, Progress, SafetyTest
from datamodules import Demonstrations, Preferences, Prompts
from hcrlhf.certificate import VERDICT_FILE, verdict_record, write_json
from hcrlhf.cli import BAD_INPUT, INTERRUPTED, NO_SOLUTION, NOT_TESTED, PASSED, did_you_mean
from hcrlhf.errors import InputError
from hcrlhf.stages import FILE as STAGE_FILE
from lightning_modules import Policy, Preference, Supervised

KNOWN_CLASSES = [
    f"{cls.__module__.split('.')[0]}.{cls.__name__}"
    for cls in (
        *(Supervised, Preference, Policy),
        *(Demonstrations, Preferences, Prompts),
        *(SafetyTest, Checkpoint, Completions, Progress),
    )
]


class Parser(LightningArgumentParser):
    """Errors of a config become one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(short_error(str(ex or message)))


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml when training begins: a config that is refused leaves nothing behind."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(
                self.config, str(folder / "config.yaml"), skip_none=False, overwrite=True
            )


class CLI(LightningCLI):
    """Adds the run folder: `trainer.default_root_dir` holds everything that a run writes."""

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand].trainer
        if not trainer.default_root_dir:
            raise InputError(
                "trainer.default_root_dir names the run's folder, and it is not set; for example "
                "--trainer.default_root_dir runs/my-run"
            )
        folder = Path(trainer.default_root_dir)
        resumed = getattr(self.config[self.subcommand], "ckpt_path", None)
        if self.subcommand == "fit" and (folder / STAGE_FILE).is_file() and not resumed:
            raise InputError(
                f"{folder} already holds a finished stage; choose another "
                "trainer.default_root_dir, or remove that folder"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand].trainer
        if config.logger in (None, True):
            # metrics.csv lies in the run folder itself; the other commands log nothing there.
            logger: Any = False
            if self.subcommand == "fit":
                logger = CSVLogger(config.default_root_dir, name="", version="")
            kwargs["logger"] = logger
        return super().instantiate_trainer(**kwargs)


def run(arguments: Sequence[str]) -> int:
    """Runs one of Lightning's commands and returns its exit code.

    Raises:
        InputError: the config or what it names cannot be used.
    """
    _quiet()
    cli = CLI(
        save_config_callback=SaveConfig,
        parser_class=Parser,
        # The modules make their own optimizers.
        auto_configure_optimizers=False,
        # The module's arguments are not kept in checkpoints: a resumed run takes its settings
        # from the config alone, safety settings above all.
        load_from_checkpoint_support=False,
        seed_everything_default=0,
        args=list(arguments),
    )
    if getattr(cli.trainer, "interrupted", False):
        return INTERRUPTED
    if isinstance(cli.model, Policy) and cli.subcommand in ("fit", "test"):
        return _verdict_code(cli.trainer)
    return PASSED


def _verdict_code(trainer: Trainer) -> int:
    """The exit code of a policy run; says the verdict, and writes one where no test was set up."""
    path = Path(trainer.default_root_dir) / VERDICT_FILE
    if not any(isinstance(c, SafetyTest) for c in trainer.callbacks):  # type: ignore[attr-defined]
        reason = "the config has no callbacks.SafetyTest"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, verdict_record("NOT_TESTED", reason, None))
    record = json.loads(path.read_text())
    words = record["verdict"].replace("_", " ").lower() if record["verdict"] != "PASS" else "PASS"
    print(f"verdict: {words} ({record['reason']}); see {path.parent}")
    return {"PASS": PASSED, "NO_SOLUTION_FOUND": NO_SOLUTION}.get(record["verdict"], NOT_TESTED)


def _quiet() -> None:
    """Turns off what libraries say about themselves; what they say about the user's run stays."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).addFilter(_no_advertising)
    for pattern in (
        ".*does not have many workers.*",
        ".*num_workers.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*args parameter is intended to run from within Python.*",
        ".*GPU available but not used.*",
        ".*is smaller than the logging interval.*",
        ".*LeafSpec.*",
        ".*no prediction results will be.*",
        ".*lr_scheduler.step.*optimizer.step.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)


def _no_advertising(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not re.search(r"💡|litlogger|Tip:|GPU available|TPU available|HPU available", text)


def short_error(message: str) -> str:
    """jsonargparse's message, several lines long, as one line with the likely remedy."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", message)
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    return " ".join(lines)
