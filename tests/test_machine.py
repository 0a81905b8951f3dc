"""What a machine or a model cannot do is said before a weight is read."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hcrlhf import backbone, doctor, machine
from hcrlhf.backbone import LoraOptions
from hcrlhf.cli import main
from hcrlhf.configured import base_of
from hcrlhf.errors import InputError
from hcrlhf.footprint import Sizes, footprint
from hcrlhf.stages import BackboneSource
from hcrlhf.text import ChatFormat

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def fit(
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """The line with which a supervised fit is refused, which reads no weights."""

    def weights(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were read")

    # Where they are used: a module that were imported now would keep what it found patched.
    monkeypatch.setattr("lightning_modules.adapter_module.load_causal_lm", weights)
    monkeypatch.setattr("lightning_modules.supervised.fingerprint", weights)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}", "response": "b"}}\n' for i in range(60)))

    def refused(*more: str) -> str:
        arguments = ["fit", "--config", str(ROOT / "configs/demo/sft.yaml")]
        arguments += ["--model.init_args.model", str(model_folder)]
        arguments += ["--data.init_args.path", str(data)]
        arguments += ["--trainer.default_root_dir", str(tmp_path / "run"), *more]
        assert main(arguments) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("hcrlhf: ")]
        return line

    return refused


FOUR_BITS = ("--model.init_args.quantization", "nf4", "--model.init_args.lora={r: 4}")


def test_4_bits_without_bitsandbytes(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    assert "quantization nf4 needs bitsandbytes" in fit(*FOUR_BITS)


def test_4_bits_with_a_bitsandbytes_that_has_no_library_for_the_device(
    fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.nn import Linear4bit

    def missing(*arguments: Any) -> None:
        raise RuntimeError("CUDA version mismatch.\nlibbitsandbytes_cuda130.so: not found")

    monkeypatch.setattr(Linear4bit, "to", missing)
    line = fit(*FOUR_BITS)
    assert "bitsandbytes does not work on cpu (CUDA version mismatch. libbits" in line
    assert "or set quantization: none" in line


def test_an_8_bit_optimizer_without_bitsandbytes(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    line = fit("--model.init_args.optimizer", "adamw_8bit")
    assert "optimizer adamw_8bit needs bitsandbytes" in line


def test_an_8_bit_optimizer_with_a_bitsandbytes_that_has_no_library_for_the_device(
    fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes import functional

    def missing(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no library")

    monkeypatch.setattr(functional, "optimizer_update_8bit_blockwise", missing)
    line = fit("--model.init_args.optimizer", "adamw_8bit")
    assert "bitsandbytes does not work on cpu (no library)" in line
    assert "or set optimizer: adamw" in line


def test_texts_that_are_longer_than_the_model_reads(
    fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "learnt_positions", lambda config: True)
    line = fit("--model.init_args.chat.max_prompt_tokens", "600")
    assert "chat.max_prompt_tokens 600 and max_response_tokens" in line
    assert "and the model has 512 positions" in line


def test_positions_are_those_that_a_model_says_it_has() -> None:
    from transformers import BloomConfig, FalconConfig, GPT2Config, LlamaConfig

    machine.require_positions(GPT2Config(n_positions=64), ChatFormat(32, 32))
    machine.require_positions(BloomConfig(), ChatFormat(10**6, 10**6))  # ALiBi: without an end
    machine.require_positions(FalconConfig(alibi=True), ChatFormat(10**6, 10**6))
    with pytest.raises(InputError, match="of up to 65 tokens, and the model has 64 positions"):
        machine.require_positions(GPT2Config(n_positions=64), ChatFormat(33, 32))
    # Angles go on behind the last position that was trained.
    with pytest.warns(UserWarning, match="has 64 positions .*, or expect worse responses"):
        machine.require_positions(LlamaConfig(max_position_embeddings=64), ChatFormat(33, 32))


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "rwkv"}, "is a rwkv, which keeps no keys and values"),
        (
            {"quantization_config": NF4},
            r"already \(bitsandbytes\), and quantization is none; .* set quantization: nf4",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised already .gptq., and"),
    ],
)
def test_a_base_that_cannot_be_read_here(change: dict[str, Any], message: str) -> None:
    given = {"model_type": "llama", **change}
    with pytest.raises(InputError, match=message):
        machine.require_plain_base(BackboneSource("base"), SimpleNamespace(**given))
    machine.require_plain_base(BackboneSource("base"), SimpleNamespace(model_type="llama"))


def test_a_base_in_4_bits_is_taken_as_what_it_is() -> None:
    source = BackboneSource("base", "nf4")
    machine.require_plain_base(source, SimpleNamespace(model_type="a", quantization_config=NF4))
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    for other in (eight, NF4 | {"bnb_4bit_quant_type": "fp4"}):
        own = SimpleNamespace(model_type="a", quantization_config=other)
        with pytest.raises(InputError, match="quantised already .bitsandbytes., and .* is nf4"):
            machine.require_plain_base(source, own)


def test_a_tokenizer_that_pads_with_a_token_that_the_model_cannot_embed(
    fit: Any, model_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[MINE]"})
    tokenizer.save_pretrained(folder)
    line = fit("--model.init_args.model", str(folder))
    assert "ends or pads with '[MINE]', its token" in line


def test_sampling_on_cuda_has_no_deterministic_form() -> None:
    gpu = torch.device("cuda")
    machine.require_draws(gpu)
    try:
        torch.use_deterministic_algorithms(True)
        machine.require_draws(CPU)
        with pytest.raises(InputError, match="set trainer.deterministic: warn"):
            machine.require_draws(gpu)
        torch.use_deterministic_algorithms(True, warn_only=True)
        machine.require_draws(gpu)
    finally:
        torch.use_deterministic_algorithms(False)


def test_lora_without_a_layer_of_that_name(fit: Any) -> None:
    line = fit("--model.init_args.lora={target_modules: [c_attn]}")
    assert "target_modules ['c_attn'] name no linear layer of this model; expected some of" in line
    assert "q_proj" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_gpu_where_there_is_none(fit: Any) -> None:
    assert "trainer.accelerator is gpu, and PyTorch finds none" in fit("--trainer.accelerator=gpu")


def test_a_card_that_does_not_hold_what_stays(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcrlhf.lightning_cli.card_memory", lambda device: 1000)
    assert "this stage does not fit: foretold are" in fit()


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("all-linear", True),
        (["v_proj", "nothing"], True),
        (["self_attn.q_proj"], True),
        (["proj"], False),
        (r".*\.layers\.0\..*_proj", True),
        ("q_proj", False),  # a regular expression of the whole name
    ],
)
def test_targets_are_read_as_peft_reads_them(
    model_folder: Path, targets: str | list[str], found: bool
) -> None:
    lora = LoraOptions(r=2, target_modules=targets)
    source = BackboneSource(str(model_folder))
    own = backbone.Backbone(backbone.load_causal_lm(source))
    sizes = Sizes("supervised", "none", "float32", False, lora, prompt=4, response=4, rows=1)
    if found:
        machine.require(source, ChatFormat(), lora, "adamw", CPU)
        own.add_role("x", lora, trainable=True)
        told = footprint(machine.model_config(source), sizes)
        assert told.trained == sum(p.numel() for _, p in own.trained_parameters())
        return
    with pytest.raises(InputError, match="name no linear layer"):
        machine.require(source, ChatFormat(), lora, "adamw", CPU)
    with pytest.raises(InputError, match="name no linear layer"):
        footprint(machine.model_config(source), sizes)
    with pytest.raises(InputError, match="LoRA does not fit this model"):
        own.add_role("x", lora, trainable=True)


def test_a_layer_that_is_named_by_its_number_is_foretold_in_a_deep_model(make_llama: Any) -> None:
    lora = LoraOptions(r=2, target_modules=[r"layers.7.self_attn.q_proj"])
    sizes = Sizes("supervised", "none", "float32", False, lora, prompt=4, response=4, rows=1)
    told = footprint(make_llama(num_hidden_layers=9).config, sizes)
    assert told.trained == 2 * (32 + 32)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", "accept the model's licence on https://huggingface.co/org/model, then"),
        ("RevisionNotFoundError", "the hub has no revision 'abc' of org/model"),
        ("RepositoryNotFoundError", "the hub has no model 'org/model' that you may read"),
    ],
)
def test_why_the_hub_does_not_give_a_model_is_said_although_transformers_wraps_it(
    error: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import errors

    def download(*arguments: Any, **options: Any) -> None:
        kind = getattr(errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
    with pytest.raises(InputError) as caught:
        machine.model_config(BackboneSource("org/model", revision="abc"))
    assert words in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)  # of transformers


def test_a_card_that_is_too_small(model_folder: Path, tmp_path: Path) -> None:
    from hcrlhf.lightning_cli import parse

    arguments = ["--config", str(ROOT / "configs/demo/sft.yaml")]
    config = parse([*arguments, "--model.init_args.model", str(model_folder)])
    base = base_of(config, None)
    own = machine.model_config(base.source)
    told = doctor.footprint(own, doctor.sizes_of(config, base))
    assert doctor.require_card(config, told.peak + int(doctor.ALLOWANCE) + 1) is None
    stays = sum(told.parts.values())
    assert "may not fit: foretold" in str(doctor.require_card(config, stays))
    with pytest.raises(InputError, match=r"does not fit: foretold are .*; hcrlhf doctor"):
        doctor.require_card(config, stays - 1)
    # What cannot be foretold is not refused.
    config["model"]["init_args"]["model"] = str(tmp_path / "nothing")
    assert doctor.require_card(config, 1) is None
