"""The safety test at the end of fit: PASS releases the policy, anything else does not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from hcrlhf import certificate
from hcrlhf.certificate import CERTIFICATE_FILE, PLAN_FILE, VERDICT_FILE, Verdict
from hcrlhf.errors import InputError
from hcrlhf.examples import EncodesExamples
from hcrlhf.safety import CostSamples, HoldsSafetyPrompts, SafetyTestable
from hcrlhf.splits import require_disjoint
from hcrlhf.stages import file_sha256


class SafetyTest(Callback):
    """Draws one response to each safety prompt, bounds the costs, writes the verdict.

    What is promised (threshold, δ, bound, number of prompts) is said by the module's
    `constraints`, which training reads too; this callback only knows how to sample.

    verdict.json says NOT_TESTED from the first moment of the fit, and something else only after
    the test has run to its end.

    Args:
        batch_size: safety prompts per forward pass.

    Raises:
        InputError: before training: the module or the data cannot be tested, the safety set
            overlaps with training prompts, or the folder holds a verdict already.
    """

    def __init__(self, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is a whole number >= 1, got {batch_size}")
        self.batch_size = batch_size
        self.verdict: Verdict | None = None
        self._pool: dict[str, Any] = {}
        self._left_out = 0

    # -- before training -----------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in ("fit", "test"):
            return
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
        sizes = {c.safety_prompts for c in pl_module.constraints}
        if len(sizes) > 1:
            raise InputError(
                f"the constraints name different numbers of safety prompts {sorted(sizes)}; one "
                "test draws one set, so give all the same"
            )
        path = self._folder(trainer) / VERDICT_FILE
        if path.is_file():
            found = json.loads(path.read_text())["verdict"]
            if found != "NOT_TESTED":
                raise InputError(
                    f"{path} already says {found}; a second look at the same safety set would "
                    "void the promise: use another run folder and fresh safety prompts"
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, pl_module)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the population, and fails closed until the test has run."""
        prompts = cast(HoldsSafetyPrompts, cast(Any, trainer).datamodule).safety_prompts or []
        module = cast(EncodesExamples, pl_module)
        encoded = {p.key: module.encode(p) for p in prompts}
        self._pool = {key: value for key, value in encoded.items() if value is not None}
        self._left_out = len(encoded) - len(self._pool)
        wanted = self._constraints(pl_module)[0].safety_prompts
        if len(self._pool) < wanted:
            raise InputError(
                f"the safety set has {len(self._pool)} different prompts that fit, but the "
                f"constraint's safety_prompts is {wanted}; give more prompts, or lower it"
            )
        self._write(trainer, "NOT_TESTED", "the safety test has not run to its end", None)

    # -- the test ------------------------------------------------------------------------------

    # Not on_fit_end: by then the strategy has moved the model to the CPU.
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(trainer, "NOT_TESTED", "fast_dev_run", None)
            return
        self.run(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run(trainer, pl_module)

    def run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan, responses, bounds, verdict; the policy is written only on PASS."""
        module = cast(SafetyTestable, pl_module)
        constraints = self._constraints(pl_module)
        folder = self._folder(trainer)
        chosen = certificate.safety_order(list(self._pool))[: constraints[0].safety_prompts]
        policy_hash = module.policy_hash()
        plan = certificate.make_plan(
            constraints,
            list(self._pool),
            chosen,
            self._left_out,
            policy_hash,
            module.provenance(),
        )
        certificate.write_json(folder / PLAN_FILE, plan)
        plan_hash = certificate.json_hash(plan)
        rank_zero_info(f"safety test on {len(chosen)} prompts")
        samples = self._sample(pl_module, chosen, policy_hash)
        judgements = certificate.judge(constraints, samples)
        if not all(j.passed for j in judgements):
            self._write(trainer, "NO_SOLUTION_FOUND", "the safety test was not passed", plan_hash)
            return
        record = certificate.make_certificate(constraints, judgements, samples, plan)
        candidate = self._write_policy(module, folder, policy_hash)
        certificate.write_json(folder / CERTIFICATE_FILE, record)
        page = certificate.certificate_page(record)
        (folder / "certificate.md").write_text(page, encoding="utf-8")
        self._write(trainer, "PASS", "every bound is within its limit", plan_hash)
        # Last of all: wherever this breaks off, there is no policy/ without a PASS.
        shutil.rmtree(folder / "policy", ignore_errors=True)
        os.replace(candidate, folder / "policy")

    def _sample(self, pl_module: LightningModule, keys: list[str], policy_hash: str) -> CostSamples:
        seed = certificate.response_seed_text(policy_hash, keys)
        encoder = cast(EncodesExamples, pl_module)
        parts = []
        for start in range(0, len(keys), self.batch_size):
            batch = encoder.collate(
                [self._pool[key] for key in keys[start : start + self.batch_size]]
            )
            parts.append(
                cast(SafetyTestable, pl_module).sample_costs(batch.to(pl_module.device), seed)
            )
        return CostSamples.join(parts)

    @staticmethod
    def _write_policy(module: SafetyTestable, folder: Path, policy_hash: str) -> Path:
        """Writes the policy to policy.tmp, and checks that it is what was tested.

        Raises:
            RuntimeError: the weights written are not those that were tested.
        """
        temporary = folder / "policy.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        module.save_policy(temporary)
        if file_sha256(temporary / "adapter_model.safetensors") != policy_hash:
            shutil.rmtree(temporary)
            raise RuntimeError("the policy that was written is not the policy that was tested")
        return temporary

    # -- fail closed ---------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.verdict is None:
            self._write(trainer, "NOT_TESTED", "training ended without a safety test", None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Only where the fit had begun: before that nothing is written at all.
        if self.verdict is not None:
            reason = f"the run stopped with {type(exception).__name__}"
            self._write(trainer, "NOT_TESTED", reason, None)

    def _write(
        self, trainer: Trainer, verdict: Verdict, reason: str, plan_hash: str | None
    ) -> None:
        self.verdict = verdict
        if trainer.is_global_zero:
            folder = self._folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            certificate.write_json(
                folder / VERDICT_FILE, certificate.verdict_record(verdict, reason, plan_hash)
            )

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir)

    @staticmethod
    def _constraints(pl_module: LightningModule) -> Any:
        return cast(SafetyTestable, pl_module).constraints
