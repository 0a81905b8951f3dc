"""What `hcrlhf doctor` says of a config, before a weight is loaded."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from hcrlhf import checks, doctor
from hcrlhf.backbone import LoraOptions
from hcrlhf.configured import base_of
from hcrlhf.doctor import best_remedies, remedies, shares, suffice
from hcrlhf.examples import prompt_key, user_turn
from hcrlhf.footprint import Footprint, Sizes, footprint
from hcrlhf.lightning_cli import parse
from hcrlhf.stages import (
    BackboneSource,
    ClassifierStage,
    Stage,
    write_classifier_stage,
    write_stage,
)
from hcrlhf.text import ChatFormat

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "demo"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}"} for i in range(count)]


def pairs(count: int = 60, **more: Any) -> list[dict[str, Any]]:
    answers = {"response_0": "a", "response_1": "b", "better_response_id": 0}
    return [row | answers | {"safer_response_id": 1} | more for row in prompts("pair", count)]


class Run:
    """The stages of a run, on a model that nothing has trained, and the prompts of a policy."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        for role in ("sft", "reward", "cost"):
            self.stage(role)
        for name, count in (("train", 80), ("validation", 30), ("safety", 40), ("evaluation", 5)):
            write(root / f"{name}.jsonl", prompts(name, count))

    def stage(self, role: Any, seen: str = "", folder: str = "", **changes: Any) -> None:
        """A finished stage that was trained on one prompt; its adapter is not asked for."""
        source = BackboneSource(str(self.model))
        stage = Stage(role, source, "f" * 64, role != "sft", ChatFormat(128, 32))
        (self.root / (folder or role)).mkdir(exist_ok=True)
        keys = [prompt_key(user_turn(seen or "something else"))]
        write_stage(self.root / (folder or role), replace(stage, **changes), keys)

    def checks(self, config: str, options: dict[str, Any]) -> list[str]:
        arguments = ["--config", str(CONFIGS / f"{config}.yaml")]
        arguments += ["--trainer.default_root_dir", str(self.root / "new" / "run")]
        for key, value in options.items():
            text = value if isinstance(value, str) else json.dumps(value)
            arguments.append(f"--{key}={text}")
        parsed = parse(arguments)
        found = checks.checks(parsed, base_of(parsed, None))
        return [f"{checks.MARKS[x.good]} {x.name}: {x.seen}" for x in found]

    def policy(self, **limit: Any) -> list[str]:
        limit = {"estimand": "mean", "threshold": 1.0, "safety_prompts": 40} | limit
        options = limit.pop("options", {})
        given = {f"model.init_args.{r}": str(self.root / r) for r in ("sft", "reward", "cost")}
        for name in ("train", "validation", "safety", "evaluation"):
            given[f"data.init_args.{name}"] = str(self.root / f"{name}.jsonl")
        return self.checks("policy", given | {"model.init_args.constraints": [limit]} | options)

    def examples(self, config: str, path: Path | str, **options: Any) -> str:
        """What is said of the data of a supervised, reward or cost stage."""
        given = {"data.init_args.path": str(path)}
        if config == "sft":
            given["model.init_args.model"] = str(self.model)
        else:
            given["model.init_args.sft"] = str(self.root / "sft")
        (line,) = [x for x in self.checks(config, given | options) if " data: " in x]
        return line


@pytest.fixture
def run(tmp_path: Path, model_folder: Path) -> Run:
    return Run(tmp_path, model_folder)


def test_a_config_that_will_run_is_well(run: Run) -> None:
    found = run.policy()
    assert [line[:3] for line in found] == ["ok "] * len(found)
    assert "80 train, 30 validation, 40 safety, 5 evaluation" in found[2]
    assert found[2].endswith("nor among what sft, reward, cost learnt from")
    assert not (run.root / "new").exists()


# -- data ------------------------------------------------------------------------------------------


def test_examples_are_read_as_fit_reads_them(run: Run, tmp_path: Path) -> None:
    said = run.examples("reward", write(tmp_path / "pairs.jsonl", pairs(60)))
    assert said.startswith("ok ")
    numbers = [int(word) for word in said.split() if word.isdecimal()]
    assert len(numbers) == 2 and sum(numbers) == 60
    demonstrations = write(
        tmp_path / "good.jsonl", [{"q": f"how {i}", "a": "so"} for i in range(60)]
    )
    fields = {"data.init_args.prompt_field": "q", "data.init_args.response_field": "a"}
    assert run.examples("sft", demonstrations, **fields).startswith("ok ")
    said = run.examples("sft", demonstrations)
    assert said.startswith("NOT ") and "has no column 'prompt'; its columns are q, a" in said


@pytest.mark.parametrize(
    ("config", "text", "words"),
    [
        ("sft", "this is not json\n", "cannot be parsed"),
        ("reward", '{"prompt": "a", "response": "b"}\n', "has the columns prompt, response; exp"),
        ("reward", "", "bad.jsonl"),
        (
            "cost",
            "".join(json.dumps(x) + "\n" for x in pairs()),
            "the cost model's sign terms need",
        ),
        (
            "reward",
            "".join(json.dumps(x | {"prompt": f"{i} " * 99}) + "\n" for i, x in enumerate(pairs())),
            "prompts are longer than max_prompt_tokens",
        ),
    ],
)
def test_examples_that_fit_would_refuse_are_not_well(
    run: Run, tmp_path: Path, config: str, text: str, words: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    said = run.examples(config, path)
    assert said.startswith("NOT ") and words in said


def test_labels_of_the_other_role_are_not_well(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", pairs())
    said = run.examples("reward", path, **{"data.init_args.label": "safer"})
    assert said.startswith("NOT ") and "a reward model learns from label: better" in said


def test_data_of_another_stage_are_not_well(run: Run, tmp_path: Path) -> None:
    path = str(write(tmp_path / "both.jsonl", pairs(response="so")))
    data: dict[str, Any] = {"class_path": "datamodules.Demonstrations", "init_args": {"path": path}}
    said = run.policy(options={"data": data})
    assert any("a policy is trained on prompts, and Demonstrations holds none" in x for x in said)
    data = {"class_path": "datamodules.Preferences", "init_args": {"path": path, "label": "better"}}
    line = run.examples("sft", path, data=data)
    assert line.startswith("NOT ") and "this stage learns from a Demonstration" in line


def test_a_data_set_of_the_hub_is_not_downloaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("datasets.load_dataset", download)
    for path in ("owner/pairs-v1.5", "owner/name/folder@a1b2"):
        assert "a data set id of the hub (not looked up)" in run.examples("reward", path)
    options = {"data.init_args.train": "owner/prompts"}
    assert any("not looked up" in line for line in run.policy(options=options))
    assert run.examples("reward", "not/there.jsonl").startswith("NOT ")


# -- limits ----------------------------------------------------------------------------------------


def test_a_limit_that_allows_no_harmful_response_at_all_is_not_well(run: Run) -> None:
    write(run.root / "safety.jsonl", prompts("safety", 500))
    rate = {"estimand": "harm_rate", "safety_prompts": 500, "options": {}}
    said = run.policy(threshold=0.008, **rate)[-1]
    # 0.992^500 = 0.018: not one of 500 may be harmful, and 1 - 0.95^(1/500) = 0.0001.
    assert said.startswith("NOT  harm_rate: to pass on 500 prompts training aims at 0.0001 for")
    assert "less than one harmful response in 500" in said
    assert run.policy(threshold=0.15, **rate)[-1].startswith("ok ")


def test_fewer_safety_prompts_than_the_test_asks_for_are_not_well(run: Run) -> None:
    said = run.policy(safety_prompts=5000)[-1]
    assert said.startswith(
        "NOT  safety test: the safety set has 40 different prompts that fit, but"
    )
    none = {"data.init_args.safety": None}
    assert "SafetyTest needs data.init_args.safety" in run.policy(options=none)[-1]
    untested = {"trainer.callbacks": []}
    assert run.policy(safety_prompts=5000, options=untested)[-1].startswith("ok ")


def test_a_limit_is_judged_with_the_range_that_the_cost_model_brings(run: Run) -> None:
    run.stage("cost", squash=4.0)
    said = run.policy(threshold=-3.9)[-1]
    assert said.startswith("NOT ") and "even if every cost were -4" in said
    run.stage("cost")
    exact = {"class_path": "hcrlhf.methods.EmpiricalBernstein"}
    said = run.policy(bound=exact)[-1]
    assert said.startswith("NOT ") and "needs the cost's lower and upper end" in said


# -- earlier stages --------------------------------------------------------------------------------


def test_a_stage_that_is_not_there_yet_is_said_and_is_no_mistake(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run.root / "reward")
    (said,) = [line for line in run.policy() if not line.startswith("ok ")]
    assert said.startswith("note stages: reward: ") and said.endswith("until then fit refuses")
    assert "(hcrlhf fit with the reward config writes it)" in said


def test_a_stage_in_the_wrong_place_is_not_well(run: Run) -> None:
    run.stage("cost", folder="reward")
    (said,) = [line for line in run.policy() if not line.startswith("ok ")]
    assert said.startswith("NOT ") and "reward is a cost model; expected a reward model" in said


def test_a_stage_on_another_base_model_is_not_well(run: Run) -> None:
    run.stage("cost", fingerprint="e" * 64)
    (said,) = [line for line in run.policy() if not line.startswith("ok ")]
    assert said.startswith("NOT ") and "sft and cost differ in backbone weights" in said


@pytest.mark.parametrize("role", ["sft", "reward", "cost"])
def test_safety_prompts_that_a_stage_has_seen_are_not_well(run: Run, role: str) -> None:
    run.stage(role, seen="Safety  7")  # case and spaces make no other prompt
    (said,) = [line for line in run.policy() if not line.startswith("ok ")]
    assert said.startswith("NOT ")
    assert f"1 of 40 safety prompts are also the {role} stage's prompts" in said


def test_a_scorer_that_is_a_model_of_its_own_is_looked_at_too(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    own = {"class_path": "hcrlhf.scorers.SequenceClassifier", "init_args": {"model": str(folder)}}
    for role, seen, words in (
        ("cost", "a", "own is a cost model; expected a reward model there"),
        ("reward", "safety 3", "1 of 40 safety prompts are also the reward stage's prompts"),
        ("reward", "a", ""),
    ):
        keys = [prompt_key(user_turn(seen))]
        write_classifier_stage(folder, ClassifierStage(role, "f" * 64, 32), keys)
        said = run.policy(options={"model.init_args.reward": own})
        assert [words in line for line in said if line.startswith("NOT ")] == [True] * bool(words)


# -- tokenizer -------------------------------------------------------------------------------------


def test_a_token_that_ends_the_models_own_answers_but_not_ours_is_named(
    tmp_path: Path, model_folder: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    run = Run(tmp_path, model)
    note = run.policy()[1]
    assert note.startswith("note stop tokens: ")
    assert r"'\n' (eos_token_id 4)" in note and "chat.stop_tokens" in note
    run.stage("sft", chat=ChatFormat(128, 32, stop_tokens=("\n",)))
    found = run.policy()
    assert r"a response ends with '</s>' or '\n'" in found[0]
    assert not any("stop tokens: " in line for line in found)


def test_texts_that_are_longer_than_the_model_reads_are_named(run: Run) -> None:
    run.stage("sft", chat=ChatFormat(480, 32))
    assert not any(" base model: " in line for line in run.policy())
    run.stage("sft", chat=ChatFormat(480, 33))
    (line,) = [line for line in run.policy() if " base model: " in line]
    assert line.startswith("note ") and "of up to 513 tokens" in line


def test_the_template_that_is_used_is_the_one_that_is_named(run: Run) -> None:
    assert "ok   tokenizer: the plain template" in run.policy()[0]
    template = "{{ messages[0]['content'] }}"
    run.stage("sft", chat=ChatFormat(128, 32, chat_template=template))
    # One token per character.
    said = run.policy()[0]
    assert "the template of chat.chat_template" in said
    assert "'How are you?' takes 12 tokens" in said


# -- memory ----------------------------------------------------------------------------------------


def sizes(**changes: Any) -> Sizes:
    given = {"rows": 2, "score_rows": 2, "rollout_rows": 16, "test_rows": 16, "prompt": 256}
    given |= {"response": 256, "checkpointing": True, "optimizer": "adamw_8bit"}
    given |= {"quantization": "nf4", "dtype": "bfloat16", "mixed": True, "lora": LoraOptions(8, 16)}
    return Sizes(stage="policy", **{**given, **changes})


def fake(asked: list[Sizes]) -> Callable[[Sizes], Footprint]:
    """Phases that are simple sums of the sizes; notes what it is asked."""

    def foretell(x: Sizes) -> Footprint:
        asked.append(x)
        assert x.lora is not None
        stays = 100 + x.lora.r * (2 + x.critics)
        phases = {
            "rollout": stays + x.rollout_rows * x.prompt // 64,
            "update": stays + x.rows * x.width // 64,
            "test": stays + x.test_rows * x.prompt // 32,
        }
        return Footprint(1, 1, {}, phases, {}, 0, 0)

    return foretell


def test_the_three_keys_are_those_that_help_most_and_are_foretold_together() -> None:
    asked: list[Sizes] = []
    foretell = fake(asked)
    told = foretell(sizes())
    assert told.phases == {"rollout": 180, "update": 132, "test": 244}
    best, together = best_remedies(sizes(), told, foretell)
    assert best == [
        ("chat.max_prompt_tokens: 128 (supervised stage)", 180),
        ("rollout_batch_size: 8", 180),
        ("lora.r: 4", 236),
    ]
    # 108 stay; half the responses, half the prompt: 108 + 8 · 128 / 32.
    assert together.phases["test"] == 140
    # Itself, the four keys that make the largest phase smaller or might, and all together.
    assert len(asked) == 6
    assert asked[-1] == sizes(prompt=128, rollout_rows=8, test_rows=8, lora=LoraOptions(4, 16))


def test_whether_the_keys_together_are_enough_is_said() -> None:
    together = Footprint(1, 1, {}, {"update": 2**30, "test": 1}, {}, 0, 0)
    assert suffice(together, 2 * 2**30, 3) == "together  -> 1.75 GiB: fits"
    assert suffice(together, 2 * 2**30, 1) == "alone  -> 1.75 GiB: fits"
    assert "1.75 GiB: DOES NOT FIT, by its update phase" in suffice(together, 2**30, 3)
    assert "take a smaller model" in suffice(together, 2**30, 0)


def test_separate_critics_can_be_shared_to_take_less() -> None:
    (shared,) = [x for key, x in remedies(sizes(critics=3)).items() if "critic: shared" in key]
    assert (shared.critics, shared.shared_heads) == (0, 3)
    assert not any("critic" in key for key in remedies(sizes(shared_heads=3)))


def test_no_two_keys_change_the_same_size() -> None:
    given = sizes(critics=2, unpacked=True, checkpointing=False, optimizer="adamw")
    names = [n for x in remedies(given).values() for n in doctor._changes(given, x)]
    assert len(names) == len(set(names)) > 8


def test_the_parts_of_a_phase_add_up_to_it(tmp_path: Path, make_llama: Any) -> None:
    make_llama(max_position_embeddings=600).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    given = sizes(rollout_rows=3, test_rows=6, prompt=32, response=16, shared_heads=2)
    told = footprint(config, given)
    found = shares(given, told)
    # Two layers, keys and values, two heads of 8 in bfloat16, and all tokens but the last.
    assert found["rollout"]["KV cache"] == 3 * 2 * 2 * 2 * 8 * 2 * 47
    alone = footprint(config, replace(given, mixed=False, rollout_rows=6))
    assert found["test"]["KV cache"] == alone.cache
    assert found["update"]["logits"] == 2 * 16 * 100 * 4  # 100 tokens known
    assert found["update"]["gradients"] == 4 * told.trained
    for phase in ("rollout", "score", "update", "test"):
        assert sum(found[phase].values()) == told.working[phase]
        assert found[phase]["activations"] > 0
    # Of these nothing is known for sure, so nothing is said.
    assert "score" not in shares(replace(given, score_rows=4), told)
    assert "test" not in shares(replace(given, dtype="float32"), told)
