"""One timed run of TRL, for benchmarks/throughput.py, in an environment of its own:

    python benchmarks/trl_peers.py ppo    FOLDER '{"batch": 32, "new_tokens": 64, "steps": 5, ...}'

`ppo` needs trl 1.9 (the last that has it), `rloo` and `reward` trl 1.16. FOLDER is what
`throughput.py` has prepared. The last line is JSON: seconds of each update.

TRL's PPO counts its gradient accumulation across minibatches: whatever num_mini_batches says, it
takes one optimizer step per pass over a rollout, where ours takes one per minibatch. Forward and
backward passes are the same; the steps that it saves are in its favour.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)


class Clock(TrainerCallback):
    """Seconds of every update, data loading and logging included.

    Args:
        steps: of the optimizer, in one update as the trainer counts them.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.marks: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        ends = self.marks[:: self.steps]
        return [b - a for a, b in pairwise(ends)]


def scorer(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        folder / "reward-trl", num_labels=1, dtype=torch.float32
    )


def policy(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "lm", dtype=torch.float32)


def lora(task: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task, **options)


def common(folder: Path) -> dict[str, Any]:
    """Nothing but training: no reports, no checkpoints, no progress bar, float32."""
    return {
        "output_dir": str(folder / "trl-out"),
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1000,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "learning_rate": 1e-5,
    }


def prompts(folder: Path) -> list[str]:
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def ppo(folder: Path, c: dict[str, Any]) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "lm", padding_side="left")
    data = Dataset.from_dict({"input_ids": [tokenizer(p)["input_ids"] for p in prompts(folder)]})
    accumulation = c["batch"] // c["micro_batch"]
    config = PPOConfig(
        **common(folder),
        per_device_train_batch_size=c["micro_batch"],
        gradient_accumulation_steps=accumulation,
        num_mini_batches=c["minibatches"],
        num_ppo_epochs=c["epochs"],
        total_episodes=c["batch"] * c["steps"],
        response_length=c["new_tokens"],
        local_rollout_forward_batch_size=c["batch"],
        temperature=1.0,
        num_sample_generations=0,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy(folder),
        ref_model=None,
        reward_model=scorer(folder),
        value_model=scorer(folder),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        peft_config=lora("CAUSAL_LM"),
    )


def rloo(folder: Path, c: dict[str, Any]) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "lm", padding_side="left")
    config = RLOOConfig(
        **common(folder),
        per_device_train_batch_size=c["micro_batch"],
        gradient_accumulation_steps=c["batch"] // c["micro_batch"] // c["minibatches"],
        steps_per_generation=c["batch"] // c["micro_batch"],
        num_generations=c["samples"],
        max_completion_length=c["new_tokens"],
        temperature=1.0,
        beta=0.05,
        num_iterations=c["epochs"],
        max_steps=c["steps"] * c["epochs"] * c["minibatches"],
    )
    return RLOOTrainer(
        model=policy(folder),
        reward_funcs=scorer(folder),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts(folder)}),
        processing_class=tokenizer,
        reward_processing_classes=AutoTokenizer.from_pretrained(folder / "lm"),
        peft_config=lora("CAUSAL_LM"),
    )


def reward(folder: Path, c: dict[str, Any]) -> Any:
    from trl import RewardConfig, RewardTrainer

    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][: c["batch"] * c["steps"]]
    data = Dataset.from_list([{k: row["prompt"] + row[k] for k in PAIR} for row in rows])
    config = RewardConfig(
        **common(folder),
        per_device_train_batch_size=c["batch"],
        num_train_epochs=1,
        max_length=c["max_tokens"],
    )
    return RewardTrainer(
        model=scorer(folder),
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "lm"),
        peft_config=lora("SEQ_CLS", modules_to_save=["score"]),
    )


PAIR = ("chosen", "rejected")
KINDS = {"ppo": ppo, "rloo": rloo, "reward": reward}


def main() -> None:
    kind, folder, configuration = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.manual_seed(0)
    # RLOOTrainer calls every optimizer step one, PPOTrainer every rollout.
    steps = configuration["epochs"] * configuration["minibatches"] if kind == "rloo" else 1
    trainer, clock = KINDS[kind](folder, configuration), Clock(steps)
    trainer.add_callback(clock)
    trainer.train()
    print(json.dumps({"seconds": clock.seconds}))


if __name__ == "__main__":
    main()
