"""External scorers: what they are refused for, and whole policy runs with them."""

import asyncio
import copy
import importlib
import json
import math
import shutil
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hcrlhf.classifier import Classifier
from hcrlhf.cli import INTERRUPTED, NO_SOLUTION, PASSED, main
from hcrlhf.constraint import Constraint
from hcrlhf.demo import CONFIGS
from hcrlhf.errors import InputError
from hcrlhf.examples import Message, prompt_key, user_turn
from hcrlhf.hashing import file_sha256
from hcrlhf.resume import source_identity
from hcrlhf.scorers import PythonScorer, Scorer, SequenceClassifier, measured_moments
from hcrlhf.stages import fingerprint, read_classifier_stage, read_stage, write_classifier_stage
from hcrlhf.world import ModelSizes, WorldSizes, write_world

pytestmark = pytest.mark.filterwarnings("ignore")

HERE = __name__
SIZES = WorldSizes(
    demonstrations=60,
    preferences=40,
    train=24,
    validation=8,
    safety=30,
    evaluation=4,
    model=ModelSizes(hidden=32, layers=1, intermediate=32),
)


# -- functions that a config may name --------------------------------------------------------------


def length(prompts: list[Any], responses: list[str]) -> list[int]:
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [len(response) for response in responses]


def one_number(prompts: list[Any], responses: list[str]) -> float:
    return 1.0


def column(prompts: list[Any], responses: list[str]) -> Any:
    return np.zeros((len(responses), 1))


def words(prompts: list[Any], responses: list[str]) -> list[str]:
    return list(responses)


def nothing(prompts: list[Any], responses: list[str]) -> None:
    return None


def nan(prompts: list[Any], responses: list[str]) -> list[float]:
    return [math.nan] * len(responses)


def leaving(prompts: Any, responses: Any) -> Any:
    sys.exit(0)


def raising(prompts: list[Any], responses: list[str]) -> list[float]:
    raise KeyError("no such\nword")


def telling(prompts: list[Any], responses: list[str]) -> Any:
    raise ValueError(f"cannot score {responses[0]} to {prompts[0][-1]['content']}")


def refusing(prompts: list[Any], responses: list[str]) -> Any:
    raise InputError(f"cannot score {responses[0]} to {prompts[0][-1]['content']}")


def chained(prompts: list[Any], responses: list[str]) -> Any:
    raise InputError(f"cannot score {responses[0]}") from ValueError("never raised")


def cancelled(prompts: list[Any], responses: list[str]) -> Any:
    raise asyncio.CancelledError(f"cannot score {responses[0]}")


def same(prompts: list[Any], responses: list[str]) -> list[float]:
    return [1.0] * len(responses)


def mild(prompts: list[Any], responses: list[str]) -> Any:
    """A torch tensor of costs that any policy keeps below 1."""
    return torch.tensor([0.001 * len(response) for response in responses])


def greedy(prompts: list[Any], responses: list[str]) -> list[int]:
    prompts.clear()
    responses.clear()
    return [1, 2]


def ranked(prompts: list[Any], responses: list[str]) -> Any:
    return np.argsort(np.argsort([len(response) for response in responses])) / len(responses)


def chance(prompts: list[Any], responses: list[str]) -> Any:
    return np.random.default_rng().normal(size=len(responses))


def half(prompts: list[Any], responses: list[str]) -> Any:
    """As a model in half precision, which padding moves by its last digits."""
    return [len(r) * (1 + 0.01 * len(responses)) for r in responses]


NOT_A_FUNCTION = 3


# -- alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_number", r"one_number gave scores of shape \(\) for 2 responses; expected \(2,\)"),
        ("column", r"column gave scores of shape \(2, 1\) for 2"),
        ("words", "words did not give numbers .*expected 2 scores"),
        ("nothing", "nothing did not give numbers"),
        ("nan", r"nan gave \[nan, nan\] for two short responses; expected finite numbers"),
        ("raising", rf"cost: {HERE}.raising raised KeyError: 'no such.*word'$"),
        ("leaving", rf"cost: {HERE}.leaving raised SystemExit: 0$"),
        ("ranked", r"gave \[0.5, 0.0\] for two .* but \[0.0, 0.0\] for each alone"),
        ("chance", "a score may depend neither on what else is in the batch nor on chance"),
    ],
)
def test_a_function_that_does_not_score_is_refused_before_training(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        PythonScorer(f"{HERE}.{name}").prepare("cost")
    assert "\n" not in str(caught.value)
    assert f"{HERE}.{name}" in str(caught.value)


def test_a_score_may_differ_by_rounding_from_one_batch_to_another() -> None:
    PythonScorer(f"{HERE}.half").prepare("cost")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("length", "expected package.module.f, got 'length'"),
        (f"{HERE}.missing", r"cannot be imported \(AttributeError"),
        ("no.such.module", r"cannot be imported \(ModuleNotFoundError"),
        (f"{HERE}.NOT_A_FUNCTION", "is a int, expected a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PythonScorer(path).prepare("reward")


def test_what_a_function_does_to_its_arguments_stays_with_it() -> None:
    prompts = [user_turn("a"), user_turn("b")]
    responses = ["x", "y"]
    assert PythonScorer(f"{HERE}.greedy").checked(prompts, responses).tolist() == [1.0, 2.0]
    assert (len(prompts), responses) == (2, ["x", "y"])


def test_later_a_scorer_that_breaks_is_named_and_nan_is_left_to_the_caller() -> None:
    with pytest.raises(RuntimeError, match=f"{HERE}.raising raised KeyError"):
        PythonScorer(f"{HERE}.raising").checked([user_turn("a")], ["x"])
    assert np.isnan(PythonScorer(f"{HERE}.nan").checked([user_turn("a")], ["x"])).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("telling", "ValueError in test_scorers.py, line "),
        ("refusing", "InputError in test_scorers.py, line "),
        ("words", "TypeError in scorers.py, line "),
        ("leaving", "SystemExit in test_scorers.py, line "),
        ("chained", "InputError in test_scorers.py, line "),
        ("cancelled", "CancelledError in test_scorers.py, line "),
    ],
)
def test_of_a_scorer_that_fails_on_safety_prompts_only_the_kind_is_said(
    name: str, kind: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        PythonScorer(f"{HERE}.{name}").checked([user_turn("secret")], ["answer"], sealed=True)
    shown = "".join(traceback.format_exception(caught.value))
    assert kind in shown and f"{HERE}.{name} could not score responses to safety prompts" in shown
    # The source lines of a traceback are code, in which neither word stands.
    assert "cannot score" not in str(caught.value)
    assert caught.value.__context__ is caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": 1.0}, "mean and std of a scorer are given together"),
        ({"mean": 1.0, "std": 0.0}, "std of a scorer is positive"),
        ({"squash": -1.0}, "squash is the positive cap of a cost model, got -1.0"),
        ({"lower": 0.0}, "lower and upper together; got lower 0.0, upper None and squash None"),
        ({"lower": 0.0, "upper": 1.0, "squash": 1.0}, "has a squash, or a range of its own"),
        ({"lower": 1.0, "upper": 1.0}, r"range of a scorer is lower < upper, got \[1.0, 1.0\]"),
        ({"lower": 0.0, "upper": math.inf}, r"is lower < upper, got \[0.0, inf\]"),
        ({"lower": math.nan, "upper": 1.0}, r"is lower < upper, got \[nan, 1.0\]"),
    ],
)
def test_moments_and_squash_out_of_range_are_refused(
    options: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        PythonScorer(f"{HERE}.length", **options)


def test_a_reward_is_not_squashed() -> None:
    scorer = PythonScorer(f"{HERE}.length", squash=2.0)
    scorer.prepare("cost")
    with pytest.raises(InputError, match=r"got 2.0 for a reward model"):
        scorer.prepare("reward")


def test_a_cost_is_not_standardised() -> None:
    scorer = PythonScorer(f"{HERE}.length", mean=0.0, std=2.0)
    scorer.prepare("reward")
    with pytest.raises(InputError, match="cost: mean and std of .*length standardise a reward"):
        scorer.prepare("cost")


class Multiplies(Scorer):
    """A scorer with a layer of its own, as a training step would find it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[torch.dtype, bool]] = []

    def scores(self, prompts: Sequence[Any], responses: Sequence[str]) -> Any:
        lengths = torch.tensor([[float(len(response))] for response in responses])
        scores = self.layer(lengths)[:, 0]
        self.seen.append((scores.dtype, scores.requires_grad))
        return scores.detach().double().numpy()


def test_a_scorer_gives_the_same_scores_in_a_training_step_as_in_a_safety_test() -> None:
    scorer, texts = Multiplies(), ["a" * 3, "b" * 7]
    alone = scorer.checked([user_turn("a")] * 2, texts)
    with torch.autocast("cpu", torch.bfloat16):
        assert scorer.checked([user_turn("a")] * 2, texts).tolist() == alone.tolist()
    assert scorer.seen == [(torch.float32, False)] * 2


def test_a_cost_that_declares_its_range_keeps_to_it() -> None:
    scorer = PythonScorer(f"{HERE}.length", lower=0.0, upper=20.0)
    scorer.prepare("cost")
    assert scorer.cost_range == (0.0, 20.0)
    assert PythonScorer(f"{HERE}.length", squash=2.0).cost_range == (-2.0, 2.0)
    assert PythonScorer(f"{HERE}.length").cost_range is None
    prompts = [user_turn("a"), user_turn("b")]
    assert scorer.checked(prompts, ["x" * 20, ""]).tolist() == [20.0, 0.0]
    outside = scorer.checked(prompts, ["x" * 21, ""])  # named, but not where costs are sealed
    with pytest.raises(RuntimeError, match=r"gave 21.0, outside of the range \[0.0, 20.0\]"):
        scorer.require_range(outside)
    short = PythonScorer(f"{HERE}.length", lower=0.0, upper=3.0)
    with pytest.raises(InputError, match="cost: .*length gave 13.0, outside of the range"):
        short.prepare("cost")
    with pytest.raises(InputError, match="reward: lower and upper of .*length are for a cost"):
        scorer.prepare("reward")
    # What is not a number is for the caller to refuse, and rounding is not a broken promise.
    rounded = PythonScorer(f"{HERE}.float32_ends", lower=-0.9, upper=0.1)
    rounded.prepare("cost")
    assert rounded.checked(prompts, ["", "a"]).tolist() == [0.1, float(np.float32(-0.9))]
    nan = PythonScorer(f"{HERE}.nan", lower=0.0, upper=1.0)
    assert np.isnan(nan.checked([user_turn("a")], ["x"])).all()


def test_the_moments_of_the_first_rollout_by_hand() -> None:
    moments = measured_moments(np.array([1.0, 2.0, 6.0]), "x")
    assert (moments.mean, moments.std, moments.count) == (3.0, pytest.approx(math.sqrt(7)), 3)
    with pytest.raises(InputError, match="x gave all 2 responses of the first rollout the same"):
        measured_moments(np.array([1.0, 1.0]), "x")
    with pytest.raises(FloatingPointError, match="x gave a score that is not finite"):
        measured_moments(np.array([1.0, math.inf]), "x")


def test_the_certificate_names_the_function_and_the_hash_of_its_file() -> None:
    record = PythonScorer(f"{HERE}.length", squash=2.0).provenance()
    assert record == {
        "class_path": "hcrlhf.scorers.PythonScorer",
        "function": f"{HERE}.length",
        "source": file_sha256(Path(__file__)),
        "squash": 2.0,
        "range": [-2.0, 2.0],
    }
    with pytest.raises(InputError, match="has no source file"):
        PythonScorer("operator.add").provenance()


class Constant(Scorer):
    """A subclass as a user writes it: `scores` alone."""

    def scores(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str]
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.full(len(responses), 2.0)


def test_a_scorer_of_ones_own_needs_scores_alone() -> None:
    scorer = Constant()
    scorer.prepare("cost")
    record = scorer.provenance()
    assert record["class_path"] == f"{HERE}.Constant"
    assert record["source"] == file_sha256(Path(__file__))


# -- classifiers -----------------------------------------------------------------------------------


def test_a_classifier_scores_a_text_alike_alone_and_in_any_batch(encoder_folder: Path) -> None:
    responses = ["yes", "no, not at all, never", "", "perhaps"]
    prompts = [user_turn(f"question {i}?") for i in range(4)]
    scorer = SequenceClassifier(str(encoder_folder), batch_size=3)
    together = scorer.checked(prompts, responses)
    alone = [scorer.checked([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together.dtype == np.float64
    assert len(set(together.round(3))) == 4


def test_a_long_text_is_warned_of_once(encoder_folder: Path) -> None:
    scorer = SequenceClassifier(str(encoder_folder), max_tokens=16)
    long = [user_turn("a long prompt it is")], ["yes"]
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than 16 tokens"):
        scorer.checked(*long)
    scorer.checked(*long)


def classifier_stage(folder: Path, source: Path, role: Any = "cost", **options: Any) -> Path:
    """The folder that training would leave, without the training."""
    from hcrlhf.stages import ClassifierStage, ScoreMoments

    shutil.copytree(source, folder)
    stage = ClassifierStage(
        role, fingerprint(str(folder)), 48, moments=ScoreMoments(0.5, 2.0, 10), **options
    )
    write_classifier_stage(folder, stage, ["f" * 64])
    return folder


def test_a_trained_classifier_brings_its_settings(encoder_folder: Path, tmp_path: Path) -> None:
    reward = classifier_stage(tmp_path / "r", encoder_folder, "reward")
    scorer = SequenceClassifier(str(reward))
    scorer.prepare("reward")
    assert scorer.moments is not None
    assert (scorer.moments.mean, scorer.moments.std) == (0.5, 2.0)
    assert scorer.classifier.max_tokens == 48
    assert scorer.training_prompt_keys() == {"f" * 32}
    cost = classifier_stage(tmp_path / "c", encoder_folder, squash=3.0, sign_weight=0.0)
    scorer = SequenceClassifier(str(cost))
    scorer.prepare("cost")
    assert (scorer.squash, scorer.arbitrary_zero, scorer.moments) == (3.0, True, None)
    record = scorer.provenance()
    assert record["weights"] == fingerprint(str(cost))
    assert (record["max_tokens"], record["squash"]) == (48, 3.0)


def test_an_adapter_stage_is_no_classifier_and_a_plain_folder_has_no_stage(
    encoder_folder: Path, tmp_path: Path
) -> None:
    assert read_classifier_stage(str(encoder_folder), "reward", "reward") is None
    (tmp_path / "hcrlhf.json").write_text('{"format": 1, "role": "reward"}')
    with pytest.raises(InputError, match="is a stage on the shared backbone; write reward: /"):
        SequenceClassifier(str(tmp_path)).prepare("reward")


def test_a_classifier_in_the_wrong_slot_or_with_other_weights_is_refused(
    encoder_folder: Path, tmp_path: Path
) -> None:
    folder = classifier_stage(tmp_path / "c", encoder_folder)
    with pytest.raises(InputError, match="is a cost model; expected a reward model there"):
        SequenceClassifier(str(folder)).prepare("reward")
    with pytest.raises(InputError, match=r"write cost: \{class_path: hcrlhf.scorers.Sequence"):
        read_stage(str(folder), "cost", "cost")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(InputError, match="not those that its moments were measured with"):
        SequenceClassifier(str(folder)).prepare("cost")


# -- in a policy -----------------------------------------------------------------------------------


def policy(reward: Any = "reward", cost: Any = "cost", **options: Any) -> Any:
    from lightning_modules.policy import Policy

    return Policy("sft", reward, cost, [Constraint("mean", 0.0)], **options)


def test_a_score_that_is_not_finite_stops_training_and_names_the_scorer() -> None:
    from tests.test_rloo import rollout_of

    rollout = rollout_of(["a", "b"], [[0.0]] * 2, [1, 1])
    module = policy(PythonScorer(f"{HERE}.length"), PythonScorer(f"{HERE}.nan"))
    bad = torch.tensor([math.nan, 1.0])
    with pytest.raises(FloatingPointError, match=rf"the reward \({HERE}.length\) gave a score"):
        module._constrain(replace(rollout, rewards=bad))
    with pytest.raises(FloatingPointError, match=rf"the cost \({HERE}.nan\) gave a score"):
        module._constrain(replace(rollout, costs=bad.double().numpy()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Path:
    """A small world, its supervised stage, and an encoder trained on it as a cost model."""
    folder = tmp_path_factory.mktemp("runs")
    write_world(folder / "world", 0, SIZES)
    sft = ["--config", str(CONFIGS / "sft.yaml"), "--trainer.max_epochs", "1"]
    sft += ["--model.init_args.model", str(folder / "world" / "model")]
    sft += ["--data.init_args.path", str(folder / "world" / "demonstrations.jsonl")]
    assert main(["fit", *sft, "--trainer.default_root_dir", str(folder / "sft")]) == PASSED
    assert fit_encoder(folder, encoder_folder, "cost", "--model.init_args.squash", "4") == PASSED
    return folder


def fit_encoder(runs: Path, encoder: Path, role: str, *more: str) -> int:
    arguments = ["--config", str(CONFIGS / f"{role}.yaml"), "--trainer.default_root_dir"]
    model = {
        "class_path": "lightning_modules.PreferenceClassifier",
        "init_args": {"role": role, "model": str(encoder), "learning_rate": 1e-3},
    }
    arguments += [str(runs / role), f"--model={json.dumps(model)}"]
    arguments += ["--data.init_args.path", str(runs / "world" / "preferences.jsonl")]
    return main(["fit", *arguments, *more])


def test_a_classifier_that_runs_out_of_memory_says_which_keys_to_change(
    runs: Path,
    encoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_much(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Classifier, "forward", too_much)
    root = ["--trainer.default_root_dir", str(tmp_path / "run")]
    assert fit_encoder(runs, encoder_folder, "cost", *root) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("hcrlhf: ")]
    assert "CUDA out of memory" in line and "data.init_args.batch_size" in line


def policy_arguments(runs: Path, root: Path, reward: Any, cost: Any, *more: str) -> list[str]:
    arguments = ["--config", str(CONFIGS / "policy.yaml"), "--trainer.default_root_dir", str(root)]
    arguments += ["--model.init_args.sft", str(runs / "sft")]
    for slot, value in (("reward", reward), ("cost", cost)):
        arguments.append(f"--model.init_args.{slot}={json.dumps(value)}")
    for split in ("train", "validation", "safety", "evaluation"):
        path = runs / "world" / "prompts" / f"{split}.jsonl"
        arguments += [f"--data.init_args.{split}", str(path)]
    arguments += ["--data.init_args.prompts_per_update", "8", "--data.init_args.updates", "3"]
    learner = "--model.init_args.learner.init_args"
    arguments += [f"{learner}.epochs=2", f"{learner}.minibatches=2"]
    limit = "[{estimand: mean, threshold: 3.9, safety_prompts: 30}]"
    return [*arguments, f"--model.init_args.constraints={limit}", *more]


def python(name: str, **options: Any) -> dict[str, Any]:
    init = {"function": f"{HERE}.{name}", **options}
    return {"class_path": "hcrlhf.scorers.PythonScorer", "init_args": init}


def encoder_cost(runs: Path) -> dict[str, Any]:
    init = {"model": str(runs / "cost")}
    return {"class_path": "hcrlhf.scorers.SequenceClassifier", "init_args": init}


def callbacks(**options: Any) -> str:
    test = {"class_path": "callbacks.SafetyTest", "init_args": {"candidate_check": False}}
    every = {"class_path": "callbacks.Checkpoint", "init_args": {"every_n_updates": 1}}
    return f"--trainer.callbacks={json.dumps([every, test])}"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def float32_ends(prompts: list[Any], responses: list[str]) -> np.ndarray:
    """Ends of [-0.9, 0.1] as float32 arithmetic gives them: 1 - 0.9 is 0.100000024.

    The upper one is that of a response without an a.
    """
    high = ["a" not in response for response in responses]
    return np.array(high, np.float32) - np.float32(0.9)


def briefness(prompts: list[Any], responses: list[str]) -> list[float]:
    """A cost in [-1, 0] by itself: nearer to 0 the shorter the response."""
    return [-min(len(response), 200) / 200 for response in responses]


def test_a_cost_with_a_range_of_its_own_is_bounded_exactly_and_nothing_is_said_of_a_squash(
    runs: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run" / "policy"
    cost = python("briefness", lower=-1.0, upper=0.0)
    limit = "[{estimand: mean, threshold: -0.001, safety_prompts: 30, delta: 0.2}]"
    arguments = policy_arguments(runs, root, python("length"), cost, callbacks())
    arguments.append(f"--model.init_args.constraints={limit}")
    assert main(["fit", *arguments]) == PASSED
    record = read(root / "certificate.json")
    (bound,) = record["bounds"]
    assert (bound["bound"], bound["lower"], bound["upper"]) == ("betting", -1.0, 0.0)
    assert (bound["class"], record["claim"]["class"]) == ("exact", "exact")
    assert "squash" not in record["claim"]["not_covered"]
    provenance = record["plan"]["provenance"]
    assert provenance["squash"] is None and provenance["cost_model"]["range"] == [-1.0, 0.0]
    responses = [json.loads(x) for x in (root / "responses.jsonl").read_text().splitlines()]
    assert [r["cost"] for r in responses] == briefness([], [r["response"] for r in responses])
    assert main(["verify", str(root / "certificate.json")]) == PASSED
    # The squash of a cost model is said, as before.
    record["plan"]["provenance"]["squash"] = 4.0
    (root / "certificate.json").write_text(json.dumps(record))
    assert main(["verify", str(root / "certificate.json")]) != PASSED


def test_a_cost_that_breaks_its_range_in_the_safety_test_is_refused_and_not_shown(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lightning_modules import Policy

    testing: list[bool] = []
    honest = Policy.sample_costs

    def marked(self: Any, *arguments: Any) -> Any:
        testing.append(True)
        return honest(self, *arguments)

    def leaving(prompts: list[Any], responses: list[str]) -> list[float]:
        return [-0.0314159 - 7 * bool(testing) for _ in responses]

    monkeypatch.setattr(Policy, "sample_costs", marked)
    monkeypatch.setitem(globals(), "briefness", leaving)
    root = tmp_path / "run" / "policy"
    limit = "[{estimand: mean, threshold: -0.001, safety_prompts: 30}]"
    cost = python("briefness", lower=-1.0, upper=0.0)
    arguments = policy_arguments(runs, root, python("length"), cost, callbacks())
    assert main(["fit", *arguments, f"--model.init_args.constraints={limit}"]) == 2
    said = capfd.readouterr()
    assert "a cost lies outside the range that its constraint declares" in said.err
    assert testing and "31415" not in said.err + said.out
    assert read(root / "verdict.json")["verdict"] == "NOT_TESTED"


def test_an_encoder_is_trained_and_measured_as_a_cost_model(runs: Path) -> None:
    stage = read_classifier_stage(str(runs / "cost"), "cost", "cost")
    assert stage is not None
    assert (stage.squash, stage.sign_weight, stage.max_tokens) == (4.0, 1.0, 64)
    assert stage.moments is not None and stage.moments.std > 0
    assert stage.calibration is not None
    assert {"accuracy", "sign_accuracy", "length_correlation"} <= stage.metrics.keys()
    from transformers import pipeline

    plain: Any = pipeline("text-classification", model=str(runs / "cost"), device="cpu")
    scorer = SequenceClassifier(str(runs / "cost"))
    (found,) = scorer.checked([user_turn("Hi?")], ["No."])
    pair = {"text": "Hi?", "text_pair": "No."}
    assert plain(pair, function_to_apply="none")["score"] == pytest.approx(found, abs=1e-4)


def test_a_finished_encoder_is_validated_as_it_was_saved(runs: Path, encoder_folder: Path) -> None:
    before = read(runs / "cost" / "hcrlhf.json")["metrics"]["accuracy"]
    arguments = ["--config", str(runs / "cost" / "config.yaml")]
    assert main(["validate", *arguments]) == PASSED
    assert main(["fit", *arguments]) == 2  # a finished stage is not trained over
    assert read(runs / "cost" / "hcrlhf.json")["metrics"]["accuracy"] == before


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_policy_is_trained_and_tested_with_an_external_reward_and_cost(
    runs: Path, tmp_path: Path, critic: str
) -> None:
    root = tmp_path / "run" / "policy"
    more = [callbacks(), "--model.init_args.learner.init_args.critic", critic]
    assert (
        main(["fit", *policy_arguments(runs, root, python("length"), encoder_cost(runs), *more)])
        == PASSED
    )
    certificate = read(root / "certificate.json")
    record = certificate["plan"]["provenance"]["cost_model"]
    assert record["class_path"] == "hcrlhf.scorers.SequenceClassifier"
    assert record["weights"] == fingerprint(str(runs / "cost"))
    responses = [json.loads(x) for x in (root / "responses.jsonl").read_text().splitlines()]
    costs = np.array(certificate["data"]["costs"])[:, 0]
    # What is certified is what the classifier itself says of these texts, squashed into [-4, 4].
    scorer = SequenceClassifier(str(runs / "cost"))
    again = scorer.checked(
        [user_turn(r["text"]) for r in responses], [r["response"] for r in responses]
    )
    np.testing.assert_allclose(costs, 4 * np.tanh(again / 4), atol=1e-4)
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    moments = state["policy"]["reward_moments"]
    assert moments["count"] == 8 and moments["std"] > 0
    assert not [name for name in state["state_dict"] if ".reward." in name or ".cost." in name]
    assert main(["verify", str(root / "certificate.json")]) == PASSED


def test_a_resumed_run_with_scorers_ends_with_the_weights_of_the_unbroken_one(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    whole, part = tmp_path / "whole" / "run", tmp_path / "part" / "run"
    scorers = python("length"), encoder_cost(runs)
    assert main(["fit", *policy_arguments(runs, whole, *scorers, callbacks())]) == PASSED
    honest = Policy.training_step

    def interrupted(self: Policy, batch: Any, batch_idx: int) -> None:
        if self.updates == 2:
            raise KeyboardInterrupt
        honest(self, batch, batch_idx)

    arguments = policy_arguments(runs, part, *scorers, callbacks())
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "training_step", interrupted)
        assert main(["fit", *arguments]) == INTERRUPTED
    assert main(["fit", *arguments, "--ckpt_path", "last"]) == PASSED
    name = "policy/adapter_model.safetensors"
    assert (part / name).read_bytes() == (whole / name).read_bytes()
    costs = [read(folder / "certificate.json")["data"]["costs"] for folder in (whole, part)]
    assert costs[0] == costs[1]


def test_a_scorer_that_gives_nan_in_the_safety_test_never_passes(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_modules import Policy

    honest, testing = Policy.sample_costs, []

    def marked(self: Policy, *arguments: Any) -> Any:
        testing.append(True)
        return honest(self, *arguments)

    def sometimes(prompts: list[Any], responses: list[str]) -> list[float]:
        return [math.nan if testing and i == 0 else 0.0 for i in range(len(responses))]

    def never_asked(prompts: list[Any], responses: list[str]) -> list[int]:
        assert not testing, "the reward has no business with safety prompts"
        return length(prompts, responses)

    monkeypatch.setattr(Policy, "sample_costs", marked)
    monkeypatch.setitem(globals(), "mild", sometimes)
    monkeypatch.setitem(globals(), "same", never_asked)
    root = tmp_path / "run" / "policy"
    arguments = policy_arguments(
        runs, root, python("same"), python("mild", squash=4.0), callbacks()
    )
    assert main(["fit", *arguments]) == NO_SOLUTION
    assert testing and not (root / "policy").exists()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (python("one_number"), f"reward: {HERE}.one_number gave scores of shape"),
        (python("nan"), "gave [nan, nan] for two short responses"),
        (python("raising"), "raised KeyError"),
        (python("missing"), "cannot be imported"),
        (python("length", mean=1.0), "are given together"),
        (python("length", men=1.0), "unknown key 'men' (did you mean 'mean'?)"),
        (
            {"class_path": "hcrlhf.scorers.PytonScorer", "init_args": {}},
            "did you mean 'hcrlhf.scorers.PythonScorer'?",
        ),
    ],
)
def test_a_scorer_that_cannot_work_is_refused_in_one_line_before_training(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reward: Any, message: str
) -> None:
    root = tmp_path / "run"
    cost = encoder_cost(runs)
    capsys.readouterr()
    assert main(["fit", *policy_arguments(runs, root, reward, cost)]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("hcrlhf: ")]
    assert message in line
    assert not root.exists()


def test_safety_prompts_that_an_external_cost_was_trained_on_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = ["--data.init_args.safety", str(runs / "world" / "preferences.jsonl")]
    arguments = policy_arguments(
        runs, tmp_path / "run", python("length"), encoder_cost(runs), *seen
    )
    assert main(["fit", *arguments]) == 2
    assert "safety prompts are also earlier stages' prompts" in capsys.readouterr().err


class Learned(Scorer):
    """A cost that reads what it was trained on together with its weights."""

    def __init__(self, file: str) -> None:
        super().__init__(lower=-1.0, upper=0.0)
        self.file = file
        self.keys: frozenset[str] = frozenset()

    def prepare(self, slot: Any) -> None:
        super().prepare(slot)
        self.keys = frozenset(
            prompt_key(user_turn(json.loads(row)["prompt"]))
            for row in Path(self.file).read_text().splitlines()
        )

    def training_prompt_keys(self) -> frozenset[str]:
        return self.keys

    def scores(self, prompts: Any, responses: Any) -> Any:
        return np.array(briefness(prompts, responses))


def test_safety_prompts_that_a_cost_knows_of_only_once_it_is_loaded_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = runs / "world" / "prompts"
    for seen, code in (("safety", 2), ("train", PASSED)):
        init = {"file": str(prompts / f"{seen}.jsonl")}
        cost = {"class_path": f"{HERE}.Learned", "init_args": init}
        limit = "[{estimand: mean, threshold: -0.001, safety_prompts: 30}]"
        root = tmp_path / seen / "run"
        arguments = policy_arguments(runs, root, python("length"), cost, callbacks())
        assert main(["fit", *arguments, f"--model.init_args.constraints={limit}"]) == code
    assert "safety prompts are also earlier stages' prompts" in capsys.readouterr().err
    assert not (tmp_path / "safety" / "run" / "verdict.json").exists()


def test_a_limit_about_a_zero_that_means_nothing_is_warned_of(runs: Path, tmp_path: Path) -> None:
    record = read(runs / "cost" / "hcrlhf.json") | {"sign_weight": 0.0}
    shutil.copytree(runs / "cost", tmp_path / "cost")
    (tmp_path / "cost" / "hcrlhf.json").write_text(json.dumps(record))

    def warnings_of(constraints: str) -> list[str]:
        limit = f"--model.init_args.constraints={constraints}"
        root = tmp_path / "run"
        arguments = policy_arguments(runs, root, python("length"), encoder_cost(tmp_path), limit)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main(["predict", *arguments]) == PASSED
        return [str(w.message) for w in caught if "sign_weight 0" in str(w.message)]

    (message,) = warnings_of("[{estimand: mean, threshold: 0.0, safety_prompts: 30}]")
    assert "its zero means nothing in particular" in message
    assert warnings_of("[{estimand: harm_rate, threshold: 0.9, safety_prompts: 30}]")
    assert not warnings_of("[{estimand: mean, threshold: 3.5, safety_prompts: 30}]")


# -- what the plan of a safety test says of a scorer -----------------------------------------------


class Scaled(Scorer):
    def __init__(self, factor: float, words: list[str]) -> None:
        super().__init__(squash=2.0)
        self.factor = factor

    def scores(self, prompts: Any, responses: Any) -> Any:
        return self.factor * np.array([len(r) for r in responses])


def test_a_scorer_with_other_arguments_is_another_one() -> None:
    one, other = Scaled(1.0, ["a"]), Scaled(-1.0, words=["a"])
    assert one.provenance() != other.provenance()
    assert one.provenance() == Scaled(1.0, ["a"]).provenance()
    assert copy.deepcopy(one).provenance() == one.provenance()
    json.dumps(Scaled(float("inf"), ["a"]).provenance(), allow_nan=False)
    assert "secret" not in json.dumps(Scaled(1.0, ["secret"]).provenance())  # others read the plan
    with pytest.raises(TypeError, match="words"):
        Scaled(1.0)  # type: ignore[call-arg]


class Mode(Enum):
    STRICT = 1
    MILD = 2


@dataclass
class Options:
    weights: Path


class Judging(Scorer):
    def __init__(self, given: Any) -> None:
        super().__init__()

    def scores(self, prompts: Any, responses: Any) -> Any:
        return np.zeros(len(responses))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Path("a.pt"), Path("b.pt")),
        (Mode.STRICT, Mode.MILD),
        (Options(Path("a.pt")), Options(Path("b.pt"))),
        (np.float32(1), np.float32(2)),
        ([Scaled(1.0, ["a"])], [Scaled(2.0, ["a"])]),
        (np.sum, np.mean),
    ],
    ids=lambda x: type(x).__name__,
)
def test_objects_are_told_apart_by_what_is_in_them(one: Any, other: Any) -> None:
    assert Judging(one).provenance() == Judging(copy.deepcopy(one)).provenance()
    assert Judging(one).provenance() != Judging(other).provenance()


def test_a_cost_that_was_given_an_object_of_unknown_contents_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot tell from others of their kind \(given is a obj"):
        Judging(object()).prepare("cost")
    with pytest.raises(InputError, match="given is a list"):
        Judging([1, object()]).prepare("cost")
    Judging(object()).prepare("reward")


def test_keys_that_are_none_are_refused_before_training() -> None:
    scorer = Judging(1)
    wrong = frozenset({"ab" * 16, "a prompt"})
    scorer.training_prompt_keys = lambda: wrong  # type: ignore[method-assign]
    with pytest.raises(InputError, match="gives something else than hcrlhf.examples.prompt_key"):
        scorer.prepare("reward")


def test_what_a_partial_holds_is_part_of_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    text = (
        "from functools import partial\n"
        "def f(sign, prompts, responses):\n    return [sign * len(r) for r in responses]\n"
        "cost = partial(f, %d)\n"
    )
    found = []
    for sign in (1, -1):
        (tmp_path / "partial_cost.py").write_text(text % sign)
        sys.modules.pop("partial_cost", None)
        importlib.invalidate_caches()
        scorer = PythonScorer("partial_cost.cost", squash=2.0)
        found.append((scorer.provenance()["source"], source_identity("partial_cost.cost")))
    assert None not in found[0] and not set(found[0]) & set(found[1])
    # A file that is edited while the run goes on is not the one that scores.
    (tmp_path / "partial_cost.py").write_text("")
    assert scorer.provenance()["source"] == found[1][0]
