"""Prompts that no stage sees: what is held out is in no other file, whatever form the data has."""

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules import Prompts
from hcrlhf.cli import main
from hcrlhf.errors import InputError
from hcrlhf.examples import prompt_key, user_turn
from hcrlhf.holdout import drawn, split

SIZES = {"safety": 6, "validation": 4, "evaluation": 3}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """30 prompts, each in two rows, of which one is spelt otherwise."""
    rows = [{"prompt": f"Question {i}?", "response_0": "a", "response_1": "b"} for i in range(30)]
    return write(
        tmp_path / "pairs.jsonl",
        [*rows, *[{**r, "prompt": r["prompt"].upper() + " "} for r in rows]],
    )


@pytest.fixture
def dialogues(tmp_path: Path) -> str:
    """Openings that are among those prompts, and further ones; some of several turns."""
    rows = [
        {
            "chosen": f"\n\nHuman: question  {i}?\n\nAssistant: Yes.{more}",
            "rejected": f"\n\nHuman: question  {i}?\n\nAssistant: No.{more}",
        }
        for i in range(20, 40)
        for more in ("", "\n\nHuman: Why?\n\nAssistant: So.")
    ]
    return write(tmp_path / "dialogues.jsonl", rows)


@pytest.fixture
def demonstrations(tmp_path: Path) -> str:
    rows = [{"instruction": f"question {i}?", "response": "Yes."} for i in range(0, 40, 3)]
    return write(tmp_path / "demonstrations.jsonl", rows)


def test_held_out_prompts_are_in_no_other_file(
    tmp_path: Path, pairs: str, dialogues: str, demonstrations: str
) -> None:
    out = tmp_path / "data"
    written = split([pairs], [dialogues, demonstrations], out, SIZES)
    keys = {
        name: {prompt_key(user_turn(row["prompt"])) for row in read(out / f"prompts/{name}.jsonl")}
        for name in ("train", *SIZES)
    }
    assert {name: len(found) for name, found in keys.items()} == {"train": 17, **SIZES}
    assert len(set.union(*keys.values())) == 30  # disjoint, and nothing is lost
    held_out = keys["safety"] | keys["validation"] | keys["evaluation"]

    def left(name: str, text: Any) -> tuple[int, set[str]]:
        rows = read(out / name)
        assert written[name] == len(rows)
        return len(rows), {prompt_key(user_turn(text(row))) for row in rows}

    count, found = left("pairs.jsonl", lambda row: row["prompt"])
    assert count == 2 * 17 and not found & held_out  # both spellings are out
    count, found = left(
        "dialogues.jsonl", lambda row: row["chosen"].split("Assistant")[0].split("Human:")[1]
    )
    assert count == 2 * sum(
        prompt_key(user_turn(f"question {i}?")) not in held_out for i in range(20, 40)
    )
    assert 0 < count < 40 and not found & held_out
    count, found = left("demonstrations.jsonl", lambda row: row["instruction"])
    assert 0 < count < 14 and not found & held_out
    assert json.loads((out / "split.json").read_text())["rows"] == written

    # What the policy stage itself asks of them.
    files = {name: str(out / f"prompts/{name}.jsonl") for name in keys}
    data = Prompts(
        **files,
        demonstrations=str(out / "demonstrations.jsonl"),
        demonstration_fields=("instruction", "response"),
        prompts_per_update=4,
    )
    data.setup("fit")
    assert len(data.demonstrations) == count
    data = Prompts(
        **files,
        demonstrations=demonstrations,
        demonstration_fields=("instruction", "response"),
        prompts_per_update=4,
    )
    with pytest.raises(InputError, match="safety prompts are also demonstrations prompts"):
        data.setup("fit")


def test_the_draw_depends_on_the_prompts_and_the_seed_alone() -> None:
    prompts = {f"{i:064x}": str(i) for i in range(50)}
    backwards = dict(reversed(prompts.items()))
    assert drawn(prompts, SIZES, None, 0) == drawn(backwards, SIZES, None, 0)
    assert drawn(prompts, SIZES, None, 0) != drawn(prompts, SIZES, None, 1)
    assert len(drawn(prompts, SIZES, 5, 0)["train"]) == 5
    # A file of another size leaves the test's prompts what they are.
    assert (
        drawn(prompts, SIZES | {"evaluation": 9}, None, 0)["safety"]
        == drawn(prompts, SIZES, None, 0)["safety"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": SIZES | {"safety": 60}}, "30 different prompts are not enough for 67"),
        ({"sizes": SIZES | {"safety": 0}}, "each file has at least one prompt"),
        ({"train": 0}, "each file has at least one prompt"),
        ({"field": "text"}, "has no column 'text'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(
    tmp_path: Path, pairs: str, options: dict[str, Any], message: str
) -> None:
    out = tmp_path / "data"
    with pytest.raises(InputError, match=message):
        split([pairs], [], out, **{"sizes": SIZES, **options})
    assert not out.exists()


def test_sources_that_cannot_be_used_are_refused(tmp_path: Path, pairs: str) -> None:
    out = tmp_path / "data"
    other = write(tmp_path / "other.jsonl", [{"text": "Hello"}])
    with pytest.raises(InputError, match="expected one of prompt, instruction, question or chosen"):
        split([pairs], [other], out, SIZES)
    (tmp_path / "again").mkdir()
    twin = write(tmp_path / "again" / "pairs.jsonl", [{"prompt": "x"}])
    with pytest.raises(InputError, match="two sources would be written to one file"):
        split([pairs], [twin], out, SIZES)
    split([pairs], [], tmp_path / "first", SIZES)
    few = write(tmp_path / "few.jsonl", read(tmp_path / "first" / "prompts" / "safety.jsonl"))
    with pytest.raises(InputError, match="every row of .*few.jsonl has a held-out prompt"):
        split([pairs], [few], out, SIZES)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(InputError, match="is not empty; give a new folder"):
        split([pairs], [], out, SIZES)


def test_the_command_says_what_it_wrote(tmp_path: Path, pairs: str, capsys: Any) -> None:
    sizes = [f"--{name}={count}" for name, count in SIZES.items()]
    assert main(["split", pairs, "--out", str(tmp_path / "data"), *sizes]) == 0
    said = capsys.readouterr().out
    for words in ("17  ", "prompts/train.jsonl", "6  ", "34  ", "pairs.jsonl"):
        assert words in said
    assert main(["split", "nowhere.jsonl", "--out", str(tmp_path / "x")]) == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


def test_the_name_of_a_hub_data_set_says_its_folder_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    class Loaded:
        def to_list(self) -> list[dict[str, str]]:
            return [{"prompt": f"Question {i}?"} for i in range(30)]

    def load(name: str, **options: Any) -> Loaded:
        asked.append((name, options))
        return Loaded()

    monkeypatch.setattr(datasets, "load_dataset", load)
    sources = ["Anthropic/hh-rlhf/helpful-base@0123abc", "owner/data@v1.0", "squad/a/b", "imdb"]
    split(sources, [], tmp_path / "x", SIZES)
    assert asked == [
        (
            "Anthropic/hh-rlhf",
            {"split": "train", "data_dir": "helpful-base", "revision": "0123abc"},
        ),
        ("owner/data", {"split": "train", "revision": "v1.0"}),
        ("squad/a", {"split": "train", "data_dir": "b"}),
        ("imdb", {"split": "train"}),
    ]
    names = ("hh-rlhf-helpful-base", "data", "a-b", "imdb")
    assert {p.name for p in (tmp_path / "x").glob("*.jsonl")} == {f"{n}.jsonl" for n in names}
    assert json.loads((tmp_path / "x" / "split.json").read_text())["sources"] == sources
