"""Prompts for the policy stage: training, validation, safety (in no other one) and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Sampler

from datamodules.demonstrations import read_demonstrations
from datamodules.files import EncodedLoading, check_batch_size
from hcrlhf.errors import InputError
from hcrlhf.examples import Demonstration, Prompt, user_turn
from hcrlhf.rollouts import shuffled
from hcrlhf.rows import read_rows, text_field
from hcrlhf.splits import require_disjoint


class Prompts(EncodedLoading):
    """Files with one prompt per row. One epoch is the whole run: `updates` batches.

    Args:
        train: prompts that the policy is trained on.
        validation: prompts on which it is watched.
        safety: prompts for the safety test alone; no stage may have seen one.
        evaluation: prompts for `predict`.
        demonstrations: prompts with responses, which `ptx_coefficient` of the policy keeps likely;
            as a rule those of the supervised stage.
        field: name of the column of prompts.
        demonstration_fields: names of the demonstrations' columns of prompts, responses and, where
            there is one, context (`datamodules.Demonstrations`).
        prompts_per_update: prompts of one rollout, at least 2.
        updates: rollouts of the run; the training prompts are gone through as often as needed, in
            a new order each time.
        batch_size: prompts per batch outside training.
        seed: of the order of training.
    """

    def __init__(
        self,
        train: str,
        validation: str,
        safety: str | None = None,
        evaluation: str | None = None,
        demonstrations: str | None = None,
        field: str = "prompt",
        demonstration_fields: tuple[str, str] | tuple[str, str, str] = ("prompt", "response"),
        prompts_per_update: int = 64,
        updates: int = 100,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.paths = {
            "train": train,
            "validation": validation,
            "safety": safety,
            "evaluation": evaluation,
        }
        self.demonstrations_path, self.demonstration_fields = demonstrations, demonstration_fields
        self.field = field
        self.prompts_per_update = check_batch_size(prompts_per_update, "prompts_per_update")
        if prompts_per_update < 2:
            raise InputError(
                "prompts_per_update is at least 2, got 1: the spread of the cost is that of "
                "responses to different prompts"
            )
        self.updates = check_batch_size(updates, "updates")
        self.batch_size = check_batch_size(batch_size)
        self.seed = seed
        self.prompts: dict[str, list[Prompt]] = {}
        self.demonstrations: list[Demonstration] = []

    def setup(self, stage: str) -> None:
        self.prompts = {
            name: self._read(path) for name, path in self.paths.items() if path is not None
        }
        if self.demonstrations_path is not None:
            self.demonstrations = read_demonstrations(
                self.demonstrations_path, *self.demonstration_fields
            )
        if "safety" in self.prompts:
            safety = [p.key for p in self.prompts["safety"]]
            others: dict[str, Sequence[Prompt]] = {
                **self.prompts,
                "demonstrations": self.demonstrations,
            }
            for name, prompts in others.items():
                if name != "safety":
                    require_disjoint(safety, [p.key for p in prompts], "safety", name)
        if len(self.prompts["train"]) < self.prompts_per_update:
            raise InputError(
                f"{self.paths['train']} has {len(self.prompts['train'])} prompts, fewer than "
                f"prompts_per_update {self.prompts_per_update}; lower it or give more prompts"
            )

    def _read(self, path: str) -> list[Prompt]:
        """The unique prompts of a file, in order."""
        expected = "a file of prompts (hcrlhf split writes the four that a policy needs)"
        prompts: dict[str, Prompt] = {}
        for i, row in enumerate(read_rows(path, expected=expected)):
            text = text_field(row, self.field, path, i)
            if not text.strip():
                raise InputError(f"{path}, row {i + 1}: the prompt is empty")
            prompt = Prompt(user_turn(text))
            prompts.setdefault(prompt.key, prompt)
        return list(prompts.values())

    @property
    def safety_prompts(self) -> list[Prompt] | None:
        """What the safety test may draw from; None where the config names no safety file."""
        return self.prompts.get("safety")

    @property
    def validation_prompts(self) -> list[Prompt]:
        """Prompts that training is watched on, and a candidate is checked on."""
        return self.prompts["validation"]

    @property
    def safety_source(self) -> str:
        """Name of the file of safety prompts."""
        return Path(self.paths["safety"] or "").name

    @property
    def training_keys(self) -> frozenset[str]:
        """Keys of the prompts that training or validation uses."""
        used = (self.prompts["train"], self.prompts["validation"], self.demonstrations)
        return frozenset(p.key for prompts in used for p in prompts)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(
            self.prompts["train"],
            "training",
            self.prompts_per_update,
            batch_sampler=lambda count: UpdateSampler(
                count, self.prompts_per_update, self.updates, self.seed, self._updates_done
            ),
        )

    def _updates_done(self) -> int:
        """How many updates the policy has behind it: not 0 in a run that is resumed."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return int(getattr(module, "updates", 0))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.prompts["validation"], "validation", self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._optional("safety", "test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._optional("evaluation", "predict")

    def _optional(self, name: str, command: str) -> DataLoader[Any]:
        if name not in self.prompts:
            raise InputError(f"hcrlhf {command} needs data.init_args.{name}, a file of prompts")
        return self.loader(self.prompts[name], name, self.batch_size)


class UpdateSampler(Sampler[list[int]]):
    """Batches for `updates` rollouts: pass after pass over all prompts, each in its own order.

    A batch is a function of (seed, its number) alone, and never holds one prompt twice: the rest
    of a pass that does not fill a batch is left out of that pass.

    Args:
        done: how many updates are behind the policy when an iteration begins; their batches are
            left out, so that a resumed run goes on where the broken one was.
    """

    def __init__(
        self,
        prompts: int,
        batch_size: int,
        updates: int,
        seed: int,
        done: Callable[[], int] = lambda: 0,
    ) -> None:
        if prompts < batch_size:
            raise InputError(
                f"{prompts} training prompts fit max_prompt_tokens, fewer than prompts_per_update "
                f"{batch_size}"
            )
        self.prompts, self.batch_size, self.updates, self.seed = prompts, batch_size, updates, seed
        self.done = done

    def __len__(self) -> int:
        return self.updates

    def __iter__(self) -> Iterator[list[int]]:
        per_pass = self.prompts // self.batch_size
        for update in range(self.done() % self.updates, self.updates):
            number, place = divmod(update, per_pass)
            order = shuffled(self.prompts, self.seed, "order", number).tolist()
            yield order[place * self.batch_size : (place + 1) * self.batch_size]
