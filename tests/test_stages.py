"""`hcrlhf.json`: round trips, moved folders, and refusals that say what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hcrlhf.errors import InputError
from hcrlhf.examples import prompt_key, user_turn
from hcrlhf.stages import (
    BackboneSource,
    ScoreMoments,
    Stage,
    file_sha256,
    fingerprint,
    local_model,
    read_prompt_keys,
    read_stage,
    require_same_base,
    write_stage,
)
from hcrlhf.text import ChatFormat

COST = Stage(
    role="cost",
    backbone=BackboneSource("organisation/model", "nf4", "bfloat16"),
    fingerprint="0123456789abcdef" * 4,
    adapter=True,
    chat=ChatFormat(64, 32, "Be kind.", "{{ messages[0]['content'] }} – Ünicode"),
    moments=ScoreMoments(mean=-0.25, std=1.5, count=100),
    calibration={"slope": 2.0, "intercept": -0.125},
    squash=3.7,
    sign_weight=0.5,
    metrics={"accuracy": 0.875, "val/loss": 1e-300},
)
SFT = Stage(
    role="sft",
    backbone=BackboneSource("organisation/model"),
    fingerprint="f" * 64,
    adapter=False,
    chat=ChatFormat(),
)
KEYS = [prompt_key(user_turn(text)) for text in ("one", "two", "three")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a backbone and empty stage folders."""
    for name in ("base", "sft", "cost"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run/base/config.json").write_text("{}")
    (tmp_path / "run/base/model.safetensors").write_bytes(b"weights")
    return tmp_path / "run"


def local(stage: Stage, folder: Path) -> Stage:
    return replace(stage, backbone=replace(stage.backbone, model=str(folder)))


# -- writing and reading ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [COST, SFT], ids=["everything", "defaults"])
def test_a_stage_is_read_as_it_was_written(run: Path, stage: Stage) -> None:
    write_stage(run / stage.role, stage, KEYS)
    assert read_stage(str(run / stage.role), stage.role, "slot") == stage


def test_a_hub_id_is_written_as_it_is(run: Path) -> None:
    write_stage(run / "cost", COST, KEYS)
    record = json.loads((run / "cost/hcrlhf.json").read_text(encoding="utf-8"))
    assert record["format"] == 1
    assert record["backbone"]["model"] == "organisation/model"


@pytest.mark.parametrize("relative", [False, True])
def test_a_backbone_folder_is_found_after_the_whole_run_has_moved(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("run") if relative else run
    write_stage(root / "cost", local(COST, root / "base"), KEYS)
    assert str(tmp_path) not in (run / "cost/hcrlhf.json").read_text(encoding="utf-8")
    moved = tmp_path / "some" / "where" / "else"
    shutil.move(run, moved)
    # Nor does it matter from where, or by which path, the folder is read.
    monkeypatch.chdir(moved)
    for folder in (str(moved / "cost"), "cost", "../else/cost"):
        stage = read_stage(folder, "cost", "slot")
        assert Path(stage.backbone.model) == (moved / "base").resolve()


def test_a_backbone_folder_is_found_from_a_run_folder_behind_a_link(
    run: Path, tmp_path: Path
) -> None:
    # As where runs/ is a link to a bigger disk.
    (tmp_path / "disk/deep/runs/cost").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk/deep/runs", target_is_directory=True)
    folder = tmp_path / "runs/cost"
    write_stage(folder, local(COST, run / "base"), KEYS)
    found = read_stage(str(folder), "cost", "slot").backbone.model
    assert Path(found) == (run / "base").resolve()


def test_a_whole_model_is_its_own_backbone(run: Path) -> None:
    write_stage(run / "sft", local(SFT, run / "sft"), KEYS)
    moved = run.rename(run.with_name("later"))
    stage = read_stage(str(moved / "sft"), "sft", "slot")
    assert Path(stage.backbone.model) == (moved / "sft").resolve()


# -- refusals --------------------------------------------------------------------------------------


def refusal(folder: Path, role: Any = "cost") -> str:
    with pytest.raises(InputError) as caught:
        read_stage(str(folder), role, "model.cost_model")
    message = str(caught.value)
    assert message.startswith("model.cost_model: ")
    assert "\n" not in message
    return message


def test_a_folder_without_stage_is_refused(run: Path, tmp_path: Path) -> None:
    for folder in (run / "cost", tmp_path / "nowhere"):
        message = refusal(folder)
        assert f"{folder} holds no hcrlhf.json" in message
        assert "finished cost stage" in message


def test_a_stage_of_another_role_is_refused(run: Path) -> None:
    write_stage(run / "sft", SFT, KEYS)
    message = refusal(run / "sft")
    assert "is a sft model; expected a cost model" in message


def edited(run: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """The folder of a cost stage whose record went through `edit`."""
    write_stage(run / "cost", COST, KEYS)
    path = run / "cost/hcrlhf.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    edit(record)
    path.write_text(json.dumps(record), encoding="utf-8")
    return run / "cost"


def test_another_format_is_refused(run: Path) -> None:
    folder = edited(run, lambda record: record.update(format=2))
    assert "has format 2, this version reads 1" in refusal(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.pop("format"),
        lambda record: record.pop("chat"),
        lambda record: record.pop("metrics"),
        lambda record: record["backbone"].update(color="red"),
        lambda record: record["moments"].pop("std"),
        lambda record: record.pop("squash"),
        lambda record: record.pop("sign_weight"),
        lambda record: record.update(backbone=None),
    ],
)
def test_a_record_with_a_missing_or_unknown_key_is_refused(
    run: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    message = refusal(edited(run, edit))
    assert "hcrlhf.json is not readable" in message
    assert "run the cost stage again" in message


@pytest.mark.parametrize("content", [b"", b'{"format": 1,', b"[]", b"null", b"\xff\xfe{}"])
def test_a_broken_file_is_refused(run: Path, content: bytes) -> None:
    (run / "cost/hcrlhf.json").write_bytes(content)
    message = refusal(run / "cost")
    assert "hcrlhf.json is not readable" in message
    assert "run the cost stage again" in message


# -- one backbone ----------------------------------------------------------------------------------


def test_stages_of_one_backbone_agree_wherever_it_lies(run: Path) -> None:
    moved = local(COST, run / "base")
    policy = replace(COST, role="policy", moments=None, adapter=False, metrics={"kl": 1.0})
    assert require_same_base({"sft": policy, "cost": moved}) == policy
    assert require_same_base({"sft": SFT}) == SFT


@pytest.mark.parametrize(
    ("change", "name", "ours", "theirs"),
    [
        ({"fingerprint": "e" * 64}, "backbone weights", "0123456789ab", "e" * 12),
        ({"quantization": "none"}, "quantization", "nf4", "none"),
        ({"dtype": "float32"}, "dtype", "bfloat16", "float32"),
        ({"max_prompt_tokens": 65}, "max_prompt_tokens", 64, 65),
        ({"max_response_tokens": 33}, "max_response_tokens", 32, 33),
        ({"system_prompt": None}, "system_prompt", "Be kind.", None),
        ({"chat_template": "x"}, "chat_template", COST.chat.chat_template, "x"),
    ],
)
def test_stages_that_differ_are_refused_with_both_slots_and_values(
    change: dict[str, Any], name: str, ours: object, theirs: object
) -> None:
    own = {key: value for key, value in change.items() if key in asdict(COST)}
    source = {key: value for key, value in change.items() if key in asdict(COST.backbone)}
    chat = {key: value for key, value in change.items() if key in asdict(COST.chat)}
    other = replace(
        COST, **own, backbone=replace(COST.backbone, **source), chat=replace(COST.chat, **chat)
    )
    expected = f"model.reward_model and model.cost_model differ in {name}: {ours!r} and {theirs!r}"
    with pytest.raises(InputError, match=re.escape(expected)):
        require_same_base(
            {"model.reward_model": COST, "model.sft_model": COST, "model.cost_model": other}
        )


def test_stages_that_read_texts_otherwise_are_refused() -> None:
    one, other = replace(COST, tokens="a" * 64), replace(COST, tokens="b" * 64)
    require_same_base({"sft": one, "reward": COST, "cost": one})  # an older one does not say
    with pytest.raises(InputError, match="sft and cost were trained with another tokenizer or"):
        require_same_base({"sft": one, "cost": other})


# -- fingerprints ----------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_any_byte_of_weights_or_config(run: Path) -> None:
    base = run / "base"
    before = fingerprint(str(base))
    assert len(before) == 64
    seen = {before}
    for name, content in [
        ("model.safetensors", b"weighty"),
        ("config.json", b"{ }"),
        ("model-00002.safetensors", b"more"),
    ]:
        (base / name).write_bytes(content)
        seen.add(fingerprint(str(base)))
    assert len(seen) == 4


def test_a_fingerprint_ignores_other_files_and_the_place(run: Path, tmp_path: Path) -> None:
    before = fingerprint(str(run / "base"))
    (run / "base/README.md").write_text("unrelated")
    (run / "base/tokenizer.json").write_text("{}")
    (run / "base/folder").mkdir()
    assert fingerprint(str(run / "base")) == before
    shutil.copytree(run / "base", tmp_path / "copy")
    assert fingerprint(str(tmp_path / "copy")) == before


def test_weights_that_swap_their_files_have_another_fingerprint(run: Path) -> None:
    base = run / "base"
    (base / "a.safetensors").write_bytes(b"first")
    (base / "b.safetensors").write_bytes(b"second")
    before = fingerprint(str(base))
    (base / "a.safetensors").write_bytes(b"second")
    (base / "b.safetensors").write_bytes(b"first")
    assert fingerprint(str(base)) != before


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_has_no_fingerprint(run: Path, missing: str) -> None:
    (run / "base" / missing).unlink()
    with pytest.raises(InputError, match=r"expected config\.json and \*\.safetensors"):
        fingerprint(str(run / "base"))


def test_a_model_that_is_neither_folder_nor_cached_has_no_fingerprint() -> None:
    with pytest.raises(InputError, match="neither a folder nor in the Hugging Face cache"):
        fingerprint("no-such-organisation/no-such-model")


def test_the_sha256_of_a_file_is_the_published_one(tmp_path: Path) -> None:
    # FIPS 180-2, appendix B.1.
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


# -- prompt keys -----------------------------------------------------------------------------------


def test_training_prompts_are_kept_as_the_heads_of_their_keys(run: Path) -> None:
    write_stage(run / "cost", COST, KEYS)
    lines = (run / "cost/training_prompts.txt").read_text().splitlines()
    assert lines == sorted(key[:32] for key in KEYS)
    assert read_prompt_keys(str(run / "cost")) == {key[:32] for key in KEYS}


def test_a_folder_without_training_prompts_has_none(run: Path) -> None:
    assert read_prompt_keys(str(run / "base")) == frozenset()
    write_stage(run / "cost", COST, [])
    assert read_prompt_keys(str(run / "cost")) == frozenset()


def test_a_stage_that_lost_its_training_prompts_is_refused(run: Path) -> None:
    write_stage(run / "cost", COST, KEYS)
    (run / "cost/training_prompts.txt").unlink()
    with pytest.raises(InputError, match="cost has no training_prompts.txt"):
        read_prompt_keys(str(run / "cost"))


# -- models of the hub -----------------------------------------------------------------------------


def hub_that_says(error: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub whose every download ends with that error; notes what was asked of it."""
    import huggingface_hub
    from huggingface_hub import errors

    asked: list[dict[str, Any]] = []

    def download(model: str, **options: Any) -> str:
        asked.append({"model": model, **options})
        if options.get("local_files_only"):
            raise errors.LocalEntryNotFoundError("not in the cache")
        kind = getattr(errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "accept the model's licence on https://huggingface.co/org/model, then"),
        ("RevisionNotFoundError", "no revision 'abc' of org/model"),
        ("RepositoryNotFoundError", "no model 'org/model' that you may read"),
        ("LocalEntryNotFoundError", r"could not be reached \(LocalEntryNotFoundError\)"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_refused_in_one_line(
    error: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub_that_says(error, monkeypatch)
    with pytest.raises(InputError, match=message):
        local_model("org/model", "abc")
    assert [a["revision"] for a in asked] == ["abc", "abc"]  # the cache first, then the network
    assert all("*.bin" not in a["allow_patterns"] for a in asked)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_cache_that_holds_a_part_of_a_model_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    import huggingface_hub

    weights = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "config.json").write_text("{}")  # what the doctor has left
    if sharded:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
        (tmp_path / "one.safetensors").write_bytes(b"1")
    asked: list[bool] = []

    def download(model: str, **options: Any) -> str:
        asked.append(options.get("local_files_only", False))
        if not asked[-1]:
            for name in weights.values():
                (tmp_path / name).write_bytes(b"1")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_model("org/model") == str(tmp_path)
    assert asked == [True, False]
    assert local_model("org/model") == str(tmp_path)
    assert asked == [True, False, True]  # the second time nothing is fetched


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_path_is_never_taken_for_a_hub_id(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub_that_says("RepositoryNotFoundError", monkeypatch)
    with pytest.raises(InputError, match="does not exist"):
        local_model(model)
    assert asked == []


def test_a_revision_is_kept_with_the_stage(run: Path) -> None:
    stage = replace(SFT, backbone=replace(SFT.backbone, model="org/model", revision="abc"))
    write_stage(run / "sft", stage, KEYS)
    assert read_stage(str(run / "sft"), "sft", "sft").backbone == stage.backbone


def test_a_list_of_prompts_that_was_edited_is_noticed(run: Path) -> None:
    write_stage(run / "cost", COST, KEYS)
    path = run / "cost" / "training_prompts.txt"
    whole = path.read_text()
    path.write_text(whole.splitlines()[0] + "\n")
    with pytest.raises(InputError, match="is not the list that the stage wrote.*train the stage"):
        read_prompt_keys(str(run / "cost"))
    path.write_text(whole)
    # No hash is no way around it.
    stage = run / "cost" / "hcrlhf.json"
    record = json.loads(stage.read_text())
    assert len(record.pop("training_prompts_sha256")) == 64
    stage.write_text(json.dumps(record))
    path.write_text(whole.splitlines()[0] + "\n")
    with pytest.raises(InputError, match="is not the list that the stage wrote"):
        read_prompt_keys(str(run / "cost"))
    stage.write_text("{")
    with pytest.raises(InputError, match="hcrlhf.json is not readable"):
        read_prompt_keys(str(run / "cost"))
