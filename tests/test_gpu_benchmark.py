"""The command that will run on a card that is there for minutes: it keeps what it has measured."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROMPT": 8, "RESPONSE": 6, "WARM": 2}.items():
        monkeypatch.setattr(gpu, name, value)


def measured(folder: Path) -> list[dict[str, object]]:
    gpu.measure(["tiny"], [12.0], torch.device("cpu"), folder)
    (path,) = folder.glob("gpu-*.json")
    rows: list[dict[str, object]] = json.loads(path.read_text())["rows"]
    return rows


def test_every_stage_is_measured_and_an_error_costs_one_row(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = gpu.Bench.measured

    def unlucky(self: gpu.Bench, stage: str) -> dict[str, object]:
        if stage == "RLOO":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, stage)

    with monkeypatch.context() as patch:
        patch.setattr(gpu.Bench, "measured", unlucky)
        rows = measured(tmp_path)
    expected = [(stage, None) for stage in gpu.STAGES]
    expected.insert(1 + list(gpu.STAGES).index(gpu.LIMITED), (gpu.LIMITED, 12.0))
    assert [(row["stage"], row["memory"]) for row in rows] == expected
    assert [row["stage"] for row in rows if "error" in row] == ["RLOO"]
    for row in rows:
        rollout = row["stage"] not in ("supervised", "reward or cost", *gpu.WITHOUT_ROLLOUT)
        if "error" not in row:
            assert ("rollout" in row["seconds"]) == ("samples/s" in row) == rollout
    assert "| tiny | RLOO | all | torch.OutOfMemoryError: CUDA out of memory |" in (
        capsys.readouterr().out
    )
    # A second call replaces a row and keeps the others.
    monkeypatch.setattr(gpu, "STAGES", {"RLOO": gpu.STAGES["RLOO"]})
    rows = measured(tmp_path)
    assert len(rows) == len(expected) and not any("error" in row for row in rows)


def test_roles_of_a_stage_are_added_to_those_of_the_ones_before_it() -> None:
    counts = [(s.frozen, s.shared_heads, s.critics) for s in gpu.STAGES.values()]
    frozen = [count for count, _, _ in counts]
    critics = [count for _, _, count in counts]
    assert frozen == sorted(frozen) and critics == sorted(critics)
