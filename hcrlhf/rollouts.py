"""Sampling responses, and the value that flows through a policy update.

Every response draws its randomness from its own seed, a hash of what it is (run, purpose, prompt,
index). So a response depends neither on the other rows of its batch nor on what was sampled
before (but for rounding: kernels differ with the number of rows), a resumed run samples what the
unbroken one would have, and no generator state has to be saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from hcrlhf.backbone import Backbone
from hcrlhf.errors import InputError
from hcrlhf.samples import Floats
from hcrlhf.text import Tokens, join

# Responses that have ended are dropped once fewer than this share of a batch is being written:
# dropping copies the cache, carrying them along computes for nothing.
COMPACT_BELOW = 0.8


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn: in rollouts, in the safety test and in the shipped policy alike.

    Always from the full softmax (no top-k, no top-p, no repetition penalty): with anything else
    the policy that PPO optimises is not the policy that answers.

    Args:
        temperature: logits are divided by it, in sampling and in every log-probability.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature is positive, got {self.temperature}")

    def generation_config(self, max_new_tokens: int) -> dict[str, Any]:
        """The same decoding as keys of a Hugging Face generation_config.json."""
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "max_new_tokens": max_new_tokens,
        }


@dataclass(frozen=True)
class Rollout:
    """Responses to B prompts and everything a learner needs to know of them.

    Attributes:
        tokens: prompts and responses.
        keys: B prompt keys.
        log_probs: (B, T), of the sampled tokens under the policy that sampled them, recomputed
            with the training forward.
        reference_log_probs: (B, T), under the reference.
        rewards: (B,), standardised reward-model scores.
        costs: (B,) float64, cost-model scores, squashed where the cost model says so; positive =
            harmful.
        values: (S, B, T), the critics' predictions; S = 0 without critics.
    """

    tokens: Tokens
    keys: tuple[str, ...]
    log_probs: Tensor
    reference_log_probs: Tensor
    rewards: Tensor
    costs: Floats
    values: Tensor

    @property
    def kl(self) -> Tensor:
        """log π_θ - log π_ref per token (the k1 estimate), (B, T), zero outside the mask."""
        return (self.log_probs - self.reference_log_probs) * self.tokens.response_mask

    def rows(self, index: Tensor) -> Rollout:
        """The responses at `index`."""
        chosen = index.tolist()
        return replace(
            self,
            tokens=self.tokens.rows(index),
            keys=tuple(self.keys[i] for i in chosen),
            log_probs=self.log_probs[index],
            reference_log_probs=self.reference_log_probs[index],
            rewards=self.rewards[index],
            costs=self.costs[chosen],
            values=self.values[:, index],
        )

    def to(self, device: Any) -> Rollout:
        return replace(
            self,
            tokens=self.tokens.to(device),
            log_probs=self.log_probs.to(device),
            reference_log_probs=self.reference_log_probs.to(device),
            rewards=self.rewards.to(device),
            values=self.values.to(device),
        )

    @staticmethod
    def join(parts: Sequence[Rollout], pad_id: int) -> Rollout:
        """The responses of several rollouts in one, padded to common lengths."""
        tokens = join([part.tokens for part in parts], pad_id)
        width = tokens.response_ids.shape[1]

        def padded(x: Tensor) -> Tensor:
            return pad(x, (0, width - x.shape[-1]))

        return Rollout(
            tokens=tokens,
            keys=tuple(key for part in parts for key in part.keys),
            log_probs=torch.cat([padded(part.log_probs) for part in parts]),
            reference_log_probs=torch.cat([padded(part.reference_log_probs) for part in parts]),
            rewards=torch.cat([part.rewards for part in parts]),
            costs=np.concatenate([part.costs for part in parts]),
            values=torch.cat([padded(part.values) for part in parts], dim=1),
        )


def response_seed(*parts: object) -> int:
    """The first 8 bytes of SHA-256("part/part/…") as a number."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def shuffled(count: int, *parts: object) -> Tensor:
    """0 to count - 1 in an order that `parts` alone decide."""
    generator = torch.Generator().manual_seed(response_seed(*parts) % 2**63)
    return torch.randperm(count, generator=generator)


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(B, count) numbers in [0, 1), row i from seeds[i] alone."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).random(count) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (B,) by inverting the distribution function: the smallest v with F(v) > u.

    Args:
        logits: (B, V). uniform: (B,) in [0, 1).
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # Rounding can leave the last sum below 1; u is scaled so that it never falls beyond it.
    threshold = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(
        max=logits.shape[-1] - 1
    )


def sample(
    backbone: Backbone,
    prompts: Tokens,
    seeds: Sequence[int],
    decoding: Decoding,
    max_response_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
) -> Tokens:
    """One response per prompt, from the active role.

    A response ends with its first stop token, which belongs to it; one that reaches
    `max_response_tokens` without is marked truncated.

    Args:
        prompts: (B, P) without responses. seeds: one per row.

    Returns:
        prompts and responses, T = the longest response.
    """
    from transformers import DynamicCache

    device, count = prompts.input_ids.device, len(prompts)
    randomness = uniforms(seeds, max_response_tokens).to(device)
    stops = torch.tensor(list(stop_ids), device=device)
    responses = torch.full((count, max_response_tokens), pad_id, device=device)
    lengths = torch.full((count,), max_response_tokens, device=device)
    truncated = torch.ones(count, dtype=torch.bool, device=device)
    rows = torch.arange(count, device=device)  # of the responses that are still being written
    mask, ids, position = prompts.attention_mask, prompts.input_ids, prompts.position_ids
    broken = torch.zeros((), dtype=torch.bool, device=device)
    with backbone.inference():
        cache = DynamicCache(config=backbone.model.config)
        for t in range(max_response_tokens):
            output = backbone.model(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            logits = backbone.output_layer(output.logits[:, -1]).float() / decoding.temperature
            broken |= ~(logits.amax(dim=1).isfinite().all())  # NaN, +inf, or nothing but -inf
            chosen = draw(logits, randomness[rows, t])
            position = position[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            going = truncated[rows]  # rows that had ended before are still carried along
            responses[rows[going], t] = chosen[going]
            ended = going & torch.isin(chosen, stops)
            lengths[rows[ended]] = t + 1
            truncated[rows[ended]] = False
            keep = truncated[rows]
            if not keep.any():
                break
            if keep.float().mean() < COMPACT_BELOW:
                rows, mask, position, chosen = rows[keep], mask[keep], position[keep], chosen[keep]
                # Not batch_select_indices, which states of linear attention do not have.
                cache.reorder_cache(cast(Any, keep.nonzero()[:, 0]))
            ids = chosen[:, None]
    if bool(broken):  # asked once a rollout, since asking waits for the device
        raise FloatingPointError("the policy gives no probabilities: NaN or infinite logits")
    width = int(lengths.max())
    response_mask = torch.arange(width, device=device) < lengths[:, None]
    return Tokens(
        torch.cat([prompts.input_ids, responses[:, :width]], dim=1),
        torch.cat([prompts.attention_mask, response_mask], dim=1),
        prompts.prompt_length,
        truncated,
    )
