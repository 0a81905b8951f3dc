"""Every shipped config parses, with the classes and keys that it names."""

from pathlib import Path
from typing import Any

import pytest

from hcrlhf.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# A config that changes another one is given after it.
BASES = {
    ROOT / f"configs/demo/{name}.yaml": ROOT / "configs/demo/policy.yaml"
    for name in ("unconstrained", "rloo", "long")
}
BASES[ROOT / "configs/loggers/wandb.yaml"] = ROOT / "configs/demo/policy.yaml"
BASES[ROOT / "configs/large/rloo.yaml"] = ROOT / "configs/large/policy.yaml"
BASES |= dict.fromkeys((ROOT / "configs/models").glob("*.yaml"), ROOT / "configs/large/sft.yaml")
for kind, stage in (("sft", "sft"), ("pairs", "reward"), ("policy", "policy")):
    layers = (ROOT / "configs/cards").glob(f"*-{kind}.yaml")
    BASES |= dict.fromkeys(layers, ROOT / f"configs/large/{stage}.yaml")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_parses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [BASES[config], config] if config in BASES else [config]
    arguments = [argument for file in files for argument in ("--config", str(file))]
    assert main(["fit", *arguments, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "class_path: lightning_modules." in printed
    assert "class_path: datamodules." in printed


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_says_its_purpose_and_command_at_the_top(config: Path) -> None:
    head = config.read_text(encoding="utf-8").split("\n\n")[0].splitlines()[:3]
    assert head[0].startswith("# ")
    assert any("hcrlhf fit --config" in line for line in head)


@pytest.mark.parametrize("folder", ["cards", "large", "models"])
def test_every_config_of_a_large_model_says_where_the_licences_stand(folder: str) -> None:
    for config in sorted((ROOT / "configs" / folder).glob("*.yaml")):
        head = config.read_text(encoding="utf-8").split("\nmodel:")[0].lower()
        assert "licen" in head and "model" in head and "data" in head, config


def test_the_policy_configs_of_the_demo_end_with_a_safety_test() -> None:
    text = (ROOT / "configs/demo/policy.yaml").read_text(encoding="utf-8")
    assert "callbacks.SafetyTest" in text


def large(*files: str) -> Any:
    from hcrlhf.lightning_cli import parse

    paths = [ROOT / "configs" / f"{file}.yaml" for file in files]
    return parse([argument for path in paths for argument in ("--config", str(path))])


def foretold(shape: str, model: str, *files: str) -> int:
    """Peak bytes of a stage in 4 bits, of a model of which only the shape is needed."""
    from benchmarks.gpu import configuration
    from hcrlhf import doctor
    from hcrlhf.configured import base_of
    from hcrlhf.footprint import footprint

    sizes = doctor.sizes_of(large(*files), base_of(large(*files), large("large/sft", model)))
    assert (sizes.quantization, sizes.mixed, sizes.checkpointing) == ("nf4", True, True)
    assert sizes.width == 512
    return footprint(configuration(shape), sizes).peak


@pytest.mark.parametrize(
    ("card", "stage"),
    [
        *((8, stage) for stage in ("sft", "reward", "policy")),
        *((12, stage) for stage in ("sft", "cost", "policy", "rloo")),
        *((24, stage) for stage in ("sft", "reward", "policy")),
    ],
)
def test_large_configs_are_foretold_to_fit_their_card(card: int, stage: str) -> None:
    from hcrlhf.doctor import ALLOWANCE

    model = "models/llama-3.2-3b"  # the one that takes most
    layer = {"reward": "pairs"}.get(stage, stage)
    files = [*(["large/policy"] if stage == "rloo" else []), f"large/{stage}"]
    files += [model] if stage == "sft" else []
    files += [] if card == 12 else [f"cards/{card}gb-{layer}"]
    assert foretold("Llama-3.2-3B", model, *files) + ALLOWANCE < card * 2**30


@pytest.mark.parametrize("stage", ["reward", "policy"])
def test_a_model_of_3_billion_weights_stays_within_5_gib(stage: str) -> None:
    assert foretold("Qwen2.5-3B", "models/qwen2.5-3b", f"large/{stage}") <= 5 * 2**30


def test_one_more_role_takes_a_small_share_of_the_backbone() -> None:
    from benchmarks.gpu import roles

    shares = {row["role"]: row["share"] for row in roles("Qwen2.5-3B", rank=8)}
    limits = {"frozen": 0.03, "trained, adamw": 0.12, "trained, adamw_8bit": 0.08}
    assert all(shares[role] <= limit for role, limit in limits.items())
