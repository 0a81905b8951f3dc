"""Which policy of a run goes to the safety test: the best one that is likely to pass it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from hcrlhf.constraint import with_etas
from hcrlhf.errors import InputError
from hcrlhf.examples import EncodesExamples
from hcrlhf.pessimism import LOOK
from hcrlhf.safety import HoldsSafetyPrompts, OffersCandidates, SafetyTestable
from hcrlhf.samples import Floats

KEPT = 6  # policies of a run that are looked at once more, until one is likely to pass
# Times the miss that a look forgives. On 400 prompts it errs by a sixth of a harm rate of 8%: with
# none forgiven it drops half of the policies that are where training aims, those with most reward.
FORGIVEN = 4


class BestCandidate(Callback):
    """Looks at the policy now and then, and ends training with the best one it saw.

    A multiplier swings about its level, so the last policy of a run may stand on either side of a
    limit, and those on the right side are not the ones with the most reward.

    Every look answers the same validation prompts, with the same random numbers, and ranks the
    policy by its mean reward if its safety test is forecast to be passed
    (`Constraint.pass_probability`) with probability 1 - FORGIVEN · miss_probability, but with an
    even chance at least. The best of many looks owes something to luck, so the KEPT best are looked
    at once more in the end, in their order, with other random numbers and on all validation
    prompts: the first policy that is likely to pass with probability 1 - miss_probability then is
    the candidate. Training aims at what a last look at LOOK prompts would accept; with more of them
    it accepts a little more, so that a policy may stand where a swing has left it. With several
    constraints each is given its share of the miss, as in training.

    Where none is likely enough, the candidate is the one that comes nearest, and the candidate
    check of `callbacks.SafetyTest` has its say; the last policy stays only where no look gave any
    policy a chance.

    The looks touch no safety prompt, so the promise holds whatever they choose. A finished run that
    is resumed with more updates goes on from its last policy, not from the candidate.

    Args:
        every_n_updates: updates between two looks; there is one more after the last update.
        start: share of the run before the first look, in [0, 1].
        batch_size: validation prompts that are answered together, at most (the module may split
            them).
        prompts: how many of the validation prompts a look asks, the first ones of the file; the
            last look, which may see KEPT policies, asks all of them.

    Raises:
        InputError: the module is no policy.
    """

    def __init__(
        self,
        every_n_updates: int = 10,
        start: float = 0.5,
        batch_size: int = 100,
        prompts: int = LOOK,
    ) -> None:
        counts = {"every_n_updates": every_n_updates, "batch_size": batch_size, "prompts": prompts}
        for name, value in counts.items():
            if value < 1:
                raise InputError(f"{name} is a whole number >= 1, got {value}")
        if not 0 <= start <= 1:
            raise InputError(f"start is a share of the run in [0, 1], got {start}")
        self.every_n_updates = every_n_updates
        self.start = start
        self.batch_size = batch_size
        self.prompts = prompts
        self._best: list[dict[str, Any]] = []  # the likely ones first, by reward; then by chance
        self._last: dict[str, Any] = {}  # of a run that ended with another policy
        self._looked_at = 0  # the update of the last look

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
        due = update % self.every_n_updates == 0 and update >= self.start * data.updates
        if due and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._look(data, pl_module)

    def _look(self, data: HoldsSafetyPrompts, pl_module: LightningModule) -> None:
        module, update = cast(OffersCandidates, pl_module), cast(SafetyTestable, pl_module).updates
        self._looked_at = update
        rewards, costs = self._answered(data, pl_module, "predict", self.prompts)
        chances, likely = self._chances(module, costs, forgiven=FORGIVEN)
        reward, chance = float(rewards.mean()), min(chances)
        worth = reward if np.isfinite(reward) else -np.inf  # NaN has no rank
        look = {"update": update, "rank": [likely, worth if likely else chance]}
        better = chance > 0 and all(look["rank"] > other["rank"] for other in self._best)
        shown = "; the best so far" if better else ""
        rank_zero_info(
            f"update {update}: reward {reward:.3g} on {len(costs)} validation prompts; forecast to "
            f"pass: {named(module, chances)}{shown}"
        )
        if chance > 0:
            best = sorted([*self._best, look], key=lambda x: x["rank"], reverse=True)[:KEPT]
            if any(kept is look for kept in best):
                look["state"] = module.policy_state()
            self._best = best

    @staticmethod
    def _chances(
        module: OffersCandidates, costs: Floats, forgiven: float = 1.0
    ) -> tuple[list[float], bool]:
        """How likely each constraint's test is to be passed; and whether all are likely enough."""
        constraints = with_etas(module.constraints, module.training_costs)
        chances = [c.pass_probability(costs) for c in constraints]
        for chance, constraint in zip(chances, constraints, strict=True):
            miss = constraint.miss / len(constraints)
            # What is forgiven never makes less than an even chance enough.
            if chance < 1 - max(miss, min(forgiven * miss, 0.5)):
                return chances, False
        return chances, True

    def _answered(
        self, data: HoldsSafetyPrompts, pl_module: LightningModule, purpose: str, most: int | None
    ) -> tuple[Floats, Floats]:
        """Rewards and costs (m,) of one response to each of the first `most` validation prompts."""
        encoder, module = cast(EncodesExamples, pl_module), cast(OffersCandidates, pl_module)
        found = (encoder.encode(prompt) for prompt in data.validation_prompts)
        encoded = [*islice((e for e in found if e is not None), most)]
        records: list[dict[str, Any]] = []
        for begin in range(0, len(encoded), self.batch_size):
            batch = encoder.collate(encoded[begin : begin + self.batch_size])
            records += module.answers(batch.to(pl_module.device), purpose)
        rewards = np.array([record["reward"] for record in records])
        return rewards, np.array([record["cost"] for record in records])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # One epoch is the whole run. Before the last checkpoint is written and the test begins.
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data = cast(HoldsSafetyPrompts, cast(Any, trainer).datamodule)
        if self._looked_at != cast(SafetyTestable, pl_module).updates:
            self._look(data, pl_module)
        if not self._best:
            rank_zero_info("no policy of this run has a chance to pass; the last one stays")
            return
        module = cast(OffersCandidates, pl_module)
        self._last = module.policy_state()
        again: list[tuple[float, dict[str, Any]]] = []
        for look in self._best:
            module.load_policy_state(look["state"], look["update"])
            _, costs = self._answered(data, pl_module, "confirm", None)
            chances, likely = self._chances(module, costs)
            rank_zero_info(
                f"the policy after update {look['update']}, looked at once more on {len(costs)} "
                f"validation prompts: forecast to pass: {named(module, chances)}"
            )
            again.append((min(chances), look))
            if likely:
                break
        else:
            _, look = max(again, key=lambda pair: pair[0])
            module.load_policy_state(look["state"], look["update"])
        rank_zero_info(f"the candidate is the policy after update {look['update']}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": list(self._best), "last": dict(self._last), "looked_at": self._looked_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._last = list(state_dict["best"]), dict(state_dict["last"])
        self._looked_at = int(state_dict["looked_at"])


def named(module: OffersCandidates, chances: Sequence[float]) -> str:
    """The chances with the names of their constraints."""
    pairs = zip(module.constraints, chances, strict=True)
    return ", ".join(f"{c.label} {chance:.0%}" for c, chance in pairs)
