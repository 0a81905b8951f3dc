"""Every shipped config parses, with the classes and keys that it names."""

from pathlib import Path

import pytest

from hcrlhf.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# A config that changes another one is given after it.
BASES = {
    ROOT / f"configs/demo/{name}.yaml": ROOT / "configs/demo/policy.yaml"
    for name in ("unconstrained", "rloo")
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


def test_the_policy_configs_of_the_demo_end_with_a_safety_test() -> None:
    text = (ROOT / "configs/demo/policy.yaml").read_text(encoding="utf-8")
    assert "callbacks.SafetyTest" in text
