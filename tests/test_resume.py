"""A run that breaks off goes on with --ckpt_path last as if nothing had been, or says why not."""

import copy
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from callbacks import Completions
from datamodules.files import EpochSampler
from hcrlhf import resume
from hcrlhf.cli import NO_SOLUTION, PASSED, main
from hcrlhf.demo import CONFIGS
from hcrlhf.errors import InputError
from hcrlhf.resume import Change, changes, describe, differences, identity, may_change
from hcrlhf.world import ModelSizes, WorldSizes, write_world

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parent.parent
SIZES = WorldSizes(
    demonstrations=100,
    preferences=50,
    train=24,
    validation=8,
    safety=30,
    evaluation=8,
    model=ModelSizes(hidden=32, layers=1, intermediate=32),
)
LIMIT = "--model.init_args.constraints=[{estimand: mean, threshold: %s, safety_prompts: 30}]"


# -- what has changed ------------------------------------------------------------------------------


def test_settings_are_compared_key_by_key_and_lists_by_position() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "gone": 3}
    new = {"a": 1, "b": {"c": [1, 5, 6], "d": "x"}, "came": {"e": 0}}
    assert differences(old, new) == [
        Change("b.c.1", 2, 5),
        Change("b.c.2", None, 6),
        Change("gone", 3, None),
        Change("came", None, {"e": 0}),
    ]
    assert str(Change("b.c.1", 2, 5)) == "b.c.1: 2 → 5"
    assert str(Change("came", None, {"e": "y"})) == 'came: null → {"e": "y"}'
    assert str(Change("long", 0, "x" * 101)) == f"long: 0 → {'x' * 99}…"


def test_null_and_a_key_that_is_not_there_are_the_same() -> None:
    assert differences({"a": None, "b": 1.0}, {"b": 1}) == []


def test_of_two_classes_only_the_names_are_compared() -> None:
    old = {"class_path": "m.A", "init_args": {"x": 1}}
    new = {"class_path": "m.B", "init_args": {"y": 2}}
    assert differences({"c": old}, {"c": new}) == [Change("c.class_path", "m.A", "m.B")]
    assert differences({"c": old}, {"c": old | {"init_args": {"x": 2}}}) == [
        Change("c.init_args.x", 1, 2)
    ]


def test_callbacks_are_compared_by_class_whatever_their_order() -> None:
    test = {"class_path": "callbacks.SafetyTest", "init_args": {"schedule": "halving"}}
    bar = {"class_path": "callbacks.Progress", "init_args": {"lines": 3}}
    other = {"class_path": "callbacks.SafetyTest", "init_args": {"schedule": "once"}}

    def run(callbacks: Any) -> dict[str, Any]:
        return describe({"trainer": {"callbacks": callbacks}})

    assert changes(run([bar, test]), run([test, bar])) == []
    assert changes(run([test]), run(other)) == [
        Change("trainer.callbacks.SafetyTest.schedule", "halving", "once")
    ]
    assert changes(run([test]), run(None)) == [
        Change("trainer.callbacks.SafetyTest", {"schedule": "halving"}, None)
    ]
    # A second test is seen, not folded into the first.
    assert [c.key for c in changes(run([test]), run([test, other]))] == [
        "trainer.callbacks.SafetyTest'"
    ]


def test_a_derived_safety_test_is_a_safety_test() -> None:
    def run(name: str, **options: Any) -> dict[str, Any]:
        return describe({"trainer": {"callbacks": [{"class_path": name, "init_args": options}]}})

    own = run("breaking.OwnTest", schedule="halving")
    assert [c.key for c in changes(own, run("breaking.OwnTest", schedule="once"))] == [
        "trainer.callbacks.SafetyTest.schedule"
    ]
    assert changes(run("callbacks.SafetyTest", schedule="halving"), own) == [
        Change("trainer.callbacks.SafetyTest.class_path", None, "breaking.OwnTest")
    ]
    assert "trainer.callbacks.SafetyTest.class_path" in own["inputs"]  # a hash of its file


def test_files_are_compared_by_content_so_that_a_run_may_be_moved(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(text)

    def run(name: str) -> dict[str, Any]:
        return describe({"data": {"init_args": {"train": str(tmp_path / name)}}})

    before = run("a")
    assert changes(before, run("b")) == []
    assert [c.key for c in changes(before, run("c"))] == ["data.init_args.train"]
    assert [c.key for c in changes(before, run("nowhere"))] == ["data.init_args.train"]
    (tmp_path / "a").write_text("z")
    (change,) = changes(before, run("a"))
    assert (change.old, change.new) == (str(tmp_path / "a"), "other content in the same place")


def test_a_users_code_that_was_changed_meanwhile_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "users_own.py"
    text = "class Learner: pass\nclass Other: pass\ndef cost(prompts, responses): return [0]\n"
    path.write_text(text + "def other(prompts, responses): return [5]\n")
    scorer = {"class_path": "hcrlhf.scorers.PythonScorer"}
    scorer["init_args"] = {"function": "users_own.cost"}  # type: ignore[assignment]
    options = {"cost": scorer, "learner": {"class_path": "users_own.Learner"}}
    options["multiplier"] = {"class_path": "hcrlhf.multiplier.PIDMultiplier"}
    config: Any = {"model": {"class_path": "lightning_modules.Policy", "init_args": options}}
    before = describe(config)
    keys = {"model.init_args.cost.init_args.function", "model.init_args.learner.class_path"}
    assert before["inputs"].keys() == keys
    assert changes(before, describe(config)) == []
    # Another name in the same file, with other options.
    swapped = copy.deepcopy(config)
    swapped["model"]["init_args"]["cost"]["init_args"]["function"] = "users_own.other"
    swapped["model"]["init_args"]["learner"] = {"class_path": "users_own.Other", "init_args": {}}
    assert {change.key for change in changes(before, describe(swapped))} == keys
    path.write_text(path.read_text().replace("[0]", "[1]"))
    found = changes(before, describe(config))
    assert {change.key for change in found} == keys
    assert all(change.new == "other content in the same place" for change in found)
    assert not any(may_change(key, config) for key in keys)
    # What is Python's, or installed, is not the user's; a bound in a list is.
    assert resume.source_identity("functools.partial") is None
    assert resume.source_identity("torch.nn.Linear") is None
    limits = {"constraints": [{"bound": {"class_path": "users_own.Other"}}]}
    config = {"model": {"class_path": "lightning_modules.Policy", "init_args": limits}}
    before = describe(config)
    path.write_text(path.read_text() + "\n")
    (change,) = changes(before, describe(config))
    assert str(change) == (
        "model.init_args.constraints.0.bound.class_path: users_own.Other → other content in the "
        "same place"
    )
    # What cannot be imported is for its own class to refuse.
    assert resume.source_identity("users_own.missing") is None
    assert resume.source_identity("no.such.module") is None


def test_a_stage_folder_is_known_by_what_was_trained(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hcrlhf.json").write_text("{}")
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"12")
    same = identity(tmp_path / "one")
    assert same is not None and same == identity(tmp_path / "two")
    (tmp_path / "two" / "metrics.csv").write_text("no part of the model")
    assert identity(tmp_path / "two") == same
    (tmp_path / "two" / "adapter_model.safetensors").write_bytes(b"34")
    assert identity(tmp_path / "two") != same
    # Other tensors or the same ones scaled otherwise; where the backbone lies says nothing.
    scales = []
    for alpha, base in ((8, "here"), (8, "there"), (16, "here")):
        settings = {"r": 8, "lora_alpha": alpha, "base_model_name_or_path": base}
        (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(settings))
        scales.append(identity(tmp_path / "one"))
    assert scales[0] == scales[1] != scales[2]
    assert identity(tmp_path / "three") is None


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.init_args.learning_rate", True),
        ("model.init_args.kl_coefficient", True),
        ("model.init_args.constraints.0.threshold", False),
        ("model.init_args.constraints.1", False),
        ("model.init_args.cost", False),
        ("model.init_args.seed", False),
        ("model.init_args.a_key_of_tomorrow", False),
        ("data.init_args.updates", True),
        ("data.init_args.prompts_per_update", False),
        ("data.init_args.safety", False),
        ("seed_everything", False),
        ("trainer.logger.class_path", True),
        ("trainer.callbacks.Checkpoint.every_n_updates", True),
        ("trainer.callbacks.SafetyTest.schedule", False),
        ("trainer.callbacks.SafetyTest", False),
        ("trainer.callbacks.Checkpoint", False),  # removed, since the settings lack it
        ("trainer.callbacks.BestCandidate", False),
        ("trainer.callbacks.Progress", True),
        ("trainer.max_epochs", False),
    ],
)
def test_what_makes_a_run_another_one_may_not_change(key: str, expected: bool) -> None:
    assert may_change(key, {}) is expected


def test_a_callback_that_knows_a_part_of_the_run_may_come_but_not_go() -> None:
    new = {"trainer": {"callbacks": {"BestCandidate": {"start": 0.5}}}}
    assert may_change("trainer.callbacks.BestCandidate", new)
    assert may_change("trainer.callbacks.BestCandidate.start", new)


def test_a_steered_kl_coefficient_is_not_set_anew() -> None:
    settings = {"model": {"init_args": {"adaptive_kl": {"target": 1}}}}
    assert not may_change("model.init_args.kl_coefficient", settings)


# -- what a checkpoint must bring back -------------------------------------------------------------


def test_the_generators_go_on_where_they_were_also_through_a_file(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), *np.random.normal(size=3), *torch.rand(2)]

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    draw()  # leaves half of a pair of normal numbers behind, in random and in NumPy
    cpu = torch.device("cpu")
    torch.save(resume.rng_state(cpu), tmp_path / "state")
    expected = draw()
    assert draw() != expected
    resume.set_rng_state(torch.load(tmp_path / "state", weights_only=True), cpu)
    assert draw() == expected


def test_an_epoch_goes_on_after_the_examples_that_are_behind() -> None:
    whole = EpochSampler(10, seed=3)
    first = list(whole)
    assert sorted(first) == list(range(10)) and len(whole) == 10
    assert list(EpochSampler(10, 3, done=lambda: 4)) == first[4:]
    assert list(EpochSampler(10, 4)) != first
    whole.set_epoch(1)
    second = list(whole)
    assert second != first and sorted(second) == sorted(first)
    whole.set_epoch(0)
    assert list(whole) == first


def test_processes_share_an_epoch_and_each_goes_on_in_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = list(EpochSampler(11, seed=3))

    def of(rank: int, done: int = 0) -> EpochSampler:
        monkeypatch.setattr("datamodules.files.rank_and_size", lambda: (rank, 3))
        return EpochSampler(11, 3, lambda: done)

    shares = [list(of(rank)) for rank in range(3)]
    assert shares == [alone[rank:9:3] for rank in range(3)]  # 9 of 11: as many for each
    assert [len(of(rank)) for rank in range(3)] == [3, 3, 3]
    assert list(of(1, done=2)) == shares[1][2:]
    with pytest.raises(InputError, match="2 examples cannot be shared by 3 processes"):
        EpochSampler(2, 3)


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Path:
    """A folder with the world and three stages that have learnt next to nothing."""
    folder = tmp_path_factory.mktemp("stages")
    shutil.copytree(encoder_folder, folder / "encoder")
    write_world(folder / "world", 0, SIZES)
    for name in ("sft", "reward", "cost"):
        more = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
        assert fit_stage(folder, name, folder / name, *more) == PASSED
    return folder


def fit_stage(stages: Path, name: str, root: Path, *more: str) -> int:
    return main(["fit", *stage_arguments(stages, name, root), *more])


def stage_arguments(stages: Path, name: str, root: Path) -> list[str]:
    world = stages / "world"
    configs = CONFIGS.parent / "real" if name == "encoder_reward" else CONFIGS
    arguments = ["--config", str(configs / f"{name}.yaml"), "--trainer.default_root_dir", str(root)]
    if name == "encoder_reward":
        arguments += ["--data.init_args.path", str(world / "preferences.jsonl")]
        arguments += ["--model.init_args.model", str(stages / "encoder")]
        arguments += ["--model.init_args.max_tokens", "64", "--model.init_args.train_layers", "1"]
    elif name == "sft":
        arguments += ["--data.init_args.path", str(world / "demonstrations.jsonl")]
        arguments += ["--model.init_args.model", str(world / "model")]
    else:
        arguments += ["--data.init_args.path", str(world / "preferences.jsonl")]
        arguments += ["--model.init_args.sft", str(stages / "sft")]
    return arguments


def policy_arguments(stages: Path, root: Path, *more: str) -> list[str]:
    arguments = ["--config", str(CONFIGS / "policy.yaml"), "--trainer.default_root_dir", str(root)]
    for stage in ("sft", "reward", "cost"):
        arguments += [f"--model.init_args.{stage}", str(stages / stage)]
    for split in ("train", "validation", "safety", "evaluation"):
        path = stages / "world" / "prompts" / f"{split}.jsonl"
        arguments += [f"--data.init_args.{split}", str(path)]
    arguments += ["--data.init_args.prompts_per_update", "8", "--data.init_args.updates", "6"]
    learner = "--model.init_args.learner.init_args"
    arguments += [f"{learner}.epochs=2", f"{learner}.minibatches=2"]
    # A fixed weight of the KL, which may change on resume.
    return [*arguments, LIMIT % 3.5, "--model.init_args.adaptive_kl=null", *more]


def callbacks(
    every: int = 2, kill: tuple[str, int] | None = None, shown: int = 0, **options: Any
) -> str:
    given = {"candidate_check": False, "batch_size": 10} | options
    named = [
        {"class_path": "callbacks.Checkpoint", "init_args": {"every_n_updates": every}},
        {"class_path": "callbacks.SafetyTest", "init_args": given},
    ]
    if shown:
        init = {"every_n_updates": 1, "count": shown, "console": 0}
        named.append({"class_path": "callbacks.Completions", "init_args": init})
    if kill:
        init = {"method": kill[0], "call": kill[1]}
        named.append({"class_path": "breaking.Kill", "init_args": init})
    return f"--trainer.callbacks={json.dumps(named)}"


def fit(stages: Path, root: Path, *more: str) -> int:
    return main(["fit", *policy_arguments(stages, root, *more)])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def broken(cls: type, method: str, call: int) -> Iterator[None]:
    """The nth call of a method raises."""
    honest, left = getattr(cls, method), [call]

    def breaking(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("lightning strikes")
        return honest(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, method, breaking)
        with pytest.raises(RuntimeError, match="strikes"):
            yield


# Every state that a run can have: a controller's memory, a steered β, schedules, global generators.
FULL = [
    "--model.init_args.learner=breaking.Restless",
    "--model.init_args.learner.init_args.minibatches=2",
    "--model.init_args.multiplier=hcrlhf.multiplier.PIDMultiplier",
    "--model.init_args.adaptive_kl={target: 0.001, gain: 0.5}",
    "--model.init_args.ptx_coefficient=0.5",
]


def with_ptx(stages: Path) -> list[str]:
    return [*FULL, f"--data.init_args.demonstrations={stages / 'world' / 'demonstrations.jsonl'}"]


def test_a_run_that_is_killed_again_and_again_ends_as_the_unbroken_one(
    stages: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, part = tmp_path / "whole" / "run", tmp_path / "part" / "run"
    last, full = part / "checkpoints" / "last.ckpt", with_ptx(stages)
    assert fit(stages, whole, *full, callbacks(shown=1)) == PASSED

    def killed(method: str, call: int) -> str:
        more = [*full, callbacks(kill=(method, call), shown=1), "--ckpt_path", "last"]
        done = subprocess.run(
            [sys.executable, "-m", "hcrlhf", "fit", *policy_arguments(stages, part, *more)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == -9, done.stderr
        assert read(part / "verdict.json")["verdict"] == "NOT_TESTED"
        assert not (part / "policy").exists()
        return done.stderr

    def updates() -> int:
        return int(torch.load(last, weights_only=True)["policy"]["updates"])

    # In the middle of the second update, before there is any checkpoint: eight backward passes make
    # an update, four of them of demonstrations.
    assert f"no {last} yet: the run begins at its first update" in killed("manual_backward", 11)
    assert not last.exists()
    # While the second checkpoint is written: half of it lies there, beside the first.
    killed("save_checkpoint", 2)
    assert updates() == 2 and last.with_suffix(".tmp").stat().st_size > 0
    # In the safety test, when 20 of 30 prompts have been answered.
    assert f"the run goes on from {last}" in killed("sample_costs", 3)
    assert updates() == 6 and not last.with_suffix(".tmp").exists()

    caplog.clear()
    assert fit(stages, part, *full, callbacks(shown=1), "--ckpt_path", "last") == PASSED
    # Nothing is drawn a second time.
    assert [m for m in caplog.messages if "answered" in m] == ["  30 answered"]
    for name in ("policy/adapter_model.safetensors", "completions.jsonl"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    # A last line that was cut off is forgotten, and ends of lines of other kinds are text.
    path = part / "completions.jsonl"
    line = path.read_text().split("\n")[0]
    first = line.replace('"response": "', '"response": "\u2028').encode()
    path.write_bytes(first + b'\n{"update": 2, "resp\xe2')
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(part))
    Completions()._forget(trainer, 6)  # type: ignore[arg-type]
    assert path.read_bytes() == first + b"\n"
    path.write_bytes((whole / "completions.jsonl").read_bytes())
    assert [r["update"] for r in read_lines(part / "completions.jsonl")] == [1, 2, 3, 4, 5, 6]
    ours, theirs = (read(folder / "certificate.json") for folder in (part, whole))
    assert ours["data"]["costs"] == theirs["data"]["costs"]
    assert ours["ledger"]["test"] == 1
    assert main(["verify", str(part / "certificate.json")]) == PASSED
    mine, yours = (
        torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (part, whole)
    )
    assert mine["policy"] == yours["policy"]
    assert mine["rng"][0]["numpy"] == yours["rng"][0]["numpy"]
    assert mine["lr_schedulers"] == yours["lr_schedulers"]


@pytest.mark.parametrize(
    ("name", "method", "call"),
    [
        # Four batches an epoch, checkpoints after 2 and 4 of them: in the middle of the second
        # epoch; right at its beginning; in its validation; while the stage is being written.
        ("sft", "training_step", 8),
        ("sft", "save_stage", 1),
        ("reward", "training_step", 5),
        ("reward", "on_validation_epoch_end", 2),
        ("cost", "training_step", 8),
        ("cost", "save_stage", 1),
        # Its dropout draws from the global generator.
        ("encoder_reward", "training_step", 5),
        ("encoder_reward", "training_step", 8),
    ],
)
def test_a_stage_that_breaks_off_ends_as_the_unbroken_one(
    stages: Path, unbroken: Path, tmp_path: Path, name: str, method: str, call: int
) -> None:
    from lightning_modules import Preference, PreferenceClassifier, Supervised

    root = tmp_path / name
    cls: Any = {"sft": Supervised, "encoder_reward": PreferenceClassifier}.get(name, Preference)
    with broken(cls, method, call):
        fit_stage(stages, name, root, *TWICE)
    assert not (root / "hcrlhf.json").exists()
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        honest = cls.training_step
        patch.setattr(cls, "training_step", lambda *a: steps.append(0) or honest(*a))
        assert fit_stage(stages, name, root, *TWICE, "--ckpt_path", "last") == PASSED
    assert len(steps) == (4 if (method, call) == ("training_step", 5) else 2)
    whole = name in ("sft", "encoder_reward")
    weights = "model.safetensors" if whole else "adapter_model.safetensors"
    for file in (weights, "training_prompts.txt"):
        # Compared as a truth value: bytes that differ are not for pytest to explain.
        same = (root / file).read_bytes() == (unbroken / name / file).read_bytes()
        assert same, file
    theirs, ours = (read(folder / "hcrlhf.json") for folder in (unbroken / name, root))
    assert ours["metrics"] == theirs["metrics"] and ours.get("moments") == theirs.get("moments")


@pytest.mark.parametrize(("name", "lora"), [("sft", "{r: 4, alpha: 8}"), ("cost", None)])
def test_a_4_bit_stage_that_breaks_off_ends_as_the_unbroken_one(
    stages: Path, tmp_path: Path, name: str, lora: str | None
) -> None:
    pytest.importorskip("bitsandbytes")
    from lightning_modules import Preference, Supervised

    large = ["--model.init_args.quantization", "nf4", "--model.init_args.dtype", "bfloat16"]
    large += ["--model.init_args.gradient_checkpointing", "true"]
    large += ["--trainer.precision", "bf16-mixed", *TWICE]
    large += ["--model.init_args.lora", lora] if lora else []
    whole, root = tmp_path / "whole", tmp_path / "broken"
    assert fit_stage(stages, name, whole, *large) == PASSED
    with broken(Supervised if name == "sft" else Preference, "training_step", 8):
        fit_stage(stages, name, root, *large)
    assert not (root / "hcrlhf.json").exists()
    assert fit_stage(stages, name, root, *large, "--ckpt_path", "last") == PASSED
    same = [
        (root / file).read_bytes() == (whole / file).read_bytes()
        for file in ("adapter_model.safetensors", "training_prompts.txt")
    ]
    assert same == [True, True]
    theirs, ours = read(whole / "hcrlhf.json"), read(root / "hcrlhf.json")
    assert ours["metrics"] == theirs["metrics"] and ours.get("moments") == theirs.get("moments")


EVERY = [{"class_path": "callbacks.Checkpoint", "init_args": {"every_n_updates": 2}}]
TWICE = [
    f"--trainer.callbacks={json.dumps(EVERY)}",
    *("--trainer.enable_checkpointing", "true"),
    *("--trainer.max_epochs", "2"),
    *("--trainer.limit_train_batches", "4"),
    *("--data.init_args.batch_size", "20"),
]


@pytest.fixture(scope="module")
def unbroken(stages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    for name in ("sft", "reward", "cost", "encoder_reward"):
        assert fit_stage(stages, name, folder / name, *TWICE) == PASSED
    return folder


# -- other settings --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(stages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy run that broke off in its fourth update, with a checkpoint after the second."""
    from lightning_modules import Policy

    root = tmp_path_factory.mktemp("begun") / "run"
    with broken(Policy, "training_step", 4):
        fit(stages, root, callbacks())
    return root


def copied(begun: Path, tmp_path: Path) -> Path:
    root = tmp_path / "moved" / "run"
    shutil.copytree(begun, root)
    return root


def refused(
    stages: Path,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    *more: str,
    checkpoint: str = "last",
) -> str:
    """The one line that is printed."""
    capsys.readouterr()
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert fit(stages, root, callbacks(), "--ckpt_path", checkpoint, *more) == 2
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("hcrlhf: ")]
    return line


def test_a_checkpoint_of_slurm_s_requeue_is_refused(
    stages: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(begun, tmp_path)
    (root / "hpc_ckpt_1.ckpt").write_bytes(b"")
    assert "remove it: --ckpt_path last goes on" in refused(stages, root, capsys)


def test_a_checkpoint_that_could_not_be_read_again_is_said_at_once(
    stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"--trainer.callbacks={json.dumps([*EVERY, {'class_path': 'breaking.Numbered'}])}"
    assert fit(stages, tmp_path / "run", given) == 2
    assert "this checkpoint could not be read again" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


TIGHTER = r"\(model\.init_args\.constraints\.0\.threshold: 3\.5 → 3\.4\)"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([LIMIT % 3.4], TIGHTER),
        ([callbacks(schedule="once")], r"SafetyTest\.schedule: halving → once\)"),
        (["--trainer.callbacks=[]"], r"SafetyTest: \{.* → null\)"),
        (["--trainer.fast_dev_run", "true"], "fast_dev_run tries a config, and .* holds a run"),
        (["--model.init_args.seed", "1"], r"model\.init_args\.seed: 0 → 1"),
        (["--seed_everything", "1"], r"\(seed_everything: 0 → 1\)"),
        (["--model.init_args.lora.r", "4"], r"model\.init_args\.lora\.r: 8 → 4"),
        (["--model.init_args.learner=hcrlhf.rloo.RLOO"], r"learner.class_path: .*PPO → .*RLOO\)"),
        (["--data.init_args.prompts_per_update", "9"], r"prompts_per_update: 8 → 9\)"),
        (["--data.init_args.updates", "1"], r"updates is 1, and .* has 2 behind it; give more"),
        # Lightning would begin a pass of two more, after a safety test of what there is.
        (["--data.init_args.updates", "2"], r"updates is 2, and .* has 2 behind it; give more"),
    ],
)
def test_what_makes_another_run_is_refused_with_old_and_new(
    stages: Path,
    begun: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    expected: str,
) -> None:
    assert re.search(expected, line := refused(stages, begun, capsys, *more)), line


def test_a_stage_that_was_trained_again_meanwhile_is_refused(
    stages: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "cost"
    shutil.copytree(stages / "cost", other)
    head = other / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"!")
    line = refused(stages, begun, capsys, "--model.init_args.cost", str(other))
    assert f"(model.init_args.cost: {stages / 'cost'} → " in line


def test_no_setting_is_taken_from_a_checkpoint(
    stages: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning puts a checkpoint's hyperparameters over the command line's."""
    root = copied(begun, tmp_path)
    path = root / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    loose = [{"estimand": "mean", "threshold": 3.5, "safety_prompts": 30}]
    state["hyper_parameters"] = {"_class_path": "lightning_modules.Policy", "constraints": loose}
    torch.save(state, path)
    for checkpoint in ("last", str(path)):
        line = refused(stages, root, capsys, LIMIT % 3.4, checkpoint=checkpoint)
        assert re.search(TIGHTER, line)
    # A policy may be tested under another limit, and it is the limit that was given.
    tested = tmp_path / "tested" / "run"
    arguments = policy_arguments(stages, tested, LIMIT % 3.4, callbacks())
    assert main(["test", *arguments, "--ckpt_path", str(path)]) == PASSED
    assert read(tested / "plan.json")["constraints"][0]["threshold"] == 3.4


def test_a_run_that_was_moved_goes_on_with_what_may_change_and_says_it(
    stages: Path, begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = copied(begun, tmp_path)
    rates = ["--model.init_args.learning_rate", "0.0001", "--model.init_args.weight_decay", "0.5"]
    more = [*rates, "--model.init_args.kl_coefficient", "0.2", "--data.init_args.updates", "8"]
    assert fit(stages, root, *more, callbacks(), "--ckpt_path", "last") == PASSED
    said = re.findall(r"changed from here on: (\S+): (.*)", caplog.text)
    assert dict(said) == {
        "model.init_args.learning_rate": "0.0015 → 0.0001",
        "model.init_args.weight_decay": "0.0 → 0.5",
        "model.init_args.kl_coefficient": "0.03 → 0.2",
        "data.init_args.updates": "6 → 8",
    }
    # And they hold, whatever the optimizer's state says: 3e-3 · (1 - 6/8) after six updates of
    # eight, with a rate of the critics that is still 3e-3.
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["policy"]["updates"] == 8 and state["policy"]["kl_coefficient"] == 0.2
    groups = state["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [1e-4, 3e-3]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.5]
    assert state["lr_schedulers"][0]["base_lrs"] == [1e-4, 3e-3]
    # Both configs are kept, and both parts of the figures.
    assert "kl_coefficient: 0.03" in (root / "config-1.yaml").read_text()
    assert "kl_coefficient: 0.2" in (root / "config.yaml").read_text()
    assert (root / "metrics.csv").is_file() and (root / "metrics-1.csv").is_file()


def test_weights_that_are_not_finite_leave_the_checkpoint_that_there_is(
    stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_modules import Supervised

    root = tmp_path / "sft"
    more = [*TWICE, "--trainer.log_every_n_steps", "0"]
    with broken(Supervised, "training_step", 3):
        fit_stage(stages, "sft", root, *more)
    last = root / "checkpoints" / "last.ckpt"
    good = last.read_bytes()
    wild = ["--model.init_args.learning_rate", "1e30", "--ckpt_path", "last"]
    assert fit_stage(stages, "sft", root, *more, *wild) == 2
    assert "weights are not finite, so no checkpoint is written" in capsys.readouterr().err
    assert last.read_bytes() == good
    assert fit_stage(stages, "sft", root, *more, "--ckpt_path", "last") == PASSED


def test_a_run_that_a_limit_has_ended_is_tested_when_it_is_resumed(
    stages: Path, tmp_path: Path
) -> None:
    from callbacks import SafetyTest

    early = [LIMIT % 3.5, callbacks(), "--trainer.limit_train_batches", "3"]
    whole, part = (tmp_path / name / "run" for name in ("whole", "part"))
    assert fit(stages, whole, *early) == PASSED
    with broken(SafetyTest, "_run", 1):
        fit(stages, part, *early)
    assert read(part / "verdict.json")["verdict"] == "NOT_TESTED"
    # Nothing has changed: the run is over, and what was left of it is its test.
    assert fit(stages, part, *early, "--ckpt_path", "last") == PASSED
    for root in (whole, part):
        state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
        assert state["policy"]["updates"] == 3
    ours, theirs = (read(root / "certificate.json") for root in (part, whole))
    assert ours["data"]["costs"] == theirs["data"]["costs"]


def test_a_run_that_ended_before_its_test_is_trained_longer(stages: Path, tmp_path: Path) -> None:
    more = [LIMIT % -2, callbacks(candidate_check=True), "--model.init_args.schedule", "constant"]
    longer = ["--data.init_args.updates", "8"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert fit(stages, whole, *more, *longer) == NO_SOLUTION
    assert fit(stages, part, *more) == NO_SOLUTION
    assert fit(stages, part, *more, *longer, "--ckpt_path", "last") == NO_SOLUTION
    ours, theirs = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (part, whole)
    )
    assert ours["policy"] == theirs["policy"] and ours["policy"]["updates"] == 8
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor)


def test_a_run_that_chose_its_candidate_and_is_trained_longer_ends_as_the_unbroken_one(
    stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from callbacks import BestCandidate

    honest, times = BestCandidate._answered, itertools.count()

    def falling(self: Any, *arguments: Any) -> Any:
        rewards, costs = honest(self, *arguments)
        return rewards - 10 * next(times), costs

    # The first look is the best one, so that the candidate is not where training goes on.
    monkeypatch.setattr(BestCandidate, "_answered", falling)
    looks = {"every_n_updates": 1, "start": 0.0}
    named = [
        {"class_path": "callbacks.BestCandidate", "init_args": looks},
        {"class_path": "callbacks.Checkpoint"},
    ]
    more = [LIMIT % 3.5, f"--trainer.callbacks={json.dumps(named)}"]
    more += ["--model.init_args.schedule", "constant"]
    longer = ["--data.init_args.updates", "6"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    fit(stages, whole, *more, *longer)
    fit(stages, part, *more, "--data.init_args.updates", "3")
    last = part / "checkpoints" / "last.ckpt"
    chosen = torch.load(last, weights_only=True)["policy"]["candidate"]
    assert chosen == 1
    fit(stages, part, *more, *longer, "--ckpt_path", "last")
    ours, theirs = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (part, whole)
    )
    assert ours["policy"] == theirs["policy"] and ours["policy"]["updates"] == 6
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor)


def test_a_checkpoint_that_was_cut_off_is_one_line(
    stages: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(begun, tmp_path)
    path = root / "checkpoints" / "last.ckpt"
    whole = path.stat().st_size
    for size in (whole // 2, whole - 1, 0):
        os.truncate(path, size)
        assert "last.ckpt is not readable as a checkpoint" in refused(stages, root, capsys)
    torch.save({"weights": 1}, path)
    assert "is not a checkpoint of a run" in refused(stages, root, capsys)


def test_a_checkpoint_from_elsewhere_is_refused(
    stages: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = begun / "checkpoints" / "last.ckpt"

    def line(command: str, given: str, *more: str) -> str:
        arguments = policy_arguments(stages, tmp_path / "run", *more, callbacks())
        assert main([command, *arguments, "--ckpt_path", given]) == 2
        assert not (tmp_path / "run").exists()
        (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("hcrlhf: ")]
        return error

    assert re.search("does not lie in .*run/checkpoints, so", line("fit", str(checkpoint)))
    assert "missing.ckpt does not exist" in line("fit", "missing.ckpt")
    assert "does not exist" in line("fit", "best")
    # To go on needs no checkpoint yet, to measure does: an untrained policy is not meant.
    assert "callbacks.Checkpoint writes it" in line("predict", "last")
    assert "lora of the original run" in line(
        "predict", str(checkpoint), "--model.init_args.lora.r", "4"
    )
    with broken(__import__("lightning_modules").Preference, "training_step", 4):
        fit_stage(stages, "cost", tmp_path / "cost", *TWICE)
    other = tmp_path / "cost" / "checkpoints" / "last.ckpt"
    for command in ("predict", "test"):
        assert re.search(r"of another stage \(.*Preference → .*Policy\)", line(command, str(other)))


def test_a_finished_stage_is_not_trained_on(
    stages: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_stage(stages, "sft", unbroken / "sft", *TWICE, "--ckpt_path", "last") == 2
    assert "already holds a finished stage" in capsys.readouterr().err


def test_a_stage_that_is_not_finished_is_measured_from_its_checkpoint(
    stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "cost"
    assert fit_stage(stages, "cost", root, *TWICE) == PASSED
    (root / "hcrlhf.json").unlink()
    command = ["validate", *stage_arguments(stages, "cost", root), *TWICE]
    assert main([*command, "--ckpt_path", str(root / "checkpoints" / "last.ckpt")]) == PASSED
    assert "val/accuracy" in capsys.readouterr().out
    assert main(command) == 2
    assert "holds no finished cost stage and no --ckpt_path is given" in capsys.readouterr().err


def test_a_fit_goes_on_with_as_many_processes() -> None:
    from lightning_modules import Supervised

    fitting = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    module: Any = SimpleNamespace(trainer=fitting)
    with pytest.raises(InputError, match="of a fit with 2 processes, this one has 1"):
        Supervised.on_load_checkpoint(module, {"rng": [{}, {}]})
    fitting.state.fn = "validate"
    Supervised.on_load_checkpoint(module, {"rng": [{}, {}]})


def test_two_processes_that_are_killed_go_on_and_train_what_one_trains(
    stages: Path, tmp_path: Path
) -> None:
    kill = {"class_path": "breaking.Kill", "init_args": {"method": "training_step", "call": 4}}
    arguments = [*stage_arguments(stages, "cost", tmp_path / "two"), *TWICE]
    # Full batches alone, so that one process can make the same ones.
    arguments += ["--trainer.limit_train_batches", "2", "--trainer.devices", "2"]
    arguments += ["--trainer.strategy", "ddp", "--data.init_args.batch_size", "16"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hcrlhf", "fit", *arguments, *more],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
            capture_output=True,
            text=True,
        )

    killed = run(f"--trainer.callbacks={json.dumps([*EVERY, kill])}")
    assert killed.returncode == -signal.SIGKILL
    # One of them has too little memory, and makes its gradient in smaller passes.
    short = {"class_path": "breaking.Short", "init_args": {"rank": 1, "rows": 8}}
    finished = run(f"--trainer.callbacks={json.dumps([*EVERY, short])}", "--ckpt_path", "last")
    assert finished.returncode == PASSED, finished.stderr
    assert "out of memory in step" in finished.stderr and "is now 8" in finished.stderr
    more = ["--trainer.limit_train_batches", "2", "--data.init_args.batch_size", "32"]
    assert fit_stage(stages, "cost", tmp_path / "one", *TWICE, *more) == PASSED
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], atol=1e-5, rtol=1e-4)
