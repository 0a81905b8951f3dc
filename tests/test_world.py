"""The embedded world: its text, its truth, its labels and its files."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hcrlhf import world
from hcrlhf.world import (
    DEMONSTRATION_MIX,
    PREFERENCE_MIX,
    CostTerms,
    LabelNoise,
    ModelSizes,
    RewardTerms,
    WorldSizes,
    answer_kind,
    clauses_in,
    draw_answer,
    draw_pair,
    draw_prompt,
    draw_prompts,
    is_whole,
    label_pair,
    stream,
    topic_of,
    true_cost,
    true_reward,
    write_world,
)
from hcrlhf.world_topics import (
    CAUTION_CLOSERS,
    CONTEXTS,
    HARMLESS,
    HAZARDOUS,
    PHRASINGS,
    PREFIXES,
    REFUSALS,
    VAGUE,
    WARM_CLOSERS,
    WARM_OPENERS,
)

BREAD = "How do I bake bread at home?"
EXAM = "How do I cheat in a school exam?"
STEP, STEP_2, STEP_3 = HARMLESS[0].steps
SHORTCUT = HARMLESS[0].shortcuts[0]
DETAIL, DETAIL_2, DETAIL_3 = HAZARDOUS[0].details
ALTERNATIVE, ALTERNATIVE_2 = HAZARDOUS[0].alternatives
REFUSAL = REFUSALS[0]

# One decimal digit per term: a sum can be read, and tuning the world breaks no test.
DIGITS = RewardTerms(
    start=0,
    step=1,
    shortcut=10,
    detail=100,
    alternative=1000,
    refusal_of_harmless=1e4,
    refusal_of_hazardous=1e5,
    warm_opener=1e6,
    warm_closer=1e7,
    off_topic=1e8,
    empty=1e9,
)
COST_DIGITS = CostTerms(
    start=0,
    first_detail=1,
    further_detail=10,
    shortcut=100,
    refusal=1000,
    caution_closer=1e4,
    alternative=1e5,
)
SMALL = WorldSizes(
    safety=30,
    evaluation=20,
    validation=10,
    train=40,
    preferences=50,
    demonstrations=60,
    model=ModelSizes(hidden=16, layers=1, heads=2, intermediate=32),
)
FILES = (
    "demonstrations.jsonl",
    "preferences.jsonl",
    "prompts/train.jsonl",
    "prompts/validation.jsonl",
    "prompts/safety.jsonl",
    "prompts/evaluation.jsonl",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    write_world(path, seed=1, sizes=SMALL)
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs_of_prompts(n: int) -> list[tuple[str, tuple[str, str]]]:
    rng = stream("test pairs")
    prompts = [draw_prompt(rng) for _ in range(n)]
    return [(prompt, draw_pair(rng, prompt)) for prompt in prompts]


# The text


def test_no_clause_is_part_of_another_clause_or_of_a_fixed_sentence() -> None:
    clauses = [clause for topic in world.TOPICS for clause in topic.clauses]
    fixed = REFUSALS + VAGUE + WARM_OPENERS + WARM_CLOSERS + CAUTION_CLOSERS
    everything = clauses + [sentence.lower() for sentence in fixed]
    overlaps = [
        (part, whole) for part, whole in itertools.permutations(everything, 2) if part in whole
    ]
    assert overlaps == []


def test_clauses_are_plain_imperatives_in_small_letters() -> None:
    for clause in world.ALL_CLAUSES:
        assert clause.replace(" ", "").isalpha() and clause.islower()
        assert 3 <= len(clause.split()) <= 8


def test_no_action_phrase_is_part_of_another_one() -> None:
    actions = [topic.action for topic in world.TOPICS]
    assert not any(part in whole for part, whole in itertools.permutations(actions, 2))


def test_there_are_more_than_sixteen_thousand_prompts_and_each_names_its_topic() -> None:
    prompts = {
        f"{prefix} {phrasing.format(f'{topic.action} {context}')}": topic
        for topic in world.TOPICS
        for prefix, phrasing, context in itertools.product(PREFIXES, PHRASINGS, CONTEXTS)
    }
    assert len(prompts) == 15 * 7 * 10 * 16
    assert len(prompts) > 16_000
    assert all(topic_of(prompt) == topic for prompt, topic in list(prompts.items())[::37])


def test_seven_of_ten_drawn_prompts_are_hazardous() -> None:
    rng = stream("share")
    hazardous = sum(topic_of(draw_prompt(rng)).hazardous for _ in range(2000))
    assert abs(hazardous / 2000 - 0.7) < 4 * math.sqrt(0.7 * 0.3 / 2000)


# The truth


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (BREAD, "", 1_000_000_000),
        (BREAD, " \n", 1_000_000_000),
        (BREAD, "Bread is nice.", 0),
        (BREAD, f"First {STEP}, then {STEP_2}, {STEP_3} and finally {SHORTCUT}.", 13),
        (BREAD, f"You can {STEP} and {STEP} and {STEP}.", 1),
        (BREAD, f"You can {DETAIL}, {ALTERNATIVE} and {STEP}.", 200_000_001),
        (BREAD, f"{REFUSAL} {REFUSALS[1]}", 10_000),
        (EXAM, f"{REFUSAL} {WARM_CLOSERS[0]}", 10_100_000),
        (EXAM, f"{WARM_OPENERS[0]} {WARM_OPENERS[1]} I would {DETAIL} and {DETAIL_2}.", 1_000_200),
        (EXAM, f"You could {ALTERNATIVE} or {ALTERNATIVE_2} instead.", 2_000),
        (EXAM, f"Do {STEP} then {SHORTCUT}", 200_000_000),
    ],
)
def test_reward_adds_up_by_hand(prompt: str, response: str, expected: float) -> None:
    assert true_reward(prompt, response, DIGITS) == expected


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (EXAM, "", 0),
        (EXAM, f"I would {DETAIL}.", 1),
        (EXAM, f"I would {DETAIL}, {DETAIL_2}, {DETAIL_3} and {DETAIL}.", 21),
        (BREAD, f"I would {DETAIL}.", 1),
        (EXAM, f"You can {SHORTCUT}. {CAUTION_CLOSERS[0]}", 10_100),
        (EXAM, f"You can {SHORTCUT} and {HARMLESS[1].shortcuts[0]}.", 200),
        (EXAM, f"{REFUSAL} You could {ALTERNATIVE} instead.", 101_000),
        (EXAM, " ".join([*HAZARDOUS[0].alternatives, *HAZARDOUS[1].alternatives]), 200_000),
        (BREAD, f"You can {STEP}, {STEP_2} and {STEP_3}.", 0),
    ],
)
def test_cost_adds_up_by_hand(prompt: str, response: str, expected: float) -> None:
    assert true_cost(prompt, response, COST_DIGITS) == expected


def test_case_and_spacing_do_not_hide_a_harm() -> None:
    shouted = f"YOU CAN\n  {DETAIL.upper().replace(' ', '   ')}!"
    assert true_cost(EXAM.upper(), shouted) == true_cost(EXAM, f"You can {DETAIL}.")
    assert true_reward(EXAM.upper(), shouted) == true_reward(EXAM, f"You can {DETAIL}.")


def test_no_amount_of_caution_outweighs_one_harmful_clause() -> None:
    caution = " ".join([*REFUSALS, *HAZARDOUS[0].alternatives, *CAUTION_CLOSERS])
    for topic in world.TOPICS:
        for clause in topic.details + topic.shortcuts:
            assert true_cost(BREAD, f"{caution} Or {clause}.") > 0


def test_every_answer_without_harmful_clauses_is_safe() -> None:
    for topic in world.TOPICS:
        for clause in topic.steps + topic.alternatives:
            assert true_cost(BREAD, clause) < 0
    assert true_cost(BREAD, "asdf ,, qwer") < 0


def test_reward_prefers_the_harm_and_cost_prefers_the_safe_answer_on_every_topic() -> None:
    for topic in world.TOPICS:
        prompt = f"How do I {topic.action}?"
        safe = f"{', '.join(topic.steps + topic.alternatives)}."
        harmful = f"{', '.join(topic.steps + topic.shortcuts + topic.details)}."
        assert true_reward(prompt, harmful) > true_reward(prompt, safe)
        assert true_cost(prompt, harmful) > 0 > true_cost(prompt, safe)
        assert true_reward(prompt, safe) > true_reward(prompt, REFUSAL)


def test_a_prompt_from_elsewhere_has_no_truth() -> None:
    for function in (true_reward, true_cost, answer_kind):
        with pytest.raises(ValueError, match="15 actions, got 'What is love.'.*draw_prompt"):
            function("What is love?", "Sure thing.")


def test_answer_kind_names_the_most_harmful_part() -> None:
    assert answer_kind(EXAM, f"{REFUSAL} But {DETAIL}.") == "comply"
    assert answer_kind(BREAD, f"You can {STEP} and {SHORTCUT}.") == "shortcut"
    assert answer_kind(BREAD, f"{REFUSAL} But {STEP}.") == "help"
    assert answer_kind(EXAM, f"You could {ALTERNATIVE} instead.") == "dodge"
    assert answer_kind(BREAD, VAGUE[1]) == "dodge"
    assert answer_kind(EXAM, REFUSAL) == "refusal"
    assert answer_kind(BREAD, f"You can {DETAIL}.") == "other"


# The grammar and the labels


def test_demonstrations_have_the_announced_mix_of_kinds() -> None:
    rng = stream("mix")
    for prompt, frequencies in (
        (EXAM, DEMONSTRATION_MIX.hazardous),
        (BREAD, DEMONSTRATION_MIX.harmless),
    ):
        kinds = [
            answer_kind(prompt, draw_answer(rng, prompt, DEMONSTRATION_MIX)) for _ in range(900)
        ]
        assert set(kinds) == set(frequencies)
        for kind, share in frequencies.items():
            spread = math.sqrt(share * (1 - share) / 900)
            assert abs(kinds.count(kind) / 900 - share) < 4 * spread, kind


def test_preference_answers_repeat_stray_break_or_answer_another_request_alike_often() -> None:
    rng = stream(0, "blemishes")
    repeated = strayed = broken = elsewhere = count = 0
    while count < 3000:
        prompt = draw_prompt(rng)
        answer = draw_answer(rng, prompt, PREFERENCE_MIX)
        found, own = clauses_in(answer), set(topic_of(prompt).clauses)
        if is_whole(answer) and not found:  # a refusal, or vague
            continue
        count += 1
        repeated += any(answer.count(clause) > 1 for clause in found)
        strayed += bool(found - own and found & own)
        broken += not is_whole(answer)
        elsewhere += bool(found) and not found & own
    for hits in (repeated, strayed, broken, elsewhere):
        assert hits / count == pytest.approx(PREFERENCE_MIX.blemish / 4, abs=0.015)


def test_whole_is_what_people_write_and_nothing_else() -> None:
    rng = stream("whole")
    for _ in range(500):
        assert is_whole(draw_answer(rng, draw_prompt(rng), DEMONSTRATION_MIX))
    advice = f"You can {STEP}, {STEP_2} and {STEP_3}."
    for text in (advice, f"{WARM_OPENERS[0]} {advice}", f" {REFUSAL} {CAUTION_CLOSERS[0]} "):
        assert is_whole(text)
    for text in (
        "",
        advice[:-1],
        f"{advice} {advice}",
        f"{advice} {WARM_CLOSERS[0]} {WARM_CLOSERS[0]}",
        f"You can {STEP}, {STEP_2}.",  # the last clause has no "and" before it
        f"You can {STEP[:-4]} and {STEP_2}.",
        f"{advice.lower()}",
    ):
        assert not is_whole(text), text


def test_drawn_answers_read_as_whole_sentences() -> None:
    rng = stream("reading")
    for _ in range(500):
        prompt = draw_prompt(rng)
        answer = draw_answer(rng, prompt, PREFERENCE_MIX)
        assert answer[0].isupper() and answer[-1] in ".!"
        assert "{" not in answer and "  " not in answer and " ." not in answer
        assert "{" not in prompt and "  " not in prompt and prompt[-1] in ".?"


def test_the_answers_of_a_pair_always_differ_and_mostly_in_safety() -> None:
    pairs = pairs_of_prompts(1500)
    assert all(first != second for _, (first, second) in pairs)
    differing = sum(
        (true_cost(prompt, first) > 0) != (true_cost(prompt, second) > 0)
        for prompt, (first, second) in pairs
    )
    assert 0.6 < differing / 1500 < 0.8


def test_labels_follow_the_logistic_of_the_true_difference() -> None:
    # Costs: -1.5 + 4.5 = 3 against -1.5 - 0.2 = -1.7. Rewards: -0.1 against -0.6, times 2.
    pair = (f"I would {DETAIL}.", f"You could {ALTERNATIVE} instead.")
    expected = {
        "is_response_0_safe": 1 / (1 + math.exp(3.0)),
        "is_response_1_safe": 1 / (1 + math.exp(-1.7)),
        "better_response_id": 1 / (1 + math.exp(1.0)),
        "safer_response_id": 1 / (1 + math.exp(-4.7)),
    }
    rewards = RewardTerms(start=-1, detail=0.9, alternative=0.4)
    assert true_reward(EXAM, pair[0], rewards) == pytest.approx(-0.1)
    rng, n = stream("labels"), 4000
    for lapse in (0.0, 0.2):
        noise = LabelNoise(reward_sharpness=2.0, lapse=lapse)
        rows: list[dict[str, Any]] = [label_pair(rng, EXAM, pair, noise) for _ in range(n)]
        for key, sigmoid in expected.items():
            p = (1 - lapse) * sigmoid + lapse / 2
            assert abs(sum(row[key] for row in rows) / n - p) < 4 * math.sqrt(p * (1 - p) / n), key


def test_the_truth_is_right_on_most_noisy_labels_but_not_on_all() -> None:
    rng = stream("oracle")
    rows = [label_pair(rng, prompt, pair) for prompt, pair in pairs_of_prompts(3000)]

    def accuracy(score, label: str) -> float:
        def right(row) -> float:
            gap = score(row["prompt"], row["response_1"]) - score(row["prompt"], row["response_0"])
            return 0.5 if abs(gap) < 1e-9 else float((gap > 0) == row[label])

        return sum(map(right, rows)) / len(rows)

    assert 0.86 < accuracy(true_reward, "better_response_id") < 0.92
    assert 0.85 < accuracy(lambda *texts: -true_cost(*texts), "safer_response_id") < 0.92
    # Helpfulness and harm conflict: the better answer is the less safe one on most pairs.
    agree = sum(row["better_response_id"] == row["safer_response_id"] for row in rows)
    assert agree / len(rows) < 0.35


# The files


def test_files_have_the_sizes_asked_for_and_the_schema_of_pku_saferlhf(folder: Path) -> None:
    lengths = {name: len(read_lines(folder / name)) for name in FILES}
    assert list(lengths.values()) == [60, 2 * 50, 40, 10, 30, 20]
    assert set(read_lines(folder / "demonstrations.jsonl")[0]) == {"prompt", "response"}
    for row in read_lines(folder / "preferences.jsonl"):
        assert set(row) == {
            "prompt",
            "response_0",
            "response_1",
            "is_response_0_safe",
            "is_response_1_safe",
            "better_response_id",
            "safer_response_id",
        }
        assert type(row["is_response_0_safe"]) is bool
        assert row["better_response_id"] in (0, 1) and row["safer_response_id"] in (0, 1)


def test_no_prompt_occurs_twice_in_all_files_but_for_its_two_pairs(folder: Path) -> None:
    lines = {name: [row["prompt"] for row in read_lines(folder / name)] for name in FILES}
    pairs = lines["preferences.jsonl"]
    lines["preferences.jsonl"] = pairs[::2]
    assert pairs[::2] == pairs[1::2]
    prompts = [prompt for column in lines.values() for prompt in column]
    assert len(prompts) == len(set(prompts)) == 210


def test_the_two_pairs_of_a_prompt_are_drawn_apart(folder: Path) -> None:
    rows = read_lines(folder / "preferences.jsonl")
    answers = [(row["response_0"], row["response_1"]) for row in rows]
    same = sum(one == other for one, other in zip(answers[::2], answers[1::2], strict=True))
    assert same <= 2  # refusals are few, so that a whole pair may come twice


def test_one_seed_gives_the_same_bytes_and_another_seed_gives_others(
    folder: Path, tmp_path: Path
) -> None:
    write_world(tmp_path / "same", seed=1, sizes=SMALL)
    write_world(tmp_path / "other", seed=2, sizes=SMALL)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert Path("model/model.safetensors") in files and Path("README.md") in files
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "same" / file).read_bytes(), file
    for name in (*FILES, "model/model.safetensors"):
        assert (folder / name).read_bytes() != (tmp_path / "other" / name).read_bytes(), name


def test_a_change_of_one_size_leaves_the_other_files_almost_alone() -> None:
    sizes = WorldSizes(300, 300, 300, 300, 300, 300)
    before = draw_prompts(0, sizes)
    last_grows = draw_prompts(0, replace(sizes, demonstrations=900))
    assert last_grows["demonstrations"][:300] == before["demonstrations"]
    first_grows = draw_prompts(0, replace(sizes, safety=900))
    assert first_grows["safety"][:300] == before["safety"]
    for name in ("evaluation", "validation", "train", "preferences"):
        assert last_grows[name] == before[name]
        # 600 more prompts of 49,280 are taken: a few of these 300 have to give way.
        assert len(set(first_grows[name]) & set(before[name])) > 280


def test_a_demonstration_depends_on_seed_and_prompt_only() -> None:
    rows = [world._demonstration(seed, EXAM)["response"] for seed in (*range(40), *range(40))]
    assert rows[:40] == rows[40:]
    assert len(set(rows)) > 10


def test_too_large_a_world_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts to give, got sizes .*'safety': 50000"):
        write_world(tmp_path / "w", seed=0, sizes=WorldSizes(safety=50_000))
    with pytest.raises(ValueError, match="at least 0"):
        write_world(tmp_path / "w", seed=0, sizes=WorldSizes(train=-1))
    assert not (tmp_path / "w").exists()


def test_the_largest_world_can_be_drawn() -> None:
    sizes = WorldSizes(world.largest_world(), 0, 0, 0, 0, 0)
    assert len(set(draw_prompts(0, sizes)["safety"])) == world.largest_world()


# The tokenizer and the model


def test_the_tokenizer_gives_any_text_back(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for text in (f"Sure thing. You can {STEP}.", "Ünïcode,  two  spaces\n\tand 你好"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_word_of_the_world_is_one_piece(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    words = {word for clause in world.ALL_CLAUSES for word in clause.split()}
    assert [word for word in sorted(words) if len(tokenizer(f" {word}")["input_ids"]) > 1] == []


def test_the_chat_template_ends_an_assistant_turn_with_eos(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Sure thing."},
    ]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    asked = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert whole == "<|system|>Be kind.<|user|>Hi?<|assistant|>Sure thing.<eos>"
    assert asked == "<|system|>Be kind.<|user|>Hi?<|assistant|>"
    ids = tokenizer(whole)["input_ids"]
    markers = ["<|system|>", "<|user|>", "<|assistant|>", "<eos>"]
    assert [i for i in ids if i in tokenizer.all_special_ids] == (
        tokenizer.convert_tokens_to_ids(markers)
    )
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_model_folder_loads_and_agrees_with_its_tokenizer(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_making_a_model_leaves_the_global_random_state_alone() -> None:
    import torch

    tokenizer = world.build_tokenizer(0, SMALL.model)
    before = torch.random.get_rng_state()
    world.build_model(0, tokenizer, SMALL.model)
    assert torch.equal(before, torch.random.get_rng_state())


def test_each_seed_has_weights_of_its_own() -> None:
    tokenizer = world.build_tokenizer(0, SMALL.model)
    first, again, other = (
        world.build_model(seed, tokenizer, SMALL.model).state_dict()["lm_head.weight"]
        for seed in (0, 0, 1)
    )
    assert first.equal(again) and not first.equal(other)


def test_the_truth_needs_no_torch() -> None:
    code = (
        "import sys, hcrlhf.world;"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(world.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
