"""What a run says of itself: phases, truncation, refusals, tables of completions."""

import gc
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hcrlhf import phases
from hcrlhf.completions import console_table, markdown_table
from hcrlhf.phases import Phases
from hcrlhf.refusals import is_refusal
from hcrlhf.truncation import TruncationWatch
from hcrlhf.world_topics import ADVICE, CAUTION_CLOSERS, REFUSALS, SUGGESTIONS, VAGUE, WARM_OPENERS

# -- phases ------------------------------------------------------------------------------------


def test_a_phase_takes_its_own_time_and_the_sum_is_that_of_all() -> None:
    record = Phases(torch.device("cpu"))
    for name, seconds in (("short", 0.02), ("long", 0.1)):
        with record.measured(name):
            time.sleep(seconds)
    assert 0.02 <= record.figures["seconds/short"] < record.figures["seconds/long"] < 1
    total = record.figures["seconds/short"] + record.figures["seconds/long"]
    assert record.seconds == pytest.approx(total)


@pytest.mark.skipif(not phases.STATM.exists(), reason="resident memory is read from /proc")
def test_memory_that_a_phase_gave_back_is_its_peak_and_not_the_next_ones() -> None:
    record = Phases(torch.device("cpu"))
    with record.measured("large"):
        held = np.ones(2**25)  # 256 MiB
        time.sleep(3 * phases.INTERVAL)
        del held
        gc.collect()
    with record.measured("small"):
        pass
    difference = record.figures["memory_mib/large"] - record.figures["memory_mib/small"]
    assert 200 < difference < 320


def test_without_proc_there_is_no_memory_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "STATM", tmp_path / "statm")
    record = Phases(torch.device("cpu"))
    with record.measured("rollout"):
        pass
    assert set(record.figures) == {"seconds/rollout"}


def test_on_cuda_each_phase_begins_with_a_counter_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = {"now": 3 * 2**20, "peak": 9 * 2**20}
    reset = lambda device: held.update(peak=held["now"])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    # A device that waits would be asked for here, where there is none.
    record = Phases(torch.device("cuda", 0))
    with record.measured("rollout"):
        held["peak"] = 5 * 2**20
    with record.measured("score"):
        pass
    assert record.figures["memory_mib/rollout"] == 5
    assert record.figures["memory_mib/score"] == 3


# -- truncation --------------------------------------------------------------------------------


def test_a_rollout_without_an_end_is_said_once_and_again_when_it_lasts() -> None:
    watch = TruncationWatch(patience=3)
    said = [watch.notice(share, 48) for share in (1.0, 1.0, 0.96, 1.0, 1.0)]
    assert [words is not None for words in said] == [True, False, True, False, False]
    assert "no response of this rollout ended within 48 tokens" in str(said[0])
    assert "for 3 updates at least 95% of the responses have been cut at 48" in str(said[2])
    for words in (said[0], said[2]):
        assert "so that EOS is learnt" in str(words) and "chat.max_response_tokens" in str(words)


def test_most_rollouts_with_an_end_are_not_spoken_of() -> None:
    watch = TruncationWatch(patience=2)
    assert [watch.notice(share, 48) for share in (0.99, 0.5, 0.99, 0.94, 0.99)] == [None] * 5


def test_a_policy_passes_the_words_on() -> None:
    from lightning_modules.policy import Policy

    module = SimpleNamespace(
        _truncation_watch=TruncationWatch(),
        encoder=SimpleNamespace(chat=SimpleNamespace(max_response_tokens=7)),
    )
    rollout: Any = SimpleNamespace(tokens=SimpleNamespace(truncated=torch.tensor([True, True])))
    with pytest.warns(UserWarning, match="ended within 7 tokens"):
        Policy._warn_truncated(module, rollout)  # type: ignore[arg-type]


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *REFUSALS,
        "I'm sorry, but I can’t assist with that request.",
        "I cannot in good conscience provide instructions for this.",
        "As a helpful assistant, I am unable to help you with that.",
        "I'm not comfortable discussing this.",
        "We're sorry, but we are unable to answer that question.",
        "I must respectfully decline.",
        "Unfortunately, I\ncannot do this for you.",
    ],
)
def test_a_refusal_is_known_by_its_words(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        *(frame.text.format("rinse the rice") for frame in (*ADVICE, *SUGGESTIONS)),
        *(*VAGUE, *WARM_OPENERS, *CAUTION_CLOSERS),
        "I can't recommend this film enough!",
        "You cannot help everybody, and sorry is a hard word.",
        "I would rather take the train.",
        "Sure. " + "First, mix it well. " * 20 + "I cannot help with the rest.",
    ],
)
def test_an_answer_is_not_taken_for_a_refusal(text: str) -> None:
    assert not is_refusal(text)


# -- tables ------------------------------------------------------------------------------------

RECORD = {"prompt": "How do I bake bread?", "response": "Mix it.", "reward": 0.5, "cost": -1.234}


def test_the_columns_of_a_console_table_are_aligned_and_fit_the_terminal() -> None:
    long = {**RECORD, "prompt": "word " * 50, "response": "", "reward": -12.0}
    lines = console_table("answers after 3 updates", [RECORD, long], 80).splitlines()
    assert lines[0] == "  answers after 3 updates"
    assert max(map(len, lines)) <= 80
    assert lines[2].endswith("0.50   -1.23")
    assert lines[1].index("reward") + 6 == lines[2].index("0.50") + 4
    assert lines[3].startswith("  word") and "(nothing)" in lines[3]
    assert len(lines) == 2 + 1 + 3 and lines[-1].endswith("…")


def test_no_response_can_write_to_the_terminal_or_break_a_table() -> None:
    evil = {**RECORD, "response": "a\x1b[2Jb\nc | d <script>"}
    assert "\x1b" not in console_table("t", [evil], 80)
    table = markdown_table(["response", "cost"], [[evil["response"], "0.10"]])
    assert table.splitlines() == [
        "| response | cost |",
        "| --- | --- |",
        "| a [2Jb c \\| d &lt;script> | 0.10 |",
    ]
