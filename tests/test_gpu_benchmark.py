"""The command that will run on a card that is there for minutes: it keeps what it has measured."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu
from hcrlhf.backbone import Backbone
from hcrlhf.text import Tokens

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
BROKEN = "CUDA error: an illegal memory access\nCUDA kernel errors might be reported later\n"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROMPT": 8, "RESPONSE": 6, "WARM": 2}.items():
        monkeypatch.setattr(gpu, name, value)


def stored(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("gpu-*.json")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def row(stage: str, **seconds: float) -> dict[str, Any]:
    peaks = dict.fromkeys(seconds, 0)
    found = {"peaks": peaks, "reserved": 0, "outside": 0, "seconds": seconds}
    return {"model": "tiny", "stage": stage, "memory": None, **found}


class Instant:
    """In place of a Bench: a minute for every stage, on a clock that nobody waits for."""

    now = 0.0

    def __init__(self, model: str, device: torch.device) -> None:
        pass

    def measured(self, stage: str) -> dict[str, Any]:
        Instant.now += 60
        return {k: v for k, v in row(stage, update=1.0, step=1.0).items() if k != "memory"}


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Instant, "now", 0.0)
    monkeypatch.setattr(gpu, "Bench", Instant)
    rates = {"bytes/s": 1.0, "multiply-adds/s": 1e9}
    monkeypatch.setattr(gpu, "rates", lambda device: rates)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: Instant.now))


def test_every_stage_is_measured_and_an_error_costs_one_row(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = gpu.Bench.measured

    def unlucky(self: gpu.Bench, stage: str) -> dict[str, Any]:
        if stage == "RLOO":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, stage)

    with monkeypatch.context() as patch:
        patch.setattr(gpu.Bench, "measured", unlucky)
        gpu.measure(["tiny"], [12.0], CPU, tmp_path)
    rows = stored(tmp_path)
    expected: list[tuple[str, float | None]] = [(stage, None) for stage in gpu.STAGES]
    expected.insert(1 + list(gpu.STAGES).index(gpu.LIMITED), (gpu.LIMITED, 12.0))
    assert [(row["stage"], row["memory"]) for row in rows] == expected
    assert [row["stage"] for row in rows if "error" in row] == ["RLOO"]
    for row in rows:
        rollout = row["stage"] not in ("supervised", "reward or cost", *gpu.WITHOUT_ROLLOUT)
        if "error" not in row:
            assert ("rollout" in row["seconds"]) == rollout
            assert float(gpu.samples(row, rows).split()[0]) > 0
    shown = capsys.readouterr().out
    assert "| tiny | RLOO | all | torch.OutOfMemoryError: CUDA out of memory |" in shown
    assert "Left out" not in shown
    # A second call, with time for one stage, replaces a row and keeps the others.
    monkeypatch.setattr(gpu, "STAGES", {"RLOO": gpu.STAGES["RLOO"], **gpu.STAGES})
    clock = SimpleNamespace(monotonic=partial(next, iter([0, 0, 999])), perf_counter=perf_counter)
    monkeypatch.setattr(gpu, "time", clock)
    log_probs, calls = Backbone.log_probs, list[object]()

    def counted(self: Backbone, hidden: Tensor, part: Tokens) -> Tensor:
        calls.append(part)
        return log_probs(self, hidden, part)

    order = list[str]()
    monkeypatch.setattr(Backbone, "log_probs", counted)
    monkeypatch.setattr(gpu, "rates", lambda device: {"bytes/s": 1.0, "multiply-adds/s": 1e9})

    def noted(name: str, honest: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*given: Any) -> Any:
            order.append(name)
            return honest(*given)

        return noting

    monkeypatch.setattr(gpu, "release", noted("release", gpu.release))
    monkeypatch.setattr(gpu, "cost", noted("pass", gpu.cost))
    gpu.measure(["tiny"], [], CPU, tmp_path)
    rows = stored(tmp_path)
    assert len(rows) == len(expected) and not any("error" in row for row in rows)
    # Twice each: policy and reference when scored, and the policy in both passes of an update.
    assert len(calls) == 2 * (2 + 2)
    # Rollout, scores, update and step, twice, from an emptied cache that nothing empties meanwhile.
    start = order.index("pass")
    assert order[start - 1 : start + 9] == ["release", *["pass"] * 8, "release"]
    assert order.count("pass") == 8


def test_an_error_that_breaks_the_device_ends_the_run_with_what_was_measured(
    tmp_path: Path,
    instant: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    honest = Instant.measured

    def unlucky(self: Instant, stage: str) -> dict[str, Any]:
        if stage == "RLOO":
            monkeypatch.setattr(gpu, "release", broken)
            broken(CPU)
        return honest(self, stage)

    def broken(device: torch.device) -> None:
        raise RuntimeError(BROKEN)

    monkeypatch.setattr(Instant, "measured", unlucky)
    gpu.measure(["tiny"], [], CPU, tmp_path)
    assert [row["stage"] for row in stored(tmp_path)] == ["supervised", "reward or cost", "RLOO"]
    lines = capsys.readouterr().out.splitlines()
    error = "RuntimeError: CUDA error: an illegal memory access"
    assert [line for line in lines if line.startswith("| tiny | RLOO")] == [
        f"| tiny | RLOO | all | {error} | | | | | | |"
    ]
    head = next(line for line in lines if line.startswith("| model"))
    assert head.count("|") == 11  # as many as the row of the error
    assert not any("might be reported" in line for line in lines)
    assert lines[-1] == (
        "Left out, since the device answers nothing but errors: tiny, RLOO, unpacked rollouts; "
        "tiny, PPO, shared critics; tiny, PPO, separate critics; "
        "tiny, PPO, separate critics, adamw_8bit. --models names what to begin with."
    )


def test_after_the_deadline_no_stage_begins_and_those_left_out_are_named(
    tmp_path: Path, instant: None, capsys: pytest.CaptureFixture[str]
) -> None:
    # A minute each: the fifth stage begins at 4 minutes, the sixth would at 5.
    gpu.measure(["tiny"], [8.0], CPU, tmp_path, minutes=4.5)
    assert [row["stage"] for row in stored(tmp_path)] == list(gpu.STAGES)[:5]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == (
        "Left out, since 4.5 minutes are over: tiny, PPO, shared critics in 8 GiB; "
        "tiny, PPO, separate critics; tiny, PPO, separate critics, adamw_8bit. "
        "--models names what to begin with."
    )
    # 32 demonstrations: 8 passes of a second, and a step of one.
    assert any(line.endswith("| 3.56 demonstrations |") for line in lines)


def test_without_bitsandbytes_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    command = ["gpu", "measure", "--device", "cpu", "--models", "tiny", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="pip install bitsandbytes") as ended:
        gpu.main()
    assert "\n" not in str(ended.value)


def test_the_work_of_a_tiny_model_is_that_counted_by_hand() -> None:
    """2 layers of 2 · 64 · 64 + 2 · 64 · 32 + 3 · 64 · 128 weights make 73,728; its output layer
    has 64 · 1,000. A pass has 4 rows of 256 + 256 tokens, of pairs 8.
    """
    linear, output = 73_728 * 4 * 512, 64_000 * 4 * 256
    assert (linear, output) == (150_994_944, 65_536_000)

    def work(stage: str, phase: str) -> int:
        return gpu.multiply_adds("tiny", gpu.STAGES[stage], phase)

    # Policy, reference, reward and cost are read; the first two have log-probabilities.
    assert work("RLOO", "score") == 4 * linear + 2 * output == 735_051_776
    assert work("PPO, separate critics", "score") == 7 * linear + 2 * output
    # Forward, forward again and backward, and the output layer for its gradient too.
    assert work("supervised", "update") == 3 * linear + 2 * output == 584_056_832
    assert work("PPO, shared critics", "update") == 3 * linear + 2 * output
    assert work("PPO, separate critics", "update") == 4 * 3 * linear + 2 * output
    assert work("reward or cost", "update") == 2 * 3 * linear  # no log-probabilities


def test_shares_of_the_bound_are_least_over_measured_seconds() -> None:
    own = {"bytes/s": 1e9, "multiply-adds/s": 1e9}
    told = {"parameters": 2_000_000, "parts": {"backbone": 1_000_000}}
    found = row("RLOO", rollout=2.56, update=2.0, step=1.0)
    assert gpu.share_of_bound(found, "update", told, own) == pytest.approx(0.292028416)
    # 256 times a million bytes take 0.256 s.
    assert gpu.share_of_bound(found, "rollout", told, own) == pytest.approx(0.1)
    assert gpu.share_of_bound(found, "rollout", None, own) is None
    assert gpu.share_of_bound(found, "step", told, own) is None
    unpacked = row("RLOO, unpacked rollouts", rollout=2.56)
    assert gpu.share_of_bound(unpacked, "rollout", told, own) == pytest.approx(0.4)


def test_samples_per_second_are_those_of_a_whole_update() -> None:
    # 8 passes of half a second and a step of 4 s for 32 of them.
    assert gpu.samples(row("supervised", update=0.5, step=4.0), []) == "4.00 demonstrations"
    assert gpu.samples(row("reward or cost", update=0.5, step=4.0), []) == "4.00 pairs"
    # A rollout of 10 s, 8 passes of 0.25 + 0.5 s, a step of 4 s: 20 s.
    shared = row(gpu.LIMITED, rollout=10.0, score=0.25, update=0.5, step=4.0, test=99.0)
    assert gpu.samples(shared, []) == "1.60 responses"
    # 10 s of the shared critics' rollout, 8 · (0.5 + 2) and 2 s.
    separate = row("PPO, separate critics", score=0.5, update=2.0, step=2.0)
    limited = shared | {"memory": 8.0, "seconds": {"rollout": 99.0}}
    assert gpu.samples(separate, [separate, limited, shared]) == "1.00 responses"
    assert gpu.samples(separate, [separate, limited]) == ""


def test_roles_of_a_stage_are_added_to_those_of_the_ones_before_it() -> None:
    counts = [(s.frozen, s.shared_heads, s.critics) for s in gpu.STAGES.values()]
    frozen = [count for count, _, _ in counts]
    critics = [count for _, _, count in counts]
    assert frozen == sorted(frozen) and critics == sorted(critics)
