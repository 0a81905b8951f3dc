"""Whether this machine and a base model can do what a stage asks, before weights are downloaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hcrlhf.backbone import LoraOptions
from hcrlhf.errors import InputError, is_out_of_memory
from hcrlhf.optimizers import Name, adamw
from hcrlhf.stages import BackboneSource, hub_refusal
from hcrlhf.text import ChatFormat, TextEncoder, one_line


def choose_attention() -> None:
    """Takes cuDNN out of the attention kernels that PyTorch may choose from; on CUDA alone it acts.

    It plans anew for every length of the keys, and every token of a response has another one: tens
    of milliseconds each, of the host. It has also given NaN gradients and wrong tokens with masks
    and grouped keys (pytorch#196678, #193893). Flash and memory-efficient attention remain.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def require(
    source: BackboneSource,
    chat: ChatFormat,
    lora: LoraOptions | None,
    optimizer: Name,
    device: torch.device,
) -> None:
    """Of a model only config.json is read.

    Args:
        lora: of an adapter that is begun anew; None where there is none.
        device: where the stage will run.

    Raises:
        InputError: texts longer than the model reads, 4 bits or an 8-bit optimizer without a
            bitsandbytes that works on the device, or LoRA without a layer to adapt.
    """
    config = model_config(source)
    require_plain_base(source, config)
    require_positions(config, chat)
    if source.quantization == "nf4":
        require_four_bits(device)
    if optimizer != "adamw":
        require_eight_bits(optimizer, device)
    if lora is not None:
        require_targets(config, lora.target_modules)


# Their states are no cache of keys and values that `rollouts.sample` could go on from.
RECURRENT = ("rwkv", "mamba", "mamba2", "falcon_mamba", "recurrent_gemma")


def require_plain_base(source: BackboneSource, config: Any) -> None:
    """
    Raises:
        InputError: the base is quantised already, or is of a kind that this backbone cannot read.
    """
    if config.model_type in RECURRENT:
        raise InputError(
            f"{source.model} is a {config.model_type}, which keeps no keys and values of what it "
            "has read, so that no responses could be drawn from it here; take another model"
        )
    own = getattr(config, "quantization_config", None)
    if own is None:
        return
    kept: dict[str, Any] = own if isinstance(own, dict) else own.to_dict()
    four_bits = bool(kept.get("load_in_4bit")) and kept.get("bnb_4bit_quant_type") == "nf4"
    if four_bits and source.quantization == "nf4":
        return
    raise InputError(
        f"{source.model} is quantised already ({kept.get('quant_method')}), and quantization is "
        f"{source.quantization}; take the base in full precision"
        + (", or set quantization: nf4" if four_bits else "")
    )


def require_positions(config: Any, chat: ChatFormat) -> None:
    """
    Args:
        config: of transformers.

    Raises:
        InputError: a prompt and its response may be longer than the model has positions for, which
            it learnt one by one: it would fail at the first such pair, perhaps in the safety test.
    """
    if (said := beyond_positions(config, chat)) is None:
        return
    if learnt_positions(config):
        raise InputError(said)
    warnings.warn(f"{said}, or expect worse responses behind them", stacklevel=2)


def beyond_positions(config: Any, chat: ChatFormat) -> str | None:
    """What is to be said where texts may be longer than what the model was made for."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    needed = chat.max_prompt_tokens + chat.max_response_tokens
    if positions is None or needed <= positions or getattr(text, "alibi", False):
        return None
    return (
        f"chat.max_prompt_tokens {chat.max_prompt_tokens} and max_response_tokens "
        f"{chat.max_response_tokens} make texts of up to {needed} tokens, and the model has "
        f"{positions} positions (max_position_embeddings); lower one of the two in the supervised "
        "stage"
    )


def learnt_positions(config: Any) -> bool:
    """Whether each position has weights of its own, and is no angle that goes on."""
    text = config.get_text_config()
    rotary = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_pct")
    return all(getattr(text, name, None) is None for name in rotary)


def require_vocabulary(config: Any, encoder: TextEncoder) -> None:
    """
    Raises:
        InputError: a sequence may end, or be padded, with a token that the model cannot embed.
            Others may be there: Gemma 3's tokenizer has one for images.
    """
    rows = config.get_text_config().vocab_size
    if (last := max(encoder.pad_id, *encoder.stop_ids)) >= rows:
        name = encoder.tokenizer.convert_ids_to_tokens(last)
        raise InputError(
            f"the tokenizer ends or pads with {name!r}, its token {last}, and the model has "
            f"embeddings for {rows} (vocab_size); take the tokenizer that the model came with"
        )


def require_four_bits(device: torch.device) -> None:
    """
    Raises:
        InputError: bitsandbytes is missing, or has no library for the device.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise InputError(
            f"quantization nf4 needs bitsandbytes ({one_line(error)}); pip install bitsandbytes, "
            "or set quantization: none"
        ) from error
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    with torch.no_grad(), _working(device, "set quantization: none"):
        layer.to(device)(torch.zeros(1, 64, device=device))


def require_eight_bits(optimizer: Name, device: torch.device) -> None:
    """
    Raises:
        InputError: bitsandbytes is missing, or has no library for the device.
    """
    weight = nn.Parameter(torch.zeros(4096, device=device))  # smaller ones keep float32 states
    weight.grad = torch.zeros_like(weight)
    made = adamw(optimizer, [weight], 1e-3, 0.0)
    with _working(device, "set optimizer: adamw"):
        made.step()


def require_draws(device: torch.device) -> None:
    """
    Raises:
        InputError: responses are to be sampled on CUDA, and PyTorch was told to refuse operations
            without a deterministic form, of which the cumulative sum of a distribution is one.
    """
    refuses = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda" and refuses and not warns:
        raise InputError(
            "trainer.deterministic: true refuses the cumulative sums by which tokens are drawn on "
            "CUDA; set trainer.deterministic: warn"
        )


@contextmanager
def _working(device: torch.device, instead: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError, AttributeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"bitsandbytes does not work on {device} ({one_line(error)}); install one with a "
            f"library for CUDA {torch.version.cuda}, which this torch is built for (python -m "
            f"bitsandbytes says what it finds), or {instead}"
        ) from error


def require_targets(config: Any, targets: str | list[str]) -> None:
    """
    Args:
        config: of transformers.

    Raises:
        InputError: no linear layer has a name that LoRA is to adapt.
    """
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    if targets == "all-linear":
        return
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError):
        return  # no causal language model: loading it says so
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    if not any(is_target(name, targets) for name in linear):
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise InputError(
            f"LoRA's target_modules {targets} name no linear layer of this model; expected some of "
            f'{known}, or "all-linear"'
        )


def is_target(name: str, targets: str | list[str]) -> bool:
    """Whether LoRA adapts the linear layer of that name: target_modules as PEFT reads them.

    One text is a regular expression of the whole name; of a list each is its end.
    """
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def model_config(source: BackboneSource) -> Any:
    """config.json of a model folder or hub id; no weights.

    Raises:
        InputError: there is none, or the hub does not give it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.model, revision=source.revision)
    except Exception as error:
        raise hub_refusal(source.model, source.revision, error) or InputError(
            f"no config.json could be read for {source.model!r} ({one_line(error)}); expected the "
            "folder of a model, or a hub id that can be reached"
        ) from error
