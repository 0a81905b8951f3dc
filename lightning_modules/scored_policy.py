"""A policy that answers and is scored: what the safety test judges, without any learning."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

import hcrlhf
from hcrlhf import machine, optimizers, processes
from hcrlhf.backbone import (
    ADAPTER_FILE,
    BASE,
    HEAD_FILE,
    Backbone,
    LoraOptions,
    load_causal_lm,
    load_head,
)
from hcrlhf.constraint import Constraint, require_etas, suffixes, with_etas
from hcrlhf.errors import InputError
from hcrlhf.examples import Message, Prompt
from hcrlhf.hashing import file_sha256, folder_hashes
from hcrlhf.phases import Phases
from hcrlhf.preferences import squash_range, squashed
from hcrlhf.release import complete, require_same_answers
from hcrlhf.rollouts import Decoding, Rollout, response_seed, sample
from hcrlhf.safety import CostSamples, HoldsSafetyPrompts
from hcrlhf.samples import Floats
from hcrlhf.scorers import Scorer, Slot
from hcrlhf.stages import FILE as STAGE_FILE
from hcrlhf.stages import (
    BackboneSource,
    Role,
    ScoreMoments,
    Stage,
    fingerprint,
    read_prompt_keys,
    read_record,
    read_stage,
    require_own_base,
    require_same_base,
    require_tokens,
    write_stage,
)
from hcrlhf.text import (
    Encoded,
    TextEncoder,
    Tokens,
    collate,
    join,
    load_tokenizer,
)
from lightning_modules.adapter_module import AdapterModule, Schedule, add_trained_role, check_size

ACTOR = "policy"
REFERENCE = "sft"
GIVEN_DTYPES = (None, "float32", "bfloat16")  # of a whole model; None: its config does not say
Reader = Callable[[Tensor, Tokens], Tensor]  # hidden states of a role, and whose they are


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


class ScoredPolicy(AdapterModule):
    """A policy that answers prompts, and what reward, cost and reference say of its answers.

    All that a safety test needs, and nothing that learns: `lightning_modules.Policy` adds that, and
    its docstring explains the arguments.
    """

    def __init__(
        self,
        sft: str,
        reward: str | Scorer,
        cost: str | Scorer,
        constraints: Sequence[Constraint],
        decoding: Decoding,
        lora: LoraOptions | None,
        micro_batch_size: int | None,
        rollout_batch_size: int | None,
        unpacked_rollouts: bool,
        seed: int,
        policy: str | None,
        learning_rate: float,
        weight_decay: float,
        schedule: Schedule,
        warmup: float,
        gradient_checkpointing: bool,
        optimizer: optimizers.Name,
    ) -> None:
        super().__init__(
            learning_rate, weight_decay, schedule, warmup, gradient_checkpointing, optimizer
        )
        given: tuple[tuple[Slot, str | Scorer], ...] = (("reward", reward), ("cost", cost))
        self.folders = {"sft": sft} | {slot: x for slot, x in given if isinstance(x, str)}
        self.scorers = {slot: x for slot, x in given if isinstance(x, Scorer)}
        self.reward_moments: ScoreMoments | None = None
        if not constraints:
            raise InputError("constraints is empty; name at least one limit")
        self.constraints = tuple(constraints)
        self.decoding = decoding
        self.lora = lora
        self.micro_batch_size = check_size(micro_batch_size, "micro_batch_size")
        self.rollout_batch_size = check_size(rollout_batch_size, "rollout_batch_size")
        self.unpacked_rollouts = unpacked_rollouts
        self.seed = seed
        self.given = policy
        self._other: Backbone | None = None  # a given policy that is a whole model
        self.updates = 0
        self.candidate: int | None = None  # the update whose policy is tested; None: the last one
        # Of the fit that is resumed: whether updates, time or callbacks are others now (the command
        # line says so), and whether it had ended before all its updates and is not to go on.
        self.settings_changed, self.over = True, False
        self.checkpoint_prompts: frozenset[str] = frozenset()  # that a loaded checkpoint has seen
        self._stage_prompts: frozenset[str] | None = None
        self._cost_files: dict[str, str] = {}
        self._validation: list[tuple[Tensor, Floats, Tensor]] = []

    @property
    def _inner_roles(self) -> list[str]:
        """Which of reward and cost are adapters on the shared backbone."""
        return [role for role in ("reward", "cost") if role in self.folders]

    @property
    def training_costs(self) -> Sequence[float]:
        """Of the last rollouts of training, oldest first."""
        return ()

    # -- what this stage stands on -------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._check_trainer(stage)
        self._read_stages()
        sft = self.stages["sft"]
        self.encoder = TextEncoder(load_tokenizer(self.folders["sft"]), sft.chat)
        require_tokens(sft, self.encoder.identity(), "sft")
        if self.given is not None:
            self._check_given(Path(self.given))

    def _check_trainer(self, stage: str) -> None:
        """
        Raises:
            InputError: several processes that would not see the same batches, or a finished policy
                that would be trained, or tested with a limit that only training completes.
        """
        if self.given is not None and stage not in ("test", "predict"):
            raise InputError(
                f"policy: {self.given} is a finished policy, to be tested and not trained; remove "
                "it, or use hcrlhf test"
            )
        # The gate would refuse it too, but after the candidate check. Checkpoints bring the costs.
        if stage == "test" and self.given is not None:
            require_etas(self.constraints)
        machine.require_draws(self.trainer.strategy.root_device)
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
        begun = self.given is None and not sft.adapter
        lora = (self.lora or LoraOptions()) if begun else None
        self.require_machine(self.source, sft.chat, lora)
        if fingerprint(self.source.folder) != sft.fingerprint:
            raise InputError(
                f"sft: the weights in {self.source.model} are not those that {folders['sft']} was "
                "trained on; run the stages again"
            )
        for slot, scorer in self.scorers.items():
            scorer.prepare(slot)
        self._read_moments()
        self.squash = (self.scorers.get("cost") or stages["cost"]).squash
        self.cost_range = squash_range(self.squash)
        if "cost" in self.scorers:
            self.cost_range = self.scorers["cost"].cost_range
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
        if self.cost_range is not None:
            return tuple(c.with_range(*self.cost_range).ready() for c in constraints)
        for constraint in constraints:
            if constraint.upper is not None or constraint.lower is not None:
                raise InputError(
                    "the constraint declares lower or upper, but nothing limits the costs of "
                    f"{self._named('cost')}; give it a squash, which brings its own range, or as "
                    "a scorer its lower and upper"
                )
        return tuple(c.ready() for c in constraints)

    def configure_model(self) -> None:
        if hasattr(self, "backbone"):
            return
        folders, sft_adapter = self.folders, self.stages["sft"].adapter
        # With dropout the ratio of the first step would not be 1, and clipping would see its noise.
        backbone = self.build_backbone(self.source, dropout=False)
        if self.given is None or not self._load_given(backbone, Path(self.given)):
            add_trained_role(backbone, ACTOR, folders["sft"] if sft_adapter else None, self.lora)
        self.reference = REFERENCE if sft_adapter else BASE
        if sft_adapter:
            backbone.load_role(REFERENCE, folders["sft"], trainable=False)
        for role in self._inner_roles:
            backbone.load_role(role, folders[role], trainable=False)
            backbone.add_head(role, trainable=False, state=load_head(folders[role]))
        # Now and not when they are asked for: what is in the folders then may be other models.
        if "cost" in folders:
            folder = Path(folders["cost"])
            self._cost_files = {n: file_sha256(folder / n) for n in (ADAPTER_FILE, HEAD_FILE)}
        self.training_prompt_keys()  # reads the lists of the stages, if nothing has yet
        self.backbone = backbone

    def _check_given(self, folder: Path) -> None:
        """Before anything is loaded.

        Raises:
            InputError: the given policy is neither adapter nor model, of another backbone, or would
                answer otherwise than it is tested.
        """
        if (folder / STAGE_FILE).is_file():
            stages = {
                "sft": self.stages["sft"],
                "policy": read_stage(str(folder), "policy", "policy"),
            }
            require_same_base({**stages, "sft": replace(stages["sft"], backbone=self.source)})
        elif (folder / ADAPTER_FILE).is_file():
            require_own_base(folder, self.source, self.stages["sft"].fingerprint)
        require_same_answers(folder, self.decoding, self.encoder)
        if not any((folder / name).is_file() for name in (ADAPTER_FILE, "config.json")):
            raise InputError(
                f"policy: {folder} holds neither {ADAPTER_FILE} nor config.json; expected the "
                "folder of a PEFT adapter or of a Hugging Face model"
            )
        if not (folder / ADAPTER_FILE).is_file() and _kept_dtype(folder) not in GIVEN_DTYPES:
            raise InputError(
                f"policy: the model in {folder} is kept in {_kept_dtype(folder)}, and would be "
                "tested in another precision than it is used in; expected float32 or bfloat16: "
                'load it with dtype="bfloat16" and save it'
            )

    def _load_given(self, backbone: Backbone, folder: Path) -> bool:
        """Loads the given policy; whether it took the place of the one that would be trained."""
        self._given_files = folder_hashes(folder)
        if (folder / ADAPTER_FILE).is_file():
            backbone.load_role(ACTOR, folder, trainable=False)
            return True
        dtype = _kept_dtype(folder) or self.source.dtype  # as people will load it
        model = load_causal_lm(BackboneSource(str(folder), dtype=dtype), self.device)
        self._other = Backbone(model.to(self.device))
        return False

    # -- data ----------------------------------------------------------------------------------

    def encode(self, example: Prompt) -> EncodedPrompt | None:
        encoded = self.encoder.encode(example.messages, None)
        return None if encoded is None else EncodedPrompt(example, encoded.prompt)

    def collate(self, encoded: list[EncodedPrompt]) -> PromptBatch:
        tokens = collate([Encoded(e.ids, []) for e in encoded], self.encoder.pad_id)
        keys = tuple(e.prompt.key for e in encoded)
        texts = tuple(e.prompt.text for e in encoded)
        return PromptBatch(tokens, keys, texts, tuple(e.prompt.messages for e in encoded))

    @property
    def progress(self) -> str:
        return f"update {self.updates}"

    # -- a rollout -----------------------------------------------------------------------------

    def respond(self, batch: PromptBatch, seeds: list[int], unpacked: bool = False) -> Tokens:
        """One response per prompt from the policy; `unpacked`: `Backbone.unpacked`."""
        return self._with_room(
            "rollout_batch_size", len(batch.keys), lambda: self._respond(batch, seeds, unpacked)
        )

    def _respond(self, batch: PromptBatch, seeds: list[int], unpacked: bool) -> Tokens:
        groups = batch.tokens.by_length(self.rollout_batch_size)
        backbone, role = (self._other, BASE) if self._other else (self.backbone, ACTOR)
        with backbone.merged(role), backbone.unpacked() if unpacked else nullcontext():
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
        with self.backbone.inference():
            found = self.backbone.read([tokens.rows(rows) for rows in groups], self._readers())
        order = torch.cat(groups).argsort()
        read = {role: torch.cat(parts)[order] for role, parts in found.items()}
        unknown = torch.full((len(keys),), math.nan, device=tokens.input_ids.device)
        return Rollout(
            tokens=tokens,
            keys=keys,
            log_probs=read[ACTOR][:, 0],
            reference_log_probs=read[self.reference],
            # Not a number where the role is a scorer's, until it has been asked.
            rewards=self._standardised(read.get("reward", unknown)),
            costs=self._costs(read.get("cost", unknown)),
            values=self._values(read),
        )

    def _readers(self) -> dict[str, Reader]:
        """What is read off the hidden states of each role."""
        own: dict[str, Reader] = {ACTOR: self._read_actor, self.reference: self._log_probs}
        return own | {role: partial(self.backbone.scores, role) for role in self._inner_roles}

    def _read_actor(self, hidden: Tensor, part: Tokens) -> Tensor:
        """(B, 1 + S, T): log-probabilities, then S streams of values, of which there are none."""
        return self._log_probs(hidden, part)[:, None]

    def _values(self, read: dict[str, Tensor]) -> Tensor:
        """(S, B, T): the values among what was read."""
        return read[ACTOR][:, 1:].transpose(0, 1)

    def _rollout(
        self,
        batch: PromptBatch,
        seeds: list[int],
        asked: Sequence[Slot] = ("reward", "cost"),
        phases: Phases | None = None,
        sealed: bool = False,
    ) -> Rollout:
        """Responses to a batch, with what models and the scorers that are asked say of them.

        With several processes each answers its share, and all get the whole.

        Args:
            sealed: for a safety test: drawn from packed weights, as they are shipped, also where
                training unpacks them; and no message names a cost.
        """
        count, phases = len(batch.keys), phases or Phases(self.device)
        if processes.rank_and_size()[1] == 1:
            return self._own_rollout(batch, seeds, asked, phases, sealed)
        mine, own = processes.share(count), None
        if len(mine) > 0:  # the last batch of a safety test may be smaller than the processes
            chosen = [seeds[i] for i in mine.tolist()]
            own = self._own_rollout(batch.rows(mine), chosen, asked, phases, sealed).to("cpu")
        parts = [part for part in processes.gathered(own) if part is not None]
        whole = Rollout.join(parts, self.encoder.pad_id)
        return whole.rows(processes.in_order(count)).to(self.device)

    def _own_rollout(
        self,
        batch: PromptBatch,
        seeds: list[int],
        asked: Sequence[Slot],
        phases: Phases,
        sealed: bool,
    ) -> Rollout:
        """`_rollout` of this process alone."""
        with phases.measured("rollout"):
            tokens = self.respond(batch, seeds, self.unpacked_rollouts and not sealed)
        with phases.measured("score"):
            return self._asked(batch, self.score(tokens, batch.keys), asked, sealed)

    def _asked(
        self, batch: PromptBatch, rollout: Rollout, asked: Sequence[Slot], sealed: bool
    ) -> Rollout:
        """The rollout with the scores of external scorers."""
        scorers = {slot: self.scorers[slot] for slot in asked if slot in self.scorers}
        if not scorers:
            return rollout
        texts = self.encoder.decode(rollout.tokens)
        for slot, scorer in scorers.items():
            scorer.to(self.device)
            scores = scorer.checked(batch.messages, texts, sealed)
            if slot == "cost":
                if not sealed:  # the gate looks at the range too, and says nothing of the cost
                    scorer.require_range(scores)
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
        # A cost that is not a number ends no training that is over: it is for the test to judge.
        finite = bool(np.isfinite(costs).all())
        if not finite:
            rank_zero_warn(
                f"{self._named('cost')} gave {int((~np.isfinite(costs)).sum())} of {costs.size} "
                "responses to validation prompts a cost that is not finite; no bound is forecast"
            )
        constraints = with_etas(self.constraints, self.training_costs)
        for constraint, suffix in zip(constraints, suffixes(constraints), strict=True):
            figures[f"val/bound{suffix}"] = constraint.forecast(costs) if finite else math.inf
        self.log_dict(figures)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        return self.answers(batch, "predict")

    def answers(self, batch: PromptBatch, purpose: str) -> list[dict[str, Any]]:
        """One record per prompt: key, prompt, response, reward (standardised), cost,
        kl (nats per response), truncated.

        Args:
            purpose: names the random numbers.

        Raises:
            InputError: the policy is a whole model, whose KL is not measured.
        """
        if self._other is not None:
            raise InputError("predict is for adapters; a whole model answers with transformers")
        rollout = self.evaluate(batch, purpose)
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
        rollout = self._rollout(batch, seeds, asked=["cost"], sealed=True)
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
        self.backbone.save_role(ACTOR, folder, self.source.model, self.source.revision)
        complete(folder, self.decoding, self.encoder)
        stage = replace(
            self.stages["sft"],
            role="policy",
            backbone=self.source,
            adapter=True,
            metrics={},
        )
        write_stage(folder, stage, self.prompts_seen)

    def provenance(self) -> dict[str, Any]:
        return {
            "hcrlhf": hcrlhf.__version__,
            "updates": None if self.given else self.updates,
            "candidate": self.updates if self.candidate is None else self.candidate,
            "given": self.given and Path(self.given).name,
            "policy": self._policy_options(),
            "backbone": self.stages["sft"].fingerprint,
            "squash": self.squash,
            "quantization": self.source.quantization,
            "dtype": self.source.dtype,
            "cost_model": self._cost_provenance(),
            "decoding": self.decoding.generation_config(self.encoder.chat.max_response_tokens),
            "chat": asdict(self.encoder.chat),
            "template": hashlib.sha256(self.encoder.template.encode()).hexdigest(),
        }

    def _policy_options(self) -> dict[str, Any]:
        """What the policy is besides its weights, wherever its folder lies."""
        if self._other is not None:
            dtype = str(self._other.model.dtype).removeprefix("torch.")
            return {"config.json": self._given_files["config.json"], "dtype": dtype}
        return self.backbone.scale_settings(ACTOR)

    def _cost_provenance(self) -> dict[str, Any]:
        if "cost" in self.scorers:
            return self.scorers["cost"].provenance()
        return {**self._cost_files, **self.backbone.scale_settings("cost")}

    def training_prompt_keys(self) -> frozenset[str]:
        if self._stage_prompts is None:
            given = [] if self.given is None else [self.given]
            folders = [read_prompt_keys(folder) for folder in (*self.folders.values(), *given)]
            self._stage_prompts = frozenset().union(*folders)
        # Asked anew: before `prepare` a scorer may not know its own.
        return self._stage_prompts.union(*(s.training_prompt_keys() for s in self.scorers.values()))

    @property
    def prompts_seen(self) -> frozenset[str]:
        """Keys of every prompt that the policy, or a model it was trained with, has seen."""
        data = cast(HoldsSafetyPrompts, cast(Any, self.trainer).datamodule)
        return self.training_prompt_keys() | self.checkpoint_prompts | data.training_keys


def _kept_dtype(folder: Path) -> Any:
    """In which precision a Hugging Face model lies in a folder, by its config; None: unsaid."""
    record = read_record(folder / "config.json")
    return record.get("dtype") or record.get("torch_dtype")
