"""Tiny models and tokenizers, built in memory from fixed seeds; nothing is downloaded.

The tokenizer has one token per character, so that ids can be worked out by hand: `<pad>` 0,
`<s>` 1, `</s>` 2, `<unk>` 3, newline 4, then the 95 printable ASCII characters from the space, 5.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read when torch and huggingface_hub are first imported, so before any fixture runs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = [*SPECIAL, "\n", *map(chr, range(32, 127))]


def build_tokenizer(
    pad: str | None = "<pad>", eos: str | None = "</s>", *, adds_bos: bool = False
) -> Any:
    """One token per character.

    Args:
        adds_bos: calling the tokenizer puts `<s>` first, as Llama's does.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    named = {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": pad, "eos_token": eos}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: token for name, token in named.items() if token}
    )


def build_llama(seed: int = 0, **changes: Any) -> Any:
    """A Llama of hidden size 32 and two layers whose next-token distributions are far from flat."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**options | changes)).eval()


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes what the user's machine remembers of ledgers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCRLHF_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """`build_tokenizer`: distinct padding by default, `pad="</s>"` and `pad=None` otherwise."""
    return build_tokenizer


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Any]:
    """`build_llama`, for tests that need other sizes."""
    return build_llama


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer, as `from_pretrained` reads them. Not to be written to."""
    folder = tmp_path_factory.mktemp("llama")
    build_llama().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output layer is its embedding matrix. Not to be written to."""
    folder = tmp_path_factory.mktemp("tied")
    build_llama(tie_word_embeddings=True).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with one label, which reads text pairs. Not to be written to."""
    import torch
    from tokenizers import processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    backend = build_tokenizer().backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that scores the last token, without a chat template. Not to be written to."""
    import torch
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("llama-score")
    build_tokenizer().save_pretrained(folder)
    config = build_llama(num_labels=1).config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stir() -> Callable[[Any, str, int], None]:
    """Gives an adapter random weights: a new one changes nothing, and so would hide mix-ups."""
    import torch

    def fill(backbone: Any, role: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in backbone.named_parameters():
            if f".{role}." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.3 * noise)

    return fill
