"""Log-probabilities, values and scores against the plain model; roles, and weights on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from hcrlhf.backbone import (
    BASE,
    Backbone,
    FrozenOutput,
    LoraOptions,
    load_causal_lm,
    load_head,
)
from hcrlhf.errors import InputError
from hcrlhf.stages import BackboneSource
from hcrlhf.text import Encoded, Tokens, collate, join

# PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

PAD, EOS = 0, 2
LORA = LoraOptions(r=4, alpha=8)
Stir = Callable[[Any, str, int], None]

# Prompts and responses of several lengths; the third is cut, the last two are special cases of
# padding: a prompt that begins and a response that ends with the token that may also be padding.
SEQUENCES = [
    Encoded([1, 40, 41, 42, 43, 44], [50, 51, EOS]),
    Encoded([1, 60], [61, 62, 63, 64, EOS]),
    Encoded([1, 70, 71], [72, 73, 74, 75, 76, 77, 78], truncated=True),
    Encoded([EOS, PAD, 30], [31, EOS]),
    Encoded([1, 33], [PAD, 34, PAD, EOS]),
]

pads = pytest.mark.parametrize("pad_id", [PAD, EOS], ids=["own_pad", "pad_is_eos"])


@pytest.fixture
def lm(model_folder: Path) -> Any:
    """The model without any of our code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder)


def load(folder: Path) -> Backbone:
    return Backbone(load_causal_lm(BackboneSource(str(folder))))


@pytest.fixture
def bare(model_folder: Path) -> Backbone:
    """A backbone without adapters, in evaluation mode."""
    return load(model_folder).eval()


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backbone, int], None]:
    """Lets so many tokens through the output layer at a time."""

    def choose(backbone: Backbone, tokens: int) -> None:
        logits = tokens * backbone.output_layer.weight.shape[0]
        monkeypatch.setattr("hcrlhf.backbone.LOGITS", logits)

    return choose


def with_roles(folder: Path, stir: Stir) -> Backbone:
    backbone = load(folder)
    for seed, (name, trainable) in enumerate(
        [("actor", True), ("critic", True), ("reward", False)], start=1
    ):
        backbone.add_role(name, LORA, trainable=trainable)
        stir(backbone, name, seed)
    return backbone


@pytest.fixture
def roles(model_folder: Path, stir: Stir) -> Backbone:
    """Trainable adapters "actor" and "critic", a frozen "reward"; all with random weights."""
    return with_roles(model_folder, stir)


def batch(pad_id: int = PAD) -> Tokens:
    return collate(SEQUENCES, pad_id)


def plain_log_probs(lm: Any, sequence: Encoded, temperature: float = 1.0) -> Tensor:
    """log π of one response from a plain forward pass over its unpadded sequence."""
    ids = torch.tensor([sequence.prompt + sequence.response])
    log_probs = (lm(input_ids=ids).logits[0] / temperature).log_softmax(-1)
    start = len(sequence.prompt)
    return torch.stack([log_probs[i - 1, ids[0, i]] for i in range(start, ids.shape[1])])


def plain_states(lm: Any, sequence: Encoded) -> Tensor:
    """Last hidden states of one unpadded sequence."""
    ids = torch.tensor([sequence.prompt + sequence.response])
    return lm.model(input_ids=ids).last_hidden_state[0]


def assert_same_states(one: Tensor, other: Tensor) -> None:
    """Up to sums in another order, which differ by up to 5e-5 on some processors.

    The states of two roles are more than 0.1 apart.
    """
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def random_head(seed: int, size: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(1, size, generator=generator),
        "bias": torch.randn(1, generator=generator),
    }


def trainable_names(backbone: Backbone) -> set[str]:
    return {name for name, p in backbone.named_parameters() if p.requires_grad}


def trained_names(backbone: Backbone) -> set[str]:
    return {name for name, _ in backbone.trained_parameters()}


def copies(backbone: Backbone) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in backbone.named_parameters()}


def changed_names(backbone: Backbone, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in backbone.named_parameters() if not torch.equal(p, before[name])}


def real(tokens: Tokens, states: Tensor) -> Tensor:
    """The states of real tokens alone."""
    return states[tokens.attention_mask]


def hidden_of(backbone: Backbone, role: str, tokens: Tokens) -> Tensor:
    with backbone.inference(), backbone.role(role):
        return backbone.hidden(tokens)


# -- log-probabilities -----------------------------------------------------------------------------


@pads
@pytest.mark.parametrize("chunk", [4096, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_plain_model(
    bare: Backbone, lm: Any, pad_id: int, chunk: int, temperature: float, chunked: Any
) -> None:
    tokens = batch(pad_id)
    chunked(bare, chunk)
    found = bare.log_probs(bare.hidden(tokens), tokens, temperature)
    assert found.shape == tokens.response_ids.shape
    assert found.dtype == torch.float32
    for row, sequence in zip(found, SEQUENCES, strict=True):
        count = len(sequence.response)
        torch.testing.assert_close(
            row[:count], plain_log_probs(lm, sequence, temperature), atol=1e-5, rtol=0
        )
        assert torch.equal(row[count:], torch.zeros(len(row) - count))


def test_padding_does_not_move_a_sequence_in_a_model_with_absolute_positions() -> None:
    # Llama's rotary positions are relative and would not notice.
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    lm = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(lm.transformer.wpe.weight)
    expected = [plain_log_probs(lm, sequence).detach() for sequence in SEQUENCES]
    backbone, tokens = Backbone(lm), batch()
    found = backbone.log_probs(backbone.hidden(tokens), tokens)
    for row, one in zip(found, expected, strict=True):
        torch.testing.assert_close(row[: len(one)].detach(), one, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_without_dropout_the_ratio_of_the_first_step_is_one(kind: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 100, "num_hidden_layers": 2, "hidden_size": 32}
    # These two have dropout by default: as modules, and as numbers that attention reads.
    made = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**size, n_head=4)),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(**size, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32)
        ),
    }[kind]()
    made.save_pretrained(tmp_path)
    tokens = batch()

    def shift(dropout: bool) -> float:
        backbone = Backbone(load_causal_lm(BackboneSource(str(tmp_path)), dropout=dropout))
        backbone.add_role("policy", LORA, trainable=True)
        backbone.train()
        with backbone.inference(), backbone.role("policy"):
            old = backbone.log_probs(backbone.hidden(tokens), tokens)
        with backbone.role("policy"):
            new = backbone.log_probs(backbone.hidden(tokens), tokens)
        return float((new.detach() - old).abs().max())

    assert shift(dropout=False) == 0.0
    assert shift(dropout=True) > 1e-3


@pytest.mark.parametrize("chunk", [4096, 4, 1])
def test_gradients_are_those_of_the_plain_model_with_and_without_chunks(
    bare: Backbone, lm: Any, chunk: int, chunked: Any
) -> None:
    chunked(bare, chunk)
    bare.requires_grad_(True)
    tokens = batch()
    bare.log_probs(bare.hidden(tokens), tokens).sum().backward()
    torch.stack([plain_log_probs(lm, sequence).sum() for sequence in SEQUENCES]).sum().backward()
    plain = dict(lm.named_parameters())
    for name, parameter in bare.named_parameters():
        expected = plain[name.removeprefix("model.").replace("output_layer", "lm_head")].grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [4096, 4])
def test_a_frozen_output_layer_passes_the_gradient_that_a_trained_one_would(
    bare: Backbone, chunk: int, temperature: float, chunked: Any
) -> None:
    tokens = batch()
    chunked(bare, chunk)
    hidden = bare.hidden(tokens).detach()
    weights = torch.linspace(-1, 2, tokens.response_ids.numel()).view(tokens.response_ids.shape)
    gradients = []
    for trained in (False, True):
        bare.output_layer.requires_grad_(trained)
        states = hidden.clone().requires_grad_()
        (bare.log_probs(states, tokens, temperature) * weights).sum().backward()
        gradients.append(states.grad)
    bare.output_layer.requires_grad_(False)
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


def test_a_token_that_the_model_is_sure_of_keeps_its_gradient_in_16_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 32, generator=generator).bfloat16()
    targets = torch.arange(50)
    states = (weight / 2.5).requires_grad_()
    exact = states.detach().double().requires_grad_()
    logits = exact @ weight.double().T
    assert ((logits.softmax(-1)[targets, targets] > 0.99).double().mean()) > 0.5
    logits.log_softmax(-1)[targets, targets].sum().backward()
    FrozenOutput.apply(states, weight, targets, 1.0).sum().backward()
    assert states.grad is not None and exact.grad is not None
    error = (states.grad.double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert error.median() < 0.05  # 0.95 where W_y and Wᵀp are rounded before they are subtracted


@pytest.mark.parametrize("trained", [False, True])
def test_no_logits_are_kept_for_the_backward_pass(bare: Backbone, trained: bool) -> None:
    vocabulary = bare.output_layer.out_features
    bare.output_layer.requires_grad_(trained)
    kept: list[tuple[int, ...]] = []

    def record(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != bare.output_layer.weight.data_ptr():
            kept.append(tuple(tensor.shape))
        return tensor

    tokens = batch()
    hidden = bare.hidden(tokens).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        result = bare.log_probs(hidden, tokens)
    assert kept
    assert not [shape for shape in kept if vocabulary in shape]
    result.sum().backward()
    bare.output_layer.requires_grad_(False)
    bare.output_layer.weight.grad = None


def test_bare_prompts_have_no_log_probs(bare: Backbone) -> None:
    tokens = collate([Encoded([1, 5, 6], []), Encoded([1], [])], PAD)
    assert bare.log_probs(bare.hidden(tokens), tokens).shape == (2, 0)


def test_log_probs_and_scores_of_a_bfloat16_backbone_are_float32(model_folder: Path) -> None:
    source = BackboneSource(str(model_folder), dtype="bfloat16")
    backbone = Backbone(load_causal_lm(source))
    backbone.add_role("actor", LORA, trainable=True)
    backbone.add_head("actor", trainable=True)
    assert {p.dtype for _, p in backbone.trained_parameters()} == {torch.float32}
    assert backbone.output_layer.weight.dtype == torch.bfloat16
    tokens = batch()
    hidden = backbone.hidden(tokens)
    assert backbone.log_probs(hidden, tokens).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone.values("actor", hidden, tokens).dtype == torch.float32
        assert backbone.scores("actor", hidden, tokens).dtype == torch.float32


# -- values and scores -----------------------------------------------------------------------------


@pads
def test_values_are_the_head_on_the_state_before_each_token(
    bare: Backbone, lm: Any, pad_id: int
) -> None:
    head = random_head(1)
    bare.add_head("critic", trainable=True, state=head)
    tokens = batch(pad_id)
    values = bare.values("critic", bare.hidden(tokens), tokens)
    for row, sequence in zip(values, SEQUENCES, strict=True):
        states = plain_states(lm, sequence)
        start, count = len(sequence.prompt), len(sequence.response)
        expected = [
            states[start + t - 1] @ head["weight"][0] + head["bias"][0] for t in range(count)
        ]
        torch.testing.assert_close(row[:count], torch.stack(expected), atol=1e-4, rtol=0)
        assert torch.equal(row[count:], torch.zeros(len(row) - count))


@pads
def test_scores_read_the_last_real_token(bare: Backbone, lm: Any, pad_id: int) -> None:
    # Whether the response ends with EOS, was cut, is empty, or EOS is also the padding.
    head = random_head(2)
    bare.add_head("reward", trainable=False, state=head)
    sequences = [*SEQUENCES, Encoded([1, 8, 9], [])]
    tokens = collate(sequences, pad_id)
    scores = bare.scores("reward", bare.hidden(tokens), tokens)
    expected = [plain_states(lm, s)[-1] @ head["weight"][0] + head["bias"][0] for s in sequences]
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-4, rtol=0)
    # The states differ from token to token, so that a neighbour's would be noticed.
    before = [plain_states(lm, s)[-2] @ head["weight"][0] + head["bias"][0] for s in sequences]
    assert (scores - torch.stack(before)).abs().min() > 1e-2


@pads
def test_a_sequence_alone_and_beside_longer_ones_is_the_same(roles: Backbone, pad_id: int) -> None:
    roles.add_head("actor", trainable=True, state=random_head(3))
    wide = collate([Encoded([1] + [9] * 20, [10] * 25)], pad_id)
    together = join([batch(pad_id), wide], pad_id)
    with roles.inference(), roles.role("actor"):
        hidden = roles.hidden(together)
        log_probs = roles.log_probs(hidden, together)
        values = roles.values("actor", hidden, together)
        scores = roles.scores("actor", hidden, together)
        for i, sequence in enumerate(SEQUENCES):
            tokens = collate([sequence], pad_id)
            alone, count = roles.hidden(tokens), len(sequence.response)
            near = {"atol": 1e-5, "rtol": 1e-5}
            torch.testing.assert_close(
                roles.log_probs(alone, tokens)[0], log_probs[i, :count], **near
            )
            torch.testing.assert_close(
                roles.values("actor", alone, tokens)[0], values[i, :count], **near
            )
            torch.testing.assert_close(roles.scores("actor", alone, tokens)[0], scores[i], **near)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_leaves_no_nan_in_states_or_gradients(
    make_llama: Callable[..., Any], attention: str
) -> None:
    # Left padding attends to nothing real; a softmax over nothing would be NaN.
    lm = make_llama()
    lm.set_attn_implementation(attention)
    backbone = Backbone(lm)
    backbone.add_role("actor", LORA, trainable=True)
    backbone.add_head("actor", trainable=True, state=random_head(4))
    tokens = collate([Encoded([1], [5, EOS]), Encoded([1] * 20, [6] * 9)], PAD)
    with backbone.role("actor"):
        hidden = backbone.hidden(tokens)
        assert hidden.isfinite().all()
        values = backbone.values("actor", hidden, tokens)
        (backbone.log_probs(hidden, tokens).sum() + values.sum()).backward()
    for _, parameter in backbone.trained_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_a_new_head_scores_zero_and_then_its_bias(bare: Backbone) -> None:
    bare.add_head("cost", trainable=True)
    tokens = batch()
    hidden = bare.hidden(tokens)
    assert bare.scores("cost", hidden, tokens).tolist() == [0.0] * len(SEQUENCES)
    bare.set_head_bias("cost", -1.5)
    assert bare.scores("cost", hidden, tokens).tolist() == [-1.5] * len(SEQUENCES)


# -- roles -----------------------------------------------------------------------------------------


def test_a_new_role_changes_nothing_yet(bare: Backbone) -> None:
    tokens = batch()
    before = bare.hidden(tokens)
    bare.add_role("actor", LORA, trainable=True)
    torch.testing.assert_close(hidden_of(bare, "actor", tokens), before)


def test_the_base_role_is_the_model_without_peft(roles: Backbone, lm: Any) -> None:
    tokens = batch()
    hidden = hidden_of(roles, BASE, tokens)
    for row, mask, sequence in zip(hidden, tokens.attention_mask, SEQUENCES, strict=True):
        torch.testing.assert_close(row[mask], plain_states(lm, sequence), atol=1e-5, rtol=1e-5)


def test_a_model_that_rescales_its_logits_is_refused_or_read_right() -> None:
    # Gemma 2 squashes its logits, Cohere and Granite scale them, outside the output layer: with
    # the identity in its place they would squash and scale the hidden states instead.
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
    )
    lm = Gemma2ForCausalLM(config).eval()
    expected = plain_log_probs(lm, SEQUENCES[0]).detach()
    tokens = collate(SEQUENCES[:1], PAD)
    try:
        backbone = Backbone(lm)
    except InputError:
        return
    found = backbone.log_probs(backbone.hidden(tokens), tokens)[0].detach()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_backbone_without_roles_has_the_base_role_alone(bare: Backbone) -> None:
    tokens = batch()
    assert torch.equal(hidden_of(bare, BASE, tokens), hidden_of(bare, BASE, tokens))
    with pytest.raises(KeyError, match="actor"), bare.role("actor"):
        pass


def test_roles_mixed_in_one_pass_are_the_roles_one_at_a_time(roles: Backbone) -> None:
    tokens = batch()
    order = ["reward", BASE, "actor", "critic", "actor"]
    with roles.inference():
        mixed = roles.hidden_of_roles(tokens, order)
    single = [hidden_of(roles, role, tokens) for role in order]
    for one, other in zip(mixed, single, strict=True):
        assert_same_states(real(tokens, one), real(tokens, other))
    # Any two roles are far apart, so that a swap would be noticed.
    for i in range(4):
        for j in range(i):
            assert (real(tokens, single[i]) - real(tokens, single[j])).abs().max() > 0.1


def test_a_mixed_pass_that_fails_leaves_no_adapters_to_the_next_one(roles: Backbone) -> None:
    tokens = batch()
    before = hidden_of(roles, "critic", tokens)
    last = [m for m in roles.model.modules() if isinstance(m, torch.nn.Linear)][-1]

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = last.register_forward_hook(full)
    # As many rows as the next pass has.
    with pytest.raises(torch.OutOfMemoryError), roles.inference():
        roles.hidden_of_roles(tokens, ["reward"])
    handle.remove()
    assert torch.equal(hidden_of(roles, "critic", tokens), before)


def test_a_mixed_pass_leaves_role_and_trainable_set_as_they_were(roles: Backbone) -> None:
    tokens = batch()
    with roles.role("critic"):
        before, names = roles.hidden(tokens), trainable_names(roles)
        with roles.inference():
            roles.hidden_of_roles(tokens, ["reward", BASE, "actor"])
        assert trainable_names(roles) == names
        torch.testing.assert_close(roles.hidden(tokens), before)


def test_a_merged_role_is_the_role_and_leaves_every_weight_bit_identical(roles: Backbone) -> None:
    tokens = batch()
    expected = hidden_of(roles, "actor", tokens)
    before = {name: value.clone() for name, value in roles.named_parameters()}
    names = trainable_names(roles)
    assert roles.mergeable
    with roles.role("critic"):
        with roles.inference(), roles.merged("actor"):
            found = roles.hidden(tokens)
        torch.testing.assert_close(
            roles.hidden(tokens).detach(), hidden_of(roles, "critic", tokens)
        )
    assert_same_states(real(tokens, found), real(tokens, expected))
    assert trainable_names(roles) == names
    for name, value in roles.named_parameters():
        assert torch.equal(value, before[name])


def test_a_merged_role_is_taken_out_again_after_an_error(roles: Backbone) -> None:
    expected = hidden_of(roles, BASE, batch())
    with pytest.raises(RuntimeError, match="on purpose"), roles.merged("actor"):
        raise RuntimeError("on purpose")
    assert torch.equal(hidden_of(roles, BASE, batch()), expected)


def test_roles_that_cannot_be_merged_are_read_in_one_pass_with_equal_states(
    roles: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = batch()
    parts = [tokens.rows(torch.tensor([0, 2])), tokens.rows(torch.tensor([1]))]
    readers = dict.fromkeys(["reward", BASE, "actor"], lambda hidden, part: real(part, hidden))
    heights: list[int] = []
    embedding = roles.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, i, __: heights.append(len(i[0])))
    with roles.inference():
        separate = roles.read(parts, readers)
        monkeypatch.setattr(Backbone, "mergeable", False)
        together = roles.read(parts, readers)
    hook.remove()
    assert heights == [2, 1] * 3 + [6, 3]
    for role in readers:
        for one, other in zip(separate[role], together[role], strict=True):
            assert_same_states(one, other)


def test_roles_are_not_read_in_training_mode(roles: Backbone) -> None:
    roles.train()
    with pytest.raises(ValueError, match="training mode"):
        roles.read([batch()], {"actor": lambda hidden, part: hidden})


def test_the_model_reads_no_more_columns_than_the_longest_sequence_has(bare: Backbone) -> None:
    # Prompts of 6 and 1 tokens, responses of 1 and 5: aligned 11 columns, at most 7 of them real.
    tokens = collate([Encoded([1, 5, 6, 7, 8, 9], [2]), Encoded([1], [5, 6, 7, 8, 2])], PAD)
    shapes: list[tuple[int, ...]] = []
    embedding = bare.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, i, __: shapes.append(tuple(i[0].shape)))
    hidden = bare.hidden(tokens)
    hook.remove()
    assert shapes == [(2, 7)]
    assert hidden.shape[:2] == (2, 11)


def test_mixing_roles_outside_inference_is_an_error_and_not_a_wrong_answer(
    roles: Backbone,
) -> None:
    roles.train()
    with pytest.raises(ValueError, match="training mode"):
        roles.hidden_of_roles(batch(), ["actor", "critic"])


def adapter_names_of(backbone: Backbone, role: str) -> set[str]:
    return {name for name, _ in backbone.named_parameters() if f".{role}." in name}


@pytest.mark.parametrize("active", ["actor", "critic", "reward"])
def test_leaving_the_base_role_restores_exactly_the_trainable_set(
    roles: Backbone, active: str
) -> None:
    expected = adapter_names_of(roles, "actor") | adapter_names_of(roles, "critic")
    assert trained_names(roles) == expected
    assert trainable_names(roles) == expected
    with roles.role(active):
        pass
    with roles.role(BASE):
        pass
    assert trainable_names(roles) == expected


def test_leaving_the_base_role_by_an_exception_restores_the_trainable_set(
    roles: Backbone,
) -> None:
    # As after Ctrl-C or running out of memory in a reference pass, when training goes on.
    expected = trainable_names(roles)
    with roles.role("reward"):
        pass
    with pytest.raises(RuntimeError, match="out of memory"), roles.role(BASE):
        raise RuntimeError("out of memory")
    assert trainable_names(roles) == expected


def test_inside_a_role_no_other_than_trainable_parameters_get_gradients(roles: Backbone) -> None:
    for role, trainable in [("actor", True), ("reward", False), ("critic", True), (BASE, False)]:
        with roles.role(role):
            names = trainable_names(roles)
            assert names <= trained_names(roles)
            if trainable:
                assert adapter_names_of(roles, role) <= names


def test_an_inner_role_gives_the_outer_one_back(roles: Backbone) -> None:
    tokens = batch()
    expected = hidden_of(roles, "actor", tokens)
    with roles.inference(), roles.role("actor"):
        for inner in (BASE, "critic"):
            with roles.role(inner):
                roles.hidden(tokens)
            torch.testing.assert_close(roles.hidden(tokens), expected)


def test_a_frozen_role_gets_no_gradient_and_its_trainable_head_does(roles: Backbone) -> None:
    roles.add_head("reward", trainable=True, state=random_head(5))
    tokens = batch()
    with roles.role("reward"):
        roles.scores("reward", roles.hidden(tokens), tokens).sum().backward()
    with_gradient = {name for name, p in roles.named_parameters() if p.grad is not None}
    assert with_gradient == {"heads.reward.weight", "heads.reward.bias"}


def test_training_one_role_leaves_every_other_weight_bit_identical(roles: Backbone) -> None:
    roles.add_head("actor", trainable=True, state=random_head(6))
    roles.add_head("critic", trainable=True, state=random_head(7))
    roles.add_head("reward", trainable=False, state=random_head(8))
    roles.train()
    tokens, before = batch(), copies(roles)
    # All trained parameters in one optimizer, as in the policy module.
    optimizer = torch.optim.AdamW([p for _, p in roles.trained_parameters()], lr=0.1)
    for _ in range(2):
        with roles.role("actor"):
            hidden = roles.hidden(tokens)
            loss = -roles.log_probs(hidden, tokens).sum()
            (loss + roles.values("actor", hidden, tokens).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = adapter_names_of(roles, "actor") | {"heads.actor.weight", "heads.actor.bias"}
    assert changed_names(roles, before) == expected


def test_two_roles_backward_in_turn_each_get_their_own_gradients(roles: Backbone) -> None:
    roles.add_head("critic", trainable=True, state=random_head(9))
    tokens = batch()

    def actor_loss() -> Tensor:
        return -roles.log_probs(roles.hidden(tokens), tokens).sum()

    def critic_loss() -> Tensor:
        return roles.values("critic", roles.hidden(tokens), tokens).square().sum()

    def gradients(*turns: tuple[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        roles.zero_grad()
        for role, loss in turns:
            with roles.role(role):
                loss().backward()
        return {n: p.grad.clone() for n, p in roles.named_parameters() if p.grad is not None}

    actor, critic = gradients(("actor", actor_loss)), gradients(("critic", critic_loss))
    both = gradients(("actor", actor_loss), ("critic", critic_loss))
    assert both.keys() == actor.keys() | critic.keys()
    assert not actor.keys() & critic.keys()
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (actor | critic)[name])


# transformers 5.23 has renamed the method that 5.0 has.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_equal_gradients_inside_a_role(
    model_folder: Path, stir: Stir
) -> None:
    tokens = batch()

    def gradients(checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        lm = load_causal_lm(BackboneSource(str(model_folder)))
        if checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        passes: list[int] = []
        lm.model.layers[0].input_layernorm.register_forward_hook(lambda *_: passes.append(1))
        backbone = Backbone(lm)
        for seed, name in enumerate(("actor", "critic")):
            backbone.add_role(name, LORA, trainable=True)
            stir(backbone, name, seed)
        backbone.add_head("critic", trainable=True, state=random_head(10))
        backbone.train()
        with backbone.role("actor"):
            backbone.log_probs(backbone.hidden(tokens), tokens).sum().backward()
        with backbone.role("critic"):
            backbone.values("critic", backbone.hidden(tokens), tokens).square().sum().backward()
        found = {}
        for name, parameter in backbone.trained_parameters():
            assert parameter.grad is not None
            found[name] = parameter.grad
        return found, len(passes)

    kept, kept_passes = gradients(checkpointing=False)
    recomputed, recomputed_passes = gradients(checkpointing=True)
    assert (kept_passes, recomputed_passes) == (2, 4)
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-5, rtol=1e-5)
        assert gradient.abs().max() > 0


def test_a_copied_role_is_equal_at_first_and_independent_afterwards(
    roles: Backbone, stir: Stir
) -> None:
    tokens = batch()
    source = hidden_of(roles, "actor", tokens)
    roles.copy_role("twin", "actor", trainable=True)
    torch.testing.assert_close(hidden_of(roles, "twin", tokens), source)
    assert adapter_names_of(roles, "twin") <= trainable_names(roles)
    stir(roles, "twin", 11)
    torch.testing.assert_close(hidden_of(roles, "actor", tokens), source)
    twin = hidden_of(roles, "twin", tokens)
    assert (real(tokens, twin) - real(tokens, source)).abs().max() > 0.1
    stir(roles, "actor", 12)
    torch.testing.assert_close(hidden_of(roles, "twin", tokens), twin)


@pytest.mark.parametrize("dropped", ["actor", "critic", "reward"])
def test_dropping_a_role_leaves_the_others_as_they_were(roles: Backbone, dropped: str) -> None:
    for seed, name in enumerate(("actor", "critic", "reward")):
        roles.add_head(name, trainable=name != "reward", state=random_head(seed))
    tokens = batch()
    others = [role for role in ("actor", "critic", "reward", BASE) if role != dropped]
    before = [hidden_of(roles, role, tokens) for role in others]
    trained = {n for n in trained_names(roles) if f".{dropped}." not in n}
    # The role in use, as after the reloaded model has been compared with the one in memory.
    with roles.role(dropped):
        pass
    roles.drop_role(dropped)
    for role, expected in zip(others, before, strict=True):
        torch.testing.assert_close(hidden_of(roles, role, tokens), expected)
    assert not adapter_names_of(roles, dropped)
    assert dropped not in roles.heads
    assert trained_names(roles) == trained
    with roles.role(BASE):
        pass
    assert trainable_names(roles) == trained


def test_a_dropped_name_can_be_used_again_for_a_frozen_role(roles: Backbone) -> None:
    roles.add_head("critic", trainable=True)
    roles.drop_role("critic")
    roles.add_role("critic", LORA, trainable=False)
    roles.add_head("critic", trainable=False)
    assert trained_names(roles) == trainable_names(roles) == adapter_names_of(roles, "actor")


def test_inference_gives_the_training_mode_back_and_makes_no_graph(roles: Backbone) -> None:
    tokens = batch()
    for training in (True, False):
        roles.train(training)
        with roles.inference():
            assert not any(module.training for module in roles.modules())
            assert not roles.hidden(tokens).requires_grad
        assert all(module.training == training for module in roles.modules())
    with pytest.raises(RuntimeError, match="interrupted"), roles.train().inference():
        raise RuntimeError("interrupted")
    assert roles.training
    assert torch.is_grad_enabled()


def test_without_roles_nothing_but_heads_is_trainable(bare: Backbone) -> None:
    bare.add_head("cost", trainable=True)
    assert trained_names(bare) == {"heads.cost.weight", "heads.cost.bias"}
    assert trainable_names(bare) == trained_names(bare)


@pytest.mark.parametrize("folder", ["model_folder", "tied_model_folder"])
def test_full_tuning_trains_every_weight_once(folder: str, request: pytest.FixtureRequest) -> None:
    lm = load_causal_lm(BackboneSource(str(request.getfixturevalue(folder))))
    expected = {id(p) for p in lm.parameters()}
    backbone = Backbone(lm, full=True)
    trained = [id(p) for _, p in backbone.trained_parameters()]
    assert len(trained) == len(set(trained))
    assert set(trained) == expected
    assert all(p.requires_grad for p in backbone.parameters())


def test_a_lora_rank_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="rank r is a whole number >= 1, got 0"):
        LoraOptions(r=0)


def test_lora_on_an_embedding_is_an_input_error(bare: Backbone) -> None:
    options = LoraOptions(target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(InputError, match="LoRA on embed_tokens is not supported"):
        bare.add_role("actor", options, trainable=True)


def test_target_modules_that_name_no_layer_are_an_input_error(bare: Backbone) -> None:
    with pytest.raises(InputError, match="expected target_modules to name its linear layers"):
        bare.add_role("actor", LoraOptions(target_modules=["c_attn"]), trainable=True)


def test_lora_reaches_the_named_layers_alone(bare: Backbone) -> None:
    bare.add_role("actor", LoraOptions(r=3, target_modules=["q_proj"]), trainable=True)
    shapes = {name: tuple(p.shape) for name, p in bare.trained_parameters()}
    assert len(shapes) == 2 * 2
    assert all("q_proj.lora_" in name for name in shapes)
    assert set(shapes.values()) == {(3, 32), (32, 3)}


# -- weights on disk -------------------------------------------------------------------------------


def assert_adapter_is_plain_peft(
    backbone: Backbone, role: str, folder: Path, model_folder: Path
) -> None:
    """Plain PEFT reads the same policy from `folder`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), str(folder)
    )
    tokens = batch()
    with backbone.inference(), backbone.role(role):
        log_probs = backbone.log_probs(backbone.hidden(tokens), tokens)
    for row, sequence in zip(log_probs, SEQUENCES, strict=True):
        expected = plain_log_probs(plain, sequence).detach()
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("role", ["actor", "critic", "reward"])
def test_plain_peft_reads_a_saved_role(
    roles: Backbone, role: str, model_folder: Path, tmp_path: Path
) -> None:
    roles.save_role(role, tmp_path, str(model_folder))
    assert_adapter_is_plain_peft(roles, role, tmp_path, model_folder)
    assert roles.adapter_bytes(role) == (tmp_path / "adapter_model.safetensors").read_bytes()


def test_a_saved_role_holds_its_adapter_alone(
    roles: Backbone, model_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftConfig

    roles.add_head("actor", trainable=True)
    roles.save_role("actor", tmp_path, "../base", "0123abc")
    state = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    # Seven linear layers in each of two blocks; A and B for each.
    assert len(state) == 7 * 2 * 2
    assert all("lora_" in name and "actor" not in name for name in state)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.base_model_name_or_path, config.revision) == ("../base", "0123abc")
    assert config.inference_mode
    # Saving does not freeze the role that goes on training.
    assert adapter_names_of(roles, "actor") <= trainable_names(roles)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_role_is_the_saved_one_under_any_name(
    roles: Backbone, model_folder: Path, tmp_path: Path, trainable: bool
) -> None:
    roles.save_role("critic", tmp_path, str(model_folder))
    other = load(model_folder)
    other.add_role("first", trainable=True)
    other.load_role("judge", tmp_path, trainable=trainable)
    tokens = batch()
    torch.testing.assert_close(
        hidden_of(other, "judge", tokens), hidden_of(roles, "critic", tokens)
    )
    expected = adapter_names_of(other, "first")
    if trainable:
        expected |= adapter_names_of(other, "judge")
    assert trained_names(other) == trainable_names(other) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 16},
        {"intermediate_size": 48},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_an_adapter_of_another_shape_is_an_input_error(
    model_folder: Path, make_llama: Callable[..., Any], tmp_path: Path, changes: dict[str, int]
) -> None:
    lora = LoraOptions(r=4, alpha=8, target_modules=["q_proj", "down_proj"])
    other = Backbone(make_llama(**changes))
    other.add_role("actor", lora, trainable=True)
    other.save_role("actor", tmp_path, str(model_folder))
    backbone = load(model_folder)
    with pytest.raises(InputError, match=str(tmp_path)) as caught:
        backbone.load_role("actor", tmp_path, trainable=False)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # what PEFT says of such adapters
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora: True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"bias": "all"}, "bias: all"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_an_adapter_that_is_more_than_lora_is_refused_and_not_merged_wrongly(
    model_folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options})
    model: Any = get_peft_model(load_causal_lm(BackboneSource(str(model_folder))), config)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match=f"{message}.*expected plain LoRA"):
        load(model_folder).load_role("policy", tmp_path, trainable=False)


def test_settings_of_other_tools_that_stay_plain_lora_are_read_as_peft_reads_them(
    model_folder: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["q_proj", "v_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"down_proj": 7},
        lora_dropout=0.1,
        init_lora_weights="gaussian",
        layers_to_transform=[1],
    )
    theirs: Any = get_peft_model(load_causal_lm(BackboneSource(str(model_folder))), config)
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    theirs.save_pretrained(str(tmp_path))
    ours, tokens = load(model_folder), batch()
    ours.add_role("other", trainable=False)
    ours.load_role("policy", tmp_path, trainable=False)
    ids = tokens.input_ids[:1, tokens.attention_mask[0]]
    expected = theirs.eval()(ids).logits.log_softmax(-1)
    row = tokens.rows(slice(0, 1)).without_common_padding()
    for context in (ours.merged("policy"), ours.role("policy")):
        with torch.no_grad(), context:
            ours.eval()
            found = ours.log_probs(ours.hidden(row), row)[row.response_mask[:1]]
        targets = ids[0, row.prompt_length :]
        reference = expected[0, row.prompt_length - 1 : -1].gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)


def test_an_adapter_loads_without_a_warning_after_its_backbone_has_moved(
    roles: Backbone, model_folder: Path, tmp_path: Path
) -> None:
    # The path in adapter_config.json is for people; the fingerprint is what is checked.
    roles.save_role("actor", tmp_path, "/before/it/moved")
    again = load(model_folder)
    again.load_role("actor", tmp_path, trainable=False)
    tokens = batch()
    torch.testing.assert_close(hidden_of(again, "actor", tokens), hidden_of(roles, "actor", tokens))


def test_an_adapter_of_another_architecture_is_an_input_error(
    model_folder: Path, tmp_path: Path
) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    other = Backbone(GPTNeoXForCausalLM(config))
    other.add_role("actor", LORA, trainable=True)
    other.save_role("actor", tmp_path, str(model_folder))
    with pytest.raises(InputError, match="does not fit"):
        load(model_folder).load_role("actor", tmp_path, trainable=False)


def test_heads_survive_saving(bare: Backbone, tmp_path: Path) -> None:
    head = random_head(13)
    bare.add_head("cost", trainable=True, state=head)
    bare.save_head("cost", tmp_path)
    loaded = load_head(tmp_path)
    assert loaded.keys() == head.keys()
    for name, value in head.items():
        assert torch.equal(loaded[name], value)
        assert loaded[name].dtype == torch.float32
    bare.add_head("copy", trainable=False, state=loaded)
    tokens = batch()
    hidden = bare.hidden(tokens)
    assert torch.equal(bare.scores("cost", hidden, tokens), bare.scores("copy", hidden, tokens))


def test_a_folder_without_head_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no head\.safetensors"):
        load_head(tmp_path)


def test_trained_state_holds_adapters_of_trainable_roles_and_trainable_heads(
    roles: Backbone,
) -> None:
    roles.add_head("critic", trainable=True)
    roles.add_head("reward", trainable=False)
    expected = adapter_names_of(roles, "actor") | adapter_names_of(roles, "critic")
    expected |= {"heads.critic.weight", "heads.critic.bias"}
    assert roles.trained_state().keys() == expected
    # Whichever role was used last.
    with roles.role("reward"):
        assert roles.trained_state().keys() == expected


def test_trained_state_restores_training_and_touches_nothing_else(
    roles: Backbone, stir: Stir, tmp_path: Path
) -> None:
    roles.add_head("critic", trainable=True, state=random_head(14))
    safetensors.torch.save_file(roles.trained_state(), tmp_path / "state")
    before = copies(roles)
    stir(roles, "actor", 15)
    roles.set_head_bias("critic", 7.0)
    assert changed_names(roles, before)
    roles.load_trained_state(safetensors.torch.load_file(tmp_path / "state"))
    assert not changed_names(roles, before)


def test_trained_state_of_other_roles_is_refused(roles: Backbone) -> None:
    state, before = roles.trained_state(), copies(roles)
    name = min(state)
    for wrong in (
        {key: value + 1 for key, value in state.items() if key != name},
        {key: value + 1 for key, value in state.items()} | {"heads.new.bias": torch.zeros(1)},
    ):
        with pytest.raises(InputError, match=r"1 names differ.*resume with the config"):
            roles.load_trained_state(wrong)
    assert not changed_names(roles, before)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fully_tuned_model_reloads_with_the_same_logits(
    model_folder: Path, tied_model_folder: Path, tmp_path: Path, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tied_model_folder if tied else model_folder
    backbone = Backbone(load_causal_lm(BackboneSource(str(folder))), full=True)
    original = AutoModelForCausalLM.from_pretrained(folder)
    tokens, before = batch(), copies(backbone)
    optimizer = torch.optim.SGD([p for _, p in backbone.trained_parameters()], lr=0.01)
    (-backbone.log_probs(backbone.hidden(tokens), tokens).mean()).backward()
    optimizer.step()
    assert changed_names(backbone, before) == before.keys()
    backbone.save_full(tmp_path)

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    embedding, output = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert (embedding is output) == tied
    assert again.config.tie_word_embeddings == tied
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert stored.keys() == set(original.state_dict()) - ({"lm_head.weight"} if tied else set())
    # The backbone is of use after saving, too.
    log_probs = backbone.log_probs(backbone.hidden(tokens), tokens)
    for row, sequence in zip(log_probs, SEQUENCES, strict=True):
        expected = plain_log_probs(again, sequence)
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=0)
        assert (expected - plain_log_probs(original, sequence)).abs().max() > 1e-3


def test_roles_of_a_tied_model_are_saved_without_embeddings(
    tied_model_folder: Path, stir: Stir, tmp_path: Path
) -> None:
    backbone = with_roles(tied_model_folder, stir)
    backbone.save_role("actor", tmp_path, str(tied_model_folder))
    state = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in state)
    assert_adapter_is_plain_peft(backbone, "actor", tmp_path, tied_model_folder)


def test_a_folder_without_model_is_an_input_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_causal_lm(BackboneSource(str(tmp_path)))
    assert "\n" not in str(caught.value)


# -- 4-bit -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_folder(make_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of whole blocks of 64 weights, as 4-bit quantisation wants them."""
    pytest.importorskip("bitsandbytes", reason="4-bit backbones need bitsandbytes")
    folder = tmp_path_factory.mktemp("wide")
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def nf4(folder: Path, names: Sequence[str], stir: Stir) -> Backbone:
    backbone = Backbone(load_causal_lm(BackboneSource(str(folder), "nf4")), quantized=True)
    for seed, name in enumerate(names, start=1):
        backbone.add_role(name, LORA, trainable=name != "reward")
        stir(backbone, name, seed)
    return backbone


def test_nf4_quantises_the_linear_layers_and_neither_adapters_nor_heads(
    wide_folder: Path, stir: Stir
) -> None:
    import bitsandbytes

    backbone = nf4(wide_folder, ["actor", "reward"], stir)
    backbone.add_head("actor", trainable=True)
    packed = {name for name, p in backbone.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 7 * 2
    assert all(name.endswith("_proj.base_layer.weight") for name in packed)
    layers = [m for m in backbone.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}
    expected = adapter_names_of(backbone, "actor") | {"heads.actor.weight", "heads.actor.bias"}
    assert trained_names(backbone) == trainable_names(backbone) == expected
    assert {p.dtype for _, p in backbone.trained_parameters()} == {torch.float32}
    assert backbone.heads["actor"].weight.dtype == torch.float32


def test_nf4_is_near_the_model_that_it_quantises(wide_folder: Path, stir: Stir) -> None:
    from transformers import AutoModelForCausalLM

    backbone = nf4(wide_folder, ["actor"], stir)
    lm, tokens = AutoModelForCausalLM.from_pretrained(wide_folder), batch()
    hidden = hidden_of(backbone, BASE, tokens)
    states = torch.cat([plain_states(lm, sequence) for sequence in SEQUENCES])
    cosine = torch.nn.functional.cosine_similarity(real(tokens, hidden), states)
    # Four bits: near, and not equal. Two unrelated vectors of 64 numbers lie within 0.5.
    assert 0.7 < float(cosine.mean().detach()) < 0.999


def test_nf4_training_moves_adapter_and_head_alone(wide_folder: Path, stir: Stir) -> None:
    backbone = nf4(wide_folder, ["actor", "reward"], stir)
    backbone.add_head("actor", trainable=True, state=random_head(16, 64))
    backbone.train()
    tokens, before = batch(), copies(backbone)
    optimizer = torch.optim.AdamW([p for _, p in backbone.trained_parameters()], lr=0.1)
    with backbone.role("actor"):
        hidden = backbone.hidden(tokens)
        loss = backbone.scores("actor", hidden, tokens).sum()
        (loss - backbone.log_probs(hidden, tokens).sum()).backward()
    optimizer.step()
    assert changed_names(backbone, before) == trained_names(backbone)


def test_nf4_gradients_are_the_same_after_a_pass_in_evaluation_mode(
    wide_folder: Path, stir: Stir
) -> None:
    # A CPU with AVX512-BF16: bitsandbytes repacks the weights at the first pass in evaluation
    # mode, and from then on no gradient flows through a quantised layer.
    backbone, tokens = nf4(wide_folder, ["actor"], stir), batch()

    def training_pass() -> tuple[Tensor, dict[str, Tensor]]:
        backbone.train().zero_grad()
        with backbone.role("actor"):
            log_probs = backbone.log_probs(backbone.hidden(tokens), tokens)
            log_probs.sum().backward()
        return log_probs.detach(), {
            name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None
        }

    fresh, fresh_gradients = training_pass()
    with backbone.inference(), backbone.role("actor"):
        sampled = backbone.log_probs(backbone.hidden(tokens), tokens)
    later, later_gradients = training_pass()
    for name, gradient in fresh_gradients.items():
        torch.testing.assert_close(later_gradients[name], gradient, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(sampled, fresh, atol=1e-4, rtol=0)
    torch.testing.assert_close(later, fresh, atol=1e-4, rtol=0)


def test_unpacked_weights_make_the_products_of_packed_ones_and_leave_nothing_behind(
    wide_folder: Path, stir: Stir
) -> None:
    from bitsandbytes.nn import Linear4bit

    backbone, tokens = nf4(wide_folder, ["actor"], stir), batch()

    def states() -> Tensor:
        with backbone.inference(), backbone.role("actor"):
            return real(tokens, backbone.hidden(tokens))

    packed, layers = states(), [m for m in backbone.modules() if isinstance(m, Linear4bit)]
    calls: list[Linear4bit] = []
    with pytest.MonkeyPatch.context() as patch:
        honest = Linear4bit.forward
        patch.setattr(Linear4bit, "forward", lambda m, x: calls.append(m) or honest(m, x))
        with backbone.unpacked():
            torch.testing.assert_close(states(), packed, atol=1e-5, rtol=1e-5)
            assert not calls  # no layer was unpacked again
        states()
        assert set(calls) == set(layers)
    layers[0].forward = layers[0].forward  # as a library's hook would
    hook = layers[0].forward
    with pytest.raises(ValueError, match="broken off"), backbone.unpacked():
        raise ValueError("broken off")
    with pytest.MonkeyPatch.context() as patch:
        room = iter([True, True, False])

        def scarce(layer: Any) -> Any:
            if not next(room):
                raise torch.OutOfMemoryError("no room for the third copy")
            return lambda x: x

        patch.setattr("hcrlhf.backbone._unpacked_product", scarce)
        with pytest.raises(torch.OutOfMemoryError, match="third copy"), backbone.unpacked():
            raise AssertionError("never entered")
    assert layers[0].__dict__["forward"] == hook
    assert not any("forward" in layer.__dict__ for layer in layers[1:])
    assert torch.equal(states(), packed)


def test_nf4_roles_mixed_in_one_pass_are_the_roles_one_at_a_time(
    wide_folder: Path, stir: Stir
) -> None:
    backbone = nf4(wide_folder, ["actor", "reward"], stir)
    tokens, order = batch(), ["reward", BASE, "actor"]
    with backbone.inference():
        mixed = backbone.hidden_of_roles(tokens, order)
    single = [hidden_of(backbone, role, tokens) for role in order]
    for one, other in zip(mixed, single, strict=True):
        torch.testing.assert_close(real(tokens, one), real(tokens, other), atol=1e-4, rtol=1e-4)
    assert (real(tokens, single[0]) - real(tokens, single[1])).abs().max() > 0.1


def test_nf4_scores_survive_saving_and_loading(
    wide_folder: Path, stir: Stir, tmp_path: Path
) -> None:
    backbone = nf4(wide_folder, ["actor", "reward"], stir)
    backbone.add_head("reward", trainable=False, state=random_head(17, 64))
    tokens = batch()
    with backbone.inference(), backbone.role("reward"):
        expected = backbone.scores("reward", backbone.hidden(tokens), tokens)
    backbone.save_role("reward", tmp_path, str(wide_folder))
    backbone.save_head("reward", tmp_path)
    again = nf4(wide_folder, [], stir)
    again.load_role("cost", tmp_path, trainable=False)
    again.add_head("cost", trainable=False, state=load_head(tmp_path))
    with again.inference(), again.role("cost"):
        found = again.scores("cost", again.hidden(tokens), tokens)
    torch.testing.assert_close(found, expected)
    assert expected.std() > 0.1
