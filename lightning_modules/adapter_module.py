"""What the stages share: an optimizer, checks; and a backbone with adapter-only checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hcrlhf import machine, optimizers, processes
from hcrlhf.backbone import Backbone, LoraOptions, load_causal_lm
from hcrlhf.errors import InputError, is_out_of_memory
from hcrlhf.gradients import known_gradient
from hcrlhf.resume import rng_state, set_rng_state
from hcrlhf.stages import FILE as STAGE_FILE
from hcrlhf.stages import BackboneSource, ClassifierStage, Role, Stage, held_out, read_stage
from hcrlhf.text import ChatFormat, TextEncoder, Tokens, one_line

QUANTISES_ADAPTERS = (
    "Lightning's bitsandbytes plugin would quantise the adapters too and leave nothing to train; "
    "remove it and set quantization: nf4 on the module"
)
LOWER = "lower model.init_args.learning_rate, or look for a bad example"
Schedule = Literal["linear", "cosine", "constant"]
Result = TypeVar("Result")


def check_size(size: int | None, name: str) -> int | None:
    """
    Raises:
        InputError: it is not a number of sequences.
    """
    if size is not None and size < 1:
        raise InputError(f"{name} is a whole number >= 1 or null, got {size}")
    return size


class StageModule(LightningModule):
    """A stage of training: one AdamW over what is trained, and a folder that it leaves behind.

    Args:
        learning_rate: of AdamW, in float32.
        weight_decay: of AdamW, on every trained weight.
        schedule: of the learning rate after the warm-up; "linear" and "cosine" end at zero.
        warmup: share of all optimizer steps during which the learning rate rises to its value.
        gradient_checkpointing: recompute activations in the backward pass; less memory, slower.
        optimizer: "adamw", or with 8-bit states "adamw_8bit" or "paged_adamw_8bit".
    """

    def __init__(
        self,
        learning_rate: float,
        weight_decay: float,
        schedule: Schedule,
        warmup: float,
        gradient_checkpointing: bool,
        optimizer: optimizers.Name,
    ) -> None:
        super().__init__()
        if not 0 < learning_rate < math.inf:
            raise InputError(f"learning_rate is positive, got {learning_rate}")
        if not 0 <= weight_decay < math.inf:
            raise InputError(f"weight_decay is not negative, got {weight_decay}")
        if not 0 <= warmup < 1:
            raise InputError(f"warmup is a share of the steps in [0, 1), got {warmup}")
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup = warmup
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer = optimizer
        self._rates: list[float] = []  # of each parameter group, as the config says
        self._unfinished: Role | None = None  # the stage that this run folder does not hold yet
        self._measured_at = -1  # the step after which held-out figures were measured
        self._rng: dict[str, Any] | None = None  # of the checkpoint that the fit goes on from

    @property
    def run_folder(self) -> Path:
        return Path(self.trainer.default_root_dir)

    def setup(self, stage: str) -> None:
        """
        Raises:
            InputError: a precision or a strategy that would break adapters.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError(
                f"trainer.strategy {type(strategy).__name__} would split weights between "
                "processes, and adapters, heads and packed 4-bit weights are switched and saved "
                "whole; set trainer.strategy: ddp, or trainer.devices: 1"
            )
        precision = type(self.trainer.precision_plugin).__name__
        if precision == "BitsandbytesPrecision":
            raise InputError(QUANTISES_ADAPTERS)
        if str(self.trainer.precision) not in ("32-true", "bf16-mixed"):
            raise InputError(
                f"precision {self.trainer.precision} would cast the adapters and heads; "
                "use 32-true or bf16-mixed"
            )
        machine.choose_attention()

    def read_own_stage(
        self, command: str, role: Role, read: Callable[[str, Role, str], Any] = read_stage
    ) -> bool:
        """Whether to start from this run folder's finished stage: for every command but fit.

        Where there is none, a checkpoint has to bring the weights: `_require_weights`.
        """
        if command == "fit":
            return False
        if (self.run_folder / STAGE_FILE).is_file():
            read(str(self.run_folder), role, "trainer.default_root_dir")
            return True
        self._unfinished = role
        return False

    # `trainer.ckpt_path` is None until a checkpoint is read, which is after setup.
    def on_validation_start(self) -> None:
        self._require_weights()

    def on_test_start(self) -> None:
        self._require_weights()

    def on_predict_start(self) -> None:
        self._require_weights()

    def _require_weights(self) -> None:
        """
        Raises:
            InputError: there is neither a finished stage nor a checkpoint, so that an untrained
                model would be measured.
        """
        if self._unfinished is not None and self.trainer.ckpt_path is None:
            raise InputError(
                f"{self.run_folder} holds no finished {self._unfinished} stage and no --ckpt_path "
                "is given, so there is nothing to measure; name the folder of a finished stage in "
                "trainer.default_root_dir"
            )

    def with_gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        """The loss of a training step, which a stage with smaller passes to fall back on overrides.

        Args:
            loss: makes it, a scalar, anew each time.
        """
        return loss()

    def trained(self) -> Iterator[torch.nn.Parameter]:
        """What the optimizer changes."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def configure_optimizers(self) -> Any:
        return self.scheduled(self.made_optimizer(list(self.trained())))

    def made_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return optimizers.adamw(self.optimizer, parameters, self.learning_rate, self.weight_decay)

    def scheduled(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer with its learning-rate schedule, as Lightning takes them."""
        from transformers import get_scheduler

        if math.isinf(self.trainer.estimated_stepping_batches):
            raise InputError(
                f"trainer.max_epochs {self.trainer.max_epochs} has no end, and the schedule of the "
                "learning rate asks for the number of steps; set trainer.max_epochs or max_steps"
            )
        steps = int(self.trainer.estimated_stepping_batches)
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        # Hugging Face's "constant" leaves the warm-up out.
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        scheduler = get_scheduler(
            name, optimizer, int(self.warmup * steps), num_training_steps=steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        if self._rng is not None:
            self._use_own_rates()
            # As late as can be: what happens between here and the next batch draws nothing.
            set_rng_state(self._rng, self.device)

    def _use_own_rates(self) -> None:
        """The config's learning rates, not those that the checkpoint brought.

        lr = rate · schedule(steps so far), as the scheduler says by itself: nothing moves where the
        config is still the same.
        """
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        scheduler.base_lrs = list(self._rates)
        for group, rate, factor in zip(
            optimizer.param_groups, self._rates, scheduler.lr_lambdas, strict=True
        ):
            group["initial_lr"], group["weight_decay"] = rate, self.weight_decay
            group["lr"] = rate * factor(scheduler.last_epoch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """
        Raises:
            InputError: the loss is not finite, in the steps that are logged; in all processes.
        """
        loss = outputs.get("loss") if isinstance(outputs, dict) else None  # a policy has its own
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if loss is None or not every or self.global_step % every:
            return
        bad = not bool(loss.isfinite())
        if self.trainer.strategy.reduce_boolean_decision(bad, all=False):
            raise InputError(f"the loss is not finite after step {self.global_step}; {LOWER}")

    def measure_last_weights(self) -> None:
        """Validates once more where training ended between two validations."""
        if self._measured_at != self.global_step and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True

    def may_save_stage(self) -> bool:
        """Whether this process writes the stage's folder, at the end of training.

        Raises:
            InputError: training has made weights that nothing can be done with.
        """
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("fast_dev_run: no stage is written")
            return False
        self._require_finite_weights("stage")
        return bool(self.trainer.is_global_zero)

    def say_written(self, stage: Stage | ClassifierStage) -> None:
        rank_zero_info(f"{held_out(stage.metrics)}; written to {self.run_folder}")

    def _require_finite_weights(self, what: str) -> None:
        """
        Raises:
            InputError: training has made weights that nothing can be done with.
        """
        if not all(bool(weight.isfinite().all()) for weight in self.trained()):
            raise InputError(
                f"the trained weights are not finite, so no {what} is written; {LOWER}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._require_finite_weights("checkpoint")  # in the place of one that is
        checkpoint["rng"] = processes.gathered(rng_state(self.device))  # of each process

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn != "fit":
            return
        rank, size = processes.rank_and_size()
        states = checkpoint.get("rng", [None] * size)
        if len(states) != size:
            raise InputError(
                f"the checkpoint is of a fit with {len(states)} processes, this one has {size}; go "
                "on with as many, or begin it anew"
            )
        self._rng = states[rank]


class AdapterModule(StageModule):
    """A stage around a `Backbone`, whose checkpoints hold trained weights only."""

    strict_loading = False
    backbone: Backbone
    encoder: TextEncoder
    group_size: int | None = None  # sequences per pass of `in_groups`
    _group_at_a_time = False  # forward again in the backward pass, so that memory holds one group
    _rows = 1  # of the last batch

    def require_machine(
        self, source: BackboneSource, chat: ChatFormat, lora: LoraOptions | None
    ) -> None:
        """Before weights are downloaded or loaded: `machine.require`.

        Args:
            lora: of an adapter that is begun anew; None where one goes on, or there is none.
        """
        used = self.optimizer if self.trainer.state.fn == "fit" else "adamw"
        machine.require(source, chat, lora, used, self.trainer.strategy.root_device)

    def build_backbone(
        self, source: BackboneSource, full: bool = False, dropout: bool = True
    ) -> Backbone:
        """The frozen backbone of this run (trainable as a whole with `full`)."""
        model = load_causal_lm(source, self.device, dropout)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return Backbone(model, quantized=source.quantization == "nf4", full=full)

    def trained(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for _, parameter in self.backbone.trained_parameters())

    def in_groups(self, tokens: Tokens, forward: Callable[[Tokens], Tensor]) -> Tensor:
        """`forward` of all rows, `group_size` of similar length per pass, in their order."""
        self._rows = len(tokens)
        groups = tokens.by_length(self.group_size)
        again = self._group_at_a_time and torch.is_grad_enabled()
        parts: list[Tensor] = [
            _recomputed(forward, tokens.rows(rows)) if again else forward(tokens.rows(rows))
            for rows in groups
        ]
        return torch.cat(parts)[torch.cat(groups).argsort()]

    # -- out of memory -------------------------------------------------------------------------

    @property
    def progress(self) -> str:
        """Where training stands, for people."""
        return f"step {self.global_step}"

    def with_gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        """loss(), whose gradient is found here already: in smaller passes where memory runs out.

        The weights get it when the result's backward pass runs, so that batches add up, and
        processes average, as ever.
        """
        weights = list(self.trained())
        attempt = self._one_group_at_a_time(lambda: known_gradient(loss, weights))
        return self._with_room("group_size", None, attempt)

    def _one_group_at_a_time(self, attempt: Callable[[], Result]) -> Callable[[], Result]:
        """`attempt`, after whose first failure a group's activations live no longer than it."""

        def tried() -> Result:
            if self._group_at_a_time:
                return attempt()
            try:
                return attempt()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._group_at_a_time = True
            self._say_less_memory("the forward pass of a group is repeated in the backward pass")
            return attempt()

        return tried

    def _with_room(
        self, setting: str, largest: int | None, attempt: Callable[[], Result]
    ) -> Result:
        """What `attempt` returns; where memory runs out, at half as many sequences per pass.

        Args:
            setting: name of the attribute that says how many; it stays at what was found to fit.
            largest: how many a pass has at most; None takes the rows of the last `in_groups`.

        Raises:
            InputError: even one sequence is too much.
        """
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                most = self._rows if largest is None else largest
                before = min(getattr(self, setting) or most, most)
                if before <= 1:
                    unpacked = getattr(self, "unpacked_rollouts", False)
                    raise InputError(
                        f"out of memory with one sequence per pass ({one_line(error)}); shorten "
                        "chat.max_response_tokens, set gradient_checkpointing: true, "
                        f"{'do without unpacked_rollouts, ' if unpacked else ''}or take a smaller "
                        "model (hcrlhf doctor says what fits)"
                    ) from None
            # Outside of the handler: what the failed pass had made lives until its end.
            setattr(self, setting, before // 2)
            self._say_less_memory(f"{setting} {before} is now {before // 2}")

    def _say_less_memory(self, change: str) -> None:
        warnings.warn(f"out of memory in {self.progress}: {change}", stacklevel=3)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def on_train_start(self) -> None:
        # Hugging Face models arrive in evaluation mode, where gradient checkpointing is silently
        # off.
        self.backbone.train()
        super().on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Lightning forgets the last gradient after `training_step`, which makes the next one here.
        if self.automatic_optimization and batch_idx % self.trainer.accumulate_grad_batches == 0:
            for weight in self.trained():
                weight.grad = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return self.backbone.trained_state()

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False
    ) -> None:
        self.backbone.load_trained_state(dict(state_dict))


def _recomputed(forward: Callable[[Tokens], Tensor], part: Tokens) -> Tensor:
    """forward(part), whose activations are found once more in the backward pass.

    `checkpoint` keeps the random state of the devices of the tensors that it is given, and does not
    look into `Tokens`: without one of them dropout on CUDA would fall otherwise the second time.
    """

    def run(_: Tensor, again: Tokens) -> Tensor:
        return forward(again)

    return cast(Tensor, checkpoint(run, part.input_ids, part, use_reentrant=False))


def add_trained_role(
    backbone: Backbone, name: str, sft_adapter: str | None, lora: LoraOptions | None
) -> None:
    """A trainable role that starts as the supervised policy.

    Args:
        sft_adapter: folder of the supervised adapter; None where the backbone itself is the
            supervised policy.

    Raises:
        InputError: `lora` is given although the adapter's own shape must be kept.
    """
    if sft_adapter is None:
        backbone.add_role(name, lora, trainable=True)
    elif lora is not None:
        raise InputError(
            "lora is fixed by the supervised adapter, as a copy of which this role starts; "
            "remove lora from this config"
        )
    else:
        backbone.load_role(name, sft_adapter, trainable=True)
