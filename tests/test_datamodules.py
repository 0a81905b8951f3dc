"""Reading real files: forms, splits, and what is refused in one line."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from datamodules import Demonstrations, Preferences, Prompts
from datamodules.demonstrations import read_demonstrations
from datamodules.files import ShareSampler, require_whole
from datamodules.preferences import read_pairs
from datamodules.prompts import UpdateSampler
from hcrlhf.errors import InputError
from hcrlhf.rows import parse_dialogue, read_rows

pytestmark = pytest.mark.filterwarnings("ignore")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def pku(prompt: str, better: int = 0, safer: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "response_0": "zero",
        "response_1": "one",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "better_response_id": better,
        "safer_response_id": safer,
    } | changes


def test_rows_are_read_from_json_lines_arrays_gzip_and_csv(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    array = tmp_path / "x.json"
    array.write_text(json.dumps(rows))
    table = tmp_path / "x.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
    files = [write(tmp_path / "x.jsonl", rows), write(tmp_path / "y.jsonl.gz", rows)]
    for path in [*files, str(array), str(table)]:
        assert read_rows(path) == rows


def test_a_context_follows_its_prompt(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Sum up.", "context": "Once upon a time.", "response": "A tale."},
        {"instruction": "Say hello.", "context": "", "response": "Hello."},
        {"instruction": "Say bye.", "context": None, "response": "Bye."},
    ]
    path = write(tmp_path / "x.jsonl", rows)
    found = read_demonstrations(path, "instruction", "response", "context")
    assert [e.text for e in found] == ["Sum up.\n\nOnce upon a time.", "Say hello.", "Say bye."]
    assert [e.response for e in found] == ["A tale.", "Hello.", "Bye."]
    assert read_demonstrations(path, "instruction", "response")[0].text == "Sum up."
    with pytest.raises(InputError, match="has no column 'text'"):
        read_demonstrations(path, "instruction", "response", "text")


def test_the_name_of_a_file_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "[v2] data"
    folder.mkdir()
    write(folder / "q1.jsonl", [{"prompt": "another file"}])
    path = write(folder / "q[1].jsonl", [{"prompt": "this file"}])
    assert read_rows(path) == [{"prompt": "this file"}]


def test_of_held_out_examples_each_process_reads_its_own_and_none_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = []
    for rank in range(2):
        monkeypatch.setattr("datamodules.files.rank_and_size", lambda r=rank: (r, 2))
        sampler = ShareSampler(5)
        own.append(list(sampler))
        assert len(sampler) == len(own[-1])
    assert own == [[0, 2, 4], [1, 3]]
    with pytest.raises(InputError, match="1 examples cannot be shared by 2 processes"):
        ShareSampler(1)
    require_whole(1.0)
    require_whole(3)
    with pytest.raises(InputError, match="limit_val_batches 0.5 is a share"):
        require_whole(0.5)


def test_a_file_changed_in_place_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "old"}])
    assert read_rows(path) == [{"prompt": "old"}]
    write(tmp_path / "x.jsonl", [{"prompt": "new"}])
    assert read_rows(path) == [{"prompt": "new"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": ', "cannot be parsed"),
        ("empty.jsonl", "", "has no rows"),
        ("notes.txt", "hello", "no known kind"),
        ("binary.parquet", "not parquet", "cannot be parsed"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_rows(str(path))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reward_pair_puts_the_better_and_a_cost_pair_the_less_safe_response_first(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "x.jsonl", [pku("p", better=0, safer=1)])
    (reward,) = read_pairs(path, "better")
    (cost,) = read_pairs(path, "safer")
    # Response 0 is better and, since 1 is safer, also the more harmful one.
    assert (reward.higher, reward.lower) == ("zero", "one")
    assert (cost.higher, cost.lower) == ("zero", "one")
    assert (cost.higher_harmful, cost.lower_harmful) == (True, False)
    path = write(tmp_path / "y.jsonl", [pku("p", better=0, safer=0)])
    (cost,) = read_pairs(path, "safer")
    assert (cost.higher, cost.higher_harmful) == ("one", False)


def test_hh_dialogues_keep_their_context_and_lose_pairs_that_cannot_be_compared(
    tmp_path: Path,
) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"
    rows = [
        {"chosen": f"{start} yes", "rejected": f"{start} no"},
        {"chosen": f"{start} same", "rejected": f"{start} same"},
        {"chosen": f"{start} yes", "rejected": f"{start}"},
        {
            "chosen": f"{start} yes",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hey.\n\nHuman: And?\n\nAssistant: no",
        },
    ]
    (pair,) = read_pairs(write(tmp_path / "hh.jsonl.gz", rows), "better")
    assert [m["content"] for m in pair.messages] == ["Hi", "Hello.", "And?"]
    assert [m["role"] for m in pair.messages] == ["user", "assistant", "user"]
    assert (pair.higher, pair.lower) == ("yes", "no")


def test_two_turns_of_one_speaker_are_one_turn() -> None:
    turns = parse_dialogue("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "f", 0)
    assert [m["content"] for m in turns] == ["a\n\nb", "c"]


@pytest.mark.parametrize(
    ("row", "label", "message"),
    [
        ({"prompt": "p", "text": "x"}, "better", "expected prompt, response_0"),
        (pku("p", better=2), "better", "better_response_id is 2, expected 0 or 1"),
        (pku("p", safer=None), "safer", "safer_response_id is None"),
        ({"chosen": "a", "rejected": "b"}, "better", "expected a dialogue"),
        ({"chosen": "a", "rejected": "b"}, "safer", "not what is safer"),
        (pku("  "), "better", "the prompt is empty"),
        (pku("p", response_0=7), "better", "expected a text"),
        (pku("p", is_response_0_safe=5), "safer", "expected true or false"),
        (pku("p", response_1="zero"), "better", "no pair of two different"),
    ],
)
def test_wrong_columns_are_refused_in_one_line(
    tmp_path: Path, row: dict[str, Any], label: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_pairs(write(tmp_path / "x.jsonl", [row]), label)
    assert "\n" not in str(caught.value)


def test_the_split_is_by_prompt(tmp_path: Path) -> None:
    rows = [pku(f"prompt {i % 50}", response_0=f"zero {i}") for i in range(300)]
    data = Preferences(write(tmp_path / "x.jsonl", rows), "better", validation_fraction=0.3)
    data.setup("fit")
    training = {pair.key for pair in data.training}
    validation = {pair.key for pair in data.validation}
    assert training
    assert validation
    assert not training & validation
    assert len(data.training) + len(data.validation) == 300


def test_held_out_pairs_from_a_file_lose_the_prompts_that_are_trained_on(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [pku("a"), pku("b")])
    held_out = write(tmp_path / "test.jsonl", [pku("B  "), pku("c")])
    data = Preferences(train, "better", validation=held_out)
    data.setup("fit")
    assert [p.text for p in data.validation] == ["c"]
    everything = Preferences(train, "better", validation=train)
    with pytest.raises(InputError, match="nothing is held out"):
        everything.setup("fit")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(InputError, match="split is empty"):
        Demonstrations(path).setup("fit")
    with pytest.raises(InputError, match=r"lies in \(0, 1\), got 1.5"):
        Demonstrations(path, validation_fraction=1.5).setup("fit")


def test_safety_prompts_that_training_also_uses_are_refused_without_showing_them(
    tmp_path: Path,
) -> None:
    train = write(tmp_path / "train.jsonl", [{"prompt": f"train {i}"} for i in range(8)])
    validation = write(tmp_path / "validation.jsonl", [{"prompt": "other"}])
    safety = write(tmp_path / "safety.jsonl", [{"prompt": "secret"}, {"prompt": "TRAIN  3"}])
    data = Prompts(train, validation, safety, prompts_per_update=4)
    with pytest.raises(InputError, match="1 of 2 safety prompts are also train prompts") as caught:
        data.setup("fit")
    assert "TRAIN" not in str(caught.value)


def test_a_rollout_of_one_prompt_is_refused_before_anything_is_read() -> None:
    with pytest.raises(InputError, match="prompts_per_update is at least 2, got 1"):
        Prompts("no such file", "nor this", prompts_per_update=1)


def test_every_batch_of_prompts_is_new_whole_and_repeatable() -> None:
    batches = list(UpdateSampler(prompts=10, batch_size=4, updates=7, seed=3))
    assert len(batches) == 7
    assert all(len(set(batch)) == 4 for batch in batches)
    # Two batches make a pass over 10 prompts; no prompt comes twice within it.
    assert not set(batches[0]) & set(batches[1])
    assert batches == list(UpdateSampler(10, 4, 7, seed=3))
    assert batches[:2] != batches[2:4]
    assert batches != list(UpdateSampler(10, 4, 7, seed=4))
