"""Which policy of a run goes to the safety test: the best one that is likely to pass it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from hcrlhf.constraint import with_etas
from hcrlhf.errors import InputError
from hcrlhf.examples import EncodesExamples
from hcrlhf.safety import HoldsSafetyPrompts, OffersCandidates, SafetyTestable


class BestCandidate(Callback):
    """Looks at the policy now and then, and ends training with the best one it saw.

    A multiplier swings about its level, so the last policy of a run may stand on either side of a
    limit. Every look answers the validation prompts, each time with the same random numbers. The
    candidate is the policy with the highest mean reward among those whose safety test is forecast
    to be passed (`Constraint.pass_probability`) with probability 1 - miss_probability; with several
    constraints each is given its share of the miss, as in training. If there is none, the last
    policy stays, and the candidate check of `callbacks.SafetyTest` has its say.

    The looks touch no safety prompt, so the promise holds whatever they choose. A finished run that
    is resumed with more updates goes on from its last policy, not from the candidate.

    Args:
        every_n_updates: updates between two looks; there is one more after the last update.
        start: share of the run before the first look, in [0, 1].
        batch_size: validation prompts per forward pass.

    Raises:
        InputError: the module is no policy.
    """

    def __init__(
        self, every_n_updates: int = 10, start: float = 0.5, batch_size: int = 100
    ) -> None:
        for name, value in (("every_n_updates", every_n_updates), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} is a whole number >= 1, got {value}")
        if not 0 <= start <= 1:
            raise InputError(f"start is a share of the run in [0, 1], got {start}")
        self.every_n_updates = every_n_updates
        self.start = start
        self.batch_size = batch_size
        self._best: dict[str, Any] = {}
        self._last: dict[str, Any] = {}  # of a run that ended with another policy

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(pl_module, OffersCandidates):
            raise InputError(
                f"BestCandidate chooses among policies, and {type(pl_module).__name__} is none; "
                "remove callbacks.BestCandidate from the config"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = cast(HoldsSafetyPrompts, cast(Any, trainer).datamodule)
        update = cast(SafetyTestable, pl_module).updates
        if self._last and update < data.updates:
            cast(OffersCandidates, pl_module).load_policy_state(self._last, update)
            self._last = {}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        data = cast(HoldsSafetyPrompts, cast(Any, trainer).datamodule)
        update = cast(SafetyTestable, pl_module).updates
        due = trainer.is_last_batch or update % self.every_n_updates == 0
        if due and update >= self.start * data.updates:
            self._look(data, pl_module, update)

    def _look(self, data: HoldsSafetyPrompts, pl_module: LightningModule, update: int) -> None:
        module = cast(OffersCandidates, pl_module)
        rewards, costs = self._answered(data, pl_module)
        constraints = with_etas(module.constraints, module.training_costs)
        count = len(constraints)
        chances = [c.pass_probability(costs) for c in constraints]
        reward = float(rewards.mean())
        likely = all(
            chance >= 1 - c.miss / count for chance, c in zip(chances, constraints, strict=True)
        )
        better = likely and reward > self._best.get("reward", -np.inf)
        shown = ", ".join(
            f"{c.label} {chance:.0%}" for c, chance in zip(constraints, chances, strict=True)
        )
        rank_zero_info(
            f"update {update}: reward {reward:.3g} on {len(costs)} validation prompts; forecast to "
            f"pass: {shown}{'; the candidate from now on' if better else ''}"
        )
        if better:
            self._best = {"update": update, "reward": reward, "state": module.policy_state()}

    def _answered(
        self, data: HoldsSafetyPrompts, pl_module: LightningModule
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Rewards and costs (m,) of one response to each validation prompt."""
        encoder = cast(EncodesExamples, pl_module)
        found = (encoder.encode(prompt) for prompt in data.validation_prompts)
        encoded = [e for e in found if e is not None]
        records: list[dict[str, Any]] = []
        for begin in range(0, len(encoded), self.batch_size):
            batch = encoder.collate(encoded[begin : begin + self.batch_size])
            records += pl_module.predict_step(batch.to(pl_module.device), 0)
        rewards = np.array([record["reward"] for record in records])
        return rewards, np.array([record["cost"] for record in records])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # One epoch is the whole run. Before the last checkpoint is written and the test begins.
        if not self._best:
            rank_zero_info("no policy of this run is likely to pass; the last one stays")
            return
        module = cast(OffersCandidates, pl_module)
        self._last = module.policy_state()
        module.load_policy_state(self._best["state"], self._best["update"])
        rank_zero_info(f"the candidate is the policy after update {self._best['update']}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self._best), "last": dict(self._last)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._last = dict(state_dict["best"]), dict(state_dict["last"])
