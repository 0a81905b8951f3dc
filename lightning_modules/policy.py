"""Stage 4: a policy that maximises reward under a pessimistic cost constraint."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import hcrlhf
from hcrlhf import optimizers, processes
from hcrlhf.backbone import (
    ADAPTER_FILE,
    BASE,
    Backbone,
    LoraOptions,
    load_causal_lm,
    load_head,
)
from hcrlhf.constraint import (
    Constraint,
    RunningVariance,
    pairwise_spread,
    pessimistic_costs,
    violation,
)
from hcrlhf.errors import InputError
from hcrlhf.examples import Message, Prompt
from hcrlhf.hashing import file_sha256, folder_hashes
from hcrlhf.kl import AdaptiveKL
from hcrlhf.learner import Learner, Targets
from hcrlhf.multiplier import Multiplier, MultiplierState, ProjectedMultiplier
from hcrlhf.phases import Phases
from hcrlhf.ppo import PPO, explained_variance, k3
from hcrlhf.preferences import squashed
from hcrlhf.refusals import is_refusal
from hcrlhf.release import complete, require_same_answers
from hcrlhf.rollouts import Decoding, Rollout, response_seed, sample
from hcrlhf.safety import CostSamples
from hcrlhf.samples import Floats
from hcrlhf.scorers import Scorer, Slot, measured_moments
from hcrlhf.stages import FILE as STAGE_FILE
from hcrlhf.stages import (
    BackboneSource,
    Role,
    ScoreMoments,
    Stage,
    fingerprint,
    read_prompt_keys,
    read_stage,
    require_same_base,
    write_stage,
)
from hcrlhf.text import (
    Encoded,
    TextEncoder,
    Tokens,
    collate,
    join,
    load_tokenizer,
    one_line,
)
from hcrlhf.truncation import TruncationWatch
from lightning_modules.adapter_module import AdapterModule, Schedule, add_trained_role, check_size

ACTOR = "policy"
REFERENCE = "sft"
SKIP_PATIENCE = 10  # gradients in a row that are not finite before the run stops
Result = TypeVar("Result")
LEARNING_RATES = {"actor": "learning_rate", "critics": "critic_learning_rate"}  # as logged
CAP_PATIENCE = 50  # updates with λ at its cap before it is said
FORECAST_EVERY = 10  # updates between two forecasts of the bounds: on a tiny model they cost much


@dataclass(frozen=True)
class EncodedPrompt:
    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True)
class PromptBatch:
    """B prompts: tokens without responses, keys, texts for people, dialogues for scorers."""

    tokens: Tokens
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    messages: tuple[tuple[Message, ...], ...]

    def to(self, device: torch.device, non_blocking: bool = False) -> PromptBatch:
        return replace(self, tokens=self.tokens.to(device, non_blocking))

    def repeat(self, count: int) -> PromptBatch:
        """Every prompt `count` times, side by side."""
        return self.rows(torch.arange(len(self.keys)).repeat_interleave(count))

    def rows(self, index: Tensor) -> PromptBatch:
        """The prompts at `index`."""
        rows = index.tolist()
        return PromptBatch(
            self.tokens.rows(index),
            tuple(self.keys[i] for i in rows),
            tuple(self.texts[i] for i in rows),
            tuple(self.messages[i] for i in rows),
        )


class Policy(AdapterModule):
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
        adaptive_kl: steers β towards a KL per response; None keeps it.
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
        max_grad_norm: gradients are scaled down to this norm.
        micro_batch_size: sequences per forward and backward pass, those of similar length
            together; None takes all at once.
        rollout_batch_size: sequences that are generated together; None takes all at once.
        seed: of every response and every shuffle of this run.
        policy: a finished policy that is tested in place of one that is trained here (`hcrlhf test
            --policy FOLDER`): an adapter for the same backbone, or a whole model.
        learning_rate, weight_decay, schedule, warmup, gradient_checkpointing, optimizer:
            `AdapterModule`.
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
            learning_rate, weight_decay, schedule, warmup, gradient_checkpointing, optimizer
        )
        for name, value in (
            ("kl_coefficient", kl_coefficient),
            ("ptx_coefficient", ptx_coefficient),
            ("max_grad_norm", max_grad_norm),
            ("truncation_penalty", truncation_penalty),
        ):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is >= 0, got {value}")
        if score_clip is not None and not score_clip > 0:
            raise InputError(f"score_clip is positive or null, got {score_clip}")
        # One optimizer with several steps per rollout: Lightning must not step it by itself.
        self.automatic_optimization = False
        given: tuple[tuple[Slot, str | Scorer], ...] = (("reward", reward), ("cost", cost))
        self.folders = {"sft": sft} | {slot: x for slot, x in given if isinstance(x, str)}
        self.scorers = {slot: x for slot, x in given if isinstance(x, Scorer)}
        self.reward_moments: ScoreMoments | None = None
        if not constraints:
            raise InputError("constraints is empty; name at least one limit")
        self.constraints = tuple(constraints)
        self.learner = learner
        self.multiplier = multiplier
        self.kl_coefficient = kl_coefficient
        self.adaptive_kl = adaptive_kl
        self.score_clip = score_clip
        self.truncation_penalty = truncation_penalty
        self._skipped_in_a_row = 0
        self.decoding = decoding
        self.lora = lora
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
        self.micro_batch_size = check_size(micro_batch_size, "micro_batch_size")
        self.rollout_batch_size = check_size(rollout_batch_size, "rollout_batch_size")
        self.seed = seed
        self.given = policy
        self._other: Backbone | None = None  # a given policy that is a whole model
        self.updates = 0
        self.candidate: int | None = None  # the update whose policy is tested; None: the last one
        self.multiplier_states = [multiplier.start() for _ in self.constraints]
        self._updates_at_cap = [0 for _ in self.constraints]
        self._truncation_watch = TruncationWatch()
        self.variances = [RunningVariance(c.std_floor) for c in self.constraints]
        self.recent_costs: list[float] = []  # the last safety_prompts ones, for the pessimism
        self.pessimisms = [0.0 for _ in self.constraints]
        self.critics = ["reward_critic"] + [
            f"cost_critic_{j}" for j in range(len(self.constraints))
        ]
        if learner.critic == "none":
            self.critics = []
        self._forecasts: list[float] = []
        self._validation: list[tuple[Tensor, Floats, Tensor]] = []

    @property
    def _inner_roles(self) -> list[str]:
        """Which of reward and cost are adapters on the shared backbone."""
        return [role for role in ("reward", "cost") if role in self.folders]

    @property
    def multipliers(self) -> list[float]:
        """λ of each constraint."""
        return [state.value for state in self.multiplier_states]

    # -- what this stage stands on -------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._check_processes()
        if self.trainer.max_steps != -1:
            raise InputError(
                f"max_steps {self.trainer.max_steps} would count optimizer steps, not updates; "
                "set data.init_args.updates instead"
            )
        if stage == "fit" and self.trainer.max_epochs != 1:
            raise InputError(
                f"max_epochs {self.trainer.max_epochs} of a policy: one epoch is the whole run, "
                "whose length is data.init_args.updates; set trainer.max_epochs: 1"
            )
        if self.given is not None and stage not in ("test", "predict"):
            raise InputError(
                f"policy: {self.given} is a finished policy, to be tested and not trained; remove "
                "it, or use hcrlhf test"
            )
        self._read_stages()
        self.encoder = TextEncoder(load_tokenizer(self.folders["sft"]), self.stages["sft"].chat)
        if stage == "fit":
            self._read_demonstrations()

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

    def _check_processes(self) -> None:
        """
        Raises:
            InputError: several processes that would not see the same batches.
        """
        # Lightning has no public way to ask for this setting.
        connector = self.trainer._accelerator_connector
        if self.trainer.world_size > 1 and connector.use_distributed_sampler:
            raise InputError(
                "the policy stage shares every batch out itself, so that a rollout is the same one "
                "with any number of processes; set trainer.use_distributed_sampler: false"
            )

    def _read_stages(self) -> None:
        folders = self.folders
        roles: tuple[Role, ...] = ("sft", "reward", "cost")
        stages: dict[str, Stage] = {
            role: read_stage(folders[role], role, role) for role in roles if role in folders
        }
        sft = stages["sft"]
        # A fully tuned supervised model may be quantised afterwards: then it is the quantised
        # model that reward, cost, reference and policy share.
        comparable = dict(stages)
        if not sft.adapter and (others := [stages[r] for r in roles[1:] if r in stages]):
            source = replace(
                sft.backbone,
                quantization=others[0].backbone.quantization,
                dtype=others[0].backbone.dtype,
            )
            comparable["sft"] = replace(sft, backbone=source)
        require_same_base(comparable)
        self.stages = stages
        self.source = comparable["sft"].backbone
        if fingerprint(self.source.folder) != sft.fingerprint:
            raise InputError(
                f"sft: the weights in {self.source.model} are not those that {folders['sft']} was "
                "trained on; run the stages again"
            )
        for slot, scorer in self.scorers.items():
            scorer.prepare(slot)
        self._read_moments()
        cost = self.scorers.get("cost") or stages["cost"]
        self.squash = cost.squash
        self.constraints = self.completed(self.constraints)
        for constraint in self.constraints:
            if constraint.rule.kind == "asymptotic":
                rank_zero_warn(
                    f"{constraint.label} is judged by {constraint.rule.name}, which holds only as "
                    "the number of prompts grows and errs for rare severe harm; a cost model "
                    "trained with squash allows an exact bound"
                )
        if self._zero_is_arbitrary() and any(c.needs_zero for c in self.constraints):
            rank_zero_warn(
                f"{self._named('cost')} was trained with sign_weight 0, so that its zero means "
                "nothing in particular, and a harm rate or a threshold of 0 is about that zero; "
                "train the cost model with sign terms"
            )

    def _read_moments(self) -> None:
        """Of the reward; those of a scorer that has none are measured on the first rollout."""
        if "reward" in self.scorers:
            self.reward_moments = self.scorers["reward"].moments
            return
        moments = self.stages["reward"].moments
        if moments is None or not moments.std > 0:
            raise InputError(
                f"reward: {self.folders['reward']} has no spread in its held-out scores, so the "
                "reward cannot be standardised; train the reward model again"
            )
        self.reward_moments = moments

    def _zero_is_arbitrary(self) -> bool:
        if "cost" in self.scorers:
            return self.scorers["cost"].arbitrary_zero
        return self.stages["cost"].sign_weight == 0

    def _named(self, slot: Slot) -> str:
        """The reward or cost model, for messages."""
        where = self.scorers[slot].name if slot in self.scorers else self.folders[slot]
        return f"the {slot} ({where})"

    def completed(self, constraints: Sequence[Constraint]) -> tuple[Constraint, ...]:
        """The constraints with the range of the cost model's costs, ready to judge.

        Raises:
            InputError: a constraint declares a range that is not a fact, or needs one.
        """
        if self.squash is not None:
            return tuple(c.with_range(-self.squash, self.squash).ready() for c in constraints)
        for constraint in constraints:
            if constraint.upper is not None or constraint.lower is not None:
                raise InputError(
                    "the constraint declares lower or upper, but nothing limits the costs of "
                    f"{self._named('cost')}; give it a squash, which brings its own range"
                )
        return tuple(c.ready() for c in constraints)

    def configure_model(self) -> None:
        if hasattr(self, "backbone"):
            return
        folders, sft_adapter = self.folders, self.stages["sft"].adapter
        backbone = self.build_backbone(self.source)
        if self.given is None or not self._load_given(backbone, Path(self.given)):
            add_trained_role(backbone, ACTOR, folders["sft"] if sft_adapter else None, self.lora)
        self.reference = REFERENCE if sft_adapter else BASE
        if sft_adapter:
            backbone.load_role(REFERENCE, folders["sft"], trainable=False)
        for role in self._inner_roles:
            backbone.load_role(role, folders[role], trainable=False)
            backbone.add_head(role, trainable=False, state=load_head(folders[role]))
        for critic in self.critics:
            backbone.add_head(critic, trainable=True)
            if self.learner.critic == "separate":
                source = "reward" if critic == "reward_critic" else "cost"
                # Without such an adapter a critic starts where the policy does.
                backbone.copy_role(
                    critic, source if source in self._inner_roles else ACTOR, trainable=True
                )
        self.backbone = backbone

    def _load_given(self, backbone: Backbone, folder: Path) -> bool:
        """Loads the given policy; whether it took the place of the one that would be trained.

        Raises:
            InputError: it is neither adapter nor model, of another backbone, or would answer
                otherwise than it is tested.
        """
        self._given_files = folder_hashes(folder)
        if (folder / STAGE_FILE).is_file():
            stages = {
                "sft": self.stages["sft"],
                "policy": read_stage(str(folder), "policy", "policy"),
            }
            require_same_base({**stages, "sft": replace(stages["sft"], backbone=self.source)})
        require_same_answers(folder, self.decoding, self.encoder)
        if (folder / ADAPTER_FILE).is_file():
            backbone.load_role(ACTOR, folder, trainable=False)
            return True
        if not (folder / "config.json").is_file():
            raise InputError(
                f"policy: {folder} holds neither {ADAPTER_FILE} nor config.json; expected the "
                "folder of a PEFT adapter or of a Hugging Face model"
            )
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = record.get("dtype") or record.get("torch_dtype")  # as people will load it
        dtype = kept if kept in ("float32", "bfloat16") else self.source.dtype
        model = load_causal_lm(BackboneSource(str(folder), dtype=dtype), self.device)
        self._other = Backbone(model.to(self.device))
        return False

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

    # -- data ----------------------------------------------------------------------------------

    def encode(self, example: Prompt) -> EncodedPrompt | None:
        encoded = self.encoder.encode(example.messages, None)
        return None if encoded is None else EncodedPrompt(example, encoded.prompt)

    def collate(self, encoded: list[EncodedPrompt]) -> PromptBatch:
        tokens = collate([Encoded(e.ids, []) for e in encoded], self.encoder.pad_id)
        keys = tuple(e.prompt.key for e in encoded)
        texts = tuple(e.prompt.text for e in encoded)
        return PromptBatch(tokens, keys, texts, tuple(e.prompt.messages for e in encoded))

    # -- a rollout -----------------------------------------------------------------------------

    def respond(self, batch: PromptBatch, seeds: list[int]) -> Tokens:
        """One response per prompt from the policy."""
        return self._with_room(
            "rollout_batch_size", len(batch.keys), lambda: self._respond(batch, seeds)
        )

    def _with_room(self, setting: str, largest: int, attempt: Callable[[], Result]) -> Result:
        """What `attempt` returns; where memory runs out, at half as many sequences per pass.

        Args:
            setting: name of the attribute that says how many; it stays at what was found to fit.
            largest: how many a pass has where the setting is None.

        Raises:
            InputError: even one sequence is too much.
        """
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError as error:
                before = min(getattr(self, setting) or largest, largest)
                if before <= 1:
                    raise InputError(
                        f"out of memory with one sequence per pass ({one_line(error)}); shorten "
                        "chat.max_response_tokens, set gradient_checkpointing: true, or take a "
                        "smaller model (hcrlhf doctor says what fits)"
                    ) from None
            # Outside of the handler: what the failed pass had made lives until its end.
            setattr(self, setting, before // 2)
            warnings.warn(
                f"out of memory in update {self.updates}: {setting} {before} is now {before // 2}",
                stacklevel=2,
            )
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _respond(self, batch: PromptBatch, seeds: list[int]) -> Tokens:
        groups = batch.tokens.by_length(self.rollout_batch_size)
        backbone, role = (self._other, BASE) if self._other else (self.backbone, ACTOR)
        with backbone.merged(role):
            parts = [
                sample(
                    backbone,
                    batch.tokens.rows(rows).without_common_padding(),
                    [seeds[i] for i in rows.tolist()],
                    self.decoding,
                    self.encoder.chat.max_response_tokens,
                    self.encoder.stop_ids,
                    self.encoder.pad_id,
                )
                for rows in groups
            ]
        return join(parts, self.encoder.pad_id).rows(torch.cat(groups).argsort())

    def score(self, tokens: Tokens, keys: tuple[str, ...]) -> Rollout:
        """Everything that the frozen and the sampling models say of responses."""
        return self._with_room("micro_batch_size", len(tokens), lambda: self._score(tokens, keys))

    def _score(self, tokens: Tokens, keys: tuple[str, ...]) -> Rollout:
        groups = tokens.by_length(self.micro_batch_size)
        readers: dict[str, Callable[[Tensor, Tokens], Tensor]] = {
            ACTOR: self._read_actor,
            self.reference: self._log_probs,
        }
        readers |= {role: partial(self.backbone.scores, role) for role in self._inner_roles}
        if self.learner.critic == "separate":
            readers |= {role: partial(self.backbone.values, role) for role in self.critics}
        with self.backbone.inference():
            found = self.backbone.read([tokens.rows(rows) for rows in groups], readers)
        order = torch.cat(groups).argsort()
        read = {role: torch.cat(parts)[order] for role, parts in found.items()}
        unknown = torch.full((len(keys),), math.nan, device=tokens.input_ids.device)
        values = read[ACTOR][:, 1:].transpose(0, 1)
        if self.learner.critic == "separate":
            values = torch.stack([read[critic] for critic in self.critics])
        return Rollout(
            tokens=tokens,
            keys=keys,
            log_probs=read[ACTOR][:, 0],
            reference_log_probs=read[self.reference],
            # Not a number where the role is a scorer's, until it has been asked.
            rewards=self._standardised(read.get("reward", unknown)),
            costs=self._costs(read.get("cost", unknown)),
            values=values,
        )

    def _read_actor(self, hidden: Tensor, part: Tokens) -> Tensor:
        """(B, 1 + S, T): log-probabilities, then the values of critics that share these states."""
        shared = self.critics if self.learner.critic == "shared" else []
        values = [self.backbone.values(critic, hidden, part) for critic in shared]
        return torch.stack([self._log_probs(hidden, part), *values], dim=1)

    def _rollout(
        self,
        batch: PromptBatch,
        seeds: list[int],
        asked: Sequence[Slot] = ("reward", "cost"),
        phases: Phases | None = None,
    ) -> Rollout:
        """Responses to a batch, with what models and the scorers that are asked say of them.

        With several processes each answers its share, and all get the whole.
        """
        count, phases = len(batch.keys), phases or Phases(self.device)
        if processes.rank_and_size()[1] == 1:
            return self._own_rollout(batch, seeds, asked, phases)
        mine, own = processes.share(count), None
        if len(mine) > 0:  # the last batch of a safety test may be smaller than the processes
            chosen = [seeds[i] for i in mine.tolist()]
            own = self._own_rollout(batch.rows(mine), chosen, asked, phases).to("cpu")
        parts = [part for part in processes.gathered(own) if part is not None]
        whole = Rollout.join(parts, self.encoder.pad_id)
        return whole.rows(processes.in_order(count)).to(self.device)

    def _own_rollout(
        self, batch: PromptBatch, seeds: list[int], asked: Sequence[Slot], phases: Phases
    ) -> Rollout:
        """`_rollout` of this process alone."""
        with phases.measured("rollout"):
            tokens = self.respond(batch, seeds)
        with phases.measured("score"):
            return self._asked(batch, self.score(tokens, batch.keys), asked)

    def _asked(self, batch: PromptBatch, rollout: Rollout, asked: Sequence[Slot]) -> Rollout:
        """The rollout with the scores of external scorers."""
        scorers = {slot: self.scorers[slot] for slot in asked if slot in self.scorers}
        if not scorers:
            return rollout
        texts = self.encoder.decode(rollout.tokens)
        for slot, scorer in scorers.items():
            scorer.to(self.device)
            scores = scorer.checked(batch.messages, texts)
            if slot == "cost":
                rollout = replace(rollout, costs=squashed(scores, self.squash))
            else:
                rewards = self._standardised(torch.from_numpy(scores)).to(rollout.rewards)
                rollout = replace(rollout, rewards=rewards)
        return rollout

    def _log_probs(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        return self.backbone.log_probs(hidden, tokens, self.decoding.temperature)

    def _standardised(self, scores: Tensor) -> Tensor:
        if self.reward_moments is None:  # before the first rollout, on which they are measured
            return scores
        return (scores - self.reward_moments.mean) / self.reward_moments.std

    def _costs(self, scores: Tensor) -> Floats:
        """What training and safety test both see: the squashed score in float64."""
        return squashed(scores.double().cpu().numpy(), self.squash)

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
        targets = self.learner.targets(rollout, scores, self.multipliers, self.kl_coefficient)
        with phases.measured("update"):
            statistics = self._improve(rollout, targets)
        if not self._warming_up:
            self._steer(rollout, violations)
        self.updates += 1
        self._report(rollout, targets, violations, statistics, phases)
        self._warn_at_cap(rollout)
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
        self.multiplier_states = [
            self.multiplier.step(state, g)
            for state, g in zip(self.multiplier_states, violations, strict=True)
        ]
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

    def _warn_at_cap(self, rollout: Rollout) -> None:
        """Says so when a multiplier has stayed at its cap: more of it will not help."""
        for j, constraint in enumerate(self.constraints):
            at_cap = self.multipliers[j] >= self.multiplier.maximum
            self._updates_at_cap[j] = self._updates_at_cap[j] + 1 if at_cap else 0
            if self._updates_at_cap[j] == CAP_PATIENCE:
                rank_zero_warn(
                    f"λ of the {constraint.label} has been at its cap {self.multiplier.maximum:g} "
                    f"for {CAP_PATIENCE} updates: the constraint may not be reachable from this "
                    f"reference; forecast of the bound {constraint.forecast(rollout.costs):.3g}, "
                    f"limit {constraint.threshold:g}"
                )

    def _warn_truncated(self, rollout: Rollout) -> None:
        share = float(rollout.tokens.truncated.float().mean())
        words = self._truncation_watch.notice(share, self.encoder.chat.max_response_tokens)
        if words is not None:
            rank_zero_warn(words)

    def _constrain(self, rollout: Rollout) -> tuple[Tensor, list[float]]:
        """Scores per stream (1 + C, B): reward and pessimistic costs; and every violation g."""
        self._require_finite("reward", bool(rollout.rewards.isfinite().all()))
        self._require_finite("cost", bool(np.isfinite(rollout.costs).all()))
        streams, violations = [self._shaped_rewards(rollout)], []
        count = len(self.constraints)
        self._remember(rollout.costs)
        for constraint, variance, pessimism in zip(
            self.constraints, self.variances, self.pessimisms, strict=True
        ):
            values = constraint.values(rollout.costs)
            spread = pairwise_spread(values, rollout.keys)
            current = float(spread.mean()) / 2
            std = variance.std(current)
            # In units of σ̄, as the violation is: then λ means the same whatever a cost's scale.
            costs = pessimistic_costs(values, spread, pessimism, std) / std
            streams.append(torch.from_numpy(costs).to(rollout.rewards))
            target = constraint.training_target(count)
            violations.append(violation(float(values.mean()), std, pessimism, target))
            variance.update(current)
        return torch.stack(streams), violations

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

    def _remember(self, costs: Floats) -> None:
        """Keeps recent costs; renews every pessimism when they have been replaced once."""
        capacity = max(c.safety_prompts for c in self.constraints)
        every = max(1, capacity // costs.size)
        self.recent_costs = [*self.recent_costs, *costs.tolist()][-capacity:]
        if self.updates % every == 0:
            count = len(self.constraints)
            self.pessimisms = [
                c.training_pessimism(count, self.recent_costs) for c in self.constraints
            ]

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
        steps = 0
        for epoch in range(self.learner.epochs):
            generator = torch.Generator().manual_seed(
                response_seed(self.seed, "minibatch", self.updates, epoch) % 2**63
            )
            order = torch.randperm(len(rollout.keys), generator=generator)
            epoch_kl = 0.0
            for number, rows in enumerate(order.chunk(self.learner.minibatches)):
                demonstrations = self._drawn_demonstrations(epoch, number)
                statistics = self._minibatch(rollout, targets, rows, demonstrations)
                self.backbone.restore_trainable()
                trained = list(self.trained())
                processes.sum_gradients(trained)
                norm = clip_grad_norm_(trained, self.max_grad_norm)
                if self._usable(norm):
                    optimizer.step()
                optimizer.zero_grad()  # at once: the next rollout has no use for gradients
                statistics["skipped"] = float(not norm.isfinite())
                statistics["grad_norm"] = float(norm) if norm.isfinite() else 0.0
                epoch_kl += statistics["update_kl"] / self.learner.minibatches
                steps += 1
                for name, value in statistics.items():
                    totals[name] = totals.get(name, 0.0) + value
            if self.learner.target_kl is not None and epoch_kl > self.learner.target_kl:
                break
        means = {name: value / steps for name, value in totals.items()} | {"inner_steps": steps}
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

        With several processes each takes its share of the rows; the gradients are theirs, to be
        summed, and the means are of all.
        """
        count = rollout.tokens.response_mask[rows].sum()
        mine = rows[processes.share(len(rows))]
        if len(mine) == 0:
            raise InputError(
                f"a minibatch of {len(rows)} responses cannot be shared by "
                f"{processes.rank_and_size()[1]} processes; raise data.init_args.prompts_per_update"
            )
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
        generator = torch.Generator().manual_seed(
            response_seed(self.seed, "ptx", self.updates, epoch, minibatch) % 2**63
        )
        order = torch.randperm(len(self._demonstrations), generator=generator)
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
                    self.manual_backward(self.ptx_coefficient * loss)
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
                    self.manual_backward(loss)
            if separate:
                for stream, critic in enumerate(self.critics):
                    with self.backbone.role(critic):
                        hidden = self.backbone.hidden(part.tokens)
                        values = self.backbone.values(critic, hidden, part.tokens)
                        own = learner.value_loss(values, part, aim, stream) / count
                        self.manual_backward(learner.value_coefficient * own)
                    value_loss = value_loss + own.detach().cpu()
            shift = learner.update_statistics(log_probs.detach(), part)
            statistics["policy_loss"] += float(policy_loss.detach())
            statistics["value_loss"] += float(value_loss.detach())
            statistics["update_kl"] += float(shift.kl / count)
            statistics["clip_share"] += float(shift.clipped / count)
        return statistics

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
        for j, constraint in enumerate(self.constraints):
            suffix = "" if len(self.constraints) == 1 else f"_{constraint.label}"
            bar[f"lambda{suffix}"] = self.multipliers[j]
            if j >= len(self._forecasts) or self.updates % FORECAST_EVERY == 0:
                self._forecasts[j:] = [constraint.forecast(rollout.costs)]
            bar[f"bound{suffix}"] = self._forecasts[j]
            rest[f"violation{suffix}"] = violations[j]
            rest[f"pessimism{suffix}"] = self.pessimisms[j]
            if explained:
                rest[f"explained_variance_cost{suffix}"] = explained[j]
        self.log_dict(bar, prog_bar=True, batch_size=len(rollout.keys))
        self.log_dict(rest, batch_size=len(rollout.keys))

    # -- held-out prompts ----------------------------------------------------------------------

    def evaluate(self, batch: PromptBatch, purpose: str) -> Rollout:
        """Responses to a batch, seeded by purpose and prompt, with rewards, costs and KL."""
        seeds = [response_seed(self.seed, purpose, key, 0) for key in batch.keys]
        return self._rollout(batch, seeds)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        rollout = self.evaluate(batch, "validation")
        kl = rollout.kl.sum(dim=1)
        self._validation.append((rollout.rewards.cpu(), rollout.costs, kl.cpu()))

    def on_validation_epoch_end(self) -> None:
        rewards = torch.cat([r for r, _, _ in self._validation])
        costs = np.concatenate([c for _, c, _ in self._validation])
        kl = torch.cat([k for _, _, k in self._validation])
        self._validation.clear()
        if self.trainer.sanity_checking or costs.size < 2:
            return
        figures = {
            "val/reward": float(rewards.mean()),
            "val/cost": float(costs.mean()),
            "val/harm_rate": float((costs > 0).mean()),
            "val/kl": float(kl.mean()),
        }
        for constraint in self.constraints:
            suffix = "" if len(self.constraints) == 1 else f"_{constraint.label}"
            figures[f"val/bound{suffix}"] = constraint.forecast(costs)
        self.log_dict(figures)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record per prompt: key, prompt, response, reward (standardised), cost, truncated.

        Raises:
            InputError: the policy is a whole model, whose KL is not measured.
        """
        if self._other is not None:
            raise InputError("predict is for adapters; a whole model answers with transformers")
        rollout = self.evaluate(batch, "predict")
        return [
            {
                "key": key,
                "prompt": text,
                "response": response,
                "reward": float(reward),
                "cost": float(cost),
                "kl": float(kl),
                "truncated": bool(truncated),
            }
            for key, text, response, reward, cost, kl, truncated in zip(
                batch.keys,
                batch.texts,
                self.encoder.decode(rollout.tokens),
                rollout.rewards,
                rollout.costs,
                rollout.kl.sum(dim=1),
                rollout.tokens.truncated,
                strict=True,
            )
        ]

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Nothing: `callbacks.SafetyTest` draws the responses, once, after it wrote its plan."""

    # -- which policy of the run is the candidate ----------------------------------------------

    def policy_state(self) -> dict[str, Tensor]:
        """A copy of the policy's adapter, in main memory."""
        state = self.backbone.adapter_state(ACTOR)
        return {name: tensor.cpu().clone() for name, tensor in state.items()}

    def load_policy_state(self, state: dict[str, Tensor], update: int) -> None:
        """Makes the copied adapter the policy; `update` is the one after which it was copied."""
        self.backbone.set_adapter_state(ACTOR, state)
        self.candidate = update

    # -- what the safety test asks for ---------------------------------------------------------

    def sample_costs(self, batch: PromptBatch, seed: str) -> CostSamples:
        seeds = [response_seed(seed, key, 0) for key in batch.keys]
        rollout = self._rollout(batch, seeds, asked=["cost"])
        costs = np.repeat(rollout.costs[:, None, None], len(self.constraints), axis=2)
        texts = self.encoder.decode(rollout.tokens)
        truncated = rollout.tokens.truncated.cpu().numpy()[:, None]
        return CostSamples(batch.keys, costs, tuple((t,) for t in texts), truncated)

    def save_policy(self, folder: Path) -> None:
        """The adapter in PEFT's format, tokenizer, decoding and `hcrlhf.json`.

        Raises:
            RuntimeError: a given policy has changed since it was loaded.
        """
        if self.given is not None:  # what is released is what was given, byte by byte
            shutil.copytree(self.given, folder)
            if folder_hashes(folder) != self._given_files:
                raise RuntimeError(f"{self.given} has changed since it was loaded for the test")
            complete(folder, self.decoding, self.encoder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_role(ACTOR, folder, self.source.model)
        complete(folder, self.decoding, self.encoder)
        stage = replace(
            self.stages["sft"],
            role="policy",
            backbone=self.source,
            adapter=True,
            metrics={},
        )
        write_stage(folder, stage, self.training_prompt_keys())

    def provenance(self) -> dict[str, Any]:
        return {
            "hcrlhf": hcrlhf.__version__,
            "updates": None if self.given else self.updates,
            "candidate": self.updates if self.candidate is None else self.candidate,
            "given": self.given and Path(self.given).name,
            "backbone": self.stages["sft"].fingerprint,
            "squash": self.squash,
            "quantization": self.source.quantization,
            "dtype": self.source.dtype,
            "cost_model": self._cost_provenance(),
            "decoding": self.decoding.generation_config(self.encoder.chat.max_response_tokens),
            "chat": asdict(self.encoder.chat),
            "template": hashlib.sha256(self.encoder.template.encode()).hexdigest(),
        }

    def _cost_provenance(self) -> dict[str, Any]:
        if "cost" in self.scorers:
            return self.scorers["cost"].provenance()
        folder = Path(self.folders["cost"])
        files = ("adapter_model.safetensors", "head.safetensors")
        return {name: file_sha256(folder / name) for name in files}

    def training_prompt_keys(self) -> frozenset[str]:
        given = [] if self.given is None else [self.given]
        folders = [read_prompt_keys(folder) for folder in (*self.folders.values(), *given)]
        return frozenset().union(
            *folders, *(s.training_prompt_keys() for s in self.scorers.values())
        )

    # -- checkpoint ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["policy"] = {
            "updates": self.updates,
            "candidate": self.candidate,
            "multipliers": [[s.value, *s.memory] for s in self.multiplier_states],
            "variances": [[v.mean, v.weight] for v in self.variances],
            "recent_costs": list(self.recent_costs),
            "pessimisms": list(self.pessimisms),
            "kl_coefficient": self.kl_coefficient,
            "reward_moments": asdict(self.reward_moments) if self.reward_moments else None,
            "updates_at_cap": list(self._updates_at_cap),
            "skipped_in_a_row": self._skipped_in_a_row,
            "forecasts": list(self._forecasts),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if (state := checkpoint.get("policy")) is None:
            raise InputError("the checkpoint is of another stage; give one of a policy run")
        if len(state["multipliers"]) != len(self.constraints):
            raise InputError(
                f"the checkpoint has {len(state['multipliers'])} constraints, this config has "
                f"{len(self.constraints)}; resume with the constraints of the original run"
            )
        self.updates = int(state["updates"])
        self.candidate = state.get("candidate")
        self.multiplier_states = [
            MultiplierState(float(value), tuple(float(m) for m in memory))
            for value, *memory in state["multipliers"]
        ]
        for variance, (mean, weight) in zip(self.variances, state["variances"], strict=True):
            variance.mean, variance.weight = float(mean), float(weight)
        self.recent_costs = [float(c) for c in state["recent_costs"]]
        self.pessimisms = [float(p) for p in state["pessimisms"]]
        if self.reward_moments is None and state.get("reward_moments"):  # measured, not declared
            self.reward_moments = ScoreMoments(**state["reward_moments"])
        self._updates_at_cap = [int(n) for n in state["updates_at_cap"]]
        self._skipped_in_a_row = int(state["skipped_in_a_row"])
        self._forecasts = [float(f) for f in state["forecasts"]]
        if self.adaptive_kl is not None:  # a fixed one is taken from the config alone
            self.kl_coefficient = float(state["kl_coefficient"])
        trainer: Any = self.trainer
        if self.updates < getattr(trainer.datamodule, "updates", 0):
            # The one epoch may have ended already, at a smaller number of updates: it goes on.
            for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                counts["processed"] = counts["completed"]
