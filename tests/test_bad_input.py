"""Bad input: one line, exit code 2, before any training, and nothing left behind."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import LightningModule

from hcrlhf.cli import CRASHED, PASSED, main
from hcrlhf.errors import InputError
from hcrlhf.lightning_cli import short_error
from lightning_modules import Policy, Preference, PreferenceClassifier, Supervised

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parent.parent
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs `fit` on a demo config with more arguments; gives the one line that it printed."""

    def run(config: str, *arguments: str) -> str:
        folder = tmp_path / "run"
        path = str(ROOT / "configs" / "demo" / f"{config}.yaml")
        root = ["--trainer.default_root_dir", str(folder)]
        assert main(["fit", "--config", path, *root, *arguments]) == 2
        assert not folder.exists(), "something was written"
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("hcrlhf: ")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.init_args.kl_coeficient", "1"], "unknown key.*did you mean 'kl_coefficient'"),
        (["--model.class_path", "lightning_modules.Polcy"], "did you mean.*Policy"),
        (["--trainer.callbacks+=callbacks.SaftyTest"], "did you mean 'callbacks.SafetyTest'"),
        (["--trainer.max_epoch", "3"], "unknown key.*did you mean 'max_epochs'"),
        (["--model.init_args.learning_rate", "fast"], "learning_rate: expected float, got fast"),
        (["--model.init_args.learning_rate", "-1"], "learning_rate is positive, got -1"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (
            ["--model.init_args.constraints=[{estimand: mean, threshold: 0, delta: 5}]"],
            r"lies in \(0, 1\), got 5",
        ),
        (
            ["--model.init_args.constraints=[{estimand: median, threshold: 0}]"],
            "'mean', 'harm_rate', 'cvar', got median",
        ),
        (["--model.init_args.constraints=[{estimand: mean, threshold: .inf}]"], "finite number"),
        (
            ["--model.init_args.constraints=[{estimand: harm_rate, threshold: 1.5}]"],
            r"lies in \(0, 1\), got 1.5",
        ),
        (
            [
                "--model.init_args.constraints="
                "[{estimand: harm_rate, threshold: 0.01, safety_prompts: 100}]"
            ],
            "at least 299 are needed",
        ),
        (["--trainer.precision", "16-true"], "use 32-true or bf16-mixed"),
        (["--trainer.precision", "bf16-true"], "use 32-true or bf16-mixed"),
        (["--trainer.precision", "16-mixed"], "use bf16-mixed or 32-true"),
        (
            ["--trainer.plugins=[{class_path: lightning.pytorch.plugins.HalfPrecision}]"],
            "use 32-true or bf16-mixed",
        ),
        (
            [
                "--trainer.plugins=[{class_path: lightning.pytorch.plugins.BitsandbytesPrecision, "
                "init_args: {mode: nf4}}]"
            ],
            "quantise the adapters too.*set quantization: nf4 on the module",
        ),
        (["--trainer.strategy", "fsdp"], "trainer: The strategy `fsdp` requires a GPU"),
        (["--trainer.max_epochs", "2"], "one epoch is the whole run.*data.init_args.updates"),
        (["--trainer.max_epochs", "null"], "set trainer.max_epochs: 1"),
        (["--model.init_args.decoding={top_k: 50}"], "no key 'top_k': .* full softmax.* remove it"),
        (["--model.init_args.decoding.top_p", "0.9"], "no key 'top_p': .* full softmax"),
        (
            ["--model.init_args.decoding={temperature: 1, repetition_penalty: 1.2}"],
            "no key 'repetition_penalty': .*generation_config.json draw likewise",
        ),
        (
            ["--model.init_args.decoding={max_new_tokens: 64}"],
            "chat.max_response_tokens of the supervised stage",
        ),
        (["--trainer.max_steps", "7"], "would count optimizer steps"),
        (["--trainer.gradient_clip_val", "1"], "set model.init_args.max_grad_norm"),
        (["--trainer.accumulate_grad_batches", "2"], "set model.init_args.micro_batch_size"),
        (["--data.init_args.train", "missing.jsonl"], "missing.jsonl does not exist.*hcrlhf split"),
        (["--trainer.default_root_dir="], "default_root_dir"),
    ],
)
def test_a_policy_config_with_a_mistake_is_refused(
    refused: Refused, arguments: list[str], expected: str, tmp_path: Path
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p {i}"}) + "\n" for i in range(99)))
    files = ["--data.init_args.train", str(data)]
    for name in ("validation", "safety", "evaluation"):
        other = tmp_path / f"{name}.jsonl"
        other.write_text(json.dumps({"prompt": f"one for {name}"}) + "\n")
        files += [f"--data.init_args.{name}", str(other)]
    assert re.search(expected, refused("policy", *files, *arguments))


def test_a_missing_model_folder_is_refused(refused: Refused, tmp_path: Path) -> None:
    data = tmp_path / "x.jsonl"
    rows = [{"prompt": f"p {i}", "response": "r"} for i in range(200)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refused(
        "sft",
        *("--data.init_args.path", str(data)),
        *("--model.init_args.model", str(tmp_path / "nowhere")),
    )
    assert "nowhere" in line


def test_a_reward_model_is_not_trained_on_safety_labels(refused: Refused) -> None:
    line = refused("reward", "--data.init_args.label", "safer")
    assert "a reward model learns from label: better, got label: safer" in line


def test_a_stage_that_does_not_exist_is_named_with_its_slot(
    refused: Refused, tmp_path: Path
) -> None:
    data = tmp_path / "x.jsonl"
    row = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0}
    rows = [row | {"prompt": f"p {i}"} for i in range(99)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    line = refused(
        "reward",
        *("--data.init_args.path", str(data)),
        *("--model.init_args.sft", str(tmp_path / "no-stage")),
    )
    assert re.search("sft: .*no-stage holds no hcrlhf.json; expected .* finished sft stage", line)


def test_an_unknown_command_is_refused_with_a_suggestion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fitt"]) == 2
    assert "did you mean 'fit'" in capsys.readouterr().err
    assert main([]) == 2


def test_the_world_is_not_written_over_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").write_text("x")
    assert main(["world", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_parser_message_of_many_lines_becomes_one() -> None:
    message = (
        'Parser key "model":\n  Does not validate against any of the Union subtypes\n'
        "  Errors:\n    - Parser key \"rate\":\n        Expected a <class 'float'>. Got value: x\n"
        "    - Expected a <class 'NoneType'>\n  Given value: Namespace(a=1)"
    )
    assert short_error(message) == "model.rate: expected float, got x"


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
@pytest.mark.parametrize("module", [Supervised, Preference, PreferenceClassifier, Policy])
def test_strategies_that_split_weights_are_refused(module: Any, strategy: str) -> None:
    # A stand-in: the real strategies refuse a machine without a GPU before we are asked.
    stub = module.__new__(module)
    LightningModule.__init__(stub)
    stub._trainer = SimpleNamespace(strategy=type(strategy, (), {})(), world_size=2)
    with pytest.raises(InputError, match=f"{strategy} would split.*set trainer.strategy: ddp"):
        stub.setup("fit")


def test_a_reader_that_has_gone_gets_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` has, once it has seen enough
    command = [sys.executable, "-m", "hcrlhf", "power", "--gap", "0.25", "--n", "500"]
    ends = ["--lower", "-4", "--upper", "4"]
    process = subprocess.run([*command, *ends], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (process.returncode, process.stderr) == (CRASHED, b"")


def test_code_that_leaves_with_zero_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from hcrlhf import cli

    monkeypatch.setattr(cli, "run_trainer", lambda arguments: sys.exit(0))
    assert main(["fit", "--config", "run.yaml"]) == CRASHED
    assert main(["fit", "--print_config"]) == main(["fit", "--model.help", "Policy"]) == PASSED


@pytest.mark.parametrize("command", ["world", "export", "split"])
def test_a_file_where_a_folder_is_expected_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "adapter_model.safetensors").write_text("")
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n')
    for target in ("file", "file/below", "x" * 300):
        folder = str(tmp_path / target)
        arguments = {
            "world": [folder],
            "export": [str(tmp_path), folder],
            "split": [str(tmp_path / "x.jsonl"), "--out", folder],
        }[command]
        assert main([command, *arguments]) == 2
        assert re.search("is a file|is not empty|too long", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seed_everything", "-1"], r"seed_everything lies in \[0, 2\^32\), got -1"),
        (["--trainer.precision", "transformer-engine"], "trainer: .*transformer_engine"),
        (["--trainer.max_epochs", "0"], "trainer.max_epochs is 0, so fit would do nothing"),
        (["--trainer.limit_train_batches", "0"], "limit_train_batches is 0"),
        (["--model.init_args.weight_decay", "-1"], "weight_decay is not negative, got -1"),
        (["--model.init_args.learning_rate", ".inf"], "learning_rate is positive, got inf"),
        (["--data.init_args.batch_size", str(10**23)], "whole number from 1 to"),
    ],
)
def test_a_setting_that_no_stage_can_use_is_refused(
    refused: Refused, arguments: list[str], expected: str
) -> None:
    assert re.search(expected, refused("sft", *arguments))


@pytest.mark.parametrize("name", ["sign_weight", "penalty"])
def test_a_negative_weight_of_the_loss_is_refused(refused: Refused, name: str) -> None:
    assert f"{name} is not negative" in refused("cost", f"--model.init_args.{name}=-1")


def test_of_several_configs_the_one_that_is_no_yaml_is_named_with_its_place(
    refused: Refused, tmp_path: Path
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("data:\n  init_args: {updates: 3\n")
    for given in ([f"--config={path}"], ["--config", str(path)]):
        assert f"{path}, line 3, column 1: not YAML (" in refused("policy", *given)


def test_a_config_that_is_no_text_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"model: \xe1\xff")
    assert main(["fit", "--config", str(path)]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err
