"""What a stage is said to take, against the tensors that it makes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hcrlhf.backbone import Backbone, LoraOptions, load_causal_lm
from hcrlhf.doctor import remedies
from hcrlhf.footprint import LiveBytes, Sizes, _footprint, _joined, footprint
from hcrlhf.gradients import known_gradient
from hcrlhf.rollouts import Decoding, sample
from hcrlhf.stages import BackboneSource
from hcrlhf.text import Encoded, Tokens, collate

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT, RESPONSE, ROWS, ROLLOUT_ROWS = 24, 40, 4, 8
LORA = LoraOptions(4, 8)
TOLERANCE = 0.1


def test_live_bytes_follow_storages_and_not_views() -> None:
    with LiveBytes() as live:
        x = torch.zeros(100)
        view = x[:10]
        assert (live.now, live.peak) == (400, 400)
        y = x + 1
        assert live.now == 800
        del x
        assert live.now == 800  # the view keeps the storage
        del view
        assert live.now == 400
        assert live.peak == 800
        assert live.restart() == live.peak == 400
        del y
    assert live.now == 0


def model_of(tmp_path: Path, make_llama: Any, **changes: Any) -> Any:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "vocab_size": 1500,
    }
    make_llama(**{**sizes, **changes}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def policy_sizes(source: dict[str, Any], **changes: Any) -> Sizes:
    return Sizes(
        stage="policy",
        quantization=source.get("quantization", "none"),
        dtype=source.get("dtype", "float32"),
        lora=LORA,
        prompt=PROMPT,
        response=RESPONSE,
        rows=ROWS,
        score_rows=ROWS,
        rollout_rows=ROLLOUT_ROWS,
        test_rows=ROLLOUT_ROWS,
        **changes,
    )


def backbone(
    folder: Path, source: dict[str, Any], checkpointing: bool, frozen: int, critics: int = 0
) -> Backbone:
    model = load_causal_lm(BackboneSource(str(folder), **source))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    result = Backbone(model, quantized=source.get("quantization") == "nf4")
    result.add_role("policy", LORA, trainable=True)
    for i in range(frozen):
        result.add_role(f"frozen{i}", LORA, trainable=False)
    for name in [f"critic{i}" for i in range(critics)]:
        result.add_role(name, LORA, trainable=True)
        result.add_head(name, trainable=True)
    if not critics:
        result.add_head("value", trainable=True)
    return result


def tokens(rows: int, response: int = RESPONSE) -> Tokens:
    return collate([Encoded([7] * PROMPT, [8] * response) for _ in range(rows)], pad_id=0)


@contextmanager
def counted(found: dict[str, int], name: str) -> Iterator[None]:
    with LiveBytes() as live:
        yield
    found[name] = live.peak


def measured(own: Backbone, mixed: bool, unpacked: bool = False) -> dict[str, int]:
    """Peaks beside the weights, of the same passes as a policy makes."""
    found: dict[str, int] = {}
    roles = list(own.roles)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False)
    copies = own.unpacked() if unpacked else nullcontext()
    with counted(found, "rollout"), autocast, own.merged("policy"), copies:
        never = [10**6]
        sample(own, tokens(ROLLOUT_ROWS, 0), [0] * ROLLOUT_ROWS, Decoding(), RESPONSE, never, 0)
    copies = own.unpacked() if unpacked else nullcontext()  # as a look at a candidate draws
    with counted(found, "test"), own.merged("policy"), copies:
        sample(own, tokens(ROLLOUT_ROWS, 0), [0] * ROLLOUT_ROWS, Decoding(), RESPONSE, never, 0)
    with counted(found, "score"), autocast, own.inference():
        readers = {role: (lambda h, t: h[:, -1]) for role in roles}
        readers["policy"] = lambda h, t: own.log_probs(h, t)
        own.read([tokens(ROWS)], readers)
    own.train()
    own.restore_trainable()
    critics = [role for role in roles if role.startswith("critic")]
    with counted(found, "update"):
        for _ in range(2):
            with own.role("policy"):
                with autocast:
                    hidden = own.hidden(tokens(ROWS))
                    loss = own.log_probs(hidden, tokens(ROWS)).sum()
                    if not critics:
                        loss = loss + own.values("value", hidden, tokens(ROWS)).sum()
                del hidden
                loss.backward()
            for critic in critics:
                with own.role(critic):
                    with autocast:
                        hidden = own.hidden(tokens(ROWS))
                        loss = own.values(critic, hidden, tokens(ROWS)).sum()
                    del hidden
                    loss.backward()
    return found


SOURCES: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"dtype": "bfloat16"}, True),
    ({"quantization": "nf4"}, False),
    ({"quantization": "nf4", "dtype": "bfloat16"}, True),
]


# Every two settings meet; all three together would take another minute.
@pytest.mark.parametrize(
    ("source", "mixed", "checkpointing", "critics"),
    [
        (*of, checkpointing, 2 * ((place + checkpointing) % 2))
        for place, of in enumerate(SOURCES)
        for checkpointing in (False, True)
    ],
)
def test_what_is_foretold_is_what_is_taken(
    tmp_path: Path,
    make_llama: Any,
    source: dict[str, Any],
    mixed: bool,
    checkpointing: bool,
    critics: int,
) -> None:
    folder = model_of(tmp_path, make_llama)
    own = backbone(folder, source, checkpointing, frozen=2, critics=critics)
    storages = {t.untyped_storage() for t in own.state_dict().values()}
    weights = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    found = measured(own, mixed)
    sizes = policy_sizes(
        source,
        mixed=mixed,
        frozen=2,
        shared_heads=0 if critics else 1,
        critics=critics,
        merged=not source,
        checkpointing=checkpointing,
    )
    told = footprint(AutoConfig.from_pretrained(folder), sizes, "cpu")
    assert told.trained == sum(p.numel() for _, p in own.trained_parameters())
    config, known = own.model.config, PROMPT + RESPONSE - 1  # the last token is not read again
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    bytes_ = 2 if source.get("dtype") == "bfloat16" else 4
    assert told.cache == ROLLOUT_ROWS * known * width * bytes_
    assert told.parts["backbone"] + told.parts["adapters"] == pytest.approx(weights, rel=0.03)
    for phase, peak in found.items():
        assert told.working[phase] + weights == pytest.approx(peak + weights, rel=TOLERANCE), phase


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("stage", ["supervised", "preference"])
@pytest.mark.parametrize(
    ("source", "mixed"), [({"quantization": "nf4"}, False), ({"dtype": "bfloat16"}, True)]
)
def test_the_earlier_stages_and_their_optimizer_step_are_foretold_too(
    tmp_path: Path,
    make_llama: Any,
    source: dict[str, Any],
    mixed: bool,
    stage: Any,
    accumulated: bool,
) -> None:
    folder = model_of(tmp_path, make_llama)
    own = backbone(folder, source, checkpointing=True, frozen=0)
    if stage == "supervised":
        own.heads.clear()
    storages = {t.untyped_storage() for t in own.state_dict().values()}
    weights = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    trained = [p for _, p in own.trained_parameters()]
    # As on a GPU, where AdamW works on all weights together.
    optimizer = torch.optim.AdamW(trained, foreach=True)
    own.train()
    own.restore_trainable()
    found = {}

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
            # Two passes, whose activations live until one backward pass.
            states = [own.hidden(tokens(ROWS)) for _ in range(2)]
            if stage == "supervised":
                losses = [own.log_probs(x, tokens(ROWS)).sum() for x in states]
            else:
                losses = [own.scores("value", x, tokens(ROWS)).sum() for x in states]
            return torch.stack(losses).sum()

    with LiveBytes() as live:
        with own.role("policy"):
            for _ in range(1 + accumulated):
                known_gradient(loss, trained).backward()
        found["update"] = live.peak
        live.restart()
        optimizer.step()
        found["step"] = live.peak
    sizes = replace(policy_sizes(source, mixed=mixed, checkpointing=True), stage=stage)
    told = footprint(
        AutoConfig.from_pretrained(folder), replace(sizes, batch=2, accumulated=accumulated), "cpu"
    )
    states_of_optimizer = {"update": 0, "step": told.parts["optimizer"]}  # made in the first step
    assert told.trained == sum(p.numel() for p in trained)
    for phase, peak in found.items():
        foretold = told.working[phase] + states_of_optimizer[phase] + weights
        assert foretold == pytest.approx(peak + weights, rel=TOLERANCE), phase


def test_half_a_batch_is_foretold_beside_the_gradient_of_the_other_half() -> None:
    sizes = replace(policy_sizes({}, mixed=False), stage="supervised", rows=4, batch=2)
    (halved,) = (smaller for key, smaller in remedies(sizes).items() if "batch_size" in key)
    assert (halved.rows, halved.batch, halved.accumulated) == (4, 1, True)


def test_unpacked_rollouts_are_foretold_too(tmp_path: Path, make_llama: Any) -> None:
    folder = model_of(tmp_path, make_llama)
    source = {"quantization": "nf4"}
    own = backbone(folder, source, checkpointing=True, frozen=2, critics=0)
    packed = measured(own, mixed=False)
    unpacked = measured(own, mixed=False, unpacked=True)
    sizes = policy_sizes(source, mixed=False, frozen=2, shared_heads=1, checkpointing=True)
    config = AutoConfig.from_pretrained(folder)
    told, more = (footprint(config, replace(sizes, unpacked=u), "cpu") for u in (False, True))
    weights = sum(told.parts.values()) - told.parts["optimizer"]
    for found, foretold in ((packed, told), (unpacked, more)):
        for phase, peak in found.items():
            expected = pytest.approx(peak + weights, rel=TOLERANCE)
            assert foretold.working[phase] + weights == expected, phase
    from bitsandbytes.nn import Linear4bit

    layers = [layer for layer in own.modules() if isinstance(layer, Linear4bit)]
    linear = sum(4 * layer.in_features * layer.out_features for layer in layers)
    # All but the largest layer's, which the packed passes unpack as well.
    assert 0.5 * linear < more.working["rollout"] - told.working["rollout"] <= linear
    assert more.working["score"] == told.working["score"]


# With wide layers the first token of a rollout takes the most in a shallow model and the last one,
# with its cache, in a deep one.
@pytest.mark.parametrize(("stage", "wide"), [("policy", 512), ("preference", 128)])
def test_a_deep_model_is_foretold_from_a_shallow_one(
    make_llama: Any, stage: Any, wide: int
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": wide, "vocab_size": 2000}
    config = make_llama(num_hidden_layers=13, **shape).config
    source = {"quantization": "nf4", "dtype": "bfloat16"}
    sizes = policy_sizes(source, mixed=True, frozen=3, shared_heads=2, checkpointing=True)
    sizes = replace(sizes, stage=stage)
    quick, whole = footprint(config, sizes), _joined(_footprint(config, sizes, "cuda"))
    assert (quick.parameters, quick.trained) == (whole.parameters, whole.trained)
    assert quick.parts == whole.parts
    for phase, bytes_ in whole.phases.items():
        assert quick.phases[phase] == pytest.approx(bytes_, rel=0.01), phase


def test_log_probabilities_take_a_chunk_of_logits_whatever_the_vocabulary(
    tmp_path: Path, make_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcrlhf.backbone.LOGITS", 2**16)
    peaks: dict[str, list[int]] = {"training": [], "scoring": []}
    for vocabulary in (2_000, 20_000):
        folder = model_of(tmp_path / str(vocabulary), make_llama, vocab_size=vocabulary)
        own = backbone(folder, {}, False, frozen=0)
        hidden = torch.randn(ROWS, PROMPT + RESPONSE, own.hidden_size, requires_grad=True)
        for name, found in peaks.items():
            with torch.set_grad_enabled(name == "training"), LiveBytes() as live:
                result = own.log_probs(hidden, tokens(ROWS))
                if name == "training":
                    result.sum().backward()
            found.append(live.peak)
    for small, large in peaks.values():
        assert large < 1.2 * small
        assert large < ROWS * RESPONSE * 20_000 * 4 / 8
