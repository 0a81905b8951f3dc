"""Prompts with one good response each, for the supervised stage."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from datamodules.files import EncodedLoading, check_batch_size
from hcrlhf.errors import InputError
from hcrlhf.examples import Demonstration, user_turn
from hcrlhf.rows import read_rows, text_field
from hcrlhf.splits import split_by_prompt


class Demonstrations(EncodedLoading):
    """Rows with a prompt and a response.

    Args:
        path: file (.json, .jsonl, .csv, .gz of these, .parquet) or hub id, as of
            `hcrlhf.rows.hub_source` (a commit behind @ keeps it the same).
        prompt_field, response_field: names of the columns.
        context_field: of a text that the prompt is about, put after it and an empty line (`context`
            of databricks-dolly-15k); None: there is none.
        batch_size: demonstrations per step.
        validation_fraction: share of the prompts that is held out, by a hash of the prompt.
        split: of a hub data set.
        seed: of the order of training.
    """

    def __init__(
        self,
        path: str,
        prompt_field: str = "prompt",
        response_field: str = "response",
        context_field: str | None = None,
        batch_size: int = 32,
        validation_fraction: float = 0.05,
        split: str = "train",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.path = path
        self.fields = (prompt_field, response_field, context_field)
        self.batch_size = check_batch_size(batch_size)
        self.validation_fraction = validation_fraction
        self.split = split
        self.seed = seed

    def setup(self, stage: str) -> None:
        examples = read_demonstrations(self.path, *self.fields, split=self.split)
        self.training, self.validation = split_by_prompt(
            examples, self.validation_fraction, self.path
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.training, "training", self.batch_size, seed=self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.validation, "validation", self.batch_size, shared=True)

    test_dataloader = predict_dataloader = val_dataloader


def read_demonstrations(
    path: str,
    prompt_field: str,
    response_field: str,
    context_field: str | None = None,
    split: str = "train",
) -> list[Demonstration]:
    """
    Raises:
        InputError: the file cannot be read, a column is missing, or a text is empty.
    """
    examples = []
    for i, row in enumerate(read_rows(path, split)):
        prompt = text_field(row, prompt_field, path, i)
        response = text_field(row, response_field, path, i)
        if not prompt.strip() or not response.strip():
            raise InputError(f"{path}, row {i + 1}: the prompt or the response is empty")
        # Null and "" are no context; a column that is not there is an error.
        if context_field is not None and (context_field not in row or row[context_field]):
            prompt = f"{prompt}\n\n{text_field(row, context_field, path, i)}"
        examples.append(Demonstration(user_turn(prompt), response.strip()))
    return examples
