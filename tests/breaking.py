"""What tests/test_resume.py names by class_path: a kill from within, and a learner that draws."""

import os
import random
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

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


@dataclass(frozen=True)
class Restless(PPO):
    """Draws from every global generator in each minibatch, as a user's learner may."""

    def policy_loss(self, *arguments: Any) -> torch.Tensor:
        noise = 1 + 0.1 * (random.random() + np.random.random() + torch.rand(()))
        return noise * super().policy_loss(*arguments)
