"""What tests name by class_path: a kill from within, too little memory, a learner that draws."""

import os
import random
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import SafetyTest
from hcrlhf.backbone import Backbone
from hcrlhf.ppo import PPO


class Kill(Callback):
    """SIGKILL when a method is called for the nth time: nothing is closed, nothing is cleared up.

    Args:
        method: of the trainer, or of the module. `save_checkpoint` is let write half of its file.
    """

    def __init__(self, method: str, call: int) -> None:
        self.method, self.left = method, call

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        holder: Any = trainer if hasattr(trainer, self.method) else pl_module
        honest = getattr(holder, self.method)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left > 0:
                return honest(*arguments, **options)
            if self.method == "save_checkpoint":
                honest(*arguments, **options)
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            return os.kill(os.getpid(), signal.SIGKILL)

        setattr(holder, self.method, counted)


class OwnTest(SafetyTest):
    """A safety test that somebody has derived."""


class Numbered(Callback):
    """Keeps one of NumPy's numbers, which torch does not read again with weights_only."""

    def state_dict(self) -> dict[str, Any]:
        return {"seen": np.float64(1.0)}


class Short(Callback):
    """One process runs out of memory in each backward pass through more rows than it has room for.

    Args:
        rank: of that process.
    """

    def __init__(self, rank: int, rows: int) -> None:
        self.rank, self.rows = rank, rows

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.global_rank != self.rank:
            return
        backbone: Any = Backbone
        honest = backbone.hidden

        def fail(_: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        def limited(own: Backbone, tokens: Any) -> torch.Tensor:
            states: torch.Tensor = honest(own, tokens)
            if torch.is_grad_enabled() and len(states) > self.rows:
                states.register_hook(fail)
            return states

        backbone.hidden = limited


@dataclass(frozen=True)
class Restless(PPO):
    """Draws from every global generator in each minibatch, as a user's learner may."""

    def policy_loss(self, *arguments: Any) -> torch.Tensor:
        noise = 1 + 0.1 * (random.random() + np.random.random() + torch.rand(()))
        return noise * super().policy_loss(*arguments)
