"""Sequence classifiers: what is read of a text, which token is scored, what is refused."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hcrlhf.classifier import (
    Classifier,
    chosen_label,
    kept,
    load_classifier,
    log_odds,
    most_positions,
    plain_dialogue,
)
from hcrlhf.errors import InputError
from hcrlhf.examples import Message, user_turn
from tests.conftest import VOCABULARY

DIALOGUE = (
    Message(role="user", content="Hi"),
    Message(role="assistant", content="Yes?"),
    Message(role="user", content="Go on"),
)
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (9, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (6, [0, 3, 4, 5, 6, 7]),  # the first two of the prompt go
        (5, [0, 4, 5, 6, 7]),
        (4, [0, 4, 5, 7]),  # no prompt is left: the end of the response goes
    ],
)
def test_the_beginning_of_the_prompt_goes_first_then_the_end_of_the_response(
    limit: int, expected: list[int]
) -> None:
    assert kept([None, 0, 0, 0, None, 1, 1, None], limit) == expected


def test_a_dialogue_of_one_turn_is_its_text_and_longer_ones_name_the_speakers() -> None:
    assert plain_dialogue(user_turn("Hi")) == "Hi"
    assert plain_dialogue(DIALOGUE) == "Human: Hi\n\nAssistant: Yes?\n\nHuman: Go on"


def test_the_score_of_one_label_among_several_is_its_log_odds() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    share = logits.softmax(dim=1)[0, 1]
    odds = log_odds(logits, 1, independent=False)
    assert odds.item() == pytest.approx(math.log(share / (1 - share)), rel=1e-5)
    assert log_odds(logits[:, :2], 1, independent=False).item() == 2.0
    assert log_odds(logits, 1, independent=True).item() == 3.0
    assert log_odds(logits[:, :1], 0, independent=False).item() == 1.0


# -- an encoder ------------------------------------------------------------------------------------


def test_an_encoder_scores_text_pairs_as_transformers_does_whatever_is_beside_them(
    encoder_folder: Path,
) -> None:
    classifier = load_classifier(str(encoder_folder))
    texts = [("a", "yes"), ("which one?", "the second"), ("x", "")]
    encoded = [classifier.encode(user_turn(p), r) for p, r in texts]
    together = classifier(classifier.collate(encoded))
    for (prompt, response), found in zip(texts, together, strict=True):
        inputs = classifier.tokenizer(prompt, response, return_tensors="pt")
        assert found.item() == pytest.approx(classifier.model(**inputs).logits.item(), abs=1e-4)
    assert len({round(x.item(), 4) for x in together}) == 3
    assert [t.response_tokens for t in encoded] == [3, 10, 0]


def test_a_long_text_keeps_the_end_of_its_prompt_and_the_whole_response(
    encoder_folder: Path,
) -> None:
    classifier = load_classifier(str(encoder_folder), max_tokens=10)
    text = classifier.encode(user_turn("abcdefgh"), "12345")
    assert classifier.tokenizer.decode(text.ids) == "<s>gh</s>12345</s>"
    assert text.types == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert text.cut
    assert not classifier.encode(user_turn("ab"), "12345").cut


# -- a decoder -------------------------------------------------------------------------------------


def decoder(folder: Path, pad: str, make_tokenizer: Callable[..., Any], **options: Any) -> Any:
    from transformers import LlamaForSequenceClassification

    tokenizer = make_tokenizer(pad=pad)
    # The last token is EOS, as most reward models want it.
    tokenizer.chat_template = TEMPLATE + "{{ eos_token }}"
    model = LlamaForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    return Classifier(model.eval(), tokenizer, "decoder", **options)


def test_a_decoder_whose_padding_is_its_eos_is_scored_at_its_last_token(
    decoder_folder: Path, make_tokenizer: Callable[..., Any]
) -> None:
    classifier = decoder(decoder_folder, "</s>", make_tokenizer)
    texts = [("a", "yes"), ("which one of these?", "the second")]
    encoded = [classifier.encode(user_turn(p), r) for p, r in texts]
    assert all(text.ids[-1] == 2 for text in encoded)
    batch = classifier.collate(encoded)
    together = classifier(batch)
    for text, found in zip(encoded, together, strict=True):
        ids = torch.tensor([text.ids])
        hidden = classifier.model.base_model(ids).last_hidden_state[0, -1]
        assert found.item() == pytest.approx(classifier.model.score(hidden).item(), abs=1e-5)
    # The trap: transformers takes EOS for padding and reads the token before it.
    theirs = classifier.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()
    ).logits[:, 0]
    assert (theirs - together).abs().min() > 1e-3


def test_a_decoder_scores_the_same_with_any_padding_token(
    decoder_folder: Path, make_tokenizer: Callable[..., Any]
) -> None:
    texts = [("a", "yes"), ("which one of these?", "the second")]
    found = []
    for pad in ("</s>", "<pad>"):
        classifier = decoder(decoder_folder, pad, make_tokenizer)
        batch = classifier.collate([classifier.encode(user_turn(p), r) for p, r in texts])
        found.append(classifier(batch))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_the_response_of_a_rendered_dialogue_is_known_and_its_prompt_is_cut_first(
    decoder_folder: Path, make_tokenizer: Callable[..., Any]
) -> None:
    template = "{{ bos_token }}" + TEMPLATE
    options = {"chat_template": template, "max_tokens": 12}
    classifier = decoder(decoder_folder, "</s>", make_tokenizer, **options)
    text = classifier.encode(DIALOGUE, "Well")
    # <s><Hi><Yes?><Go on><Well>: the response is "Well>" and its "<", which no prompt shows.
    assert classifier.tokenizer.decode(text.ids) == "<s>Go on><Well>"[:3] + "o on><Well>"
    assert (text.response_tokens, text.cut) == (6, True)


# -- training --------------------------------------------------------------------------------------


def test_only_the_last_layers_and_what_follows_them_are_trained(
    encoder_folder: Path, decoder_folder: Path
) -> None:
    encoder = load_classifier(str(encoder_folder))
    encoder.train_last(1)
    trained = {n for n, p in encoder.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(
        n.startswith(("bert.encoder.layer.1.", "bert.pooler", "classifier")) for n in trained
    )
    assert {"bert.pooler.dense.weight", "classifier.weight"} < trained
    llama = load_classifier(str(decoder_folder), chat_template=TEMPLATE)
    llama.train_last(1)
    trained = {n for n, p in llama.model.named_parameters() if p.requires_grad}
    assert {"model.norm.weight", "score.weight"} < trained
    assert not [n for n in trained if ".0." in n or "embed" in n]
    with pytest.raises(InputError, match="has 2 layers, got train_layers 3"):
        llama.train_last(3)


# -- refusals --------------------------------------------------------------------------------------


def test_a_model_without_a_trained_head_is_no_scorer(model_folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds no weights for score\.weight, so its scores"):
        load_classifier(str(model_folder), chat_template=TEMPLATE)
    new = load_classifier(str(model_folder), new_head=True)
    assert new.template is not None and "Human" in new.template


def test_positions_that_are_the_padding_s_are_not_read() -> None:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    sizes = {
        "vocab_size": 50,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "max_position_embeddings": 34,
    }
    bert = BertForSequenceClassification(BertConfig(**sizes))
    roberta = RobertaForSequenceClassification(RobertaConfig(**sizes, pad_token_id=1)).eval()
    assert (most_positions(bert), most_positions(roberta)) == (34, 32)
    roberta(torch.full((1, 32), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, 33), 5))


def test_an_adapter_is_no_classifier(encoder_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(encoder_folder, folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter and not a whole model; merge it first"):
        load_classifier(str(folder), new_head=True)


def test_several_labels_need_one_to_be_named(encoder_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "three"
    shutil.copytree(encoder_folder, folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True
    )
    model.config.id2label = {0: "safe", 1: "rude", 2: "harmful"}
    model.config.label2id = {"safe": 0, "rude": 1, "harmful": 2}
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"has 3 labels \(safe, rude, harmful\); say whose"):
        load_classifier(str(folder))
    for label in ("harmful", 2):
        assert load_classifier(str(folder), label=label).label == 2
    for label in ("cruel", 3, -1):
        with pytest.raises(InputError, match=f"has no label {label!r}; its labels are safe"):
            chosen_label(model.config, label, "m")


def test_what_does_not_fit_together_is_refused_in_one_line(
    encoder_folder: Path,
    decoder_folder: Path,
    tmp_path: Path,
    make_tokenizer: Callable[..., Any],
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(encoder_folder, bare)
    for file in bare.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_classifier(str(bare))
    with pytest.raises(InputError, match="is a decoder without a chat template"):
        load_classifier(str(decoder_folder))
    with pytest.raises(InputError, match="reads 8 to 64 tokens, got max_tokens 65"):
        load_classifier(str(encoder_folder), max_tokens=65)
    make_tokenizer().save_pretrained(bare)
    (bare / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_classifier(str(bare))
    other = make_tokenizer()
    other.add_tokens(["one", "more"])
    model = load_classifier(str(encoder_folder)).model
    message = f"has {len(VOCABULARY) + 2} tokens, the model {len(VOCABULARY)}; they do not belong"
    with pytest.raises(InputError, match=message):
        Classifier(model, other, "m")
    with pytest.raises(InputError, match="no padding token"):
        Classifier(model, make_tokenizer(pad=None), "m")
    clock = "{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match="of m writes today's date .*; set chat_template to one"):
        Classifier(model, make_tokenizer(), "m", chat_template=clock)
    model.config.is_encoder_decoder = True
    with pytest.raises(InputError, match="is an encoder-decoder"):
        Classifier(model, make_tokenizer(), "m")
