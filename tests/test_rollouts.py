"""Sampling against an explicit loop over the plain model, and against the softmax itself."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from hcrlhf.backbone import Backbone, LoraOptions, load_causal_lm
from hcrlhf.errors import InputError
from hcrlhf.rollouts import Decoding, Rollout, draw, response_seed, sample, uniforms
from hcrlhf.stages import BackboneSource
from hcrlhf.text import Encoded, Tokens, collate

# PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

PAD, EOS = 0, 2
LIMIT = 12
PLAIN = Decoding()
PROMPTS = [[1, 40, 41, 42, 43], [1, 60], [EOS, PAD, 30], [1, 70, 71, 72, 73, 74, 75], [1, 5]]
SEEDS = [response_seed("test", i) for i in range(len(PROMPTS))]
# Several tokens stop here, or the untrained model would hardly ever.
STOPS = [EOS, *range(20, 40)]


@pytest.fixture(scope="module")
def backbone(model_folder: Path, stir: Callable[[Any, str, int], None]) -> Backbone:
    made = Backbone(load_causal_lm(BackboneSource(str(model_folder))))
    made.add_role("actor", LoraOptions(), trainable=True)
    stir(made, "actor", 1)
    return made


@pytest.fixture(scope="module")
def bare(model_folder: Path) -> Backbone:
    return Backbone(load_causal_lm(BackboneSource(str(model_folder))))


@pytest.fixture(scope="module")
def lm(model_folder: Path) -> Any:
    """The model without any of our code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder)


def prompts(rows: list[list[int]] = PROMPTS, pad_id: int = PAD) -> Tokens:
    return collate([Encoded(row, []) for row in rows], pad_id)


def responses(tokens: Tokens) -> list[list[int]]:
    """Each row's response without padding."""
    return [
        row[mask].tolist()
        for row, mask in zip(tokens.response_ids, tokens.response_mask, strict=True)
    ]


def looped_response(
    next_logits: Callable[[list[int]], Tensor], prompt: list[int], seed: int, temperature: float
) -> list[int]:
    """Token by token: the whole sequence again each time, no cache, no padding, no batch."""
    uniform = uniforms([seed], LIMIT)[0].tolist()
    response: list[int] = []
    for u in uniform:
        logits = next_logits(prompt + response).tolist()
        weights = [math.exp((x - max(logits)) / temperature) for x in logits]
        below = list(itertools.accumulate(weight / sum(weights) for weight in weights))
        # The last sum is 1 up to rounding, so that some token always exceeds u.
        token = next(v for v, f in enumerate(below) if f / below[-1] > u)
        response.append(token)
        if token in STOPS:
            break
    return response


# -- randomness ------------------------------------------------------------------------------------


def test_a_seed_is_the_head_of_a_sha256() -> None:
    expected = int(hashlib.sha256(b"run/safety/abc/3").hexdigest()[:16], 16)
    assert response_seed("run", "safety", "abc", 3) == expected
    assert response_seed("run", "safety", "abc", 4) != expected


def test_uniforms_of_a_row_come_from_its_seed_alone() -> None:
    numbers = uniforms([5, 2**64 - 1, 5], 7)
    assert numbers.shape == (3, 7)
    assert torch.equal(numbers[0], numbers[2])
    assert not torch.equal(numbers[0], numbers[1])
    assert torch.equal(uniforms([2**64 - 1], 7)[0], numbers[1])
    # A longer response begins as a shorter one.
    assert torch.equal(uniforms([5], 3)[0], numbers[0, :3])


def test_uniforms_are_uniform_over_seeds_and_over_positions() -> None:
    numbers = uniforms([response_seed("run", i) for i in range(2000)], 2)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert stats.kstest(numbers[:, 0].numpy(), "uniform").pvalue > 0.001
    assert abs(np.corrcoef(numbers.numpy(), rowvar=False)[0, 1]) < 4 / math.sqrt(2000)


@pytest.mark.parametrize(
    ("u", "token"),
    [(0.0, 0), (0.12, 0), (0.13, 1), (0.3, 1), (0.4, 3), (0.86, 3), (0.88, 4), (1 - 2**-53, 4)],
)
def test_drawing_inverts_the_distribution_function(u: float, token: int) -> None:
    # F = 1/8, 3/8, 3/8, 7/8, 1, 1: tokens 2 and 5 are impossible.
    logits = torch.tensor([1 / 8, 1 / 4, 0.0, 1 / 2, 1 / 8, 0.0]).log()[None]
    assert draw(logits, torch.tensor([u], dtype=torch.float64)).tolist() == [token]


def test_a_token_is_drawn_where_the_distribution_function_first_exceeds_u() -> None:
    # Four equal tokens: F is exactly 1/4, 1/2, 3/4, 1, and u = F(v) belongs to v + 1.
    u = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    assert draw(torch.zeros(4, 4), u).tolist() == [0, 1, 2, 3]
    assert draw(torch.zeros(4, 4), (u - 1e-9).clamp(min=0)).tolist() == [0, 0, 1, 2]


def test_tokens_rarer_than_single_precision_can_tell_are_drawn_at_their_rate() -> None:
    # Three tokens of 2e-9 each after one of nearly 1, where float32 has steps of 6e-8.
    logits, rare = torch.tensor([[0.0, -20.0, -20.0, -20.0]]), math.exp(-20.0)
    u = 1 - torch.tensor([3.5, 2.5, 1.5, 0.5], dtype=torch.float64) * rare / (1 + 3 * rare)
    assert draw(logits.expand(4, 4), u).tolist() == [0, 1, 2, 3]


def test_impossible_first_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0]])
    assert draw(logits, torch.tensor([0.0], dtype=torch.float64)).tolist() == [1]


# -- sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_id", [PAD, EOS])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_with_a_cache_is_an_explicit_loop_without_one(
    bare: Backbone, lm: Any, pad_id: int, temperature: float
) -> None:
    def next_logits(ids: list[int]) -> Tensor:
        with torch.no_grad():
            return lm(input_ids=torch.tensor([ids])).logits[0, -1].double()

    rows, seeds = PROMPTS * 4, [response_seed("loop", i) for i in range(4 * len(PROMPTS))]
    found = sample(bare, prompts(rows, pad_id), seeds, Decoding(temperature), LIMIT, STOPS, pad_id)
    expected = [
        looped_response(next_logits, row, seed, temperature)
        for row, seed in zip(rows, seeds, strict=True)
    ]
    assert responses(found) == expected
    lengths = [len(response) for response in expected]
    assert min(lengths) < LIMIT / 2 < max(lengths)


def test_sampling_follows_the_active_role(backbone: Backbone, bare: Backbone) -> None:
    def next_logits(ids: list[int]) -> Tensor:
        with torch.no_grad(), backbone.role("actor"):
            hidden = backbone.hidden(collate([Encoded(ids, [])], PAD))
            return backbone.output_layer(hidden[0, -1]).double()

    with backbone.role("actor"):
        found = sample(backbone, prompts(), SEEDS, PLAIN, LIMIT, STOPS, PAD)
    assert responses(found) == [
        looped_response(next_logits, row, seed, 1.0)
        for row, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert responses(found) != responses(sample(bare, prompts(), SEEDS, PLAIN, LIMIT, STOPS, PAD))


def test_near_zero_temperature_is_greedy_generation(bare: Backbone, lm: Any) -> None:
    cold = Decoding(temperature=1e-4)
    found = sample(bare, prompts(), SEEDS, cold, LIMIT, STOPS, PAD)
    for prompt, response in zip(PROMPTS, responses(found), strict=True):
        ids = torch.tensor([prompt])
        greedy = lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=LIMIT,
            eos_token_id=STOPS,
            pad_token_id=PAD,
        )
        assert greedy[0, len(prompt) :].tolist() == response


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_tokens_have_the_softmax_as_their_distribution(
    bare: Backbone, lm: Any, temperature: float
) -> None:
    count, prompt = 4000, PROMPTS[0]
    seeds = [response_seed("chi-square", i) for i in range(count)]
    batch = prompts([prompt] * count)
    found = sample(bare, batch, seeds, Decoding(temperature), 1, [EOS], PAD)
    seen = Counter(found.response_ids[:, 0].tolist())
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    expected = (count * (logits / temperature).softmax(-1)).tolist()
    # Tokens that are expected fewer than five times make one class together.
    common = [token for token, n in enumerate(expected) if n >= 5]
    observed = [seen[token] for token in common]
    wanted = [expected[token] for token in common]
    assert len(common) > 20
    result = stats.chisquare([*observed, count - sum(observed)], [*wanted, count - sum(wanted)])
    assert result.pvalue > 0.001


def test_a_response_does_not_depend_on_its_batch(backbone: Backbone) -> None:
    together = responses(sample(backbone, prompts(), SEEDS, PLAIN, LIMIT, STOPS, PAD))
    for i, prompt in enumerate(PROMPTS):
        alone = sample(backbone, prompts([prompt]), [SEEDS[i]], PLAIN, LIMIT, STOPS, PAD)
        assert responses(alone) == [together[i]]
    order = [3, 0, 4, 1, 2]
    mixed = sample(
        backbone,
        prompts([PROMPTS[i] for i in order] + [[1] * 20]),
        [SEEDS[i] for i in order] + [99],
        PLAIN,
        LIMIT,
        STOPS,
        PAD,
    )
    assert responses(mixed)[:-1] == [together[i] for i in order]


def test_a_response_is_a_function_of_its_seed(backbone: Backbone) -> None:
    batch = prompts([PROMPTS[0]] * 3)
    first = sample(backbone, batch, [1, 2, 1], PLAIN, LIMIT, [EOS], PAD)
    torch.manual_seed(123)
    again = sample(backbone, batch, [1, 2, 1], PLAIN, LIMIT, [EOS], PAD)
    assert torch.equal(first.input_ids, again.input_ids)
    one, two, three = responses(first)
    assert one == three != two


def test_a_higher_limit_only_makes_responses_longer(backbone: Backbone) -> None:
    short = responses(sample(backbone, prompts(), SEEDS, PLAIN, 4, STOPS, PAD))
    long = responses(sample(backbone, prompts(), SEEDS, PLAIN, LIMIT, STOPS, PAD))
    assert short == [response[:4] for response in long]


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_a_stop_token_belongs_to_the_response_and_nothing_follows_it(
    backbone: Backbone, pad_id: int
) -> None:
    seeds = [response_seed("stop", i) for i in range(60)]
    found = sample(backbone, prompts(PROMPTS * 12, pad_id), seeds, PLAIN, LIMIT, STOPS, pad_id)
    rows = zip(found.response_ids, found.response_mask, found.truncated, strict=True)
    for ids, mask, truncated in rows:
        stopped = [token in STOPS for token in ids[mask].tolist()]
        length = len(stopped)
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        assert ids[length:].tolist() == [pad_id] * (len(mask) - length)
        assert not any(stopped[:-1])
        assert stopped[-1] != bool(truncated)
        assert length == LIMIT or not truncated
    assert 0 < int(found.truncated.sum()) < 60
    assert found.prompt_length == 7
    assert torch.equal(found.input_ids[:, :7], prompts(PROMPTS * 12, pad_id).input_ids)
    assert torch.equal(found.attention_mask[:, :7], prompts(PROMPTS * 12, pad_id).attention_mask)


def test_either_of_two_stop_tokens_ends_a_response(bare: Backbone) -> None:
    # The first tokens of two seeds, made the two stop tokens.
    batch, seeds = prompts([PROMPTS[0]] * 3), [1, 2, 3]
    free = responses(sample(bare, batch, seeds, PLAIN, 5, [], PAD))
    stops = [free[0][0], free[1][0]]
    assert free[2][0] not in stops
    found = sample(bare, batch, seeds, PLAIN, 5, stops, PAD)
    assert responses(found)[:2] == [[stops[0]], [stops[1]]]
    assert found.truncated.tolist()[:2] == [False, False]
    assert len(responses(found)[2]) > 1


def test_a_stop_token_in_the_last_column_is_no_truncation(bare: Backbone) -> None:
    batch = prompts(PROMPTS[:1])
    (free,) = responses(sample(bare, batch, [1], PLAIN, 4, [], PAD))
    last = free[-1]
    assert last not in free[:-1]
    found = sample(bare, batch, [1], PLAIN, 4, [last], PAD)
    assert responses(found) == [free]
    assert found.truncated.tolist() == [False]
    assert sample(bare, batch, [1], PLAIN, 3, [last], PAD).truncated.tolist() == [True]


def test_columns_end_with_the_longest_response(bare: Backbone) -> None:
    batch = prompts([PROMPTS[0]] * 2)
    free = responses(sample(bare, batch, [1, 2], PLAIN, 5, [], PAD))
    stops = [free[0][0], free[1][0]]
    assert sample(bare, batch, [1, 2], PLAIN, 5, stops, PAD).response_ids.shape == (2, 1)


def test_a_sampled_padding_token_is_a_token_like_any_other(bare: Backbone) -> None:
    # The padding id is in the vocabulary; drawn before the stop, it is part of the response.
    count = 400
    seeds = [response_seed("pad", i) for i in range(count)]
    found = sample(bare, prompts([PROMPTS[1]] * count), seeds, Decoding(3.0), 4, [EOS], PAD)
    real_pads = (found.response_ids == PAD) & found.response_mask
    assert real_pads.any()
    rows = real_pads[:, :-1].any(dim=1)
    assert all(
        len(r) > r.index(PAD) + 1 for r, at in zip(responses(found), rows, strict=True) if at
    )


def test_each_step_after_the_first_reads_one_column(bare: Backbone) -> None:
    shapes: list[tuple[int, ...]] = []
    embedding = bare.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, i, __: shapes.append(tuple(i[0].shape)))
    try:
        sample(bare, prompts(), SEEDS, PLAIN, 4, [], PAD)
    finally:
        hook.remove()
    assert shapes == [(5, 7), (5, 1), (5, 1), (5, 1)]


def test_rows_that_have_ended_are_dropped_and_the_others_do_not_notice(
    bare: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, limit = [PROMPTS[i % 5] for i in range(20)], 8
    seeds = [response_seed("dropped", i) for i in range(20)]
    heights: list[int] = []
    embedding = bare.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, i, __: heights.append(len(i[0])))
    dropped = sample(bare, prompts(rows), seeds, PLAIN, limit, STOPS, PAD)
    hook.remove()
    monkeypatch.setattr("hcrlhf.rollouts.COMPACT_BELOW", 0.0)
    kept = sample(bare, prompts(rows), seeds, PLAIN, limit, STOPS, PAD)
    assert heights[0] == 20
    assert heights[-1] < 16
    assert heights == sorted(heights, reverse=True)
    assert torch.equal(dropped.input_ids, kept.input_ids)
    assert torch.equal(dropped.attention_mask, kept.attention_mask)
    assert torch.equal(dropped.truncated, kept.truncated)
    assert kept.truncated.any()
    assert not kept.truncated.all()


def test_states_of_a_model_without_keys_and_values_in_every_layer_are_dropped_as_well() -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        initializer_range=0.3,
    )
    mixed = Backbone(Lfm2ForCausalLM(config).eval())
    seeds = [response_seed("mixed", i) for i in range(20)]
    dropped = sample(mixed, prompts([PROMPTS[0]] * 20), seeds, PLAIN, 8, STOPS, PAD)
    alone = [sample(mixed, prompts(PROMPTS[:1]), [s], PLAIN, 8, STOPS, PAD) for s in seeds]
    lengths = {int(one.response_mask.sum()) for one in alone}
    assert len(lengths) > 2
    for row, mask, one in zip(dropped.response_ids, dropped.response_mask, alone, strict=True):
        assert torch.equal(row[mask], one.response_ids[one.response_mask])


# transformers 5.23 has renamed the method that 5.0 has.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_does_not_cost_the_cache(model_folder: Path) -> None:
    causal_lm = load_causal_lm(BackboneSource(str(model_folder)))
    causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    backbone = Backbone(causal_lm).train()
    shapes: list[int] = []
    causal_lm.get_input_embeddings().register_forward_hook(
        lambda _, i, __: shapes.append(i[0].shape[1])
    )
    sample(backbone, prompts(), SEEDS, PLAIN, 3, [], PAD)
    assert shapes == [7, 1, 1]


@pytest.mark.parametrize("training", [True, False])
def test_sampling_restores_the_training_mode_and_keeps_no_graph(
    backbone: Backbone, training: bool
) -> None:
    backbone.train(training)
    modes: list[bool] = []
    hook = backbone.output_layer.register_forward_hook(
        lambda _, i, o: modes.append(i[0].requires_grad or o.requires_grad or backbone.training)
    )
    try:
        sample(backbone, prompts(), SEEDS, PLAIN, 3, STOPS, PAD)
    finally:
        hook.remove()
    assert modes
    assert not any(modes)
    assert all(module.training == training for module in backbone.modules())
    assert torch.is_grad_enabled()


def test_sampling_restores_the_training_mode_after_an_error(backbone: Backbone) -> None:
    backbone.train()
    wrong = prompts([[10_000]])
    with pytest.raises(IndexError):
        sample(backbone, wrong, [1], PLAIN, 3, STOPS, PAD)
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [0, 2])
def test_nothing_is_drawn_from_probabilities_that_are_no_numbers(
    backbone: Backbone, token: int, wrong: float
) -> None:
    layer: Any = backbone.output_layer
    tokens = itertools.count()

    def broken(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        if next(tokens) == token:
            logits[-1] = wrong
        return logits

    hook = layer.register_forward_hook(broken)
    try:
        with pytest.raises(FloatingPointError, match="no probabilities"):
            sample(backbone, prompts(), SEEDS, PLAIN, LIMIT, STOPS, PAD)
    finally:
        hook.remove()


# -- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature is positive, got"):
        Decoding(temperature)


def test_generating_from_the_exported_config_is_the_full_softmax(lm: Any) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(**Decoding(0.5).generation_config(64))
    assert config.max_new_tokens == 64
    assert config.do_sample
    scores = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    processors = lm._get_logits_processor(
        config, input_ids_seq_length=1, device="cpu", model_kwargs={}
    )
    ids = torch.tensor([[40]])
    torch.testing.assert_close(processors(ids, scores.clone()), scores / 0.5)


# -- the rollout value -----------------------------------------------------------------------------


def rollout() -> Rollout:
    tokens = collate(
        [Encoded([5], [6, EOS]), Encoded([7, 8], [9]), Encoded([9], [5, 6, 7], True)], PAD
    )
    mask = tokens.response_mask
    return Rollout(
        tokens=tokens,
        keys=("a", "b", "c"),
        log_probs=torch.arange(9.0).reshape(3, 3) * mask,
        reference_log_probs=torch.full((3, 3), 1.0) * mask,
        rewards=torch.tensor([1.0, 2.0, 3.0]),
        costs=np.array([-1.0, 0.5, 2.0]),
        values=torch.arange(18.0).reshape(2, 3, 3),
    )


def test_kl_is_the_difference_of_log_probs_inside_the_mask() -> None:
    assert rollout().kl.tolist() == [[-1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [5.0, 6.0, 7.0]]


def test_rows_of_a_rollout_belong_together() -> None:
    picked = rollout().rows(torch.tensor([2, 0]))
    assert picked.keys == ("c", "a")
    assert picked.tokens.truncated.tolist() == [True, False]
    assert picked.rewards.tolist() == [3.0, 1.0]
    assert picked.costs.tolist() == [2.0, -1.0]
    assert picked.log_probs.tolist() == [[6.0, 7.0, 8.0], [0.0, 1.0, 0.0]]
    assert picked.reference_log_probs.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    assert picked.values[:, :, 0].tolist() == [[6.0, 0.0], [15.0, 9.0]]


def test_joining_consecutive_rows_gives_the_rollout_back() -> None:
    whole = rollout()
    parts = [whole.rows(torch.tensor([0])), whole.rows(torch.tensor([1, 2]))]
    again = Rollout.join(parts, PAD)
    assert again.keys == whole.keys
    assert again.costs.tolist() == whole.costs.tolist()
    assert again.costs.dtype == np.float64
    for name in ("log_probs", "reference_log_probs", "rewards", "values"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
