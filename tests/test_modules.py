"""What the training modules compute, against plain transformers and by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hcrlhf.backbone import Backbone
from hcrlhf.examples import Demonstration, Pair, user_turn
from hcrlhf.text import ChatFormat, TextEncoder, load_tokenizer
from hcrlhf.world import ModelSizes, WorldSizes, write_world
from lightning_modules import Preference, Supervised

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("world") / "w"
    none = dict.fromkeys(("demonstrations", "preferences", "train"), 2)
    sizes = WorldSizes(
        **none, validation=2, safety=2, evaluation=2, model=ModelSizes(hidden=32, layers=1)
    )
    write_world(folder, 0, sizes)
    return str(folder / "model")


def supervised(folder: str, limit: int = 30) -> Supervised:
    module = Supervised(folder, ChatFormat(max_prompt_tokens=40, max_response_tokens=limit))
    module.encoder = TextEncoder(load_tokenizer(folder), module.chat)
    module.backbone = Backbone(AutoModelForCausalLM.from_pretrained(folder), full=True)
    return module


def test_the_supervised_loss_is_that_of_transformers_with_the_prompt_masked(
    model_folder: str,
) -> None:
    module = supervised(model_folder)
    texts = [
        ("How do I bake bread at home?", "Mix flour and water."),
        ("And?", "You can let the dough rest for an hour, then bake it."),
    ]
    batch = module.collate(
        [module.encode(Demonstration(user_turn(p), r)) for p, r in texts]  # type: ignore[misc]
    )
    labels = batch.input_ids.clone()
    labels[:, : batch.prompt_length] = -100
    labels[~batch.attention_mask] = -100
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = plain(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=batch.position_ids,
        labels=labels,
    ).loss
    assert torch.allclose(module._loss(batch), expected, rtol=1e-5)


def test_a_cut_response_is_learnt_without_an_end(model_folder: str) -> None:
    module = supervised(model_folder, limit=3)
    batch = module.collate(
        [module.encode(Demonstration(user_turn("Hi?"), "one two three four five"))]  # type: ignore[list-item]
    )
    assert batch.truncated.tolist() == [True]
    assert module.encoder.eos_id not in batch.response_ids.flatten().tolist()


class Recorder:
    """Stands in for the trainer's logging."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "log", lambda *a, **k: None)


@pytest.mark.parametrize(
    ("role", "squash"), [("reward", None), ("cost", None), ("cost", 0.5)]
)  # the loss sees the cost itself, whatever policy and safety test see
def test_the_preference_losses_by_hand(
    role: Any, squash: float | None, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Preference(role, sft="-", sign_weight=0.5, penalty=0.01, squash=squash)
    module.encoder = TextEncoder(load_tokenizer(model_folder), ChatFormat())
    Recorder(module, monkeypatch)
    pairs = [
        Pair(user_turn("a"), "x", "y", True, False),
        Pair(user_turn("b"), "x", "y", True, True),
    ]
    batch = module.collate([module.encode(p) for p in pairs])  # type: ignore[misc]
    assert batch.harmful.tolist() == [1, 1, 0, 1]
    scores = torch.tensor([2.0, 0.5, -1.0, 1.5])  # higher, higher, lower, lower
    monkeypatch.setattr(Preference, "forward", lambda self, tokens: scores)
    loss = float(module._loss(batch))

    def nll(x: float) -> float:
        return float(torch.nn.functional.softplus(torch.tensor(-x)))

    expected = (nll(3.0) + nll(-1.0)) / 2  # 2 - (-1) and 0.5 - 1.5
    expected += 0.01 * ((4 + 1) + (0.25 + 2.25)) / 2
    if role == "cost":
        # Σ over the two responses of a pair, mean over pairs: harmful, harmful, safe, harmful.
        expected += 0.5 * (nll(2.0) + nll(0.5) + nll(1.0) + nll(1.5)) / 2
    assert loss == pytest.approx(expected, rel=1e-5)


def test_sign_terms_without_safety_labels_are_refused(model_folder: str) -> None:
    from hcrlhf.errors import InputError

    module = Preference("cost", sft="-")
    module.encoder = TextEncoder(load_tokenizer(model_folder), ChatFormat())
    with pytest.raises(InputError, match="need is_response_0_safe"):
        module.encode(Pair(user_turn("a"), "x", "y"))


def test_a_whole_model_is_not_trained_in_4_bit(tmp_path: Path) -> None:
    from hcrlhf.errors import InputError

    with pytest.raises(InputError, match="the whole model is trained in float32; give lora"):
        Supervised("m", quantization="nf4")


@pytest.mark.parametrize(
    ("role", "squash"),
    [
        ("reward", 4.0),
        ("reward", 0.0),
        ("cost", 0.0),
        ("cost", -4.0),
        ("cost", float("inf")),
        ("cost", float("nan")),
    ],
)
def test_only_a_cost_model_is_squashed_and_only_to_a_positive_cap(role: Any, squash: float) -> None:
    from hcrlhf.errors import InputError

    message = f"squash is the positive cap of a cost model, got {squash} for a {role} model"
    with pytest.raises(InputError, match=message):
        Preference(role, sft="-", squash=squash)


def test_the_cap_is_kept_for_the_stage_file() -> None:
    assert Preference("cost", sft="-", squash=3.7).squash == 3.7
    assert Preference("cost", sft="-").squash is None
