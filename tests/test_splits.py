"""Splits by prompt: the same prompt never stands on both sides."""

import hashlib
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcrlhf.errors import InputError
from hcrlhf.examples import Message, Pair, Prompt, prompt_key, user_turn
from hcrlhf.splits import in_validation, require_disjoint, split_by_prompt

seeded = settings(deadline=None, derandomize=True, max_examples=50)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(user_turn(f"question number {i}")) for i in range(count)]


def dialogue(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in turns)


# -- keys ------------------------------------------------------------------------------------------


def test_a_key_is_the_hash_of_the_folded_opening() -> None:
    # SHA-256 of "hello world", as any other tool gives it.
    expected = "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9"
    assert prompt_key(user_turn("hello world")) == expected
    assert Prompt(user_turn("  Hello\n\tWORLD ")).key == expected


@pytest.mark.parametrize("other", ["hello worlds", "helloworld", "hello world?", ""])
def test_different_openings_have_different_keys(other: str) -> None:
    assert prompt_key(user_turn(other)) != prompt_key(user_turn("hello world"))


@pytest.mark.parametrize(
    "messages",
    [
        dialogue(("user", "How?"), ("assistant", "So."), ("user", "And then?")),
        dialogue(("user", "How?"), ("assistant", "Not."), ("user", "Why?")),
        dialogue(("system", "Be brief."), ("user", "how?")),
        dialogue(("assistant", "Hello!"), ("user", " HOW? ")),
    ],
)
def test_dialogues_that_share_an_opening_share_a_key(messages: Sequence[Message]) -> None:
    assert prompt_key(messages) == prompt_key(user_turn("How?"))


# -- sides -----------------------------------------------------------------------------------------


def test_rows_of_one_prompt_all_fall_on_one_side() -> None:
    pairs = [
        Pair(user_turn(f"question number {i % 100}"), f"a{i}", f"b{i}", True, False)
        for i in range(1000)
    ]
    training, validation = split_by_prompt(pairs, 0.3, "pairs.jsonl")
    assert len(training) + len(validation) == 1000
    assert not {p.key for p in training} & {p.key for p in validation}
    assert {len([p for p in training if p.key == key]) for key in {p.key for p in training}} == {10}


def test_dialogues_that_share_an_opening_share_a_side() -> None:
    rows = [
        Prompt(dialogue(("user", f"{i}?"), ("assistant", reply), ("user", follow_up)))
        for i in range(50)
        for reply, follow_up in (("Yes.", "Sure?"), ("No.", "Why?"))
    ]
    training, validation = split_by_prompt(rows, 0.5, "dialogues.jsonl")
    openings = [{row.messages[0]["content"] for row in side} for side in (training, validation)]
    assert not openings[0] & openings[1]
    assert len(openings[0]) + len(openings[1]) == 50


def test_the_side_of_a_prompt_depends_on_nothing_but_the_prompt() -> None:
    everything = prompts(400)
    _, validation = split_by_prompt(everything, 0.2, "a.jsonl")
    _, of_reversed = split_by_prompt(everything[::-1], 0.2, "b.jsonl")
    assert of_reversed == validation[::-1]
    _, of_half = split_by_prompt(everything[:200], 0.2, "c.jsonl")
    assert of_half == [p for p in everything[:200] if p in validation]


def test_a_split_keeps_the_order_and_loses_no_row() -> None:
    everything = prompts(100)
    training, validation = split_by_prompt(everything, 0.3, "a.jsonl")
    kept = [p for p in everything if p in training], [p for p in everything if p in validation]
    assert (training, validation) == kept
    assert sorted(p.key for p in training + validation) == sorted(p.key for p in everything)


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_about_the_fraction_of_prompts_is_held_out(fraction: float) -> None:
    count = 5000
    _, validation = split_by_prompt(prompts(count), fraction, "a.jsonl")
    tolerance = 4 * math.sqrt(fraction * (1 - fraction) / count)
    assert len(validation) / count == pytest.approx(fraction, abs=tolerance)


@seeded
@given(st.integers(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds_prompts_to_validation(
    number: int, one: float, two: float
) -> None:
    key = prompt_key(user_turn(f"question number {number}"))
    small, large = sorted((one, two))
    assert in_validation(key, large) or not in_validation(key, small)
    assert not in_validation(key, 0.0)
    assert in_validation(key, 1.0)


def test_the_side_is_read_off_a_hash_that_never_changes() -> None:
    # 256 · the fraction of the first two hex digits: a side can be told from any other program.
    for prompt in prompts(50):
        first = int(hashlib.sha256(f"validation/{prompt.key}".encode()).hexdigest()[:2], 16)
        assert in_validation(prompt.key, 64 / 256) == (first < 64)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, math.nan])
def test_a_fraction_outside_zero_and_one_is_refused(fraction: float) -> None:
    message = rf"validation_fraction lies in \(0, 1\), got {fraction}"
    with pytest.raises(InputError, match=message):
        split_by_prompt(prompts(10), fraction, "a.jsonl")


@pytest.mark.parametrize(("fraction", "empty"), [(1e-12, "validation"), (1 - 1e-12, "training")])
def test_an_empty_side_is_refused_with_its_name_and_file(fraction: float, empty: str) -> None:
    message = f"a.jsonl: the {empty} split is empty .3 examples, validation_fraction {fraction}"
    with pytest.raises(InputError, match=message):
        split_by_prompt(prompts(3), fraction, "a.jsonl")


# -- overlap ---------------------------------------------------------------------------------------


def test_disjoint_sets_are_accepted() -> None:
    keys = [p.key for p in prompts(20)]
    require_disjoint(keys[:10], keys[10:], "safety", "training")
    require_disjoint([], keys, "safety", "training")


@pytest.mark.parametrize("shorten", [64, 32])
def test_an_overlap_is_refused_with_its_size_and_without_the_prompt(shorten: int) -> None:
    secret = "how to do a terrible thing"
    ours = [p.key for p in [*prompts(4), Prompt(user_turn(secret))]]
    theirs = {Prompt(user_turn(secret.upper())).key[:shorten], prompts(1)[0].key[:shorten]}
    with pytest.raises(InputError) as caught:
        require_disjoint(ours, theirs, "safety", "earlier stages'")
    message = str(caught.value)
    assert "2 of 5 safety prompts are also earlier stages' prompts" in message
    assert "terrible" not in message and "question" not in message
    # Enough of a key to find the prompt by, for someone who has the file.
    assert any(key[:12] in message for key in ours)


def test_keys_that_agree_in_less_than_32_digits_are_different_prompts() -> None:
    require_disjoint(["0" * 31 + "1" * 33], ["0" * 31 + "2" * 33], "safety", "training")
