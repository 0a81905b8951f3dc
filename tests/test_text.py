"""Rendering, padding and masks, by hand on a tokenizer with one token per character."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hcrlhf.errors import InputError
from hcrlhf.examples import (
    Demonstration,
    EncodesExamples,
    Message,
    Pair,
    Prompt,
    prompt_key,
    user_turn,
)
from hcrlhf.text import (
    ChatFormat,
    Encoded,
    TextEncoder,
    Tokens,
    collate,
    join,
    load_tokenizer,
    one_line,
)

PAD, BOS, EOS, NEWLINE = 0, 1, 2, 4
MakeTokenizer = Callable[..., Any]


def ids_of(text: str) -> list[int]:
    return [NEWLINE if c == "\n" else ord(c) - ord(" ") + 5 for c in text]


def turns(*contents: str) -> list[Message]:
    """User and assistant in turn, the user first."""
    return [
        Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(contents)
    ]


def assert_same(a: Tokens, b: Tokens) -> None:
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a.attention_mask, b.attention_mask)
    assert torch.equal(a.truncated, b.truncated)
    assert a.prompt_length == b.prompt_length


SHORT_AND_LONG = [
    Encoded([5, 6, 7], [8]),
    Encoded([9], [10, 11, EOS]),
    Encoded([12, 13], [14, 15], truncated=True),
]


# -- padding ---------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left_and_responses_on_the_right() -> None:
    tokens = collate(SHORT_AND_LONG, PAD)
    assert tokens.input_ids.tolist() == [
        [5, 6, 7, 8, 0, 0],
        [0, 0, 9, 10, 11, 2],
        [0, 12, 13, 14, 15, 0],
    ]
    assert tokens.attention_mask.int().tolist() == [
        [1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 0],
    ]
    assert tokens.prompt_length == 3
    assert tokens.response_ids.tolist() == [[8, 0, 0], [10, 11, 2], [14, 15, 0]]
    assert tokens.response_mask.int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert tokens.truncated.tolist() == [False, False, True]
    assert len(tokens) == 3
    assert tokens.input_ids.dtype == torch.long
    assert tokens.attention_mask.dtype == tokens.truncated.dtype == torch.bool


def test_a_response_that_ends_with_the_padding_token_keeps_it() -> None:
    # pad == EOS: the two columns of EOS in row 0 are one real token and one of padding.
    tokens = collate([Encoded([5], [8, EOS]), Encoded([EOS, 6], [7, 8, EOS])], pad_id=EOS)
    assert tokens.input_ids.tolist() == [[2, 5, 8, 2, 2], [2, 6, 7, 8, 2]]
    assert tokens.attention_mask.int().tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_positions_count_real_tokens_from_zero() -> None:
    tokens = collate(SHORT_AND_LONG, PAD)
    for positions, mask in zip(tokens.position_ids, tokens.attention_mask, strict=True):
        assert positions[mask].tolist() == list(range(int(mask.sum())))
    # Padding needs some position that exists in the model, too.
    assert int(tokens.position_ids.min()) >= 0
    assert int(tokens.position_ids.max()) <= 3


def test_bare_prompts_have_no_response_columns() -> None:
    tokens = collate([Encoded([5, 6], []), Encoded([7], [])], PAD)
    assert tokens.input_ids.tolist() == [[5, 6], [0, 7]]
    assert tokens.response_ids.shape == tokens.response_mask.shape == (2, 0)


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_joining_batches_is_collating_their_sequences_together(pad_id: int) -> None:
    more = [Encoded([20, 21, 22, 23], [24, EOS]), Encoded([25], [])]
    joined = join([collate(SHORT_AND_LONG, pad_id), collate(more, pad_id)], pad_id)
    assert_same(joined, collate([*SHORT_AND_LONG, *more], pad_id))


def test_joined_batches_are_the_hand_worked_columns() -> None:
    a, b = collate([Encoded([5, 6], [7])], PAD), collate([Encoded([8], [9, 10], True)], PAD)
    joined = join([a, b], PAD)
    assert joined.input_ids.tolist() == [[5, 6, 7, 0], [0, 8, 9, 10]]
    assert joined.attention_mask.int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert joined.prompt_length == 2
    assert joined.truncated.tolist() == [False, True]


def test_rows_keep_all_columns() -> None:
    tokens = collate(SHORT_AND_LONG, PAD)
    picked = tokens.rows(torch.tensor([2, 0]))
    assert picked.input_ids.tolist() == [[0, 12, 13, 14, 15, 0], [5, 6, 7, 8, 0, 0]]
    assert picked.attention_mask.int().tolist() == [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
    assert picked.truncated.tolist() == [True, False]
    assert_same(tokens.rows(slice(0, 3)), tokens)
    assert_same(tokens.to("cpu"), tokens)


# -- encoding --------------------------------------------------------------------------------------


def test_a_dialogue_without_template_is_the_plain_form(make_tokenizer: MakeTokenizer) -> None:
    encoder = TextEncoder(make_tokenizer(), ChatFormat())
    assert encoder.prompt_ids(user_turn("hi")) == [BOS, *ids_of("Human: hi\n\nAssistant:\n")]
    assert encoder.prompt_ids(turns("hi", "yo", "why?")) == [
        BOS,
        *ids_of("Human: hi\n\nAssistant:\nyo"),
        EOS,
        *ids_of("\n\nHuman: why?\n\nAssistant:\n"),
    ]


def test_a_response_is_tokenised_alike_when_it_is_learnt_and_when_it_is_read_back(
    make_tokenizer: MakeTokenizer,
) -> None:
    encoder = TextEncoder(make_tokenizer(), ChatFormat())
    learnt = encoder.encode(turns("hi"), "yo")
    assert learnt is not None
    whole = learnt.prompt + learnt.response
    assert encoder.prompt_ids(turns("hi", "yo", "why?"))[: len(whole)] == whole


def test_a_response_begins_without_the_space_that_a_tokenizer_puts_before_a_text() -> None:
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "</s>", "\n", "▁", *map(chr, range(33, 127))]
    backend = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    # As SentencePiece does it.
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>"
    )
    encoder = TextEncoder(tokenizer, ChatFormat())
    learnt = encoder.encode(turns("hi"), "yo")
    assert learnt is not None
    assert tokenizer.convert_ids_to_tokens(learnt.response) == ["y", "o", "</s>"]
    whole = learnt.prompt + learnt.response
    assert encoder.prompt_ids(turns("hi", "yo", "why?"))[: len(whole)] == whole


def test_a_beginning_token_is_not_doubled(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    assert tokenizer("a")["input_ids"] == [BOS, *ids_of("a")]
    encoded = TextEncoder(tokenizer, ChatFormat()).encode(user_turn("a"), "b")
    assert encoded is not None
    assert encoded.prompt.count(BOS) == 1
    assert encoded.response == [*ids_of("b"), EOS]


def test_the_system_prompt_comes_first(make_tokenizer: MakeTokenizer) -> None:
    encoder = TextEncoder(make_tokenizer(), ChatFormat(system_prompt="Be kind."))
    messages = user_turn("hi")
    expected = [BOS, *ids_of("Be kind.\n\nHuman: hi\n\nAssistant:\n")]
    assert encoder.prompt_ids(messages) == expected
    assert messages == user_turn("hi")
    assert encoder.prompt_ids(messages) == expected


def test_the_template_of_the_format_outranks_that_of_the_tokenizer(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "[{{ messages[0]['content'] }}]"
    assert TextEncoder(tokenizer, ChatFormat()).prompt_ids(user_turn("q")) == ids_of("[q]")
    chat = ChatFormat(chat_template="<{{ messages[0]['content'] }}>")
    assert TextEncoder(tokenizer, chat).prompt_ids(user_turn("q")) == ids_of("<q>")


def test_eos_follows_a_response_only_where_it_fits(make_tokenizer: MakeTokenizer) -> None:
    encoder = TextEncoder(make_tokenizer(), ChatFormat(max_response_tokens=3))
    prompt = encoder.prompt_ids(user_turn("q"))
    assert encoder.encode(user_turn("q"), "") == Encoded(prompt, [EOS])
    assert encoder.encode(user_turn("q"), "ab") == Encoded(prompt, [*ids_of("ab"), EOS])
    assert encoder.encode(user_turn("q"), "abc") == Encoded(prompt, ids_of("abc"), truncated=True)
    assert encoder.encode(user_turn("q"), "abcd") == Encoded(prompt, ids_of("abc"), truncated=True)
    assert encoder.encode(user_turn("q"), None) == Encoded(prompt, [])


def test_a_prompt_at_the_limit_is_kept_and_one_above_it_is_left_out(
    make_tokenizer: MakeTokenizer,
) -> None:
    # <s>, "Human: ab", two newlines, "Assistant:" and a newline: 1 + 9 + 2 + 10 + 1.
    encoder = TextEncoder(make_tokenizer(), ChatFormat(max_prompt_tokens=23))
    kept = encoder.encode(user_turn("ab"), "x")
    assert kept is not None
    assert len(kept.prompt) == 23
    assert encoder.encode(user_turn("abc"), "x") is None
    assert encoder.encode(user_turn("abc"), None) is None


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_decoding_gives_responses_without_padding_and_special_tokens(
    make_tokenizer: MakeTokenizer, pad: str
) -> None:
    encoder = TextEncoder(make_tokenizer(pad=pad), ChatFormat(max_response_tokens=6))
    texts = ["two", "", "one two", " a b "]
    encoded = [encoder.encode(user_turn("q" * i), text) for i, text in enumerate(texts)]
    tokens = collate([e for e in encoded if e is not None], encoder.pad_id)
    assert encoder.decode(tokens) == ["two", "", "one tw", "a b"]


def test_decoding_goes_by_the_mask_and_not_by_the_padding_token(
    make_tokenizer: MakeTokenizer,
) -> None:
    encoder = TextEncoder(make_tokenizer(), ChatFormat())
    tokens = collate([Encoded([5], ids_of("a")), Encoded([5], ids_of("bcd"))], ids_of("x")[0])
    assert encoder.decode(tokens) == ["a", "bcd"]


def test_a_tokenizer_without_eos_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(InputError, match=r"no EOS token.*set eos_token"):
        TextEncoder(make_tokenizer(eos=None), ChatFormat())


def test_a_tokenizer_without_padding_pads_with_eos_and_says_so_once(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(pad=None)
    with pytest.warns(UserWarning, match="no padding token") as caught:
        encoder = TextEncoder(tokenizer, ChatFormat())
    assert len(caught) == 1
    assert encoder.pad_id == encoder.eos_id == EOS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextEncoder(tokenizer, ChatFormat())


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system turns here') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{% for m in messages %}",
        "\n\n{% if %}",
    ],
)
def test_a_template_that_fails_is_an_input_error_of_one_line(
    make_tokenizer: MakeTokenizer, template: str
) -> None:
    chat = ChatFormat(system_prompt="Be kind.", chat_template=template)
    with pytest.raises(InputError, match="chat template cannot render 'system'") as caught:
        TextEncoder(make_tokenizer(), chat).prompt_ids(user_turn("q"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["max_prompt_tokens", "max_response_tokens"])
def test_lengths_below_one_token_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} .* got 0"):
        ChatFormat(**{name: 0})


def test_a_tokenizer_read_from_a_folder_gives_the_same_ids(model_folder: Path) -> None:
    encoder = TextEncoder(load_tokenizer(str(model_folder)), ChatFormat())
    assert (encoder.pad_id, encoder.eos_id) == (PAD, EOS)
    assert encoder.prompt_ids(user_turn("hi")) == [BOS, *ids_of("Human: hi\n\nAssistant:\n")]


def test_a_folder_without_tokenizer_is_an_input_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer could be read from") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_exception_is_folded_into_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("abcdef"), limit=4) == "abc…"


# -- examples --------------------------------------------------------------------------------------


def test_a_prompt_key_ignores_case_and_spaces() -> None:
    expected = hashlib.sha256(b"hello world").hexdigest()
    for text in ("hello world", "  Hello \n WORLD\t"):
        assert prompt_key(user_turn(text)) == expected
    assert prompt_key(user_turn("hello worlds")) != expected


def test_dialogues_with_one_opening_share_their_key() -> None:
    opening = Prompt(user_turn("hello")).key
    assert Prompt(tuple(turns("hello", "yes?", "bye"))).key == opening
    system = Message(role="system", content="Be kind.")
    assert Prompt((system, *user_turn("hello"))).key == opening
    assert Prompt(tuple(turns("bye", "yes?", "hello"))).key != opening


def test_an_example_is_known_by_its_prompt() -> None:
    messages = tuple(turns("hello", "yes?", "why?"))
    demonstration = Demonstration(messages, "because")
    pair = Pair(messages, higher="a", lower="b")
    assert demonstration.key == pair.key == Prompt(messages).key
    assert demonstration.text == pair.text == "why?"
    assert pair.higher_harmful is pair.lower_harmful is None


def test_what_encodes_and_collates_counts_as_an_encoder() -> None:
    class Encoder:
        def encode(self, example: Any) -> Any | None: ...

        def collate(self, encoded: list[Any]) -> Any: ...

    assert isinstance(Encoder(), EncodesExamples)
    assert not isinstance(object(), EncodesExamples)


def test_groups_by_length_hold_every_row_once_and_short_ones_first() -> None:
    tokens = collate(
        [Encoded([1], [2] * 5), Encoded([1] * 4, []), Encoded([1, 1], [2]), Encoded([1], [2, 2])], 0
    )
    assert tokens.lengths.tolist() == [6, 4, 3, 3]
    assert [g.tolist() for g in tokens.by_length(3)] == [[2, 3, 1], [0]]
    assert [g.tolist() for g in tokens.by_length(None)] == [[2, 3, 1, 0]]


def test_common_padding_is_cut_before_the_longest_prompt_and_nowhere_else() -> None:
    tokens = collate([Encoded([5] * 6, [7]), Encoded([5, 6], [7, 8]), Encoded([6], [9])], 0)
    cut = tokens.rows(torch.tensor([1, 2])).without_common_padding()
    assert cut.prompt_length == 2
    assert cut.input_ids.tolist() == [[5, 6, 7, 8], [0, 6, 9, 0]]
    assert cut.attention_mask.tolist() == [[True] * 4, [False, True, True, False]]
    assert tokens.without_common_padding().input_ids.tolist() == tokens.input_ids.tolist()


def test_stop_tokens_are_ids_of_the_vocabulary_beside_eos(make_tokenizer: MakeTokenizer) -> None:
    encoder = TextEncoder(make_tokenizer(), ChatFormat(stop_tokens=["<unk>", "<s>"]))  # type: ignore[arg-type]
    assert encoder.stop_ids == [EOS, 3, 1]
    assert TextEncoder(make_tokenizer(), ChatFormat()).stop_ids == [EOS]
    # As read from hcrlhf.json, where tuples are lists: still the same format.
    assert ChatFormat(stop_tokens=["a"]) == ChatFormat(stop_tokens=("a",))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'<|eot_id|>' is no single token"):
        TextEncoder(make_tokenizer(), ChatFormat(stop_tokens=("<|eot_id|>",)))


def test_a_template_that_reads_the_clock_is_refused(make_tokenizer: MakeTokenizer) -> None:
    template = "{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match="writes today's date into every prompt"):
        TextEncoder(make_tokenizer(), ChatFormat(chat_template=template))
