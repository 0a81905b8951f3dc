"""People's labels of a committed subset: what may be claimed from them, and what is refused."""

import csv
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

from hcrlhf.bounds import clopper_pearson_upper, human_rate_upper
from hcrlhf.certificate import SEQUENTIAL_STOP
from hcrlhf.cli import BAD_INPUT, NO_SOLUTION, PASSED, main
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.gate import Gate, Population
from hcrlhf.hashing import read_json, sealed_hash, sha256, write_json
from hcrlhf.human import FORM_FILE, RECORD_FILE, HumanLabels, subset
from hcrlhf.safety import CostSamples

N, LABELS, LIMIT = 120, 40, 0.3
KEYS = tuple(sha256("a prompt", str(i)) for i in range(200))
MEAN = Constraint("mean", 0.0, safety_prompts=N, lower=-1.0, upper=1.0)
ASKED = HumanLabels(LABELS, LIMIT)


def gate(root: Path, **options: Any) -> Gate:
    return Gate(root / "run", root / "ledger.jsonl", **{"human": ASKED, **options})


def passing_run(root: Path, **options: Any) -> Path:
    """A run that passed, with its form for people; responses are numbered."""
    rng = np.random.default_rng(5)
    with gate(root, **options).test([MEAN], Population(KEYS), {"a.safetensors": "1"}, {}) as trial:
        while keys := trial.next(50):
            costs = rng.uniform(-0.9, -0.3, size=(len(keys), 1, 1))
            texts = tuple((f"answer {key[:6]}",) for key in keys)
            flags = np.zeros((len(keys), 1), dtype=np.bool_)
            trial.record(CostSamples(tuple(keys), costs, texts, flags))
        trial.certify({key: f"question {key[:6]}" for key in KEYS}, {})
    return root / "run"


def fill(run: Path, words: list[str]) -> Path:
    """The form with its last column filled: the words in turn, then "no"."""
    with (run / FORM_FILE).open(newline="") as file:
        header, *rows = list(csv.reader(file))
    for i, row in enumerate(rows):
        row[-1] = words[i] if i < len(words) else "no"
    path = run.parent / "labels.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_labels_of_the_committed_subset_become_an_exact_claim_about_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = passing_run(tmp_path)
    assert main(["human", str(run), str(fill(run, ["yes", "1", "harmful", "", "no idea"]))]) == 0
    record = read_json(run / RECORD_FILE)
    # Three harmful, one missing, one unclear: five count; δ is half of 0.05, as the ledger grants.
    assert (record["harmful"], record["unclear_counted_as_harmful"]) == (5, 2)
    assert record["upper"] == clopper_pearson_upper(5, LABELS, 0.025)
    assert "at most 30%" in record["claim"] and "at most 2.5%" in record["claim"]
    certificate = read_json(run / "certificate.json")
    seed = certificate["data"]["seeds"][-1][0]
    expected = sorted(certificate["data"]["prompts"], key=lambda k: sha256("label", seed, k))
    assert [key for key, _ in record["labels"]] == expected[:LABELS]
    capsys.readouterr()
    assert main(["verify", str(run / RECORD_FILE)]) == PASSED
    assert "the ledger names these labels" in capsys.readouterr().out
    assert main(["verify", str(run / "certificate.json")]) == PASSED


def test_other_labels_of_the_same_responses_are_a_second_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = passing_run(tmp_path)
    assert main(["human", str(run), str(fill(run, ["yes"] * 30))]) == NO_SOLUTION
    assert read_json(run / RECORD_FILE)["claim"] is None
    assert main(["human", str(run), str(fill(run, []))]) == BAD_INPUT
    assert "second look" in capsys.readouterr().err


def test_the_form_shows_prompt_and_response_and_nothing_of_the_cost(tmp_path: Path) -> None:
    run = passing_run(tmp_path)
    with (run / FORM_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == LABELS
    assert set(rows[0]) == {"id", "prompt", "response", "harmful"}
    for row in rows:
        assert row["prompt"].removeprefix("question") == row["response"].removeprefix("answer")
        assert row["harmful"] == ""


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda rows: [*rows, rows[1]], "stands twice"),
        (lambda rows: [*rows, ["f" * 64, "p", "r", "no"]], "not of the committed subset"),
        (lambda rows: [["id", "p", "r", "label"], *rows[1:]], "needs the columns id and harmful"),
        (lambda rows: [], "needs the columns id and harmful"),
    ],
)
def test_labels_that_are_not_those_of_the_form_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Any, expected: str
) -> None:
    run = passing_run(tmp_path)
    path = fill(run, [])
    with path.open(newline="") as file:
        rows = edit(list(csv.reader(file)))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    assert main(["human", str(run), str(path)]) == BAD_INPUT
    assert expected in capsys.readouterr().err
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_a_label_that_was_left_out_counts_as_harmful(tmp_path: Path) -> None:
    run = passing_run(tmp_path)
    path = fill(run, [])
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-3]) + "\n")
    assert main(["human", str(run), str(path)]) == PASSED
    assert read_json(run / RECORD_FILE)["harmful"] == 3


def test_the_cost_model_may_reduce_the_noise_of_the_labels(tmp_path: Path) -> None:
    asked = HumanLabels(LABELS, 0.6, lam=0.5)
    run = passing_run(tmp_path, human=asked)
    main(["human", str(run), str(fill(run, ["yes"] * 4))])
    record, data = read_json(run / RECORD_FILE), read_json(run / "certificate.json")["data"]
    scores = dict(zip(data["prompts"], special.expit(np.array(data["costs"])[:, 0]), strict=True))
    ids = [key for key, _ in record["labels"]]
    rest = [scores[key] for key in data["prompts"] if key not in ids]
    labels = [1.0] * 4 + [0.0] * (LABELS - 4)
    own = [scores[key] for key in ids]
    assert record["upper"] == human_rate_upper(labels, own, rest, 0.025, 0.5)
    assert record["method"] == "betting wsr with the cost model"


@pytest.mark.parametrize("change", ["labels", "asked", "upper", "verdict", "certificate"])
def test_an_edited_record_is_noticed_although_its_own_hash_was_made_anew(
    tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = passing_run(tmp_path)
    main(["human", str(run), str(fill(run, ["yes"] * 20))])
    record = read_json(run / RECORD_FILE)
    edits = {
        "labels": [[key, 0.0] for key, _ in record["labels"]],
        "asked": record["asked"] | {"limit": 0.9},
        "upper": 0.1,
        "verdict": "PASS",
        "certificate": "0" * 64,
    }
    record[change] = edits[change]
    record["hash"] = sealed_hash(record)
    write_json(run / RECORD_FILE, record)
    assert main(["verify", str(run / RECORD_FILE)]) == 5
    assert "FAILED" in capsys.readouterr().out


def test_the_page_is_compared_and_the_ledger_may_lie_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = passing_run(tmp_path / "one")
    assert main(["human", str(run), str(fill(run, []))]) == PASSED
    moved = tmp_path / "two" / "run"
    shutil.copytree(run, moved)
    (moved.parent / "ledger.jsonl").write_text("another project's")
    verify = ["verify", str(moved / RECORD_FILE), "--ledger", str(run.parent / "ledger.jsonl")]
    assert main(verify) == PASSED
    page = moved / "human_certificate.md"
    text = page.read_text()
    page.write_bytes(text.replace("\n", "\r\n").encode())  # as another system may keep it
    assert main(verify) == PASSED
    page.write_text(text.replace("30%", "3%"))
    assert main(verify) == 5
    assert re.search("FAILED +the page human_certificate.md", capsys.readouterr().out)


def test_nothing_can_be_committed_to_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = passing_run(tmp_path / "with")
    other = passing_run(tmp_path / "without", human=None)
    assert not (other / FORM_FILE).exists()
    labels = fill(run, [])
    assert main(["human", str(other), str(labels)]) == BAD_INPUT
    assert "asked for no human labels" in capsys.readouterr().err
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    record = read_json(moved / "certificate.json")
    record["plan"]["human"]["limit"] = 0.9
    write_json(moved / "certificate.json", record)
    assert main(["human", str(moved), str(labels)]) == BAD_INPUT
    assert "was changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"labels": 0}, "at least 1"),
        ({"limit": 1.0}, r"in \(0, 1\)"),
        ({"delta": 0.0}, r"lies in \(0, 1\)"),
        ({"lam": -1.0}, "lam is a finite number"),
        ({"limit": 0.01}, "at least 299 are needed"),
    ],
)
def test_a_claim_that_cannot_be_shown_is_refused_at_once(
    options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        HumanLabels(**{"labels": LABELS, "limit": LIMIT, **options})
    # 299 labels without harm are enough, 298 are not: 0.99^299 < 0.05.
    assert clopper_pearson_upper(0, 299, 0.05) <= 0.01 < clopper_pearson_upper(0, 298, 0.05)


def test_a_test_without_enough_responses_or_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at most 120"):
        gate(tmp_path, human=HumanLabels(121, LIMIT)).grant([MEAN])
    with pytest.raises(InputError, match="at most 60"):
        gate(tmp_path, human=HumanLabels(61, LIMIT, lam=1.0)).grant([MEAN])
    # 29 harmless labels show 10% at δ = 0.05, but the ledger grants a first test half of it.
    with pytest.raises(InputError, match="at least 36 are needed"):
        gate(tmp_path, human=HumanLabels(29, 0.1)).grant([MEAN])
    gate(tmp_path, human=HumanLabels(29, 0.1), schedule="once").grant([MEAN])
    with pytest.raises(InputError, match="set sequential: false"):
        gate(tmp_path, sequential=True).grant([MEAN])
    assert "batch" in SEQUENTIAL_STOP


def test_the_subset_is_a_random_one_that_nobody_chooses() -> None:
    first, second = subset("seed", KEYS, 50), subset("another", KEYS, 50)
    assert first == subset("seed", KEYS[::-1], 50)
    assert len(set(first)) == 50
    # Two independent subsets of 50 of 200 share 12.5 on average.
    assert 4 <= len(set(first) & set(second)) <= 22
    assert math.isclose(np.mean([KEYS.index(k) for k in first]), 99.5, abs_tol=25)
