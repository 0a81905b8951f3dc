"""The whole path at reduced size, by the shipped demo configs: stages, verdicts, artefacts."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from filelock import FileLock

from hcrlhf.bounds import betting_upper
from hcrlhf.cli import INTERRUPTED, NO_SOLUTION, PASSED, main
from hcrlhf.configured import gate_of
from hcrlhf.demo import CONFIGS, POLICIES, Demo
from hcrlhf.hashing import folder_hashes, json_hash
from hcrlhf.human import HumanLabels
from hcrlhf.stages import held_out, read_prompt_keys
from hcrlhf.text import Encoded, collate
from hcrlhf.world import ModelSizes, WorldSizes

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = WorldSizes(
    demonstrations=160,
    preferences=100,
    train=48,
    validation=16,
    safety=40,
    evaluation=16,
    model=ModelSizes(hidden=64, layers=1, intermediate=64),
)
SMALL = ["--data.init_args.prompts_per_update", "8", "--data.init_args.updates", "3"]
SMALL += [f"--model.init_args.learner.init_args.{key}=2" for key in ("epochs", "minibatches")]
# Any policy passes under this threshold, none under the other: the demo's small model has learnt
# nothing, and its costs lie near 0 of a range of [-4, 4].
LIMIT = "[{estimand: mean, threshold: %s, safety_prompts: 40}]"
ALWAYS = [f"--model.init_args.constraints={LIMIT % 3.5}"]
NEVER = [f"--model.init_args.constraints={LIMIT % -3}"]
EACH_STEP = ["--trainer.log_every_n_steps", "1"]
OVERRIDES = {
    "sft": ["--trainer.max_epochs", "1", *EACH_STEP],
    "reward": ["--trainer.max_epochs", "1", *EACH_STEP],
    "cost": EACH_STEP,
    "unconstrained": [*SMALL, *ALWAYS],
    "policy": [*SMALL, *ALWAYS],
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reduced demo run that passed."""
    from hcrlhf.lightning_cli import run

    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert Demo(folder, 0, run, SIZES, OVERRIDES).run() == PASSED
    return folder


def policy_arguments(demo: Path, root: Path, *more: str) -> list[str]:
    arguments = ["--config", str(CONFIGS / "policy.yaml"), "--trainer.default_root_dir", str(root)]
    for stage in ("sft", "reward", "cost"):
        arguments += [f"--model.init_args.{stage}", str(demo / stage)]
    for split in ("train", "validation", "safety", "evaluation"):
        path = demo / "world" / "prompts" / f"{split}.jsonl"
        arguments += [f"--data.init_args.{split}", str(path)]
    return [*arguments, *SMALL, *more]


def fit(demo: Path, root: Path, *more: str) -> int:
    return main(["fit", *policy_arguments(demo, root, *more)])


def tested(**options: Any) -> str:
    """The callbacks of a policy run whose safety test has these options; no candidate check."""
    given = {"candidate_check": False, **options}
    test = {"class_path": "callbacks.SafetyTest", "init_args": given}
    every = {"class_path": "callbacks.Checkpoint", "init_args": {"every_n_updates": 1}}
    return f"--trainer.callbacks={json.dumps([every, test])}"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def broken(*arguments: Any) -> None:
    """What takes the place of a method that breaks off."""
    raise RuntimeError("lightning strikes")


def test_the_demo_reports_three_policies_the_verdict_and_where_it_wrote(demo: Path) -> None:
    report = (demo / "report.txt").read_text()
    for title in POLICIES.values():
        assert report.count(title) == 4  # the table and three examples
    assert "PASS" in report
    assert "policy/certificate.md" in report
    for name in POLICIES:
        predictions = (demo / "evaluation" / name / "predictions.jsonl").read_text().splitlines()
        assert len(predictions) == SIZES.evaluation


def test_a_demo_whose_candidate_fails_its_check_reports_that(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hcrlhf.lightning_cli import run

    folder = tmp_path / "demo"
    limits = LIMIT % -3
    overrides = OVERRIDES | {"policy": [*SMALL, f"--model.init_args.constraints={limits}"]}
    assert Demo(folder, 0, run, SIZES, overrides).run() == NO_SOLUTION
    report = (folder / "report.txt").read_text()
    assert "no solution found: the forecast on validation prompts lies above a limit" in report
    assert re.search(r"^limit +-3.00$", report, re.MULTILINE)
    assert not (folder / "policy" / "plan.json").exists()
    capsys.readouterr()
    assert main(["unseal", str(folder / "policy")]) == 2
    assert "is not the sealed result of a test" in capsys.readouterr().err


def test_every_stage_leaves_a_folder_that_the_next_one_reads(demo: Path) -> None:
    for role in ("sft", "reward", "cost"):
        stage = read(demo / role / "hcrlhf.json")
        assert stage["role"] == role
        assert (demo / role / "config.yaml").is_file()
        assert (demo / role / "metrics.csv").is_file()
    reward, cost = read(demo / "reward" / "hcrlhf.json"), read(demo / "cost" / "hcrlhf.json")
    assert (
        reward["fingerprint"]
        == cost["fingerprint"]
        == read(demo / "sft/hcrlhf.json")["fingerprint"]
    )
    assert reward["moments"]["std"] > 0
    assert 0 <= cost["metrics"]["sign_accuracy"] <= 1
    assert cost["calibration"].keys() == {"slope", "intercept"}


def test_a_pass_releases_a_policy_that_plain_peft_loads_with_its_decoding(demo: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = demo / "policy" / "policy"
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.do_sample, generation.top_k, generation.top_p) == (True, 0, 1.0)
    base = AutoModelForCausalLM.from_pretrained(demo / "sft")
    model = PeftModel.from_pretrained(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I bake bread at home?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, generation_config=generation)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_the_certificate_can_be_recomputed_from_its_own_costs(demo: Path) -> None:
    folder = demo / "policy"
    certificate, verdict = read(folder / "certificate.json"), read(folder / "verdict.json")
    (bound,) = certificate["bounds"]
    costs = np.array(certificate["data"]["costs"])[:, 0]
    assert len(costs) == 40
    upper = betting_upper(costs, bound["delta"], upper=4.0, lower=-4.0)
    assert bound["found"]["upper"] == min(upper, bound["threshold"])
    assert bound["found"]["passed"] and bound["found"]["log_e_value"] >= -math.log(0.05)
    assert json_hash(certificate["plan"]) == certificate["plan_hash"] == verdict["plan_hash"]
    assert read(folder / "plan.json") == certificate["plan"]
    assert folder_hashes(folder / "policy") == certificate["plan"]["policy"]["files"]


def test_a_third_party_can_verify_what_the_demo_left(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(demo / "policy" / "certificate.json")]) == PASSED
    printed = capsys.readouterr().out
    for what in ("ledger's chain", "policy's files", "derived order", "verdict follows"):
        assert re.search(rf"^ok .*{what}", printed, re.MULTILINE), printed


def test_no_solution_found_releases_nothing_and_tells_nothing(demo: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    completions = '{"class_path": "callbacks.Completions"}'
    callbacks = tested().replace("=[", f"=[{completions}, ")
    assert fit(demo, root, *NEVER, callbacks) == NO_SOLUTION
    verdict = read(root / "verdict.json")
    assert verdict["verdict"] == "NO_SOLUTION_FOUND"
    assert set(verdict) == {"schema", "verdict", "reason", "plan_hash"}
    assert not [p for p in root.rglob("*") if p.name.startswith(("policy", "certificate"))]
    assert not (root / "responses.jsonl").exists()
    # Not even the completions show a safety prompt.
    safety = (demo / "world" / "prompts" / "safety.jsonl").read_text().splitlines()
    shown = (root / "completions.jsonl").read_text()
    assert not any(json.loads(line)["prompt"] in shown for line in safety)


def test_a_candidate_with_a_bad_forecast_costs_neither_delta_nor_safety_prompts(
    demo: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    assert fit(demo, root, *NEVER) == NO_SOLUTION
    verdict = read(root / "verdict.json")
    assert (verdict["verdict"], verdict["plan_hash"]) == ("NO_SOLUTION_FOUND", None)
    assert "safety set was not looked at" in verdict["reason"]
    for name in ("plan.json", "sealed.json", "policy"):
        assert not (root / name).exists()
    assert not (tmp_path / "ledger.jsonl").exists()
    # Nothing was looked at, so the same folder may be tested: a candidate by another limit.
    checkpoint = ["--ckpt_path", str(demo / "policy" / "checkpoints" / "last.ckpt")]
    assert main(["test", *policy_arguments(demo, root, *ALWAYS), *checkpoint]) == PASSED


def test_a_policy_fit_without_a_safety_test_has_no_verdict(demo: Path) -> None:
    record = read(demo / "unconstrained" / "verdict.json")
    assert record["verdict"] == "NOT_TESTED"
    assert "no callbacks.SafetyTest" in record["reason"]


def test_a_run_that_breaks_off_is_not_tested(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    for name in ("training_step", "sample_costs"):
        root = tmp_path / name / "run"
        with monkeypatch.context() as patch:
            patch.setattr(Policy, name, broken)
            with pytest.raises(RuntimeError, match="lightning strikes"):
                fit(demo, root, *ALWAYS)
        assert read(root / "verdict.json")["verdict"] == "NOT_TESTED"
        assert not (root / "policy").exists()


def test_an_interrupted_run_says_so_and_is_not_tested(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    def interrupted(self: Policy, *arguments: Any) -> None:
        raise KeyboardInterrupt

    def terminated(self: Policy, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    for name, step in (("c", interrupted), ("t", terminated)):
        monkeypatch.setattr(Policy, "training_step", step)
        assert fit(demo, tmp_path / name, *ALWAYS) == INTERRUPTED
        assert read(tmp_path / name / "verdict.json")["verdict"] == "NOT_TESTED"


def test_what_breaks_after_the_test_leaves_its_verdict(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    monkeypatch.setattr(Policy, "on_fit_end", broken)  # as a logger that cannot be closed
    for limit, verdict in ((ALWAYS, "PASS"), (NEVER, "NO_SOLUTION_FOUND")):
        root = tmp_path / verdict / "run"
        with pytest.raises(RuntimeError, match="lightning strikes"):
            fit(demo, root, *limit, tested())
        assert read(root / "verdict.json")["verdict"] == verdict
        assert (root / "policy").exists() == (verdict == "PASS")


def test_a_cost_that_is_not_a_number_never_passes(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hcrlhf.rollouts import Rollout
    from hcrlhf.safety import CostSamples
    from lightning_modules import Policy

    evaluate = Policy.evaluate

    def unlucky(self: Policy, batch: Any, purpose: str) -> Rollout:
        rollout = evaluate(self, batch, purpose)
        rollout.costs[:2] = math.nan
        return rollout

    # One that only an answer to a validation prompt gets: the run ends, its test decides.
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "evaluate", unlucky)
        with pytest.warns(UserWarning, match="gave 2 of 16 responses to validation prompts a cost"):
            assert fit(demo, tmp_path / "unlucky" / "run", *ALWAYS, tested()) == PASSED
    assert column(tmp_path / "unlucky" / "run", "val/bound") == [math.inf]

    honest = Policy.sample_costs

    def spoilt(self: Policy, *arguments: Any) -> CostSamples:
        samples = honest(self, *arguments)
        samples.costs[0] = math.nan
        return samples

    monkeypatch.setattr(Policy, "sample_costs", spoilt)
    assert fit(demo, tmp_path / "run", *ALWAYS, tested()) == NO_SOLUTION
    assert main(["unseal", str(tmp_path / "run")]) == PASSED
    # With the check the candidate does not even reach its test.
    assert fit(demo, tmp_path / "checked" / "run", *ALWAYS) == NO_SOLUTION
    assert not (tmp_path / "checked" / "ledger.jsonl").exists()


def test_a_second_look_at_a_finished_run_is_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    shutil.copytree(demo / "policy", root)
    before = (root / "verdict.json").read_bytes()
    checkpoint = ["--ckpt_path", str(root / "checkpoints" / "last.ckpt")]
    assert main(["test", *policy_arguments(demo, root, *ALWAYS), *checkpoint]) == 2
    assert "already says PASS" in capsys.readouterr().err
    assert (root / "verdict.json").read_bytes() == before


def test_a_policy_can_be_tested_alone_and_gets_the_verdict_of_its_fit(
    demo: Path, tmp_path: Path
) -> None:
    root = tmp_path / "again"
    checkpoint = ["--ckpt_path", str(demo / "policy" / "checkpoints" / "last.ckpt")]
    assert main(["test", *policy_arguments(demo, root, *ALWAYS), *checkpoint]) == PASSED
    ours, theirs = read(root / "certificate.json"), read(demo / "policy" / "certificate.json")
    assert ours["data"]["costs"] == theirs["data"]["costs"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    demo: Path, tmp_path: Path
) -> None:
    costs = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        root = tmp_path / name / "run"
        fit(demo, root, *ALWAYS, "--model.init_args.seed", seed)
        costs.append(read(root / "certificate.json")["data"]["costs"])
    assert costs[0] == costs[1]
    assert costs[0] != costs[2]


def test_a_checkpoint_holds_what_was_trained_and_the_state_of_the_constraint(demo: Path) -> None:
    state = torch.load(demo / "policy" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all("lora_" in name or name.startswith("heads.") for name in state["state_dict"])
    assert state["policy"]["updates"] == 3
    dual = state["policy"]["dual"]
    assert len(dual["multipliers"]) == len(dual["variances"]) == len(dual["pessimisms"]) == 1
    assert not [p for p in (demo / "policy" / "checkpoints").iterdir() if p.name != "last.ckpt"]


def test_a_resumed_run_ends_with_the_weights_of_the_unbroken_one(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    every = '{"class_path": "callbacks.Checkpoint", "init_args": {"every_n_updates": 1}}'
    test = '{"class_path": "callbacks.SafetyTest"}'
    callbacks = f"--trainer.callbacks=[{every}, {test}]"
    whole, part = tmp_path / "whole" / "run", tmp_path / "part" / "run"
    assert fit(demo, whole, *ALWAYS, callbacks) == PASSED
    honest = Policy.training_step

    def interrupted(self: Policy, batch: Any, batch_idx: int) -> None:
        if self.updates == 2:
            raise KeyboardInterrupt
        honest(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "training_step", interrupted)
        assert fit(demo, part, *ALWAYS, callbacks) == INTERRUPTED
    assert fit(demo, part, *ALWAYS, callbacks, "--ckpt_path", "last") == PASSED
    name = "policy/adapter_model.safetensors"
    assert (part / name).read_bytes() == (whole / name).read_bytes()
    certificates = [read(folder / "certificate.json") for folder in (whole, part)]
    assert certificates[0]["data"]["costs"] == certificates[1]["data"]["costs"]
    assert certificates[0]["bounds"] == certificates[1]["bounds"]
    # The figures before the break are kept.
    assert (part / "metrics-1.csv").is_file()


def test_a_worst_share_without_eta_takes_it_from_training_and_its_test_can_be_verified(
    demo: Path, tmp_path: Path
) -> None:
    tail = json.dumps([{"estimand": "cvar", "threshold": 3.9, "alpha": 0.2, "safety_prompts": 30}])
    root = tmp_path / "run"
    assert fit(demo, root, *SMALL, f"--model.init_args.constraints={tail}", tested()) == PASSED
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    recent = state["policy"]["dual"]["recent"]
    (planned,) = read(root / "certificate.json")["plan"]["constraints"]
    assert planned["eta"] == np.quantile(recent, 0.8)
    assert main(["verify", str(root / "certificate.json")]) == PASSED


TAIL = {"estimand": "cvar", "alpha": 0.5, "safety_prompts": 40, "delta": 0.05}


def test_an_eta_is_found_for_the_delta_that_is_granted_and_not_for_the_whole(
    demo: Path, tmp_path: Path
) -> None:
    # A limit that training misses by far: η has to be lowered to where a test could be passed,
    # which half of δ and an e-process allow further down only.
    for name, options in (("halving", {}), ("sequential", {"sequential": True})):
        threshold = 0.3 if name == "halving" else 1.2
        limit = json.dumps([{**TAIL, "threshold": threshold}])
        root = tmp_path / name / "run"
        arguments = [*SMALL, f"--model.init_args.constraints={limit}", tested(**options)]
        assert fit(demo, root, *arguments) in (PASSED, NO_SOLUTION)
        (planned,) = read(root / "plan.json")["constraints"]
        assert planned["delta"] == 0.025 and planned["eta"] < threshold


def test_a_policy_that_is_tested_from_its_checkpoint_takes_eta_from_its_training(
    demo: Path, tmp_path: Path
) -> None:
    limit = f"--model.init_args.constraints={json.dumps([{**TAIL, 'threshold': 3.5}])}"
    first, again = tmp_path / "first" / "run", tmp_path / "again" / "run"
    assert fit(demo, first, *SMALL, limit, tested()) == PASSED
    checkpoint = ["--ckpt_path", str(first / "checkpoints" / "last.ckpt")]
    assert main(["test", *policy_arguments(demo, again, *SMALL, limit, tested()), *checkpoint]) == 0
    planned, tested_again = (read(root / "plan.json")["constraints"] for root in (first, again))
    assert planned[0]["eta"] == tested_again[0]["eta"] is not None


def test_an_eta_that_no_training_gave_is_refused_before_a_test_is_opened(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = f"--model.init_args.constraints={json.dumps([{**TAIL, 'threshold': 3.5}])}"
    root = tmp_path / "run"
    given = ["--policy", str(demo / "policy" / "policy"), "--trainer.callbacks"]
    test = ["callbacks.SafetyTest", *policy_arguments(demo, root, *SMALL, limit)]
    assert main(["test", *given, *test]) == 2
    assert "and there was none; give eta as a number" in capsys.readouterr().err
    assert not (root.parent / "ledger.jsonl").exists() and not (root / "plan.json").exists()
    # Its answers need no limit at all.
    arguments = policy_arguments(demo, tmp_path / "answers", *SMALL, limit)
    assert main(["predict", *arguments, *given, "callbacks.Completions"]) == PASSED


def test_a_safety_test_that_breaks_off_goes_on_where_it_was(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    whole, part = tmp_path / "whole" / "run", tmp_path / "part" / "run"
    callbacks = tested(batch_size=10)
    assert fit(demo, whole, *ALWAYS, callbacks) == PASSED
    honest = Policy.sample_costs
    asked: list[int] = []

    def breaking(self: Policy, batch: Any, seed: str) -> Any:
        if len(asked) == 2:
            raise RuntimeError("lightning strikes")
        asked.append(len(batch.keys))
        return honest(self, batch, seed)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "sample_costs", breaking)
        with pytest.raises(RuntimeError, match="lightning strikes"):
            fit(demo, part, *ALWAYS, callbacks)
    assert read(part / "verdict.json")["verdict"] == "NOT_TESTED"
    assert not (part / "policy").exists() and not (part / "policy.tmp").exists()

    def counting(self: Policy, batch: Any, seed: str) -> Any:
        asked.append(len(batch.keys))
        return honest(self, batch, seed)

    monkeypatch.setattr(Policy, "sample_costs", counting)
    assert fit(demo, part, *ALWAYS, callbacks, "--ckpt_path", "last") == PASSED
    assert asked == [10, 10, 10, 10]  # nothing is drawn a second time
    ours, theirs = (read(folder / "certificate.json") for folder in (part, whole))
    assert ours["data"]["costs"] == theirs["data"]["costs"]
    assert ours["ledger"]["test"] == 1
    assert main(["verify", str(part / "certificate.json")]) == PASSED


def break_off_in_the_test(
    demo: Path, root: Path, monkeypatch: pytest.MonkeyPatch, callbacks: str
) -> None:
    """A fit whose safety test is opened, and answers nothing."""
    from callbacks import SafetyTest

    with monkeypatch.context() as patch:
        patch.setattr(SafetyTest, "_sample", broken)
        with pytest.raises(RuntimeError, match="lightning strikes"):
            fit(demo, root, *ALWAYS, callbacks)


def test_an_open_test_is_ended_although_the_candidate_check_would_now_say_no(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from callbacks import SafetyTest
    from lightning_modules import Policy

    root = tmp_path / "run" / "policy"
    callbacks = tested(candidate_check=True)

    break_off_in_the_test(demo, root, monkeypatch, callbacks)
    monkeypatch.setattr(SafetyTest, "_is_candidate", lambda *arguments: False)
    # And it breaks off again, after the verdict was written and before the policy is in its place.
    with monkeypatch.context() as patch:
        replace = os.replace

        def not_the_policy(source: Any, target: Any) -> None:
            broken() if Path(target).name == "policy" else replace(source, target)

        patch.setattr(os, "replace", not_the_policy)
        with pytest.raises(RuntimeError, match="lightning strikes"):
            fit(demo, root, *ALWAYS, callbacks, "--ckpt_path", "last")
    assert (root / "certificate.json").is_file() and not (root / "policy").exists()
    # As a kill would leave it: nothing had the time to take the PASS back.
    verdict = read(root / "verdict.json") | {"verdict": "PASS", "plan_hash": "0" * 64}
    (root / "verdict.json").write_text(json.dumps(verdict))
    monkeypatch.setattr(Policy, "training_step", broken)
    assert fit(demo, root, *ALWAYS, callbacks, "--ckpt_path", "last") == PASSED
    assert (root / "policy" / "adapter_model.safetensors").is_file()
    assert main(["verify", str(root / "certificate.json")]) == PASSED


def test_a_test_that_fit_began_is_ended_by_the_test_of_its_checkpoint(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    root = tmp_path / "run"
    break_off_in_the_test(demo, root, monkeypatch, tested())
    plan = (root / "plan.json").read_bytes()
    checkpoint = ["--ckpt_path", str(root / "checkpoints" / "last.ckpt")]
    assert main(["test", *policy_arguments(demo, root, *ALWAYS, tested()), *checkpoint]) == PASSED
    assert (root / "plan.json").read_bytes() == plan
    assert read(root / "certificate.json")["ledger"]["test"] == 1


def test_stages_that_change_during_a_run_are_remembered_as_they_were_loaded(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy, scored_policy

    root, step = tmp_path / "run", Policy.training_step

    def changing(self: Policy, *arguments: Any) -> None:
        monkeypatch.setattr(scored_policy, "read_prompt_keys", lambda folder: frozenset())
        monkeypatch.setattr(scored_policy, "file_sha256", lambda path: "0" * 64)
        step(self, *arguments)

    monkeypatch.setattr(Policy, "training_step", changing)
    assert fit(demo, root, *ALWAYS, tested()) == PASSED
    folders = (root, demo / "policy")
    ours, honest = ((f / "policy" / "training_prompts.txt").read_bytes() for f in folders)
    assert ours == honest
    cost = [read(folder / "plan.json")["provenance"]["cost_model"] for folder in folders]
    assert cost[0] == cost[1] and "0" * 64 not in str(cost)


def test_a_run_that_begins_anew_does_not_take_over_the_test_of_another(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_modules import Policy

    root = tmp_path / "run"

    break_off_in_the_test(demo, root, monkeypatch, tested())
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "training_step", broken)
        assert fit(demo, root, *ALWAYS, tested(), "--model.init_args.seed", "1") == 2
    assert "this one begins anew: go on with that run" in capsys.readouterr().err
    # Nor does it go on learning with an open test behind it, whose answers it might learn from.
    longer = ["--data.init_args.updates", "4", "--ckpt_path", "last"]
    assert fit(demo, root, *ALWAYS, tested(), *longer) == 2
    assert "this one has only 3 of 4 updates behind it: go on with" in capsys.readouterr().err
    # Nor does another policy that is tested in its folder.
    given = ["--policy", str(demo / "policy" / "policy")]
    assert main(["test", *policy_arguments(demo, root, *ALWAYS, tested()), *given]) == 2
    assert "holds the plan of test 1 of" in capsys.readouterr().err
    assert read(root / "plan.json")["provenance"]["given"] is None
    assert fit(demo, root, *ALWAYS, tested(), "--ckpt_path", "last") == PASSED
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 3


def test_a_run_without_checkpoints_that_is_repeated_finds_its_own_test_again(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    root = tmp_path / "run"
    test = '{"class_path": "callbacks.SafetyTest", "init_args": {"candidate_check": false}}'
    callbacks = f"--trainer.callbacks=[{test}]"

    break_off_in_the_test(demo, root, monkeypatch, callbacks)
    assert fit(demo, root, *ALWAYS, callbacks) == PASSED
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 3


def test_a_verdict_is_not_written_over_and_there_is_one_safety_test(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    shutil.copytree(demo / "policy", root)
    before = folder_hashes(root)
    checkpoint = ["--ckpt_path", str(demo / "policy" / "checkpoints" / "last.ckpt")]
    for command in (["fit"], ["test", *checkpoint]):
        arguments = policy_arguments(demo, root, *ALWAYS, "--trainer.callbacks=[]")
        assert main([*command, *arguments]) == 2
        assert "holds a safety test, and this config has no callba" in capsys.readouterr().err
    assert folder_hashes(root) == before
    (root / "verdict.json").unlink()  # an open test has none
    assert main(["fit", *policy_arguments(demo, root, *ALWAYS, "--trainer.callbacks=[]")]) == 2
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "verdict.json").write_text('{"verdict": 3}')
    assert fit(demo, tmp_path / "none", *ALWAYS, "--trainer.callbacks=[]") == 2
    assert "is not the verdict of a run" in capsys.readouterr().err
    test = '{"class_path": "callbacks.SafetyTest"}'
    refuse(
        demo,
        tmp_path / "two",
        capsys,
        "names callbacks.SafetyTest more than once",
        *ALWAYS,
        f"--trainer.callbacks=[{test}, {test}]",
    )


def test_a_ledger_that_could_not_be_written_is_refused_before_training(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    ledger = str(tmp_path / "file" / "ledger.jsonl")
    expected = "callbacks.SafetyTest, ledger .*file is a file; give another place"
    refuse(demo, tmp_path, capsys, expected, *ALWAYS, tested(ledger=ledger))
    assert fit(demo, tmp_path / "first", *ALWAYS, tested()) == PASSED
    own = tmp_path / "ledger.jsonl"
    honest = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != own and honest(path, mode))
    refuse(demo, tmp_path, capsys, "ledger.jsonl is not yours to write", *ALWAYS, tested())


def test_another_scale_of_the_same_weights_is_another_policy(demo: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(demo / "policy" / "policy", policy)
    config = read(policy / "adapter_config.json")
    (policy / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))
    test = [*policy_arguments(demo, tmp_path / "run", *ALWAYS), "--policy", str(policy)]
    assert main(["test", *test]) == PASSED
    plans = [read(folder / "plan.json") for folder in (demo / "policy", tmp_path / "run")]
    assert plans[0]["policy"]["weights"] == plans[1]["policy"]["weights"]
    alphas = [plan["provenance"]["policy"]["lora_alpha"] for plan in plans]
    assert alphas == [config["lora_alpha"], 3]
    assert plans[1]["candidate"] == "the policy that was given, policy"


def test_a_sequential_test_stops_early_or_goes_on_with_fresh_prompts(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = ["--ckpt_path", str(demo / "policy" / "checkpoints" / "last.ckpt")]

    def test(name: str, constraint: str, **options: Any) -> int:
        limit = f"--model.init_args.constraints=[{{estimand: mean, {constraint}}}]"
        callbacks = tested(sequential=True, batch_size=5, **options)
        return main(
            ["test", *policy_arguments(demo, tmp_path / name, limit, callbacks), *checkpoint]
        )

    assert test("a", "threshold: 3.5, safety_prompts: 20") == PASSED
    early = read(tmp_path / "a" / "certificate.json")
    assert early["data"]["n"] < 20
    assert "optimistic" in early["diagnostics"]["note"]
    # Costs near 0 cannot show a mean below -0.5 with ten prompts, nor with ten more.
    undecided = "threshold: -0.5, safety_prompts: 10"
    assert test("b", undecided) == NO_SOLUTION
    assert test("c", undecided, continues=str(tmp_path / "b")) == NO_SOLUTION
    parts = read(tmp_path / "c" / "sealed.json")["parts"]
    assert [len(part["keys"]) for _, part in parts] == [10, 10]
    keys = [set(part["keys"]) for _, part in parts]
    assert not keys[0] & keys[1]
    # Test 1 gave back what it did not use; tests 1 and 2, with its continuation, share a ledger.
    assert main(["ledger", str(tmp_path / "ledger.jsonl")]) == PASSED
    printed = capsys.readouterr().out
    assert "test 2: no solution found; 20 prompts, δ = 0.0125" in printed
    assert main(["unseal", str(tmp_path / "c")]) == PASSED
    assert test("d", undecided, continues=str(tmp_path / "c")) == 2
    assert "burnt" in capsys.readouterr().err


def test_spent_prompts_are_refused_before_training(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(demo, tmp_path / "first", *ALWAYS, tested()) == PASSED
    refuse(demo, tmp_path, capsys, "40 of them are spent", *ALWAYS, tested())
    refuse(
        demo, tmp_path, capsys, "delta 0.05 by schedule halving", *ALWAYS, tested(schedule="once")
    )


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ({"reward": "cost"}, "reward: .* is a cost model; expected a reward model there"),
        ({"cost": "reward"}, "cost: .* is a reward model; expected a cost model there"),
        ({"sft": "reward"}, "sft: .* is a reward model; expected a sft model there"),
        ({"reward": "world"}, "reward: .* holds no hcrlhf.json"),
    ],
)
def test_a_model_in_the_wrong_slot_is_refused(
    demo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    slots: dict[str, str],
    expected: str,
) -> None:
    more = [
        a for slot, name in slots.items() for a in (f"--model.init_args.{slot}", str(demo / name))
    ]
    refuse(demo, tmp_path, capsys, expected, *more)


def refuse(
    demo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    expected: str,
    *more: str,
) -> None:
    root = tmp_path / "run"
    assert fit(demo, root, *more) == 2
    assert not root.exists()
    error = capsys.readouterr().err
    assert re.search(expected, error), error


def test_safety_prompts_that_an_earlier_stage_was_trained_on_are_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = tmp_path / "seen.jsonl"
    lines = (demo / "world" / "preferences.jsonl").read_text().splitlines()
    seen.write_text("\n".join(lines))
    refuse(
        demo,
        tmp_path,
        capsys,
        "safety prompts are also earlier stages' prompts",
        *("--data.init_args.safety", str(seen)),
    )


def test_a_checkpoint_tells_a_test_what_it_was_trained_on(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = demo / "world" / "prompts"
    moved = {"train": "evaluation", "safety": "train", "evaluation": "safety"}
    data = [f"--data.init_args.{name}={prompts / file}.jsonl" for name, file in moved.items()]
    checkpoint = ["--ckpt_path", str(demo / "policy" / "checkpoints" / "last.ckpt")]
    root = tmp_path / "run"
    assert main(["test", *policy_arguments(demo, root, *ALWAYS, *data), *checkpoint]) == 2
    assert "safety prompts are also the checkpoint's training prompts" in capsys.readouterr().err
    assert not (root / "verdict.json").exists() and not (tmp_path / "ledger.jsonl").exists()
    assert main(["test", *policy_arguments(demo, root, *ALWAYS), *checkpoint]) == PASSED
    seen = read_prompt_keys(str(root / "policy"))
    assert seen == read_prompt_keys(str(demo / "policy" / "policy"))


def test_another_folder_in_the_place_of_the_policy_is_not_replaced(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "run" / "policy" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("the only copy")
    assert fit(demo, tmp_path / "run", *ALWAYS) == 2
    assert "policy is there already, without a PASS of this run" in capsys.readouterr().err
    assert mine.is_file()


def test_a_certificate_of_no_run_does_not_come_to_lie_beside_a_verdict(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    shutil.copy(demo / "policy" / "certificate.json", root)
    assert fit(demo, root, *ALWAYS) == 2
    assert "holds a certificate.json that is of no run there" in capsys.readouterr().err
    assert [*root.iterdir()] == [root / "certificate.json"]


def test_a_run_that_breaks_off_leaves_the_verdict_of_another_in_its_folder(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    root = tmp_path / "run"
    verdict = demo / "policy" / "verdict.json"

    def overtaken(self: Policy, *arguments: Any) -> None:
        shutil.copy(verdict, root)  # the same command, begun a second time, was quicker
        raise RuntimeError("terminated")

    monkeypatch.setattr(Policy, "training_step", overtaken)
    with pytest.raises(RuntimeError, match="terminated"):
        fit(demo, root, *ALWAYS)
    assert read(root / "verdict.json") == read(verdict)


def test_too_few_safety_prompts_are_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(
        demo,
        tmp_path,
        capsys,
        "has 40 different prompts that fit, but the constraint's safety_prompts is 41",
        "--model.init_args.constraints=[{estimand: mean, threshold: 0, safety_prompts: 41}]",
    )


def test_a_backbone_that_was_changed_after_training_is_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(demo, moved)
    weights = moved / "sft" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    refuse(moved, tmp_path, capsys, "not those that .* was trained on")


def test_a_finished_stage_is_not_trained_over(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (demo / "sft" / "model.safetensors").read_bytes()
    arguments = [
        "--config",
        str(CONFIGS / "sft.yaml"),
        "--trainer.default_root_dir",
        str(demo / "sft"),
    ]
    assert main(["fit", *arguments]) == 2
    assert "already holds a finished stage" in capsys.readouterr().err
    assert (demo / "sft" / "model.safetensors").read_bytes() == before


def stage_arguments(demo: Path, stage: str, root: Path, *more: str) -> list[str]:
    data = "demonstrations" if stage == "sft" else "preferences"
    model = ("model", demo / "world" / "model") if stage == "sft" else ("sft", demo / "sft")
    return [
        *("--config", str(CONFIGS / f"{stage}.yaml"), "--trainer.default_root_dir", str(root)),
        *(f"--model.init_args.{model[0]}", str(model[1])),
        *("--data.init_args.path", str(demo / "world" / f"{data}.jsonl"), *EACH_STEP, *more),
    ]


@pytest.mark.parametrize(
    "ending",
    [
        ["--trainer.max_steps=3"],
        ["--trainer.max_steps=9", "--trainer.val_check_interval=4"],
        ["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2"],
    ],
)
def test_the_moments_are_those_of_the_weights_that_are_saved(
    demo: Path, tmp_path: Path, ending: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = stage_arguments(demo, "reward", tmp_path / "run", *ending)
    assert main(["fit", *arguments]) == PASSED
    moments = read(tmp_path / "run" / "hcrlhf.json")["moments"]
    capsys.readouterr()
    assert main(["validate", *arguments]) == PASSED
    printed = re.search(r"val/score_mean\s+│\s+(\S+)", capsys.readouterr().out)
    assert printed and float(printed[1]) == pytest.approx(moments["mean"], rel=1e-6)


@pytest.mark.parametrize(
    ("file", "message"),
    [("adapter_model", "is not the trained one"), ("head", "scores .* differently")],
)
def test_weights_that_were_not_written_as_they_are_make_no_stage(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, message: str
) -> None:
    from hcrlhf.backbone import Backbone

    method = {"adapter_model": "save_role", "head": "save_head"}[file]
    honest = getattr(Backbone, method)

    def spoilt(self: Backbone, name: str, folder: Path, *more: Any) -> None:
        honest(self, name, folder, *more)
        path = folder / f"{file}.safetensors"
        state = {key: value * 1.5 for key, value in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(state, path)

    monkeypatch.setattr(Backbone, method, spoilt)
    with pytest.raises(RuntimeError, match=message):
        fit_stage(demo, "reward", tmp_path / "run")
    assert not (tmp_path / "run" / "hcrlhf.json").exists()


def test_a_trial_of_a_config_leaves_no_stage(demo: Path, tmp_path: Path) -> None:
    for stage in ("sft", "reward"):
        root = tmp_path / stage
        arguments = stage_arguments(demo, stage, root, "--trainer.fast_dev_run", "1")
        assert main(["fit", *arguments]) == PASSED
        assert not (root / "hcrlhf.json").exists()


def test_a_trial_of_a_policy_is_not_tested_and_leaves_no_checkpoint(
    demo: Path, tmp_path: Path
) -> None:
    from hcrlhf.cli import NOT_TESTED

    root, trial = tmp_path / "policy", ["--trainer.fast_dev_run", "true"]
    assert fit(demo, root, *ALWAYS, tested(), *trial) == NOT_TESTED
    assert read(root / "verdict.json")["reason"] == "fast_dev_run"
    assert not (root / "checkpoints").exists() and not (tmp_path / "ledger.jsonl").exists()
    trained = ["--ckpt_path", str(demo / "policy" / "checkpoints" / "last.ckpt")]
    assert main(["test", *policy_arguments(demo, root, *ALWAYS, tested(), *trained, *trial)]) == (
        NOT_TESTED
    )
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_validation_that_would_never_come_is_one_line(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_stage(demo, "sft", tmp_path / "sft", "--trainer.val_check_interval", "9999") == 2
    assert "hcrlhf: trainer: " in capsys.readouterr().err


def test_the_labels_that_a_config_asks_for_are_those_of_its_gate(tmp_path: Path) -> None:
    labels = {"labels": 100, "limit": 0.2}
    test = {"class_path": "callbacks.SafetyTest", "init_args": {"human": labels}}
    gate = gate_of({"trainer": {"default_root_dir": str(tmp_path), "callbacks": [test]}})
    assert gate is not None and gate.human == HumanLabels(**labels)


def test_slurm_does_not_requeue_a_run_past_its_settings(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch import Trainer

    given = {"NTASKS": "1", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in (given | {"JOB_NAME": "train"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    seen: list[Any] = []
    honest = Trainer._run

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(self._accelerator_connector.cluster_environment)
        return honest(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "_run", run)
    assert fit_stage(demo, "sft", tmp_path / "sft", "--trainer.limit_train_batches", "1") == PASSED
    assert type(seen[0]).__name__ == "SLURMEnvironment" and not seen[0].auto_requeue


def test_a_stage_records_the_loss_of_the_weights_that_it_saves(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rare = ["--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2"]
    assert fit_stage(demo, "sft", tmp_path / "sft", *rare) == PASSED
    recorded = read(tmp_path / "sft" / "hcrlhf.json")["metrics"]["loss"]
    capsys.readouterr()
    assert run_stage("validate", demo, "sft", tmp_path / "sft") == PASSED
    (line,) = [x for x in capsys.readouterr().out.splitlines() if " val/loss " in x]
    assert float(re.findall(r"[-\d.]+", line)[-1]) == pytest.approx(recorded, rel=1e-5)


def test_a_policy_that_was_trained_is_measured_and_not_the_supervised_one(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("validate", "predict"):
        assert main([command, *policy_arguments(demo, demo / "policy")]) == 2
        assert f"{command} without --ckpt_path would measure" in capsys.readouterr().err
        assert main([command, *policy_arguments(demo, tmp_path / "new")]) == PASSED


def test_processes_that_leave_their_weights_to_this_one_are_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fork = ["--trainer.devices", "2", "--trainer.strategy", "ddp_fork"]
    assert fit_stage(demo, "reward", tmp_path / "reward", *fork) == 2
    assert "trainer.strategy ddp_fork starts processes" in capsys.readouterr().err


def test_a_run_folder_in_the_home_folder_is_found_again(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    quick = ["--trainer.limit_train_batches", "1"]
    assert main(["fit", *stage_arguments(demo, "sft", Path("~/runs/sft"), *quick)]) == PASSED
    assert (tmp_path / "runs" / "sft" / "hcrlhf.json").is_file()
    assert main(["fit", *stage_arguments(demo, "sft", Path("~/runs/sft"), *quick)]) == 2
    assert "already holds a finished stage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.max_epochs", "-1", "--trainer.max_time", "00:01:00:00"], "has no end"),
        (
            [
                "--trainer.callbacks=[callbacks.Checkpoint, callbacks.Checkpoint]",
                "--trainer.enable_checkpointing=true",
            ],
            "trainer: Found more than one stateful callback",
        ),
    ],
)
def test_what_a_trainer_cannot_do_is_one_line(
    demo: Path, tmp_path: Path, capsys: Any, options: list[str], message: str
) -> None:
    assert fit_stage(demo, "sft", tmp_path / "sft", *options) == 2
    assert message in capsys.readouterr().err


def test_weights_that_are_not_finite_make_no_stage(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = ["--model.init_args.learning_rate", "1e30", "--trainer.max_epochs", "1"]
    seen = stage_arguments(demo, "sft", tmp_path / "seen", *rate)
    assert main(["fit", *seen]) == 2
    assert "the loss is not finite after step" in capsys.readouterr().err
    # Also where no loss is logged that could show it.
    rare = [*rate, "--trainer.log_every_n_steps", "0"]
    assert main(["fit", *stage_arguments(demo, "sft", tmp_path / "unseen", *rare)]) == 2
    assert "the trained weights are not finite, so no stage is written" in capsys.readouterr().err
    assert not (tmp_path / "unseen" / "hcrlhf.json").exists()


def test_a_stage_that_begins_at_another_ones_folder_lists_its_prompts_too(
    demo: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"What is {i} plus {i}?", "response": f"{2 * i}."} for i in range(200)]
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = stage_arguments(demo, "sft", tmp_path / "run", "--trainer.max_epochs", "1")
    arguments += ["--model.init_args.model", str(demo / "sft"), "--data.init_args.path", str(more)]
    assert main(["fit", *arguments]) == PASSED
    before, after = (read_prompt_keys(str(f)) for f in (demo / "sft", tmp_path / "run"))
    assert before < after and len(after - before) == 200


def test_a_policy_without_its_list_of_prompts_is_not_merged(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(demo / "policy" / "policy", policy)
    (policy / "training_prompts.txt").unlink()
    assert main(["export", str(policy), str(tmp_path / "merged")]) == 2
    assert "has no training_prompts.txt" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_stage_with_the_data_of_another_is_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = ["--data.class_path=datamodules.Preferences", "--data.init_args.label=better"]
    pairs += ["--data.init_args.path", str(demo / "world" / "preferences.jsonl")]
    assert main(["fit", *stage_arguments(demo, "sft", tmp_path / "a"), *pairs]) == 2
    assert "learns from a Demonstration and was given a Pair" in capsys.readouterr().err
    texts = ["--data.class_path=datamodules.Demonstrations"]
    texts += ["--data.init_args.path", str(demo / "world" / "demonstrations.jsonl")]
    assert main(["fit", *stage_arguments(demo, "reward", tmp_path / "b"), *texts]) == 2
    assert "learns from a Pair and was given a Demonstration" in capsys.readouterr().err


def test_several_constraints_and_separate_critics_run_to_a_verdict(
    demo: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    constraints = (
        "--model.init_args.constraints=[{estimand: mean, threshold: 3.5, safety_prompts: 40}, "
        "{estimand: harm_rate, threshold: 0.999, safety_prompts: 40}]"
    )
    separate = ["--model.init_args.learner.init_args.critic", "separate"]
    code = fit(demo, root, constraints, *separate)
    verdict = read(root / "verdict.json")["verdict"]
    assert {PASSED: "PASS", NO_SOLUTION: "NO_SOLUTION_FOUND"}[code] == verdict
    header = (root / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"lambda_mean", "lambda_harm_rate", "bound_mean", "bound_harm_rate"} <= set(header)
    assert {"explained_variance_cost_mean", "explained_variance_cost_harm_rate"} <= set(header)


def documented(stage: str) -> set[str]:
    """The names that docs/metrics.md gives for a stage; * as the run has it that asks."""
    text = (CONFIGS.parent.parent / "docs" / "metrics.md").read_text()
    section = text.split(f"\n## {stage}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return set(re.findall(r"`([^`]+)`", " ".join(rows)))


def logged(folder: Path) -> set[str]:
    return set((folder / "metrics.csv").read_text().splitlines()[0].split(","))


def test_every_figure_that_a_stage_logs_is_documented_and_the_other_way_round(demo: Path) -> None:
    assert logged(demo / "policy") == documented("Policy")
    assert logged(demo / "sft") == documented("Supervised")
    assert logged(demo / "cost") == documented("Preference")
    # A reward model has no signs to be right about.
    signs = {"val/calibration_error", "val/harmful_share"}
    signs |= {name for name in documented("Preference") if "sign_accuracy" in name}
    assert logged(demo / "reward") == documented("Preference") - signs


def test_the_figures_of_an_update_hang_together(demo: Path) -> None:
    root = demo / "policy"
    tokens = column(root, "response_tokens")
    phases = [column(root, f"seconds/{name}") for name in ("rollout", "score", "update")]
    speed = [8 * n / sum(t) for n, t in zip(tokens, zip(*phases, strict=True), strict=True)]
    assert column(root, "tokens_per_second") == pytest.approx(speed, rel=1e-4)
    assert column(root, "kl")[0] == column(root, "kl_k3")[0] == 0  # the reference itself
    assert all(value > 0 for value in column(root, "kl_k3")[1:])
    # 1.5e-3 falls to nothing over three updates; both groups keep their ratio.
    assert column(root, "learning_rate") == pytest.approx([1.5e-3, 1e-3, 5e-4])
    assert column(root, "critic_learning_rate") == pytest.approx([3e-3, 2e-3, 1e-3])
    # A critic that begins as a constant explains nothing.
    for name in ("reward", "cost"):
        assert column(root, f"explained_variance_{name}")[0] < 0.5


def test_responses_that_do_not_divide_make_minibatches_that_differ_by_one(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    sizes: list[int] = []
    honest = Policy._minibatch
    monkeypatch.setattr(
        Policy, "_minibatch", lambda *given: sizes.append(len(given[3])) or honest(*given)
    )
    more = ["--data.init_args.prompts_per_update", "9", "--data.init_args.updates", "1"]
    more += ["--model.init_args.learner.init_args.epochs", "1"]
    more += ["--model.init_args.learner.init_args.minibatches", "4"]
    assert fit(demo, tmp_path / "run", *ALWAYS, *more) == PASSED
    assert sizes == [3, 2, 2, 2]


@pytest.mark.parametrize(("target", "steps"), [("null", 6), ("1e-12", 2), ("1e6", 6)])
def test_no_further_epoch_once_the_policy_has_moved_too_far(
    demo: Path, tmp_path: Path, target: str, steps: int
) -> None:
    options = f"{{epochs: 3, minibatches: 2, target_kl: {target}}}"
    more = [f"--model.init_args.learner={{class_path: hcrlhf.ppo.PPO, init_args: {options}}}"]
    more += ["--data.init_args.updates", "1", "--trainer.callbacks=[]"]
    fit(demo, tmp_path / "run", *ALWAYS, *more)
    assert column(tmp_path / "run", "inner_steps") == [steps]


def test_figures_go_to_tensorboard_too_and_loggers_of_ones_own_come_beside(
    demo: Path, tmp_path: Path
) -> None:
    (events,) = (demo / "policy" / "tensorboard").iterdir()
    assert b"kl_k3" in events.read_bytes() and b"seconds/rollout" in events.read_bytes()
    short = ["--trainer.limit_train_batches", "2"]
    given = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "mine"), "name": "x"},
    }
    for name, logger in (("one", json.dumps(given)), ("list", json.dumps([given]))):
        assert fit_stage(demo, "sft", tmp_path / name, *short, f"--trainer.logger={logger}") == 0
        assert (tmp_path / name / "metrics.csv").is_file()
        assert (tmp_path / name / "tensorboard").is_dir()
    assert len(list((tmp_path / "mine").rglob("metrics.csv"))) == 2
    assert fit_stage(demo, "sft", tmp_path / "none", *short, "--trainer.logger", "false") == 0
    assert not (tmp_path / "none" / "metrics.csv").exists()
    assert not (tmp_path / "none" / "tensorboard").exists()


def test_completions_show_the_same_prompts_as_the_policy_learns_and_do_not_touch_it(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent, shown = tmp_path / "silent" / "run", tmp_path / "shown" / "run"
    assert fit(demo, silent, *ALWAYS, tested()) == PASSED
    options = {"every_n_updates": 2, "count": 3, "console": 1}
    completions = {"class_path": "callbacks.Completions", "init_args": options}
    shown.mkdir(parents=True)
    (shown / "completions.jsonl").write_text("of an earlier run\n")
    capsys.readouterr()
    with_table = tested().replace("=[", f"=[{json.dumps(completions)}, ")
    assert fit(demo, shown, *ALWAYS, with_table) == PASSED
    printed = capsys.readouterr().err
    records = [json.loads(line) for line in (shown / "completions.jsonl").open()]
    # Every second update, and after the last of three.
    assert [r["update"] for r in records] == [2, 2, 2, 3, 3, 3]
    assert [r["key"] for r in records[:3]] == [r["key"] for r in records[3:]]
    validation = (demo / "world" / "prompts" / "validation.jsonl").read_text()
    assert all(json.dumps(r["prompt"]) in validation for r in records)
    assert printed.count("answers after 2 updates") == printed.count("after 3 updates") == 1
    assert printed.count(records[0]["prompt"].split()[0]) >= 2
    (events,) = (shown / "tensorboard").iterdir()
    assert b"| prompt | response | reward | cost |" in events.read_bytes()
    name = "policy/adapter_model.safetensors"
    assert (silent / name).read_bytes() == (shown / name).read_bytes()
    states = [
        torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["policy"]
        for root in (silent, shown)
    ]
    assert states[0] == states[1]


def test_validate_and_predict_run_on_a_finished_policy(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = ["--ckpt_path", str(demo / "policy" / "checkpoints" / "last.ckpt")]
    arguments = policy_arguments(demo, tmp_path / "v", *ALWAYS)
    assert main(["validate", *arguments, *checkpoint]) == PASSED
    assert main(["predict", *arguments, *checkpoint]) == PASSED
    records = (tmp_path / "v" / "predictions.jsonl").read_text().splitlines()
    assert {"prompt", "response", "reward", "cost"} <= json.loads(records[0]).keys()
    assert f"{len(records)} answers written to {tmp_path / 'v'}" in caplog.text


def test_a_supervised_folder_with_another_tokenizer_is_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "sft"
    shutil.copytree(demo / "sft", other)
    rules = read(other / "tokenizer.json")
    vocabulary = rules["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(rules))
    given = f"--model.init_args.sft={other}"
    assert fit(demo, tmp_path / "policy", *ALWAYS, given) == 2
    assert "sft: the tokenizer or chat template in its folder is not the one" in (
        capsys.readouterr().err
    )


def test_a_stage_ends_with_what_it_measured_on_held_out_examples(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quick = ["--trainer.limit_train_batches", "1"]
    for name in ("sft", "reward"):
        assert fit_stage(demo, name, tmp_path / name, *quick) == PASSED
        metrics = read(tmp_path / name / "hcrlhf.json")["metrics"]
        assert f"{held_out(metrics)}; written to {tmp_path / name}" in caplog.text
    assert held_out({"loss": 1.2345}) == "held out: loss 1.234"
    near = {"accuracy": 0.55, "accuracy_low": 0.49, "accuracy_high": 0.61, "pairs": 294.0}
    assert held_out(near) == (
        "held out: accuracy 0.550 (0.490 to 0.610) on 294 pairs, not told from chance"
    )


def test_a_finished_stage_is_measured_as_it_was_saved(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sft", "reward", "cost"):
        metrics = read(demo / name / "hcrlhf.json")["metrics"]
        figure, printed = ("loss", "val/loss") if name == "sft" else ("accuracy", "val/accuracy")
        capsys.readouterr()
        assert run_stage("validate", demo, name, demo / name) == PASSED
        (line,) = [x for x in capsys.readouterr().out.splitlines() if f" {printed} " in x]
        assert float(re.findall(r"[-\d.]+(?:e[-+]\d+)?", line)[-1]) == pytest.approx(
            metrics[figure], rel=1e-5
        )
    assert run_stage("validate", demo, "cost", tmp_path / "nothing") == 2
    assert "holds no finished cost stage" in capsys.readouterr().err


def test_a_folder_in_which_another_process_trains_is_refused(
    demo: Path, tmp_path: Path, capsys: Any
) -> None:
    root = tmp_path / "sft"
    root.mkdir()
    quick = ["--trainer.limit_train_batches", "1"]
    with FileLock(root / ".fit.lock"):
        assert fit_stage(demo, "sft", root, *quick) == 2
        assert f"another process trains or tests in {root}" in capsys.readouterr().err
        assert {path.name for path in root.iterdir()} <= {".fit.lock"}
    with FileLock(demo / "sft" / ".fit.lock"):
        assert run_stage("test", demo, "sft", demo / "sft") == 2
        assert "another process trains or tests in" in capsys.readouterr().err
    assert fit_stage(demo, "sft", root, *quick) == PASSED
    assert not (root / ".fit.lock").exists()


def test_micro_batches_change_nothing_but_rounding(demo: Path, tmp_path: Path) -> None:
    # Not the safety costs: their seeds follow from the exact bytes of the policy.
    figures = []
    for size in ("8", "3"):
        root = tmp_path / size / "run"
        fit(demo, root, *ALWAYS, "--model.init_args.micro_batch_size", size)
        figures.append(column(root, "cost") + column(root, "grad_norm"))
    # The first update only: Adam's first step turns the sign of a tiny gradient into a full step.
    assert np.allclose(figures[0][0], figures[1][0], rtol=1e-5)
    assert np.allclose(figures[0][3], figures[1][3], rtol=1e-5)


def out_of_memory_above(rows: int, method: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Passes of more rows than that end as on a small card; notes all that are tried."""
    from hcrlhf.backbone import Backbone

    tried: list[int] = []
    original = getattr(Backbone, method)

    def limited(self: Any, *arguments: Any, **options: Any) -> Any:
        states = original(self, *arguments, **options)
        if torch.is_grad_enabled():
            tried.append(len(states))
            if len(states) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return states

    monkeypatch.setattr(Backbone, method, limited)
    return tried


def noted_gradients(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What every optimizer step is made with, in one vector (a policy's is clipped by then)."""
    from lightning_modules.adapter_module import AdapterModule

    gradients: list[torch.Tensor] = []

    def note(self: Any, optimizer: Any) -> None:
        own = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]
        gradients.append(torch.cat(own))

    monkeypatch.setattr(AdapterModule, "on_before_optimizer_step", note, raising=False)
    return gradients


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_gradient_is_the_same(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = tmp_path / "whole" / "run", tmp_path / "halved" / "run"
    gradients = noted_gradients(monkeypatch)
    fit(demo, whole, *ALWAYS)
    first = gradients[0]
    gradients.clear()
    tried = out_of_memory_above(1, "hidden", monkeypatch)
    with pytest.warns(UserWarning, match="out of memory in update 0: micro_batch_size 2 is now 1"):
        assert fit(demo, halved, *ALWAYS) == PASSED
    assert tried[:3] == [4, 2, 1]  # a minibatch of four, and then what fits
    assert set(tried[3:]) == {1}
    for name in ("cost", "grad_norm", "policy_loss"):
        assert column(halved, name)[0] == pytest.approx(column(whole, name)[0], rel=1e-5)
    assert (gradients[0] - first).norm() <= 1e-5 * first.norm()


def test_one_sequence_that_does_not_fit_ends_the_run_in_one_line(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out_of_memory_above(0, "hidden", monkeypatch)
    root = tmp_path / "run"
    assert fit(demo, root, *ALWAYS) == 2
    assert "out of memory with one sequence per pass" in capsys.readouterr().err
    assert read(root / "verdict.json")["verdict"] == "NOT_TESTED"


@pytest.mark.parametrize("stage", ["sft", "cost"])
def test_passes_of_an_earlier_stage_that_do_not_fit_are_halved_and_the_weights_are_the_same(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    once = ["--trainer.limit_train_batches", "1", "--model.init_args.group_size", "16"]
    gradients = noted_gradients(monkeypatch)
    assert fit_stage(demo, stage, tmp_path / "whole", *once) == PASSED
    tried = out_of_memory_above(4, "hidden", monkeypatch)
    with pytest.warns(UserWarning, match="out of memory in step 0: group_size 8 is now 4"):
        assert fit_stage(demo, stage, tmp_path / "halved", *once) == PASSED
    assert tried[:3] == [16, 16, 8]
    rows = {"sft": 32, "cost": 64}[stage]  # a pair has two responses
    assert tried[3:] == [4] * (2 * rows // 4)  # each group once more in the backward pass
    first, again = gradients
    assert (again - first).norm() <= 1e-5 * first.norm()


@pytest.mark.parametrize("stage", ["sft", "cost"])
def test_a_backward_pass_without_memory_leaves_what_other_batches_have_added(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from hcrlhf.backbone import Backbone

    both = ["--trainer.limit_train_batches", "2", "--trainer.accumulate_grad_batches", "2"]
    both += ["--model.init_args.group_size", "16"]
    gradients = noted_gradients(monkeypatch)
    assert fit_stage(demo, stage, tmp_path / "whole", *both) == PASSED
    passes = {"sft": 2, "cost": 4}[stage]  # of 16 rows, for a batch
    seen: list[int] = []
    original = Backbone.hidden

    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def limited(self: Any, tokens: Any) -> torch.Tensor:
        """In the second batch the gradients of more than eight rows do not fit."""
        states = original(self, tokens)
        if torch.is_grad_enabled():
            seen.append(len(states))
            if len(seen) > passes and len(states) > 8:
                states.register_hook(fail)  # when those of the layers above are there
        return states

    monkeypatch.setattr(Backbone, "hidden", limited)
    with pytest.warns(UserWarning, match="out of memory in step 0: group_size 16 is now 8"):
        assert fit_stage(demo, stage, tmp_path / "halved", *both) == PASSED
    assert seen[-1] == 8
    first, again = gradients
    assert (again - first).norm() <= 1e-5 * first.norm()


def test_the_last_steps_gradient_is_gone_before_the_next_one_is_made(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = torch.autograd.grad, []

    def noted(loss: Any, weights: Any, **options: Any) -> Any:
        seen.append(any(w.grad is not None for w in weights))
        return honest(loss, weights, **options)

    monkeypatch.setattr("hcrlhf.gradients.torch.autograd.grad", noted)
    more = ["--trainer.limit_train_batches", "4", "--trainer.accumulate_grad_batches"]
    assert fit_stage(demo, "sft", tmp_path / "alone", *more, "1") == PASSED
    assert seen == [False] * 4
    seen.clear()
    assert fit_stage(demo, "sft", tmp_path / "added", *more, "2") == PASSED
    assert seen == [False, True] * 2


def test_training_knows_how_many_validation_prompts_a_candidate_is_looked_at_on(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hcrlhf.dual import Dual

    seen, honest = [], Dual.judge

    def judge(self: Dual, *arguments: Any) -> Any:
        seen.append(self.validation_prompts)
        return honest(self, *arguments)

    monkeypatch.setattr(Dual, "judge", judge)
    assert fit(demo, tmp_path / "run", *ALWAYS) == PASSED
    assert seen == [SIZES.validation] * 3
    one = tmp_path / "one.jsonl"
    first = (demo / "world" / "prompts" / "validation.jsonl").read_text().split("\n")[0]
    # Nobody looks at a prompt that is too long.
    one.write_text(f'{first}\n{{"prompt": "{"again and " * 500}"}}\n')
    assert (
        fit(demo, tmp_path / "few" / "run", *ALWAYS, "--data.init_args.validation", str(one)) == 2
    )
    assert "at least 2 validation prompts, got 1; give more in" in capsys.readouterr().err
    assert len(seen) == 3  # refused before training


def test_rollouts_that_do_not_fit_are_drawn_in_parts_and_are_the_same(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import scored_policy

    original, tried = scored_policy.sample, []

    def limited(backbone: Any, prompts: Any, *arguments: Any) -> Any:
        tried.append(len(prompts))
        if len(prompts) > 3:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED in cublasCreate(handle)")
        return original(backbone, prompts, *arguments)

    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    fit(demo, whole, *ALWAYS)
    monkeypatch.setattr(scored_policy, "sample", limited)
    fit(demo, parts, *ALWAYS)
    assert tried[:6] == [8, 4, 2, 2, 2, 2]
    assert column(parts, "response_tokens") == column(whole, "response_tokens")
    assert np.allclose(column(parts, "cost"), column(whole, "cost"), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizer_states_train_and_resume(demo: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "run"
    more = ["--model.init_args.optimizer", name, "--model.init_args.lora", "{r: 64, alpha: 64}"]
    every = {"class_path": "callbacks.Checkpoint", "init_args": {"every_n_updates": 1}}
    more += [f"--trainer.callbacks={json.dumps([every])}"]
    assert fit(demo, root, *ALWAYS, *more) == 4  # no safety test
    checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    leaves = torch.utils._pytree.tree_leaves(checkpoint["optimizer_states"])
    kinds = {leaf.dtype for leaf in leaves if torch.is_tensor(leaf)}
    assert torch.uint8 in kinds
    longer = ["--data.init_args.updates", "4", "--ckpt_path", "last"]
    assert fit(demo, root, *ALWAYS, *more, *longer) == 4
    assert column(root, "updates") == [4.0]


def column(root: Path, name: str) -> list[float]:
    """What metrics.csv says of one figure, update by update."""
    with (root / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_a_lora_stage_passes_its_adapter_on_as_reference_and_start(
    demo: Path, tmp_path: Path
) -> None:
    """The path of large models: SFT is an adapter, later roles start as copies of it."""
    sft, reward, cost = tmp_path / "sft", tmp_path / "reward", tmp_path / "cost"
    lora = ["--model.init_args.lora", "{r: 4, alpha: 8}"]
    assert fit_stage(demo, "sft", sft, *lora) == PASSED
    assert (sft / "adapter_model.safetensors").is_file()
    assert not (sft / "model.safetensors").exists()
    none = ["--model.init_args.lora", "null", "--model.init_args.sft", str(sft)]
    assert fit_stage(demo, "reward", reward, *none) == PASSED
    assert fit_stage(demo, "cost", cost, *none) == PASSED
    stages = []
    for name, folder in (("sft", sft), ("reward", reward), ("cost", cost)):
        stages += [f"--model.init_args.{name}", str(folder)]
    root = tmp_path / "policy"
    once = [f"--model.init_args.learner.init_args.{key}=1" for key in ("epochs", "minibatches")]
    assert fit(demo, root, *ALWAYS, *stages, *once, "--model.init_args.lora", "null") == PASSED
    # Before the first update policy and reference are the same, and so are the policy that sampled
    # and the one whose gradient is taken: the ratio of the first minibatch is 1.
    assert column(root, "kl")[0] == pytest.approx(0, abs=1e-4)
    assert column(root, "update_kl")[0] == pytest.approx(0, abs=1e-6)
    assert fit(demo, tmp_path / "refused", *ALWAYS, *stages) == 2  # lora is given: another shape


def test_a_4_bit_backbone_runs_every_stage_on_a_cpu(demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    nf4 = ["--model.init_args.quantization", "nf4"]
    stages = []
    for role in ("reward", "cost"):
        assert fit_stage(demo, role, tmp_path / role, *nf4) == PASSED
        assert read(tmp_path / role / "hcrlhf.json")["backbone"]["quantization"] == "nf4"
        stages += [f"--model.init_args.{role}", str(tmp_path / role)]
    assert fit(demo, tmp_path / "policy", *ALWAYS, *stages) == PASSED
    plan = read(tmp_path / "policy" / "plan.json")
    assert plan["provenance"]["quantization"] == "nf4"
    # Two processes with a packed model each, another learner, and every callback of the config.
    learner = "{class_path: hcrlhf.rloo.RLOO, init_args: {samples_per_prompt: 2}}"
    more = [f"--model.init_args.learner={learner}", "--model.init_args.micro_batch_size", "3"]
    more += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    root = tmp_path / "two" / "policy"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hcrlhf",
            "fit",
            *policy_arguments(demo, root, *ALWAYS, *stages, *more),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == PASSED, done.stderr
    assert "the candidate is the policy after update" in done.stderr
    assert read(root / "verdict.json")["verdict"] == "PASS"
    assert main(["verify", str(root / "certificate.json")]) == PASSED


def test_the_path_of_large_models_in_4_bits_to_a_tested_export(
    demo: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """configs/large at reduced size: adapters on one 4-bit backbone, a broken run, an export."""
    pytest.importorskip("bitsandbytes")
    from hcrlhf.backbone import Backbone
    from lightning_modules import Policy

    sft = tmp_path / "sft"
    large = [
        "--model.init_args.gradient_checkpointing",
        "true",
        "--trainer.precision",
        "bf16-mixed",
    ]
    nf4 = ["--model.init_args.quantization", "nf4", "--model.init_args.dtype", "bfloat16"]
    nf4 += ["--model.init_args.lora", "{r: 4, alpha: 8}"]
    assert fit_stage(demo, "sft", sft, *nf4, *large) == PASSED
    stages = ["--model.init_args.sft", str(sft)]
    for role in ("reward", "cost"):
        own = ["--model.init_args.lora", "null", "--model.init_args.sft", str(sft)]
        assert fit_stage(demo, role, tmp_path / role, *own, *large) == PASSED
        stages += [f"--model.init_args.{role}", str(tmp_path / role)]
    given = [*ALWAYS, *stages, *large, "--model.init_args.lora", "null", tested()]
    root = tmp_path / "whole" / "run"
    assert fit(demo, root, *given) == PASSED
    trained = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name or name.startswith("heads.") for name in trained)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert not any("lora_" in name and name.startswith("heads.") for name in trained)
    # Broken off in the third update and resumed: the same bytes as in one go.
    broken = tmp_path / "broken" / "run"
    with monkeypatch.context() as patch:
        honest, calls = Policy._improve, []

        def failing(self: Any, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("pulled the plug")
            return honest(self, *arguments)

        patch.setattr(Policy, "_improve", failing)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            fit(demo, broken, *given)
    assert fit(demo, broken, *given, "--ckpt_path", "last") == PASSED
    assert folder_hashes(broken / "policy") == folder_hashes(root / "policy")
    # Unpacked for the rollouts of training alone: the same responses but for rounding, by which a
    # token may fall otherwise, and the test as shipped.
    unpacked, testing = tmp_path / "unpacked" / "run", [False]
    with monkeypatch.context() as patch:
        honest_test, honest_copies = Policy.sample_costs, Backbone.unpacked
        opened: list[bool] = []

        def marked(self: Any, *arguments: Any) -> Any:
            testing[0] = True
            return honest_test(self, *arguments)

        def noted(self: Any) -> Any:
            opened.append(testing[0])
            return honest_copies(self)

        patch.setattr(Policy, "sample_costs", marked)
        patch.setattr(Backbone, "unpacked", noted)
        assert fit(demo, unpacked, *given, "--model.init_args.unpacked_rollouts", "true") == PASSED
    assert len(opened) >= 3 and not any(opened) and testing == [True]
    packed = column(root, "response_tokens")
    assert column(unpacked, "response_tokens") == pytest.approx(packed, rel=0.02)
    # What is shipped is what was tested: loaded anew it gives the same answers, and passes alike.
    again = tmp_path / "again" / "run"
    assert outcome_of(demo, root / "policy", again, *given[1:]) == PASSED
    assert folder_hashes(again / "policy") == folder_hashes(root / "policy")
    assert (again / "responses.jsonl").read_text() == (root / "responses.jsonl").read_text()
    # What is merged is another model than the 4-bit one, and says so.
    merged = tmp_path / "merged"
    assert main(["export", str(root / "policy"), str(merged)]) == PASSED
    assert "its base is not 4-bit" in capsys.readouterr().out
    state = safetensors.torch.load_file(merged / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    other = tmp_path / "other" / "run"
    assert outcome_of(demo, merged, other, *given[1:]) == PASSED
    assert (
        "- Policy, a model of its own, loaded as bfloat16; the scorers' backbone as bfloat16, "
        "quantization: nf4."
    ) in (other / "certificate.md").read_text()
    assert (
        "- Backbone loaded as bfloat16, quantization: nf4." in (root / "certificate.md").read_text()
    )


@pytest.mark.parametrize("stage", ["sft", "cost", "policy"])
def test_gradient_checkpointing_recomputes_what_is_trained_and_nothing_else(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    from hcrlhf.backbone import Backbone

    # Only in training mode does transformers recompute, and says nothing where it does not.
    calls = {"pass": 0, "layer": 0, "reading": 0}
    hidden, forward = Backbone.hidden, LlamaMLP.forward

    def counted_pass(self: Any, *arguments: Any, **options: Any) -> Any:
        calls["pass"] += torch.is_grad_enabled()
        return hidden(self, *arguments, **options)

    def counted_layer(self: Any, x: Any) -> Any:
        calls["layer" if self.training else "reading"] += 1
        return forward(self, x)

    monkeypatch.setattr(Backbone, "hidden", counted_pass)
    monkeypatch.setattr(LlamaMLP, "forward", counted_layer)
    more = ["--model.init_args.gradient_checkpointing", "true"]
    if stage == "policy":
        fit(demo, tmp_path / "run", *ALWAYS, *more, "--trainer.callbacks=[]")
    else:
        assert fit_stage(demo, stage, tmp_path / "run", *more) == PASSED
    # One layer, forward and once more; reading is done with it as it is.
    assert calls["layer"] == 2 * calls["pass"] > 0 and calls["reading"] > 0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_mixed_precision_and_gradient_checkpointing_run_to_a_verdict(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    from hcrlhf.backbone import Backbone
    from lightning_modules import Policy

    more = ["--trainer.precision", "bf16-mixed", "--model.init_args.gradient_checkpointing", "true"]
    more += ptx(demo, 0.1) if critic == "shared" else []
    seen: dict[str, set[bool]] = {"forward": set(), "backward": set()}
    honest = Backbone.hidden

    def noted(own: Backbone, tokens: Any) -> torch.Tensor:
        states = honest(own, tokens)
        if states.requires_grad:
            seen["forward"].add(torch.is_autocast_enabled("cpu"))
            states.register_hook(lambda _: seen["backward"].add(torch.is_autocast_enabled("cpu")))
        return states

    kinds: set[torch.dtype] = set()
    improve = Policy._improve

    def kinds_noted(own: Policy, rollout: Any, targets: Any) -> Any:
        kinds.update(x.dtype for x in vars(targets).values() if isinstance(x, torch.Tensor))
        return improve(own, rollout, targets)

    monkeypatch.setattr(Policy, "_improve", kinds_noted)
    monkeypatch.setattr(Backbone, "hidden", noted)
    more += ["--model.init_args.learner.init_args.critic", critic]
    assert fit(demo, tmp_path / "run", *ALWAYS, *more) == PASSED
    # What the losses aim at has not been through autocast's matrix products.
    assert torch.float32 in kinds and torch.bfloat16 not in kinds
    # In autocast's backward pass a critic's head, which is float32, would get a gradient of three
    # digits.
    assert seen == {"forward": {True}, "backward": {False}}
    # The adapter that is shipped stays float32.
    state = safetensors.torch.load_file(tmp_path / "run" / "policy" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_a_reward_and_a_cost_model_on_different_backbones_are_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "cost"
    shutil.copytree(demo / "cost", changed)
    stage = read(changed / "hcrlhf.json")
    stage["backbone"]["quantization"] = "nf4"
    (changed / "hcrlhf.json").write_text(json.dumps(stage))
    expected = "sft and cost differ in quantization: 'none' and 'nf4'"
    refuse(demo, tmp_path, capsys, expected, "--model.init_args.cost", str(changed))


def fit_stage(demo: Path, name: str, root: Path, *more: str) -> int:
    """One of the earlier stages again, by its demo config, in another folder."""
    return run_stage("fit", demo, name, root, "--trainer.max_epochs", "1", *more)


def run_stage(command: str, demo: Path, name: str, root: Path, *more: str) -> int:
    world = demo / "world"
    arguments = ["--config", str(CONFIGS / f"{name}.yaml"), "--trainer.default_root_dir", str(root)]
    if name == "sft":
        arguments += ["--data.init_args.path", str(world / "demonstrations.jsonl")]
        arguments += ["--model.init_args.model", str(world / "model")]
    else:
        arguments += ["--data.init_args.path", str(world / "preferences.jsonl")]
        arguments += ["--model.init_args.sft", str(demo / "sft")]
    return main([command, *arguments, *more])


@pytest.mark.parametrize(
    ("constraint", "options", "expected"),
    [
        ("threshold: 5", {}, "at or above the cap 4"),
        ("threshold: 0, upper: 3, lower: -3", {}, r"the cost model's lie in \[-4, 4\]"),
        ("threshold: -3.9", {}, "cannot be shown with 40 safety prompts"),
        ("threshold: 0, bound: {class_path: hcrlhf.methods.Bettin}", {}, "did you mean .*Betting"),
        (
            "threshold: 0, bound: {class_path: hcrlhf.methods.StudentT}",
            {"sequential": True},
            "a sequential test looks after every batch, which student_t does not allow",
        ),
        ("threshold: 0", {"schedule": "weekly"}, "halving"),
        ("threshold: 0", {"continues": "runs/x"}, "continues is for sequential tests"),
        ("threshold: 0", {"human": {"labels": 5, "limit": 0.1}}, "at least 29 are needed"),
    ],
)
def test_a_promise_that_cannot_be_kept_is_refused_before_training(
    demo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    constraint: str,
    options: dict[str, Any],
    expected: str,
) -> None:
    limit = f"[{{estimand: mean, safety_prompts: 40, {constraint}}}]"
    more = [f"--model.init_args.constraints={limit}", tested(**options)]
    refuse(demo, tmp_path, capsys, expected, *more)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_without_a_squash_a_mean_has_no_exact_bound(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "cost"
    shutil.copytree(demo / "cost", raw)
    stage = read(raw / "hcrlhf.json")
    stage["squash"] = None
    stage["backbone"]["model"] = str(demo / "sft")
    (raw / "hcrlhf.json").write_text(json.dumps(stage))
    slot = ["--model.init_args.cost", str(raw)]
    betting = "[{estimand: mean, threshold: 0, bound: {class_path: hcrlhf.methods.Betting}}]"
    more = [*slot, f"--model.init_args.constraints={betting}"]
    refuse(demo, tmp_path, capsys, "nothing declares; train the cost model with squash", *more)
    declared = "[{estimand: mean, threshold: 0, lower: -9, upper: 9}]"
    more = [*slot, f"--model.init_args.constraints={declared}"]
    refuse(demo, tmp_path, capsys, "but nothing limits the costs of", *more)
    # By default such a mean is judged by Hall's t, and the certificate says what that is.
    easy = "[{estimand: mean, threshold: 50, safety_prompts: 40}]"
    root = tmp_path / "run"
    with pytest.warns(UserWarning, match="hall_t, which holds only as"):
        code = fit(demo, root, *slot, f"--model.init_args.constraints={easy}", tested())
    assert code == PASSED
    claim = read(root / "certificate.json")["claim"]
    assert claim["class"] == "asymptotic" and "about at most" in claim["sentence"]


def test_rloo_trains_without_critics_and_resumes(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    learner = {"class_path": "hcrlhf.rloo.RLOO", "init_args": {"samples_per_prompt": 3}}
    more = [*ALWAYS, tested(), f"--model.init_args.learner={json.dumps(learner)}"]
    root = tmp_path / "run" / "policy"
    honest = Policy.training_step
    sizes: list[int] = []

    def interrupted(self: Policy, batch: Any, batch_idx: int) -> None:
        if len(sizes) == 2:
            sizes.append(0)
            raise KeyboardInterrupt
        sizes.append(len(batch.keys))
        honest(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "training_step", interrupted)
        assert fit(demo, root, *more) == INTERRUPTED
    assert sizes == [8, 8, 0]
    assert fit(demo, root, *more, "--ckpt_path", "last") == PASSED
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [name for name in state["state_dict"] if "critic" in name]
    whole = tmp_path / "whole" / "policy"
    assert fit(demo, whole, *more) == PASSED
    name = "policy/adapter_model.safetensors"
    assert (root / name).read_bytes() == (whole / name).read_bytes()


def test_a_bad_gradient_never_reaches_the_weights_and_the_kl_is_steered(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    honest = Policy._minibatch
    steps: list[int] = []

    def spoilt(self: Policy, *arguments: Any) -> dict[str, float]:
        statistics = honest(self, *arguments)
        steps.append(self.updates)
        if len(steps) == 2:
            for _, parameter in self.backbone.trained_parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
            return dict.fromkeys(statistics, math.nan)
        return statistics

    monkeypatch.setattr(Policy, "_minibatch", spoilt)
    steered = "--model.init_args.adaptive_kl={target: 0.001, gain: 0.5}"
    root = tmp_path / "run"
    assert fit(demo, root, *ALWAYS, tested(), steered) == PASSED
    assert sum(column(root, "skipped")) > 0
    for name in ("update_kl", "policy_loss", "grad_norm"):  # of the steps that were made
        assert np.isfinite(column(root, name)).all()
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    coefficients = column(root, "kl_coefficient")
    assert coefficients[-1] == pytest.approx(state["policy"]["kl_coefficient"])
    # After every rollout it follows: up where the KL is above its target, else down.
    rises = [new > old for old, new in zip([0.05, *coefficients], coefficients, strict=False)]
    assert rises == [kl > 0.001 for kl in column(root, "kl")]


def ptx(demo: Path, coefficient: float) -> list[str]:
    path = demo / "world" / "demonstrations.jsonl"
    return [
        f"--data.init_args.demonstrations={path}",
        f"--model.init_args.ptx_coefficient={coefficient}",
    ]


def test_ptx_adds_the_gradient_of_the_demonstrations_likelihood(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    honest = Policy._imitate
    compared: list[float] = []

    def gradients(self: Policy) -> list[torch.Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.trained()]

    def compare(self: Policy, demonstrations: list[Encoded]) -> dict[str, float]:
        parameters, before = list(self.trained()), gradients(self)
        found = honest(self, demonstrations)
        added = [new - old for new, old in zip(gradients(self), before, strict=True)]
        if not compared:
            # All demonstrations of the step at once, and by autograd alone.
            tokens = collate(demonstrations, self.encoder.pad_id)
            with self.backbone.role("policy"):
                log_probs = self.backbone.log_probs(self.backbone.hidden(tokens), tokens)
                loss = -log_probs[tokens.response_mask].mean()
                inside = [p.requires_grad for p in parameters]  # the policy's, no critic's
                reached = [p for p in parameters if p.requires_grad]
                expected = iter(torch.autograd.grad(3 * loss, reached, allow_unused=True))
            for ours, there in zip(added, inside, strict=True):
                theirs = next(expected) if there else None
                reference = torch.zeros_like(ours) if theirs is None else theirs
                torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-6)
            assert found["ptx_loss"] == pytest.approx(float(loss), rel=1e-5)
            compared.append(max(float(x.abs().max()) for x in added))
        return found

    monkeypatch.setattr(Policy, "_imitate", compare)
    root = tmp_path / "run"
    sizes = ["--model.init_args.ptx_batch_size", "5", "--model.init_args.micro_batch_size", "2"]
    assert fit(demo, root, *ALWAYS, *ptx(demo, 3.0), *sizes) == PASSED
    assert compared and compared[0] > 1e-4
    assert all(0 < x < 8 for x in column(root, "ptx_loss"))


def test_ptx_without_its_demonstrations_is_refused(demo: Path, tmp_path: Path, capsys: Any) -> None:
    only, none = ptx(demo, 1.0)[1:], ptx(demo, 0.0)
    refuse(demo, tmp_path, capsys, "ptx_coefficient 1 and 0 demonstrations", *only)
    refuse(demo, tmp_path, capsys, "one needs the other", *none)
    safety = demo / "world" / "prompts" / "safety.jsonl"
    rows = [{**json.loads(line), "response": "Yes."} for line in safety.open()]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [*only, f"--data.init_args.demonstrations={path}"]
    refuse(demo, tmp_path, capsys, "safety", *more)


def test_two_processes_make_the_run_of_one(demo: Path, tmp_path: Path) -> None:
    limits = (
        "--model.init_args.constraints=[{estimand: mean, threshold: 3.5, safety_prompts: 40}, "
        "{estimand: cvar, alpha: 0.5, threshold: 3.9, safety_prompts: 40}]"
    )
    # Micro-batches and an uneven share, so that nothing fits by accident.
    more = [limits, "--model.init_args.micro_batch_size", "3"]
    more += ["--data.init_args.prompts_per_update", "7"]
    # Backward passes that reach different weights: the policy, each critic, demonstrations.
    more += ["--model.init_args.learner.init_args.critic", "separate"]
    more += [*ptx(demo, 0.5), "--model.init_args.ptx_batch_size", "5"]
    # 40 safety prompts in batches of 13: the last one has a prompt for one process alone.
    looks = {
        "class_path": "callbacks.BestCandidate",
        "init_args": {"every_n_updates": 1, "start": 0.0, "batch_size": 7, "prompts": 11},
    }
    every = {"class_path": "callbacks.Checkpoint", "init_args": {"every_n_updates": 1}}
    test = {
        "class_path": "callbacks.SafetyTest",
        "init_args": {"batch_size": 13, "candidate_check": True},
    }
    more.append(f"--trainer.callbacks={json.dumps([looks, every, test])}")
    assert fit(demo, tmp_path / "one" / "policy", *more) == PASSED
    root = tmp_path / "two" / "policy"
    more += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]

    def run(*extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hcrlhf", "fit", *policy_arguments(demo, root, *more), *extra],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    # Both are killed in the third update, and go on from their second one.
    kill = {"class_path": "breaking.Kill", "init_args": {"method": "_constrain", "call": 3}}
    assert run(f"--trainer.callbacks={json.dumps([looks, every, test, kill])}").returncode == -9
    finished = run("--ckpt_path", "last")
    assert finished.returncode == PASSED, finished.stderr
    assert finished.stdout.count("verdict: PASS") == 1

    def figures(*files: Path) -> list[dict[str, str]]:
        return [row for file in files for row in csv.DictReader(file.open())]

    alone = tmp_path / "one" / "policy"
    rows = figures(alone / "metrics.csv"), figures(root / "metrics-1.csv", root / "metrics.csv")
    assert len(rows[0]) == len(rows[1])
    compared = 0
    for one, two in zip(*rows, strict=True):
        for name, value in one.items():
            if value and ("lambda" in name or "pessimism" in name or "violation" in name):
                assert float(two[name]) == pytest.approx(float(value), rel=1e-6, abs=1e-6)
                compared += 1
    assert compared == 3 * 6  # updates; λ, k and g of both limits
    # Not the same costs: the policies differ in their last bits, and the prompts of a safety test
    # follow from the hash of the policy.
    for name in ("one", "two"):
        certificate = read(tmp_path / name / "policy" / "certificate.json")
        assert len(certificate["data"]["costs"]) == 40
    weights = [
        safetensors.torch.load_file(
            tmp_path / name / "policy" / "policy" / "adapter_model.safetensors"
        )
        for name in ("one", "two")
    ]
    # Last bits of a gradient near zero decide the sign of Adam's step: single weights may differ.
    for name, tensor in weights[0].items():
        assert (weights[1][name] - tensor).norm() <= 5e-3 * tensor.norm(), name
    chosen = [
        read(tmp_path / name / "policy" / "certificate.json")["plan"]["provenance"]["candidate"]
        for name in ("one", "two")
    ]
    assert chosen[0] == chosen[1]
    lines = [(tmp_path / name / "ledger.jsonl").read_text().count("\n") for name in ("one", "two")]
    assert lines[0] == lines[1]
    answered = [(tmp_path / n / "policy" / "responses.jsonl").read_text() for n in ("one", "two")]
    assert answered[0].count("\n") == answered[1].count("\n") == 40


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_while_critics_warm_up_the_policy_and_lambda_stay(
    demo: Path, tmp_path: Path, critic: str
) -> None:
    root = tmp_path / "run" / "policy"
    learner = ["--model.init_args.learner.init_args.critic", critic]
    learner += ["--model.init_args.adaptive_kl.target", "1.0"]
    assert fit(demo, root, *ALWAYS, *learner, "--model.init_args.critic_warmup", "3") == PASSED
    rows = [r for r in csv.DictReader((root / "metrics.csv").open()) if r["lambda"]]
    assert [float(row["lambda"]) for row in rows] == pytest.approx([0.3] * 3)
    assert [float(row["kl"]) for row in rows] == [0.0] * 3
    assert len({row["kl_coefficient"] for row in rows}) == 1
    checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    assert all(not v.any() for k, v in state.items() if "lora_B.policy" in k)
    heads = [v for k, v in state.items() if k.startswith("heads.") and k.endswith("weight")]
    assert len(heads) == 2
    assert all(head.any() for head in heads)


# -- policies that were trained elsewhere ----------------------------------------------------------


def outcome_of(demo: Path, policy: Path, root: Path, *more: str) -> int:
    return main(["test", "--policy", str(policy), *policy_arguments(demo, root, *ALWAYS, *more)])


def test_a_policy_that_was_never_trained_is_not_tested(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    assert main(["test", *policy_arguments(demo, root, *ALWAYS)]) == 2
    assert "give --ckpt_path or --policy FOLDER" in capsys.readouterr().err
    assert not (root.parent / "ledger.jsonl").exists()


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_policy_is_not_tested_on_prompts_that_it_was_trained_on(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    policy, prompts = demo / "policy" / "policy", demo / "world" / "prompts"
    if kind == "merged":
        assert main(["export", str(policy), str(tmp_path / "merged")]) == PASSED
        policy = tmp_path / "merged"
    more = ["--data.init_args.train", str(prompts / "evaluation.jsonl")]
    more += ["--data.init_args.evaluation", "null"]
    more += ["--data.init_args.safety", str(prompts / "train.jsonl")]
    assert outcome_of(demo, policy, tmp_path / "run", *more) == 2
    assert "earlier stages'" in capsys.readouterr().err


def test_a_released_adapter_is_tested_again_and_shipped_as_it_is(
    demo: Path, tmp_path: Path
) -> None:
    given = demo / "policy" / "policy"
    assert outcome_of(demo, given, tmp_path / "again") == PASSED
    assert folder_hashes(tmp_path / "again" / "policy") == folder_hashes(given)
    plan = read(tmp_path / "again" / "plan.json")
    assert plan["provenance"]["given"] == "policy"


def test_a_merged_model_is_another_artefact_with_a_test_of_its_own(
    demo: Path, tmp_path: Path, capsys: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter, merged = demo / "policy" / "policy", tmp_path / "merged"
    assert main(["export", str(adapter), str(merged), "--dtype", "float32"]) == PASSED
    assert "not the policy that was tested" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(demo / "sft")
    ids = AutoTokenizer.from_pretrained(merged)("How do I bake bread?", return_tensors="pt")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, adapter).eval()(**ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged).eval()(**ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert outcome_of(demo, merged, tmp_path / "run") == PASSED
    assert folder_hashes(tmp_path / "run" / "policy") == folder_hashes(merged)
    assert main(["verify", str(tmp_path / "run" / "certificate.json")]) == PASSED
    assert main(["export", str(adapter), str(merged)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_an_adapter_of_other_tools_is_shipped_with_the_tokenizer_and_decoding_of_its_test(
    demo: Path, tmp_path: Path
) -> None:
    own, bare, root = demo / "policy" / "policy", tmp_path / "bare", tmp_path / "run"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(own / name, bare)
    assert outcome_of(demo, bare, root) == PASSED
    shipped, known = folder_hashes(root / "policy"), folder_hashes(own)
    assert shipped == {name: digest for name, digest in known.items() if name in shipped}
    assert {"tokenizer.json", "generation_config.json"} <= shipped.keys()


def test_a_given_policy_that_is_exchanged_while_it_is_tested_is_not_shipped(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    given, root = tmp_path / "given", tmp_path / "run"
    shutil.copytree(demo / "policy" / "policy", given)
    sample = Policy.sample_costs

    def exchanged(self: Policy, *arguments: Any) -> Any:
        (given / "README.md").write_text("another\n")
        return sample(self, *arguments)

    monkeypatch.setattr(Policy, "sample_costs", exchanged)
    with pytest.raises(RuntimeError, match="has changed since it was loaded"):
        outcome_of(demo, given, root)
    assert read(root / "verdict.json")["verdict"] == "NOT_TESTED"
    assert not (root / "policy").exists()


def test_a_given_policy_that_cannot_be_tested_is_refused_in_one_line(
    demo: Path, tmp_path: Path, capsys: Any
) -> None:
    def says(code: int, words: str) -> None:
        assert code == 2
        assert words in capsys.readouterr().err

    root, given = tmp_path / "run", demo / "policy" / "policy"
    says(outcome_of(demo, tmp_path / "nowhere", root), "expected the folder of a policy")
    says(outcome_of(demo, demo / "world", root), "holds neither adapter_model.safetensors")
    says(outcome_of(demo, demo / "cost", root), "is a cost model; expected a policy model")
    wrong = tmp_path / "wrong"
    shutil.copytree(given, wrong)
    record = read(wrong / "hcrlhf.json")
    (wrong / "hcrlhf.json").write_text(json.dumps({**record, "fingerprint": "0" * 64}))
    says(outcome_of(demo, wrong, root), "differ in backbone weights")
    plain, other = tmp_path / "plain", tmp_path / "other"
    shutil.copytree(given, plain, ignore=shutil.ignore_patterns("hcrlhf.json"))
    shutil.copytree(demo / "sft", other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(data))
    config = read(plain / "adapter_config.json")
    for base, words in [
        (str(other), "whose config or weight files are not those of"),
        ("nobody/nothing", "names 'nobody/nothing' as its base model, which cannot be compared"),
        (None, "does not say which model it was made for"),
    ]:
        changed = json.dumps({**config, "base_model_name_or_path": base})
        (plain / "adapter_config.json").write_text(changed)
        says(outcome_of(demo, plain, root), words)
    says(fit(demo, root, *ALWAYS, "--model.init_args.policy", str(given)), "to be tested and not")
    shutil.copy(given / "hcrlhf.json", wrong)
    generation = read(given / "generation_config.json")
    for change, words in [
        ({"top_k": 50}, "lets it answer otherwise than it is tested: top_k 50 (tested: 0)"),
        ({"do_sample": False, "num_beams": 4}, "do_sample False (tested: True); num_beams 4"),
        ({"eos_token_id": [0, 5]}, "eos_token_id [0, 5]"),
    ]:
        (wrong / "generation_config.json").write_text(json.dumps({**generation, **change}))
        says(outcome_of(demo, wrong, root), words)
    (wrong / "generation_config.json").write_text("{")
    says(outcome_of(demo, wrong, root), "generation_config.json cannot be read")
    shutil.copy(given / "generation_config.json", wrong)
    rules = read(given / "tokenizer.json")
    rules["normalizer"] = {"type": "Lowercase"}
    (wrong / "tokenizer.json").write_text(json.dumps(rules))
    says(outcome_of(demo, wrong, root), "reads texts otherwise than that of")
    shutil.copy(given / "tokenizer.json", wrong)
    (wrong / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    says(outcome_of(demo, wrong, root), "has another chat template than the test asks with")
    half = tmp_path / "half"
    shutil.copytree(demo / "sft", half, ignore=shutil.ignore_patterns("hcrlhf.json"))
    shutil.copy(given / "generation_config.json", half)
    (half / "config.json").write_text(
        json.dumps({**read(half / "config.json"), "dtype": "float16"})
    )
    says(outcome_of(demo, half, root), "is kept in float16, and would be tested in another")
    (half / "config.json").write_text("{")
    says(outcome_of(demo, half, root), "config.json' is not a valid JSON file")
    tail = json.dumps([{"estimand": "cvar", "threshold": 3.5, "alpha": 0.1, "safety_prompts": 30}])
    says(
        outcome_of(demo, given, root, f"--model.init_args.constraints={tail}"),
        "give eta as a number that was chosen without the safety prompts",
    )
    last = ["--ckpt_path", str(demo / "policy" / "checkpoints" / "last.ckpt")]
    says(outcome_of(demo, given, root, *last), "are two policies; give one")
    says(main(["test", "--policy"]), "expected the folder of a policy")
    says(main(["test", "--policy="]), "expected the folder of a policy")
    says(main(["export", str(demo / "sft"), str(tmp_path / "x")]), "expected the policy/ folder")
    assert not root.exists()


# -- doctor ----------------------------------------------------------------------------------------


def test_the_doctor_foretells_memory_and_checks_the_config(
    demo: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = policy_arguments(demo, tmp_path / "run", *ALWAYS)
    assert main(["doctor", *arguments, "--memory", "2GB"]) == PASSED
    told = capsys.readouterr().out
    for words in ("rollout", "score", "update", "a response ends with '<eos>'", "2GB: fits"):
        assert words in told
    assert "40 safety" in told and "training aims at" in told
    bound = {"class_path": "hcrlhf.methods.EmpiricalBernstein"}
    paper = {"c1": 2.0, "c2": 1.0, "rollout": 8}
    limits = [{"estimand": "mean", "threshold": 1.0, "bound": bound, "pessimism": paper}]
    limits[0]["safety_prompts"] = 40
    assert main(["doctor", *arguments, f"--model.init_args.constraints={json.dumps(limits)}"]) == 0
    assert "standard deviations below 1" in capsys.readouterr().out
    assert main(["doctor", *arguments, "--memory", "770MB"]) == 2
    told = capsys.readouterr().out
    assert "770MB: DOES NOT FIT" in told
    assert told.count(" -> ") == 4 and "together  -> 0.75 GiB: " in told
    missing = ["--data.init_args.safety", str(tmp_path / "none.jsonl")]
    assert main(["doctor", *arguments, *missing]) == 2
    assert "NOT  prompts:" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_doctor_counts_the_validation_prompts_that_a_policy_can_read(
    demo: Path, tmp_path: Path, capsys: Any
) -> None:
    own = demo / "world" / "prompts" / "validation.jsonl"
    longer = tmp_path / "longer.jsonl"
    words = "again and " * 500
    longer.write_text(own.read_text() + "".join(f'{{"prompt": "{words}{i}"}}\n' for i in range(9)))
    told = []
    for path in (own, longer):
        more = [*ALWAYS, "--data.init_args.validation", str(path)]
        assert main(["doctor", *policy_arguments(demo, tmp_path / "run", *more)]) == PASSED
        told.append([x for x in capsys.readouterr().out.splitlines() if "training aims at" in x])
    assert told[0] == told[1] != []


def test_the_doctor_knows_a_model_that_no_stage_has_trained_yet(
    demo: Path, tmp_path: Path, capsys: Any
) -> None:
    missing = ["--model.init_args.sft", "not/there"]
    arguments = policy_arguments(demo, tmp_path / "run", *ALWAYS, *missing)
    assert main(["doctor", *arguments]) == 2
    assert "add --sft CONFIG.yaml" in capsys.readouterr().err
    sft = tmp_path / "sft.yaml"
    text = (CONFIGS / "sft.yaml").read_text()
    text = text.replace("runs/demo/world", str(demo / "world")).replace(
        "lora: null", "lora: {r: 4, alpha: 8}\n    quantization: nf4"
    )
    sft.write_text(text)
    more = ["--sft", str(sft), "--model.init_args.lora", "null"]
    assert main(["doctor", *arguments, *more]) == PASSED
    assert "in 4 bits" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["12", "0GB", "big", "-3GB"])
def test_a_size_of_memory_that_is_none_is_refused(text: str) -> None:
    from hcrlhf.doctor import read_memory
    from hcrlhf.errors import InputError

    with pytest.raises(InputError, match="expected a size such as 12GB"):
        read_memory(text)
    assert read_memory("12GB") == read_memory("12 GiB") == 12 * 2**30
