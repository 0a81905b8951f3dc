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


def test_the_policy_configs_of_the_demo_end_with_a_safety_test() -> None:
    text = (ROOT / "configs/demo/policy.yaml").read_text(encoding="utf-8")
    assert "callbacks.SafetyTest" in text


@pytest.mark.parametrize(
    ("card", "names"), [(8, "reward"), (8, "policy"), (12, "policy"), (24, "policy")]
)
def test_large_configs_are_foretold_to_fit_their_card(card: int, names: str) -> None:
    from transformers import LlamaConfig

    from hcrlhf import doctor
    from hcrlhf.footprint import footprint
    from hcrlhf.lightning_cli import parse

    def read(*files: str) -> Any:
        paths = [ROOT / "configs" / f"{file}.yaml" for file in files]
        return parse([argument for path in paths for argument in ("--config", str(path))])

    # The shapes of Llama-3.2-3B, which takes most; its weights are not needed.
    own = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    layer = {"policy": "policy"}.get(names, "pairs")
    config = read(f"large/{names}", *([] if card == 12 else [f"cards/{card}gb-{layer}"]))
    sft = read("large/sft", "models/llama-3.2-3b")
    sizes = doctor.sizes_of(config, doctor.base_of(config, sft))
    assert (sizes.quantization, sizes.mixed, sizes.checkpointing) == ("nf4", True, True)
    assert sizes.width == 512
    assert footprint(own, sizes).peak + doctor.ALLOWANCE < card * 2**30
