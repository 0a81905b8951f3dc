"""LightningCLI as this project uses it: one-line errors, run folders, exit codes.

Apart from `cli.py` and `__main__.py` this is the only file in this folder that knows Lightning
and the three folders beside it.
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Before anything can import a tokenizer: they warn about forking otherwise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import yaml
from filelock import FileLock, Timeout
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import (
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)

# What YAML may name without a second thought: importing registers the classes.
from callbacks import BestCandidate, Checkpoint, Completions, Progress, SafetyTest
from datamodules import Demonstrations, Preferences, Prompts
from hcrlhf import doctor, processes, resume
from hcrlhf.backbone import LoraOptions
from hcrlhf.certificate import (
    CERTIFICATE_FILE,
    PLAN_FILE,
    VERDICT_FILE,
    pass_figures,
    read_verdict,
    verdict_record,
)
from hcrlhf.cli import (
    INTERRUPTED,
    NO_SOLUTION,
    NOT_TESTED,
    PASSED,
    did_you_mean,
    quiet_loading,
)
from hcrlhf.completions import markdown_table
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError, is_out_of_memory
from hcrlhf.hashing import read_json, require_writable, write_json, write_text
from hcrlhf.human import HumanLabels
from hcrlhf.kl import AdaptiveKL
from hcrlhf.methods import METHODS
from hcrlhf.multiplier import (
    FixedMultiplier,
    LogMultiplier,
    PIDMultiplier,
    ProjectedMultiplier,
    SoftplusMultiplier,
)
from hcrlhf.pessimism import PaperPessimism
from hcrlhf.ppo import PPO
from hcrlhf.rloo import RLOO
from hcrlhf.rollouts import Decoding
from hcrlhf.scorers import PythonScorer, SequenceClassifier
from hcrlhf.stages import FILE as STAGE_FILE
from hcrlhf.text import ChatFormat, one_line
from lightning_modules import Policy, Preference, PreferenceClassifier, Supervised
from lightning_modules.adapter_module import QUANTISES_ADAPTERS

# What a config may name by class_path.
CLASSES: tuple[Any, ...] = (
    *METHODS.values(),
    *(FixedMultiplier, LogMultiplier, PIDMultiplier, ProjectedMultiplier, SoftplusMultiplier),
    *(PPO, RLOO, PythonScorer, SequenceClassifier),
    *(Supervised, Preference, PreferenceClassifier, Policy),
    *(Demonstrations, Preferences, Prompts),
    *(SafetyTest, BestCandidate, Checkpoint, Completions, Progress),
)


def class_path(cls: type) -> str:
    """As configs write it: those of the folders beside hcrlhf by the folder alone."""
    module = cls.__module__
    return f"{module if module.startswith('hcrlhf.') else module.split('.')[0]}.{cls.__name__}"


# Of the trainer, by command: with one of these at 0 nothing runs.
LIMITS = {
    "fit": ("max_epochs", "max_steps", "limit_train_batches"),
    "validate": ("limit_val_batches",),
    "test": ("limit_test_batches",),
    "predict": ("limit_predict_batches",),
}


class Parser(LightningArgumentParser):
    """Errors of a config become one line, and a misspelt key is not short for another."""

    # The parsers of the subcommands are made without a way to say this.
    allow_abbrev = property(lambda self: False, lambda self, value: None)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(short_error(str(ex or message)))


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml when training begins: a config that is refused leaves nothing behind.

    The settings lie in every checkpoint too, so that a resumed run is compared with them. From then
    on the folder is this process's: a second one would mix its files with the first one's.

    Args:
        run: what `resume.describe` says of this run.
    """

    def __init__(self, *args: Any, run: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run = run
        self._lock: FileLock | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[resume.KEY] = self.run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "test"):  # either ends in a verdict
            self._take(trainer)

    def _take(self, trainer: Trainer) -> None:
        """Locks the folder. Where there is none yet nobody trains, and what is refused leaves none.

        Raises:
            InputError: another run trains or tests there; in all processes of this one.
        """
        folder, free = Path(trainer.default_root_dir), True
        if trainer.is_global_zero and self._lock is None and folder.is_dir():
            lock = FileLock(folder / ".fit.lock")
            try:
                lock.acquire(timeout=0)
                self._lock = lock
            except Timeout:
                free = False
            except (OSError, NotImplementedError):  # a file system without locks
                pass
        if not processes.from_first(free):
            raise InputError(
                f"another process trains or tests in {folder}; wait for it, or choose another "
                "trainer.default_root_dir"
            )

    def _give(self) -> None:
        if self._lock is not None:
            # While it is held: a lock file that is removed later may be another process's.
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._give()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take(trainer)  # of a folder that the safety test has made by now

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
        self._take(trainer)
        if trainer.ckpt_path is None and (folder / resume.FILE).is_file():
            rank_zero_info(
                f"{folder / resume.FILE} will be replaced; --ckpt_path last would go on from it"
            )
        if trainer.is_global_zero:
            config = self.config.clone()
            config.ckpt_path = None  # where a run went on from is not part of what it is
            text = self.parser.dump(config, skip_none=False)
            path = folder / "config.yaml"
            if path.is_file() and path.read_text(encoding="utf-8") != text:
                put_aside(path)
            write_text(path, text)


class MetricsFile(CSVLogger):
    """metrics.csv in the run folder, made with the first metric: a refused run leaves no folder.

    The file of a run that is resumed is kept as metrics-1.csv, metrics-2.csv, …
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="", version="")

    @property
    def experiment(self) -> Any:
        # The trainer asks for it before anything is checked; None makes no folder.
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._experiment is None:
            path = Path(self.log_dir) / "metrics.csv"
            if path.is_file():
                put_aside(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._experiment = ExperimentWriter(log_dir=self.log_dir)
        super().log_metrics(metrics, step)

    def save(self) -> None:
        if self._experiment is not None:
            super().save()


class EventFiles(TensorBoardLogger):
    """TensorBoard's event files in RUN/tensorboard, made with the first figure or text."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="tensorboard", version="", default_hp_metric=False)
        self._begun = False

    @property
    def experiment(self) -> Any:
        # As with `MetricsFile`: None makes no folder.
        return super().experiment if self._begun else None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._begun = True
        # A point that is not finite cannot be drawn, and the writer says so each time.
        super().log_metrics({k: v for k, v in metrics.items() if math.isfinite(v)}, step)

    @rank_zero_only
    def log_text(
        self, key: str, columns: list[str], data: list[list[str]], step: int | None = None
    ) -> None:
        """A table as text; the signature is that of Lightning's WandbLogger."""
        self._begun = True
        self.experiment.add_text(key, markdown_table(columns, data), step)

    def save(self) -> None:
        if self._experiment is not None:
            self._experiment.flush()


def put_aside(path: Path) -> None:
    """Renames name.ext to name-1.ext, name-2.ext, …: of a run that was resumed all is kept."""
    kept = (p.stem.rpartition("-")[2] for p in path.parent.glob(f"{path.stem}-*{path.suffix}"))
    number = 1 + max((int(n) for n in kept if n.isdecimal()), default=0)
    path.rename(path.with_name(f"{path.stem}-{number}{path.suffix}"))


def card_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA card; None for another device."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


class CLI(LightningCLI):
    """Adds the run folder: `trainer.default_root_dir` holds everything that a run writes."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 2**32:
            raise InputError(f"seed_everything lies in [0, 2^32), got {seed}")

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would put the checkpoint's hyperparameters over the user's config."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        trainer = config.trainer
        if not config.get("data"):
            raise InputError(
                "no data is given; the config's data names a data module, for example "
                "class_path: datamodules.Prompts"
            )
        if not trainer.default_root_dir:
            raise InputError(
                "trainer.default_root_dir names the run's folder, and it is not set; for example "
                "--trainer.default_root_dir runs/my-run"
            )
        # Without a GPU Lightning would take bf16 in its place, and the same config would be refused
        # only where there is one.
        if str(trainer.precision) in ("16", "16-mixed"):
            raise InputError(
                f"precision {trainer.precision} scales the loss, and the gradients with it, which "
                "a limit on their norm would then cut; use bf16-mixed or 32-true"
            )
        # As Lightning's trainer does, which would find another folder than what is checked here.
        trainer.default_root_dir = os.path.expanduser(trainer.default_root_dir)
        folder = Path(trainer.default_root_dir)
        if self.subcommand != "validate":
            require_writable(folder, "trainer.default_root_dir")
        for key in LIMITS[str(self.subcommand)]:
            if trainer[key] == 0:
                raise InputError(f"trainer.{key} is 0, so {self.subcommand} would do nothing")
        if found := next(folder.glob("hpc_ckpt_*"), None):
            raise InputError(
                f"Lightning would go on from {found}, which it wrote when SLURM requeued a run, in "
                "the middle of an update; remove it: --ckpt_path last goes on"
            )
        if trainer.fast_dev_run and (folder / resume.FILE).is_file():
            raise InputError(
                f"fast_dev_run tries a config, and {folder} holds a run; choose another "
                "trainer.default_root_dir"
            )
        if self.subcommand == "fit" and (folder / STAGE_FILE).is_file():
            raise InputError(
                f"{folder} already holds a finished stage; choose another "
                "trainer.default_root_dir, or remove that folder"
            )
        self._resume(folder)

    def _resume(self, folder: Path) -> None:
        """Finds the checkpoint, compares its settings with the config's, and says what differs."""
        config, command = self.config[self.subcommand], str(self.subcommand)
        text = self.parser.dump(self.config, format="json", skip_none=False)
        run = resume.describe(json.loads(text)[command])
        self.save_config_kwargs = {"run": run}
        self._changed = True
        given = config.get("ckpt_path")
        options = config.model.get("init_args", {})
        policy = options.get("policy")
        if given is not None and policy is not None:
            raise InputError(
                f"--policy {policy} and --ckpt_path {given} are two policies; give one"
            )
        if command == "test" and "policy" in options and given is policy is None:
            raise InputError(
                "test without a policy would spend δ on one that was never trained; give "
                "--ckpt_path or --policy FOLDER"
            )
        if command in ("validate", "predict") and "policy" in options and given is policy is None:
            if (folder / resume.FILE).is_file() or (folder / "policy").is_dir():
                raise InputError(
                    f"{command} without --ckpt_path would measure the supervised policy, and "
                    f"{folder} holds a trained one; give --ckpt_path last, or another "
                    "trainer.default_root_dir"
                )
            rank_zero_info("no checkpoint is given: the supervised policy answers")
        checkpoint = resume.find(given, folder, command)
        # A file also for "last", so that the two behave alike.
        config.ckpt_path = None if checkpoint is None else str(checkpoint)
        if checkpoint is not None:
            changes = resume.check(checkpoint, run, command)
            # What a run whose time is over goes on with.
            length = ("data.init_args.updates", "trainer.max_time", "trainer.callbacks")
            self._changed = any(change.key.startswith(length) for change in changes)
            if command == "fit":
                rank_zero_info(f"the run goes on from {checkpoint}")
            for change in changes:
                rank_zero_info(f"  changed from here on: {change}")
        elif given is not None:
            rank_zero_info(f"no {folder / resume.FILE} yet: the run begins at its first update")

    def before_test(self) -> None:
        self._require_no_verdict()

    def _require_no_verdict(self) -> None:
        """
        Raises:
            InputError: without a safety test, in the folder of one.
        """
        path = Path(self.trainer.default_root_dir) / VERDICT_FILE
        tests = any(isinstance(c, SafetyTest) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        if tests or not isinstance(self.model, Policy):
            return
        record = read_verdict(path)
        ended = record is not None and record["plan_hash"] is not None
        if ended or path.with_name(PLAN_FILE).is_file():
            raise InputError(
                f"{path.parent} holds a safety test, and this config has no callbacks.SafetyTest, "
                "so that its verdict would be written over; choose another "
                "trainer.default_root_dir"
            )

    def _require_card(self) -> None:
        """
        Raises:
            InputError: the card is too small for what is foretold.
        """
        total = card_memory(self.trainer.strategy.root_device)
        if total is None:
            return
        whole = json.loads(self.parser.dump(self.config, format="json", skip_none=False))
        if doubt := doctor.require_card(whole[self.subcommand], total):
            rank_zero_warn(doubt)

    def before_fit(self) -> None:
        """Settings of the trainer that cannot reach a module which steps by itself."""
        self._require_no_verdict()
        self._require_card()
        if isinstance(self.model, Policy):
            self.model.settings_changed = self._changed
        if self.model.automatic_optimization:
            return
        if self.trainer.gradient_clip_val is not None:
            raise InputError(
                "trainer.gradient_clip_val does not reach the steps of a policy; remove it and "
                "set model.init_args.max_grad_norm"
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise InputError(
                "trainer.accumulate_grad_batches does not reach the steps of a policy; remove it "
                "and set model.init_args.micro_batch_size"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand].trainer
        given = config.logger
        own = given in (None, True)
        if self.subcommand == "fit" and given is not False:
            # What the config names comes beside ours; these lie in the run folder itself.
            others = [] if own else given if isinstance(given, list) else [given]
            folder = config.default_root_dir
            kwargs["logger"] = [MetricsFile(folder), EventFiles(folder), *others]
        elif own:
            kwargs["logger"] = False  # the other commands leave nothing to look up later
        if isinstance(self.model, Policy):
            kwargs["use_distributed_sampler"] = False  # it shares a batch out itself
        plugins = config.plugins if isinstance(config.plugins, list) else [config.plugins]
        plugins = [plugin for plugin in plugins if plugin is not None]
        # Lightning's trainer asks for a GPU before it asks the module, which refuses as well.
        if any(isinstance(plugin, BitsandbytesPrecision) for plugin in plugins):
            raise InputError(QUANTISES_ADAPTERS)
        told = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
        if SLURMEnvironment.detect() and not told:
            # Requeued, Lightning would go on from a checkpoint of its own: in the middle of an
            # update, and without a look at the settings.
            kwargs["plugins"] = [*plugins, SLURMEnvironment(auto_requeue=False)]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, ImportError, RuntimeError) as error:  # what Lightning itself refuses
            raise InputError(f"trainer: {one_line(error)}") from error
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise InputError(
                f"trainer.strategy {config.strategy} starts processes that leave their weights to "
                "this one, which has built no model; set trainer.strategy: ddp"
            )
        return trainer


def run(arguments: Sequence[str]) -> int:
    """Runs one of Lightning's commands and returns its exit code.

    Raises:
        InputError: the config or what it names cannot be used.
    """
    _quiet()
    try:
        cli = _cli(arguments)
    except SIGTERMException:  # a SystemExit without a code: it would read as success
        return INTERRUPTED
    except MisconfigurationException as error:
        if "No supported gpu backend" in str(error):
            raise InputError(
                "trainer.accelerator is gpu, and PyTorch finds none; set trainer.accelerator: cpu, "
                "or install a build of torch for this machine's GPU"
            ) from error
        raise InputError(one_line(error)) from error
    except Exception as error:
        # A class that refused its arguments: the parser has wrapped what it said.
        if found := find_input_error(error):
            raise found from None
        if isinstance(error, ValueError) and "Does not validate" in str(error):
            raise InputError(short_error(str(error))) from error
        if isinstance(error, ValueError) and "val_check_interval" in str(error):  # Lightning's
            raise InputError(f"trainer: {one_line(error)}") from error
        if isinstance(error, UnicodeDecodeError):
            raise InputError(
                f"a config or a file of data is not UTF-8 text ({one_line(error)})"
            ) from None
        if is_out_of_memory(error):  # where passes could be halved, they were
            raise InputError(
                f"out of memory ({one_line(error)}); set model.init_args.gradient_checkpointing: "
                "true or optimizer: adamw_8bit, or put less into one pass: halve micro_batch_size "
                "and rollout_batch_size of a policy; of another stage data.init_args.batch_size, "
                "and double trainer.accumulate_grad_batches (hcrlhf doctor says what fits)"
            ) from None
        raise
    if getattr(cli.trainer, "interrupted", False):
        return INTERRUPTED
    if isinstance(cli.model, Policy) and cli.subcommand in ("fit", "test"):
        return _verdict_code(cli.trainer)
    return PASSED


OF_A_POLICY = (
    "--ckpt_path FILE is the checkpoint of a run, --policy FOLDER an adapter or merged model"
)
HELP = {
    command: {
        "description": description,
        "epilog": "the keys below model and data: hcrlhf fit --model.help CLASS, --data.help CLASS",
    }
    for command, description in {
        "fit": "Trains a stage; a policy's safety test comes at its end.",
        "validate": "Measures a stage, or a policy, on what it was not trained on.",
        "test": f"The safety test of a policy that is trained: {OF_A_POLICY}.",
        "predict": f"A policy's answers to the evaluation prompts: {OF_A_POLICY}.",
    }.items()
}


def require_yaml(arguments: Sequence[str]) -> None:
    """
    Raises:
        InputError: a config file is no YAML; says where, which the parser does not.
    """
    pairs = [argument.partition("=") for argument in arguments]
    names = [value for flag, _, value in pairs if flag == "--config"]
    names += [value for flag, value in itertools.pairwise(arguments) if flag == "--config"]
    for path in (Path(name) for name in names if name):
        try:
            for _ in yaml.parse(path.read_text(encoding="utf-8")) if path.is_file() else ():
                pass
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise InputError(f"{path}{place}: not YAML ({error.problem})") from None
        except (OSError, ValueError, yaml.YAMLError):
            pass  # the parser says what is wrong


def _cli(arguments: Sequence[str], cls: type[CLI] = CLI) -> CLI:
    require_yaml(arguments)
    return cls(
        save_config_callback=SaveConfig,
        parser_class=Parser,
        parser_kwargs={"prog": "hcrlhf", **HELP},
        # The modules make their own optimizers.
        auto_configure_optimizers=False,
        # The module's arguments are not kept in checkpoints: a resumed run takes its settings
        # from the config alone, safety settings above all.
        load_from_checkpoint_support=False,
        seed_everything_default=0,
        args=list(arguments),
    )


class _Parsed(Exception):
    """Carries a config out of a command line that would go on to build what it names."""


class _ParseOnly(CLI):
    def before_instantiate_classes(self) -> None:
        raise _Parsed(self.parser.dump(self.config, format="json", skip_none=False))


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The config of `hcrlhf fit` with these arguments, every default filled in, as plain data.

    Raises:
        InputError: it cannot be read.
    """
    _quiet()
    try:
        _cli(["fit", *arguments], _ParseOnly)
    except _Parsed as parsed:
        config: dict[str, Any] = json.loads(str(parsed))["fit"]
        return config
    raise RuntimeError("a config was built where it should only have been read")


def _verdict_code(trainer: Trainer) -> int:
    """The exit code of a policy run; says the verdict, and writes one where no test was set up."""
    path = Path(trainer.default_root_dir) / VERDICT_FILE
    if any(isinstance(c, SafetyTest) for c in trainer.callbacks):  # type: ignore[attr-defined]
        record = read_verdict(path)
        assert record is not None, "written when the fit or test began"
    else:
        record = verdict_record("NOT_TESTED", "the config has no callbacks.SafetyTest", None)
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
    words = record["verdict"].replace("_", " ").lower() if record["verdict"] != "PASS" else "PASS"
    if trainer.is_global_zero:
        print(f"verdict: {words} ({record['reason']}); see {path.parent}")
        if record["verdict"] == "PASS":
            print(f"  {pass_figures(read_json(path.with_name(CERTIFICATE_FILE)))}")
    return {"PASS": PASSED, "NO_SOLUTION_FOUND": NO_SOLUTION}.get(record["verdict"], NOT_TESTED)


def _quiet() -> None:
    """Turns off what libraries say about themselves; what they say of the user's run stays."""
    quiet_loading()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_about_the_run)
    for pattern in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)


# Each says something that is so by design here.
QUIET_WARNINGS = (
    ".*does not have many workers.*",  # examples are encoded before the loader sees them
    ".*args parameter is intended to run from within Python.*",  # the demo does
    ".*smaller than the logging interval.*",
    ".*sync_dist=True.*",  # every process of a policy run has the figures of all
    ".*LeafSpec.*",  # Lightning with a newer torch
    ".*in eval mode at the start of training.*",  # `AdapterModule.on_train_start`
    ".*is_gradient_checkpointing. is deprecated.*",  # PEFT asks transformers
    ".*Experiment logs directory.*",  # verdict.json is there before the first metric
    ".*callbacks used to create the checkpoint.*",  # predict runs with fewer
    ".*your dataloader is not resumable.*",  # its sampler asks the trainer where to go on
    ".*gradient_checkpointing_enable. is deprecated.*",  # its successor needs transformers 5.2x
)

BOILERPLATE = re.compile(
    r"💡|Seed set to|[GTH]PU available|weights_only|to estimate number of stepping|"
    r"Trainer\.fit. stopped|Restor(ing|ed all) states|Loaded model weights|litlogger"
)


def _is_about_the_run(record: logging.LogRecord) -> bool:
    return BOILERPLATE.search(record.getMessage()) is None


# -- errors ----------------------------------------------------------------------------------------

NOISE = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Expected a <class .(?:NoneType|str).>$|"
    r"Given value|Expected a path but|Problem with given class_path|Not a valid subclass|"
    r"- Expected a path|Subclass types expect|a class path \(str\)|a dict with)"
)


def find_input_error(error: BaseException | None) -> InputError | None:
    """The InputError that caused `error`, however a parser wrapped it."""
    while error is not None:
        if isinstance(error, InputError):
            return error
        error = error.__cause__ or error.__context__
    return None


def short_error(message: str) -> str:
    """jsonargparse's message of many lines as one: where, what, and the likely remedy."""
    keys, what = [], []
    for line in message.splitlines():
        text = line.strip(" -")
        while found := re.match(r'Parser key "([^"]+)":\s*', text):
            keys.append(found[1])
            text = text[found.end() :]
        if text and not NOISE.match(text) and text not in what:
            what.append(text)
    # What follows the first remark about a value repeats the value, however long it is.
    reasons = [remedy(text) for text in what if not text.startswith("Namespace(")]
    where = ".".join(keys)
    text = "; ".join(reasons[:2]) if reasons else " ".join(message.split())
    return f"{where}: {text}" if where else text


def remedy(text: str) -> str:
    """One remark of the parser in words, with a suggestion for a misspelt name."""
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        name = f"{found[1]}.{found[2]}"
        return f"no class {name!r}{did_you_mean(name, map(class_path, CLASSES))}"
    if found := re.search(r"No module named '([\w.]+)'", text):
        return f"no module {found[1]!r}{did_you_mean(found[1], map(class_path, CLASSES))}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", text):
        return unknown_key(found[1])
    if re.match(r"Unexpected config:?$", text):
        return "a config file holds no keys; expected YAML with model, data and trainer"
    if found := re.search(r"arguments are required: fit.model|are required: \w+\.model", text):
        return "no model is given; name a config with --config FILE.yaml"
    unknown = r"(?:unrecognized arguments: -*|does not accept option ')([\w.]+)"
    if found := re.search(unknown, text):
        return unknown_key(found[1])
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    return re.sub(r"Expected an? (.*?)\. Got value: (.*)", r"expected \1, got \2", text)


FULL_SOFTMAX = (
    "training samples from the full softmax, since the log-probabilities that PPO and the KL "
    "compare are those of the full softmax; the safety test and the shipped "
    "generation_config.json draw likewise (top_k 0, top_p 1, repetition_penalty 1), so that what "
    "is tested is what is used; remove it"
)
RESPONSE_LIMIT = (
    "the length limit of responses is chat.max_response_tokens of the supervised stage, which "
    "every later stage reads; change it there and run the stages again"
)
# Keys that people know from elsewhere, and what takes their place here.
FOREIGN_KEYS = {
    **dict.fromkeys(("top_k", "top_p", "min_p", "repetition_penalty"), FULL_SOFTMAX),
    **dict.fromkeys(("max_new_tokens", "max_length", "response_length"), RESPONSE_LIMIT),
}


def unknown_key(key: str) -> str:
    """What to do about a key that nothing accepts."""
    name = key.rpartition(".")[2]
    if name in FOREIGN_KEYS:
        return f"no key {name!r}: {FOREIGN_KEYS[name]}"
    return f"unknown key {key!r}{did_you_mean(name, known_keys())}"


def known_keys() -> list[str]:
    """Every key that a config of this project may hold below model, data and trainer."""
    options = (
        Constraint,
        PaperPessimism,
        HumanLabels,
        ChatFormat,
        Decoding,
        LoraOptions,
        AdaptiveKL,
    )
    classes = (*CLASSES, *options, Trainer)
    names = {name for cls in classes for name in inspect.signature(cls).parameters}
    return sorted(names | {"class_path", "init_args", "model", "data", "trainer", "config"})
