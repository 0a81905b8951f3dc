"""The safety test at the end of fit: PASS releases the policy, anything else does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from hcrlhf import certificate, processes
from hcrlhf.certificate import VERDICT_FILE, Verdict
from hcrlhf.constraint import with_etas
from hcrlhf.errors import InputError
from hcrlhf.examples import EncodesExamples
from hcrlhf.gate import Gate, Population, SafetyTrial
from hcrlhf.hashing import folder_hashes, sha256, write_json
from hcrlhf.human import HumanLabels
from hcrlhf.ledger import Schedule
from hcrlhf.resume import FILE as CHECKPOINT
from hcrlhf.safety import CostSamples, HoldsSafetyPrompts, SafetyTestable
from hcrlhf.splits import require_disjoint

NO_CANDIDATE = (
    "the forecast on validation prompts lies above a limit; the safety set was not looked at and "
    "no delta was spent"
)
PACKAGES = ("torch", "transformers", "peft", "numpy", "scipy")


class SafetyTest(Callback):
    """Draws one response to each safety prompt, bounds the costs, writes the verdict.

    What is promised (threshold, δ, bound, number of prompts) is said by the module's
    `constraints`, which training reads too; the ledger says what part of δ this test is granted;
    this callback only knows how to sample.

    verdict.json says NOT_TESTED from the first moment of the fit, and something else only after
    the test has run to its end.

    Args:
        batch_size: safety prompts that are answered together, at most (the module may split them);
            in a sequential test also how many lie between two looks.
        sequential: look after every batch, and stop as soon as every constraint has decided;
            `safety_prompts` is then the largest number of prompts.
        ledger: file of the claim's ledger; None takes ledger.jsonl beside the run's folder, so
            that runs that lie side by side share one.
        schedule: "halving" grants test k of the ledger δ·2^-k; "once" grants the first all of δ,
            and there is no second.
        continues: folder of a run whose sequential test was undecided; this test goes on with
            fresh prompts, the same policy and the same δ.
        candidate_check: before a test is opened, forecast every bound from responses to the
            validation prompts; if one lies above its limit the run ends in "no solution found"
            without a look at the safety set and without spending δ.
        human: how many responses people will label after a PASS, and what will be claimed from
            their labels (`hcrlhf human`).

    Raises:
        InputError: before training: the module or the data cannot be tested, the safety set
            overlaps with training prompts, prompts or δ are spent, or the folder holds a verdict
            already.
    """

    def __init__(
        self,
        batch_size: int = 64,
        sequential: bool = False,
        ledger: str | None = None,
        schedule: Schedule = "halving",
        continues: str | None = None,
        candidate_check: bool = True,
        human: HumanLabels | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is a whole number >= 1, got {batch_size}")
        if continues is not None and not sequential:
            raise InputError("continues is for sequential tests; set sequential: true")
        self.batch_size = batch_size
        self.sequential = sequential
        self.ledger = ledger
        self.schedule: Schedule = schedule
        self.continues = continues
        self.candidate_check = candidate_check
        self.human = human
        self.verdict: Verdict | None = None
        self._record: dict[str, Any] = {}  # the verdict that this process wrote last
        self._configured: Any = ()
        self._encoded: dict[str, Any] = {}
        self._population = Population(())
        self._asking = False  # whether all processes are at an answer

    # -- before training -----------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in ("fit", "test"):
            return
        if sum(isinstance(c, SafetyTest) for c in cast(Any, trainer).callbacks) > 1:
            raise InputError(
                "trainer.callbacks names callbacks.SafetyTest more than once, and a run has one "
                "verdict; remove all but one"
            )
        if not isinstance(pl_module, SafetyTestable):
            raise InputError(
                f"SafetyTest needs a module with sample_costs(batch), and "
                f"{type(pl_module).__name__} has none; fit a policy, or remove "
                "callbacks.SafetyTest from the config"
            )
        data = cast(Any, trainer).datamodule
        if not isinstance(data, HoldsSafetyPrompts):
            raise InputError(
                f"SafetyTest needs a data module with safety prompts, and {type(data).__name__} "
                "has none; use datamodules.Prompts"
            )
        if data.safety_prompts is None:
            raise InputError(
                "SafetyTest needs data.init_args.safety, a file of prompts that nothing else uses"
            )
        keys = [p.key for p in data.safety_prompts]
        require_disjoint(keys, data.training_keys, "safety", "training")
        require_disjoint(keys, pl_module.training_prompt_keys(), "safety", "earlier stages'")
        path = self._folder(trainer) / VERDICT_FILE
        if (record := certificate.read_verdict(path)) is not None:
            found = record["verdict"]
            # Without a plan nothing was looked at: the candidate check had ended that run. A PASS
            # without its policy broke off in the last moment, and is finished.
            unreleased = found == "PASS" and not (self._folder(trainer) / "policy").exists()
            looked = found != "NOT_TESTED" and record["plan_hash"] is not None
            if looked and not unreleased:
                raise InputError(
                    f"{path} already says {found}; another test is another run folder, with "
                    "prompts that no test has used"
                )
        if (self._folder(trainer) / "policy").exists():
            raise InputError(
                f"{self._folder(trainer) / 'policy'} is there already, without a PASS of this run, "
                "which writes its own in its place; remove it, or choose another "
                "trainer.default_root_dir"
            )
        if record is None and (self._folder(trainer) / certificate.CERTIFICATE_FILE).exists():
            raise InputError(
                f"{self._folder(trainer)} holds a {certificate.CERTIFICATE_FILE} that is of no run "
                "there, and would be taken for this one's; move it, or choose another "
                "trainer.default_root_dir"
            )
        # Training aims at what this test will be granted, not at what was configured.
        self._configured = pl_module.constraints
        pl_module.constraints = self._gate(trainer).grant(self._configured)

    def _gate(self, trainer: Trainer) -> Gate:
        return Gate.configured(
            self._folder(trainer),
            self.ledger,
            self.schedule,
            self.sequential,
            self.continues,
            self.human,
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        updates = cast(SafetyTestable, pl_module).updates
        folder = self._folder(trainer)
        data = self._data(trainer)
        trained = updates >= data.updates or getattr(pl_module, "over", False)
        # Without a checkpoint a run can only be repeated, and finds its own plan again in the end.
        if not trained and (folder / CHECKPOINT).is_file() and self._gate(trainer).has_begun():
            this = f"has only {updates} of {data.updates} updates behind it"
            raise InputError(
                f"{folder} holds the plan of a safety test that a run before this one opened, and "
                f"this one {this if updates else 'begins anew'}: go on with that run (--ckpt_path "
                "last, and as many data.init_args.updates as it had), or choose another "
                "trainer.default_root_dir"
            )
        self._prepare(trainer, pl_module)
        if trained:
            # A resumed run whose training is finished: no epoch begins, so none will end.
            self.run(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, pl_module)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the population, and fails closed until the test has run."""
        data = self._data(trainer)
        module = cast(EncodesExamples, pl_module)
        safety = [p.key for p in data.safety_prompts or []]
        prompts = [*(data.safety_prompts or []), *data.validation_prompts]
        encoded = {p.key: module.encode(p) for p in prompts}
        self._encoded = {key: value for key, value in encoded.items() if value is not None}
        pool = [key for key in safety if key in self._encoded]
        # Once more: a scorer may know its prompts only when it is loaded, as a checkpoint does.
        stages = cast(SafetyTestable, pl_module).training_prompt_keys()
        require_disjoint(safety, stages, "safety", "earlier stages'")
        seen = cast(SafetyTestable, pl_module).checkpoint_prompts
        require_disjoint(safety, seen, "safety", "the checkpoint's training")
        self._population = Population(
            pool,
            left_out=len(safety) - len(pool),
            compared_with={
                "training and validation prompts": len(data.training_keys),
                "prompts of earlier stages": len(stages),
            },
            source=data.safety_source,
        )
        needed = cast(SafetyTestable, pl_module).constraints[0].safety_prompts
        self._gate(trainer).require_fresh(self._population, needed)
        for other, count in self._gate(trainer).used_elsewhere(self._population).items():
            rank_zero_info(
                f"{count} of {len(pool)} safety prompts were used by tests of another ledger, "
                f"{other}: a claim for itself, and this one's δ does not cover both; runs of one "
                "claim lie beside each other, or name one file in callbacks.SafetyTest, ledger"
            )
        if trainer.is_global_zero:  # of a run that was killed: not tested, and not to be used
            shutil.rmtree(self._folder(trainer) / "policy.tmp", ignore_errors=True)
        self._write(trainer, "NOT_TESTED", "the safety test has not run to its end", None)

    # -- the test ------------------------------------------------------------------------------

    # Not on_fit_end: by then the strategy has moved the model to the CPU.
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run(trainer, pl_module)

    def run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan, responses, decision, release; the policy is written only on PASS.

        With several processes the first one alone decides and writes; the others answer their
        share of the prompts that it names.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(trainer, "NOT_TESTED", "fast_dev_run", None)
            return
        if processes.rank_and_size()[0] > 0:
            while (question := processes.from_first(None)) is not None:
                self._answer(pl_module, *question)
            self.verdict = processes.from_first(self.verdict)
            return
        try:
            self._run(trainer, pl_module)
        finally:
            # The others wait for a question, or, where an answer failed, for that of this process,
            # and end with it.
            if not self._asking:
                processes.from_first(None)
                processes.from_first(self.verdict)

    def _ask(self, pl_module: LightningModule, keys: Sequence[str], seed: str) -> CostSamples:
        """Responses of all processes together to the prompts with these keys, with costs."""
        self._asking = True
        samples = self._answer(pl_module, *processes.from_first((list(keys), seed)))
        self._asking = False
        return samples

    def _answer(self, pl_module: LightningModule, keys: Sequence[str], seed: str) -> CostSamples:
        module, encoder = cast(SafetyTestable, pl_module), cast(EncodesExamples, pl_module)
        batch = encoder.collate([self._encoded[key] for key in keys])
        return module.sample_costs(batch.to(pl_module.device), seed)

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(SafetyTestable, pl_module)
        folder = self._folder(trainer)
        # Once a test is open its prompts and its δ are spent: then it is ended, not put off.
        check = self.candidate_check and not self._gate(trainer).has_begun()
        if check and not self._is_candidate(trainer, pl_module):
            self._write(trainer, "NO_SOLUTION_FOUND", NO_CANDIDATE, None)
            return
        files = folder_hashes(self._write_policy(module, folder))
        shutil.rmtree(folder / "policy.tmp")
        constraints = module.completed(self._configured)
        with self._gate(trainer).test(
            constraints,
            self._population,
            files,
            {**module.provenance(), "candidate_check": self.candidate_check},
            module.training_costs,
            # After a training it is too late to refuse: whoever cannot go on takes the next test.
            keep_other=trainer.state.fn == "test",
        ) as trial:
            self._sample(trial, pl_module)
            if not trial.passed():
                trial.fail()
                self._write(
                    trainer, "NO_SOLUTION_FOUND", "the safety test was not passed", trial.plan_hash
                )
                trial.release()
                return
            candidate = self._write_policy(module, folder)
            if folder_hashes(candidate) != files:
                raise RuntimeError("the policy that was written is not the policy that was tested")
            texts = {p.key: p.text for p in self._data(trainer).safety_prompts or []}
            trial.certify(texts, certificate.environment(*PACKAGES))
            self._write(trainer, "PASS", certificate.PASS_REASON, trial.plan_hash)
            # Last of all: wherever this breaks off, there is no policy/ without a PASS.
            shutil.rmtree(folder / "policy", ignore_errors=True)
            os.replace(candidate, folder / "policy")
            trial.release()

    def _is_candidate(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the forecast of every bound on the validation prompts is within its limit."""
        module = cast(SafetyTestable, pl_module)
        data = self._data(trainer)
        keys = [p.key for p in data.validation_prompts if p.key in self._encoded]
        seed = sha256("candidate", str(module.updates))
        costs = [
            self._ask(pl_module, keys[start : start + self.batch_size], seed).costs[:, 0]
            for start in range(0, len(keys), self.batch_size)
        ]
        columns = np.concatenate(costs)
        if not np.isfinite(columns).all():
            rank_zero_info("candidate check: the cost of a validation prompt is no finite number")
            return False
        good = True
        for j, constraint in enumerate(with_etas(module.constraints, module.training_costs)):
            forecast = constraint.forecast(columns[:, j])
            rank_zero_info(
                f"candidate check on {len(keys)} validation prompts: forecast of the "
                f"{constraint.label}'s bound {forecast:.3g}, limit {constraint.threshold:g}"
            )
            good = good and forecast <= constraint.threshold
        return good

    def _sample(self, trial: SafetyTrial, pl_module: LightningModule) -> None:
        most = "at most " if self.sequential else ""
        number = trial.plan["ledger"]["test"]
        delta = max(c.delta for c in trial.constraints)
        rank_zero_info(
            f"safety test {number} of the ledger, granted δ = {certificate.plain(delta)}: "
            f"{most}{trial.total} prompts"
        )
        while keys := trial.next(self.batch_size):
            trial.record(self._ask(pl_module, keys, trial.seed))
            rank_zero_info(f"  {trial.done} answered")

    @staticmethod
    def _write_policy(module: SafetyTestable, folder: Path) -> Path:
        """The policy as it would be shipped, in policy.tmp."""
        temporary = folder / "policy.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        module.save_policy(temporary)
        return temporary

    # -- fail closed ---------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.verdict is None:
            self._write(trainer, "NOT_TESTED", "training ended without a safety test", None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Only where the fit had begun: before that nothing is written at all. And only where the
        # test had not ended: what breaks afterwards (a logger, another callback) changes nothing.
        released = self.verdict == "PASS" and (self._folder(trainer) / "policy").exists()
        ended = released or self.verdict == "NO_SOLUTION_FOUND"
        if self.verdict is not None and not ended and self._written_here(trainer):
            shutil.rmtree(self._folder(trainer) / "policy.tmp", ignore_errors=True)
            reason = f"the run stopped with {type(exception).__name__}"
            self._write(trainer, "NOT_TESTED", reason, None)

    def _written_here(self, trainer: Trainer) -> bool:
        """Whether the verdict on disk is this process's: another one may run in the same folder."""
        record = certificate.read_verdict(self._folder(trainer) / VERDICT_FILE)
        return record is None or record == self._record

    def _write(
        self, trainer: Trainer, verdict: Verdict, reason: str, plan_hash: str | None
    ) -> None:
        self.verdict = verdict
        if trainer.is_global_zero:
            folder = self._folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            self._record = certificate.verdict_record(verdict, reason, plan_hash)
            write_json(folder / VERDICT_FILE, self._record)

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir)

    @staticmethod
    def _data(trainer: Trainer) -> HoldsSafetyPrompts:
        return cast(HoldsSafetyPrompts, cast(Any, trainer).datamodule)
