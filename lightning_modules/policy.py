"""Stage 4: a policy that maximises reward under a pessimistic cost constraint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from hcrlhf import optimizers, processes
from hcrlhf.backbone import LoraOptions
from hcrlhf.constraint import Constraint, suffixes, with_etas
from hcrlhf.dual import Dual
from hcrlhf.errors import InputError
from hcrlhf.kl import AdaptiveKL
from hcrlhf.learner import Learner, Targets
from hcrlhf.multiplier import Multiplier, ProjectedMultiplier
from hcrlhf.pessimism import LOOK, check_validation_prompts
from hcrlhf.phases import Phases
from hcrlhf.ppo import PPO, explained_variance, k3
from hcrlhf.refusals import is_refusal
from hcrlhf.resume import is_over, packed_keys, unpacked_keys
from hcrlhf.rollouts import Decoding, Rollout, response_seed, shuffled
from hcrlhf.safety import HoldsSafetyPrompts
from hcrlhf.scorers import Scorer, Slot, measured_moments
from hcrlhf.stages import ScoreMoments
from hcrlhf.text import Encoded, Tokens, collate
from hcrlhf.truncation import TruncationWatch
from lightning_modules.adapter_module import Schedule, check_size
from lightning_modules.scored_policy import ACTOR, PromptBatch, Reader, ScoredPolicy

SKIP_PATIENCE = 10  # gradients in a row that are not finite before the run stops
LEARNING_RATES = {"actor": "learning_rate", "critics": "critic_learning_rate"}  # as logged
REVERSED = 0.05  # of responses punished for being safe, before it is said
PATIENCE = 50  # updates with λ at its cap, or a limit exceeded, before it is said
FORECAST_EVERY = 10  # updates between two forecasts of the bounds: on a tiny model they cost much


class Policy(ScoredPolicy):
    """PPO-Lagrangian or RLOO. One `training_step` is one update: a rollout, and one λ step.

    Args:
        sft: folder of the supervised stage: the reference, and where the policy starts.
        reward, cost: folders of the reward and cost models, or scorers by `class_path`
            (`hcrlhf.scorers`), which see the texts.
        constraints: what is promised; training and the safety test read the same objects. The
            cost's range comes from a cost model that was trained with `squash`.
        learner: `hcrlhf.ppo.PPO`, or `hcrlhf.rloo.RLOO` (K responses per prompt, no critics).
        multiplier: rule of the Lagrange multipliers, one λ per constraint.
        kl_coefficient: β of the KL to the reference, per token, in units of the standardised
            reward.
        adaptive_kl: steers β towards a KL per response, or limits it; None keeps β.
        score_clip: standardised rewards are clamped to ± this before the KL is added, so that a
            single score cannot rule a rollout; None does not clamp. Costs are never clamped.
        truncation_penalty: taken off the standardised reward of a response that was cut off.
        decoding: how responses are drawn, in training, in the safety test and when shipped.
        lora: adapter of the policy; only where the supervised stage trained the whole model.
        critic_learning_rate: of value heads and critic adapters; None takes learning_rate.
        critic_warmup: first updates in which the critics alone learn (of critics that share the
            policy's hidden states, the heads), and policy, multipliers and β stay as they are.
        ptx_coefficient: weight, beside the policy loss, of the mean negative log-likelihood of
            tokens of `data.init_args.demonstrations` (PTX of InstructGPT, 2203.02155), whatever λ.
        ptx_batch_size: demonstrations per optimizer step.
        max_grad_norm: gradients are scaled down to this norm; .inf: never.
        micro_batch_size: sequences per forward and backward pass, those of similar length
            together; None takes all at once.
        rollout_batch_size: sequences that are generated together; None takes all at once.
        unpacked_rollouts: 4-bit weights are unpacked once per rollout and not for every token, at 2
            bytes a weight while it lasts; the safety test draws from the packed ones.
        seed: of every response and every shuffle of this run.
        policy: a finished policy that is tested in place of one that is trained here (`hcrlhf test
            --policy FOLDER`): an adapter for the same backbone, or a whole model.
        learning_rate, weight_decay, schedule, warmup, gradient_checkpointing, optimizer:
            `StageModule`.
    """

    def __init__(
        self,
        sft: str,
        reward: str | Scorer,
        cost: str | Scorer,
        constraints: list[Constraint],
        learner: Learner = PPO(),  # noqa: B008 (frozen)
        multiplier: Multiplier = ProjectedMultiplier(),  # noqa: B008 (frozen)
        kl_coefficient: float = 0.05,
        adaptive_kl: AdaptiveKL | None = None,
        score_clip: float | None = None,
        truncation_penalty: float = 0.0,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
        lora: LoraOptions | None = None,
        critic_learning_rate: float | None = None,
        critic_warmup: int = 0,
        ptx_coefficient: float = 0.0,
        ptx_batch_size: int = 16,
        max_grad_norm: float = 1.0,
        micro_batch_size: int | None = None,
        rollout_batch_size: int | None = None,
        unpacked_rollouts: bool = False,
        seed: int = 0,
        policy: str | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        schedule: Schedule = "constant",
        warmup: float = 0.0,
        gradient_checkpointing: bool = False,
        optimizer: optimizers.Name = "adamw",
    ) -> None:
        super().__init__(
            sft=sft,
            reward=reward,
            cost=cost,
            constraints=constraints,
            decoding=decoding,
            lora=lora,
            micro_batch_size=micro_batch_size,
            rollout_batch_size=rollout_batch_size,
            unpacked_rollouts=unpacked_rollouts,
            seed=seed,
            policy=policy,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup=warmup,
            gradient_checkpointing=gradient_checkpointing,
            optimizer=optimizer,
        )
        for name, value in (
            ("kl_coefficient", kl_coefficient),
            ("ptx_coefficient", ptx_coefficient),
            ("truncation_penalty", truncation_penalty),
        ):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is >= 0, got {value}")
        if not max_grad_norm > 0:
            raise InputError(
                f"max_grad_norm is positive, got {max_grad_norm}; .inf leaves every gradient as it "
                "is"
            )
        if critic_learning_rate is not None and not critic_learning_rate > 0:
            raise InputError(
                f"critic_learning_rate is positive or null, got {critic_learning_rate}"
            )
        if adaptive_kl is not None:
            adaptive_kl.check_start(kl_coefficient)
        if score_clip is not None and not score_clip > 0:
            raise InputError(f"score_clip is positive or null, got {score_clip}")
        # One optimizer with several steps per rollout: Lightning must not step it by itself.
        self.automatic_optimization = False
        self.learner = learner
        self.kl_coefficient = kl_coefficient
        self.adaptive_kl = adaptive_kl
        self.score_clip = score_clip
        self.truncation_penalty = truncation_penalty
        self._skipped_in_a_row = 0
        self.critic_learning_rate = critic_learning_rate or learning_rate
        if critic_warmup < 0 or (critic_warmup > 0 and learner.critic == "none"):
            raise InputError(
                f"critic_warmup is a number of updates >= 0 of a learner with critics, got "
                f"{critic_warmup} for {type(learner).__name__}"
            )
        self.critic_warmup = critic_warmup
        self.ptx_coefficient = ptx_coefficient
        self.ptx_batch_size = check_size(ptx_batch_size, "ptx_batch_size")
        self._demonstrations: list[Encoded] = []
        self.max_grad_norm = max_grad_norm
        self.dual = Dual(self.constraints, multiplier)
        self._truncation_watch = TruncationWatch()
        self._said_reversed = False
        self.critics = ["reward_critic"] + [
            f"cost_critic_{j}" for j in range(len(self.constraints))
        ]
        if learner.critic == "none":
            self.critics = []
        self._forecasts: list[float] = []

    def _check_trainer(self, stage: str) -> None:
        super()._check_trainer(stage)
        if self.trainer.max_steps != -1 and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError(
                f"max_steps {self.trainer.max_steps} would count optimizer steps, not updates; "
                "set data.init_args.updates instead"
            )
        if stage == "fit" and self.trainer.max_epochs != 1:
            raise InputError(
                f"max_epochs {self.trainer.max_epochs} of a policy: one epoch is the whole run, "
                "whose length is data.init_args.updates; set trainer.max_epochs: 1"
            )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.dual.constraints = self.constraints  # with the range that the cost model brought
        if stage == "fit":
            self.dual.validation_prompts = self._count_validation_prompts(self._data_module())
            self._check_minibatches()
            self._read_demonstrations()

    def _data_module(self) -> HoldsSafetyPrompts:
        """
        Raises:
            InputError: it does not say which prompts it holds.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, HoldsSafetyPrompts):
            raise InputError(
                "a policy is trained on the prompts of a data module like datamodules.Prompts, "
                "which knows what a checkpoint and a safety test must know of them; got "
                f"{type(data).__name__}"
            )
        return data

    def _count_validation_prompts(self, data: HoldsSafetyPrompts) -> int:
        """m, on which `callbacks.BestCandidate` looks at a policy, LOOK at most.

        Prompts that are too long for the policy are not looked at, and not counted.

        Raises:
            InputError: too few to know a spread from.
        """
        count = sum(self.encode(prompt) is not None for prompt in data.validation_prompts)
        check_validation_prompts(count)
        return min(count, LOOK)

    def _check_minibatches(self) -> None:
        """
        Raises:
            InputError: a minibatch would leave a process without a response.
        """
        prompts = getattr(getattr(self.trainer, "datamodule", None), "prompts_per_update", None)
        if prompts is None:
            return
        responses = prompts * self.learner.samples_per_prompt
        smallest = responses // min(self.learner.minibatches, responses)
        if smallest < self.trainer.world_size:
            raise InputError(
                f"a minibatch of {smallest} responses cannot be shared by "
                f"{self.trainer.world_size} processes; raise data.init_args.prompts_per_update, or "
                "lower minibatches of the learner"
            )

    @property
    def training_costs(self) -> Sequence[float]:
        return self.dual.recent

    def _read_demonstrations(self) -> None:
        """
        Raises:
            InputError: a ptx_coefficient without demonstrations, or demonstrations without one.
        """
        examples = getattr(getattr(self.trainer, "datamodule", None), "demonstrations", [])
        if bool(examples) != (self.ptx_coefficient > 0):
            raise InputError(
                f"ptx_coefficient {self.ptx_coefficient:g} and {len(examples)} demonstrations: one "
                "needs the other; set data.init_args.demonstrations to the file of the supervised "
                "stage and model.init_args.ptx_coefficient above 0, or neither"
            )
        encoded = (self.encoder.encode(e.messages, e.response) for e in examples)
        self._demonstrations = [e for e in encoded if e is not None]
        if len(self._demonstrations) < len(examples):
            dropped = len(examples) - len(self._demonstrations)
            rank_zero_info(f"{dropped} of {len(examples)} demonstrations left out: prompt too long")
            if not self._demonstrations:
                raise InputError(
                    f"all {dropped} demonstrations are longer than max_prompt_tokens; raise it in "
                    "the supervised stage's chat"
                )

    def configure_model(self) -> None:
        if hasattr(self, "backbone"):
            return
        super().configure_model()
        for critic in self.critics:
            self.backbone.add_head(critic, trainable=True)
            if self.learner.critic == "separate":
                source = "reward" if critic == "reward_critic" else "cost"
                # Without such an adapter a critic starts where the policy does.
                self.backbone.copy_role(
                    critic, source if source in self._inner_roles else ACTOR, trainable=True
                )

    def configure_optimizers(self) -> Any:
        actor: list[torch.nn.Parameter] = []
        critics: list[torch.nn.Parameter] = []
        for name, parameter in self.backbone.trained_parameters():
            (critics if "critic" in name else actor).append(parameter)
        groups: list[dict[str, Any]] = [
            {"name": "actor", "params": actor, "lr": self.learning_rate}
        ]
        if critics:
            groups.append({"name": "critics", "params": critics, "lr": self.critic_learning_rate})
        return self.scheduled(self.made_optimizer(groups))

    # -- critics, beside what is asked of every answer ------------------------------------------

    def _readers(self) -> dict[str, Reader]:
        separate = self.critics if self.learner.critic == "separate" else []
        return super()._readers() | {
            critic: partial(self.backbone.values, critic) for critic in separate
        }

    def _read_actor(self, hidden: Tensor, part: Tokens) -> Tensor:
        """(B, 1 + S, T): log-probabilities, then the values of critics that share these states."""
        shared = self.critics if self.learner.critic == "shared" else []
        values = [self.backbone.values(critic, hidden, part) for critic in shared]
        return torch.stack([self._log_probs(hidden, part), *values], dim=1)

    def _values(self, read: dict[str, Tensor]) -> Tensor:
        if self.learner.critic == "separate":
            return torch.stack([read[critic] for critic in self.critics])
        return super()._values(read)

    # -- one update ----------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._sync_by_hand()
        self.candidate = None
        batch = batch.repeat(self.learner.samples_per_prompt)
        seeds = [
            response_seed(self.seed, "rollout", self.updates, row, key)
            for row, key in enumerate(batch.keys)
        ]
        phases = Phases(self.device)
        rollout = self._with_moments(self._rollout(batch, seeds, phases=phases))
        scores, violations = self._constrain(rollout)
        if self.updates == 0 and self.critics:
            rollout = self._start_critics(rollout, scores)
        # Outside autocast, which would make matrix products of it in bfloat16.
        with torch.autocast(self.device.type, enabled=False):
            targets = self.learner.targets(
                rollout, scores, self.dual.multipliers, self.kl_coefficient
            )
        with phases.measured("update"):
            statistics = self._improve(rollout, targets)
        if not self._warming_up:
            self._steer(rollout, violations)
        self.updates += 1
        self._report(rollout, targets, violations, statistics, phases)
        self._warn_unreachable(rollout)
        self._warn_reversed()
        self._warn_truncated(rollout)

    def _sync_by_hand(self) -> None:
        """Keeps DDP from exchanging gradients after each of a step's backward passes.

        Some passes do not reach all weights, which it would refuse; `processes.sum_gradients` does
        it once. To be said in every step: Lightning turns the exchange on again after each.
        """
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):
            wrapper.require_backward_grad_sync = False

    def _steer(self, rollout: Rollout, violations: list[float]) -> None:
        """One step of every multiplier, and of an adaptive β."""
        self.dual.step(violations)
        if self.adaptive_kl is not None:
            kl = float(rollout.kl.sum(dim=1).mean())
            self.kl_coefficient = self.adaptive_kl.update(self.kl_coefficient, kl)

    @property
    def _warming_up(self) -> bool:
        """Whether the critics alone learn from this rollout."""
        return self.updates < self.critic_warmup

    def _with_moments(self, rollout: Rollout) -> Rollout:
        """The rollout with a standardised reward; the first one measures what is missing."""
        if self.reward_moments is not None:
            return rollout
        rewards = rollout.rewards.double().cpu().numpy()
        self.reward_moments = measured_moments(rewards, self._named("reward"))
        return replace(rollout, rewards=self._standardised(rollout.rewards))

    def _warn_unreachable(self, rollout: Rollout) -> None:
        """Says so when more of a multiplier will not help, or does not come soon enough."""
        dual = self.dual
        for j, constraint in enumerate(self.constraints):
            value = dual.multipliers[j]
            capped, violated = dual.steps_at_cap[j], dual.steps_violated[j]
            if capped == PATIENCE:
                found = f"λ of the {constraint.label} has been at its cap {value:g} for {capped}"
            elif violated > 0 and violated % PATIENCE == 0:
                found = f"the {constraint.label} has been above training's target for {violated}"
            else:
                continue
            forecast = constraint.forecast(rollout.costs)
            if forecast <= constraint.threshold:  # what is missing is the margin alone
                continue
            rank_zero_warn(
                f"{found} updates, λ is {value:g} now: the constraint may not be reachable from "
                f"this reference, or λ rises too slowly; forecast of the bound {forecast:.3g}, "
                f"limit {constraint.threshold:g}"
            )

    def _warn_reversed(self) -> None:
        """Says so, once in a process, when a margin punishes many responses for being safe."""
        dual = self.dual
        found = zip(dual.multipliers, dual.reversed_shares, dual.pessimisms, strict=True)
        share, k = max((share, k) if value > 0 else (0.0, 0.0) for value, share, k in found)
        if share > REVERSED and not self._said_reversed:
            self._said_reversed = True
            rank_zero_warn(
                f"update {self.updates}: {share:.0%} of the responses are so safe that the margin "
                f"of k = {k:.3g} standard deviations punishes them for it, since they widen the "
                "spread; more safety_prompts make k smaller, and cvar looks at the worst alone"
            )

    def _warn_truncated(self, rollout: Rollout) -> None:
        share = float(rollout.tokens.truncated.float().mean())
        words = self._truncation_watch.notice(share, self.encoder.chat.max_response_tokens)
        if words is not None:
            rank_zero_warn(words)

    def _constrain(self, rollout: Rollout) -> tuple[Tensor, list[float]]:
        """Scores per stream (1 + C, B), the reward and `Dual.judge`'s costs; every violation g."""
        self._require_finite("reward", bool(rollout.rewards.isfinite().all()))
        self._require_finite("cost", bool(np.isfinite(rollout.costs).all()))
        costs, violations = self.dual.judge(rollout.costs, rollout.keys)
        rewards = self._shaped_rewards(rollout)
        return torch.cat([rewards[None], torch.from_numpy(costs).to(rewards)]), violations

    def _require_finite(self, slot: Slot, finite: bool) -> None:
        if not finite:
            raise FloatingPointError(
                f"update {self.updates}: {self._named(slot)} gave a score that is not finite, so "
                "nothing can be learnt from this rollout; check it, or lower the learning rate"
            )

    def _shaped_rewards(self, rollout: Rollout) -> Tensor:
        """The standardised reward as the learner sees it: clamped, less the truncation penalty."""
        rewards = rollout.rewards
        if self.score_clip is not None:
            rewards = rewards.clamp(-self.score_clip, self.score_clip)
        return rewards - self.truncation_penalty * rollout.tokens.truncated.to(rewards)

    def _start_critics(self, rollout: Rollout, scores: Tensor) -> Rollout:
        """Sets each value head's bias to its stream's mean, where learning would have to begin."""
        means = scores.mean(dim=1)
        for critic, mean in zip(self.critics, means, strict=True):
            self.backbone.set_head_bias(critic, float(mean))
        values = rollout.values + means[:, None, None] * rollout.tokens.response_mask
        return replace(rollout, values=values)

    def _improve(self, rollout: Rollout, targets: Targets) -> dict[str, float]:
        """Epochs of minibatch steps; stops early at the target KL. Returns means to log."""
        optimizer: Any = self.optimizers()
        totals: dict[str, float] = {}
        steps = used = 0
        for epoch in range(self.learner.epochs):
            order = shuffled(len(rollout.keys), self.seed, "minibatch", self.updates, epoch)
            # Sizes that differ by one at most: a last one of few responses would be a full step.
            minibatches = order.tensor_split(min(self.learner.minibatches, len(order)))
            kls: list[float] = []
            for number, rows in enumerate(minibatches):
                demonstrations = self._drawn_demonstrations(epoch, number)
                statistics = self._minibatch(rollout, targets, rows, demonstrations)
                self.backbone.restore_trainable()
                trained = list(self.trained())
                processes.sum_gradients(trained)
                norm = clip_grad_norm_(trained, self.max_grad_norm)
                usable = self._usable(norm)
                if usable:
                    optimizer.step()
                optimizer.zero_grad()  # at once: the next rollout has no use for gradients
                steps += 1
                if not usable:
                    continue  # its figures may be NaN too, and would hide those of the others
                used += 1
                kls.append(statistics["update_kl"])
                for name, value in (statistics | {"grad_norm": float(norm)}).items():
                    totals[name] = totals.get(name, 0.0) + value
            target = self.learner.target_kl
            if target is not None and kls and sum(kls) / len(kls) > target:
                break
        means = {name: value / used for name, value in totals.items()}
        means |= {"skipped": 1 - used / steps, "inner_steps": steps}
        # Before the schedule moves on: the rates that these steps were made with.
        for group in optimizer.param_groups:
            means[LEARNING_RATES[group["name"]]] = group["lr"]
        schedulers: Any = self.lr_schedulers()
        schedulers.step()
        return means

    def _usable(self, norm: Tensor) -> bool:
        """Whether a gradient may reach the optimizer; one that is not finite is skipped.

        Raises:
            FloatingPointError: too many in a row: the run will not recover by itself.
        """
        self._skipped_in_a_row = 0 if norm.isfinite() else self._skipped_in_a_row + 1
        if self._skipped_in_a_row == SKIP_PATIENCE:
            raise FloatingPointError(
                f"update {self.updates}: {SKIP_PATIENCE} gradients in a row were not finite; lower "
                "the learning rate, or use precision 32-true"
            )
        return self._skipped_in_a_row == 0

    def _minibatch(
        self, rollout: Rollout, targets: Targets, rows: Tensor, demonstrations: list[Encoded]
    ) -> dict[str, float]:
        """Gradients of one minibatch, a micro-batch at a time; token means over all of it.

        By its own tokens, as is usual: in a minibatch of few responses a short one weighs a little
        more than a long one. One divisor for all minibatches of a rollout would be unbiased; where
        it was tried PPO gained less, by that or by what was tried with it (docs/recipe.md).

        With several processes each takes its share of the rows; the gradients are theirs, to be
        summed, and the means are of all.
        """
        count = rollout.tokens.response_mask[rows].sum()
        mine = rows[processes.share(len(rows))]
        rollout, targets = rollout.rows(mine), targets.rows(mine)

        def attempt() -> dict[str, float]:
            self.zero_grad()  # of one that ran out of memory
            return self._accumulate(rollout, targets, count) | self._imitate(demonstrations)

        largest = max(len(mine), len(demonstrations))
        return processes.summed(self._with_room("micro_batch_size", largest, attempt))

    def _drawn_demonstrations(self, epoch: int, minibatch: int) -> list[Encoded]:
        """Those of one step: they depend on nothing that a resumed run would have to know."""
        if not self._demonstrations or self._warming_up:
            return []
        count = len(self._demonstrations)
        order = shuffled(count, self.seed, "ptx", self.updates, epoch, minibatch)
        return [self._demonstrations[i] for i in order[: self.ptx_batch_size].tolist()]

    def _imitate(self, demonstrations: list[Encoded]) -> dict[str, float]:
        """Gradient of ptx_coefficient · mean(-log π) over the demonstrations' tokens; the mean."""
        count = sum(len(d.response) for d in demonstrations)
        mine = [demonstrations[i] for i in processes.share(len(demonstrations)).tolist()]
        mean = 0.0
        if mine:  # not where there are none, or more processes than demonstrations
            tokens = collate(mine, self.encoder.pad_id).to(self.device)
            for group in tokens.by_length(self.micro_batch_size):
                part = tokens.rows(group)
                with self.backbone.role(ACTOR):
                    loss = -self._log_probs(self.backbone.hidden(part), part).sum() / count
                    self.add_gradient(self.ptx_coefficient * loss)
                mean += float(loss.detach())
        return {"ptx_loss": mean}

    def _accumulate(self, rollout: Rollout, targets: Targets, count: Tensor) -> dict[str, float]:
        """Gradients of these responses, and their shares of the statistics."""
        learner, separate = self.learner, self.learner.critic == "separate"
        statistics = dict.fromkeys(("policy_loss", "value_loss", "update_kl", "clip_share"), 0.0)
        for group in rollout.tokens.by_length(self.micro_batch_size):
            part, aim = rollout.rows(group), targets.rows(group)
            with self.backbone.role(ACTOR):
                hidden = self.backbone.hidden(part.tokens)
                if self._warming_up:  # what lies below the value heads stays as it is
                    hidden = hidden.detach()
                log_probs = self._log_probs(hidden, part.tokens)
                policy_loss = learner.policy_loss(log_probs, part, aim) / count
                loss = policy_loss
                value_loss = torch.zeros(())
                if self.critics and not separate:
                    value_loss = self._value_loss(part, aim, [hidden] * len(self.critics)) / count
                    loss = loss + learner.value_coefficient * value_loss
                if loss.requires_grad:
                    self.add_gradient(loss)
            if separate:
                for stream, critic in enumerate(self.critics):
                    with self.backbone.role(critic):
                        hidden = self.backbone.hidden(part.tokens)
                        values = self.backbone.values(critic, hidden, part.tokens)
                        own = learner.value_loss(values, part, aim, stream) / count
                        self.add_gradient(learner.value_coefficient * own)
                    value_loss = value_loss + own.detach().cpu()
            shift = learner.update_statistics(log_probs.detach(), part)
            statistics["policy_loss"] += float(policy_loss.detach())
            statistics["value_loss"] += float(value_loss.detach())
            statistics["update_kl"] += float(shift.kl / count)
            statistics["clip_share"] += float(shift.clipped / count)
        return statistics

    def add_gradient(self, loss: Tensor) -> None:
        """The loss's backward pass, which is none of autocast's, though a training step is."""
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss)

    def _value_loss(self, part: Rollout, aim: Targets, states: list[Tensor]) -> Tensor:
        losses = [
            self.learner.value_loss(
                self.backbone.values(critic, state, part.tokens), part, aim, stream
            )
            for stream, (critic, state) in enumerate(zip(self.critics, states, strict=True))
        ]
        return torch.stack(losses).sum()

    def _report(
        self,
        rollout: Rollout,
        targets: Targets,
        violations: list[float],
        statistics: dict[str, float],
        phases: Phases,
    ) -> None:
        """Logs one update; docs/metrics.md says what each name means, and its unit."""
        mask = rollout.tokens.response_mask
        texts = self.encoder.decode(rollout.tokens)
        lengths = mask.sum(dim=1).float()
        bar = {
            "reward": float(rollout.rewards.mean()),
            "cost": float(rollout.costs.mean()),
            "kl": float(rollout.kl.sum(dim=1).mean()),
        }
        rest = {
            "updates": float(self.updates),
            "kl_k3": float(k3(-rollout.kl).sum(dim=1).mean()),
            "harm_rate": float((rollout.costs > 0).mean()),
            "entropy": float(-(rollout.log_probs * mask).sum() / mask.sum()),
            "response_tokens": float(lengths.mean()),
            "truncated": float(rollout.tokens.truncated.float().mean()),
            "refused_by_phrases": sum(map(is_refusal, texts)) / len(texts),
            "kl_coefficient": self.kl_coefficient,
            "tokens_per_second": float(lengths.sum()) / phases.seconds,
            **statistics,
            **phases.figures,
        }
        explained = [
            float(explained_variance(returns, values, mask))
            for returns, values in zip(targets.returns, rollout.values, strict=True)
        ]
        if explained:
            rest["explained_variance_reward"] = explained.pop(0)
        constraints = with_etas(self.constraints, self.training_costs)
        for j, (constraint, suffix) in enumerate(
            zip(constraints, suffixes(constraints), strict=True)
        ):
            bar[f"lambda{suffix}"] = self.dual.multipliers[j]
            if j >= len(self._forecasts) or self.updates % FORECAST_EVERY == 0:
                self._forecasts[j:] = [constraint.forecast(rollout.costs)]
            bar[f"bound{suffix}"] = self._forecasts[j]
            rest[f"violation{suffix}"] = violations[j]
            rest[f"pessimism{suffix}"] = self.dual.pessimisms[j]
            rest[f"reversed{suffix}"] = self.dual.reversed_shares[j]
            if explained:
                rest[f"explained_variance_cost{suffix}"] = explained[j]
        self.log_dict(bar, prog_bar=True, batch_size=len(rollout.keys))
        self.log_dict(rest, batch_size=len(rollout.keys))

    # -- checkpoint ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["training_prompts"] = packed_keys(self.prompts_seen)
        checkpoint["policy"] = {
            "updates": self.updates,
            "candidate": self.candidate,
            "dual": self.dual.state(),
            "kl_coefficient": self.kl_coefficient,
            "reward_moments": asdict(self.reward_moments) if self.reward_moments else None,
            "skipped_in_a_row": self._skipped_in_a_row,
            "forecasts": list(self._forecasts),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("policy", {})
        if "dual" not in state or "training_prompts" not in checkpoint:
            raise InputError(
                "the checkpoint is of another stage or of an older version; give one of a policy "
                "run of this version"
            )
        # A run goes on with the data and stages that it had, but a test may name others: what the
        # policy has seen is asked of the checkpoint.
        if self.trainer.state.fn != "fit":
            self.checkpoint_prompts = unpacked_keys(checkpoint["training_prompts"])
        self.updates = int(state["updates"])
        self.candidate = state["candidate"]
        self.dual.load(state["dual"])
        if self.reward_moments is None and state.get("reward_moments"):  # measured, not declared
            self.reward_moments = ScoreMoments(**state["reward_moments"])
        self._skipped_in_a_row = int(state["skipped_in_a_row"])
        self._forecasts = [float(f) for f in state["forecasts"]]
        if self.adaptive_kl is not None:  # a fixed one is taken from the config alone
            self.kl_coefficient = float(state["kl_coefficient"])
        trainer: Any = self.trainer
        unfinished = self.updates < getattr(trainer.datamodule, "updates", 0)
        # The one epoch may have ended already: by max_time or a callback, and then the run is over.
        # With settings that have changed (more updates, more time) it goes on.
        self.over = unfinished and is_over(checkpoint) and not self.settings_changed
        if unfinished and not self.over:
            for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                counts["processed"] = counts["completed"]
