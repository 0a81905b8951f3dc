"""Loaders from examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from hcrlhf.errors import InputError
from hcrlhf.examples import EncodesExamples, Prompt
from hcrlhf.processes import rank_and_size
from hcrlhf.rollouts import shuffled


class EncodedLoading(LightningDataModule):
    """Turns examples into loaders, encoded by the training module of the same trainer."""

    def loader(
        self,
        examples: Sequence[Prompt],
        name: str,
        batch_size: int,
        seed: int | None = None,
        shared: bool = False,
        batch_sampler: Callable[[int], Sampler[list[int]]] | None = None,
    ) -> DataLoader[Any]:
        """A loader of encoded batches, shuffled with `seed` (None: in order).

        Examples whose prompt is too long are left out, and that is said.

        Args:
            shared: without `seed`, of several processes each reads its part.

        Raises:
            InputError: none is left.
        """
        module = self.trainer.lightning_module if self.trainer is not None else None
        if not isinstance(module, EncodesExamples):
            raise InputError(
                f"{type(self).__name__} needs a module with encode() and collate(), and "
                f"{type(module).__name__} has none; use one of lightning_modules"
            )
        encoded = [e for e in map(module.encode, examples) if e is not None]
        dropped = len(examples) - len(encoded)
        if not encoded:
            raise InputError(
                f"all {len(examples)} {name} prompts are longer than max_prompt_tokens; raise it "
                "in the supervised stage's chat"
            )
        if dropped:
            rank_zero_info(
                f"{dropped} of {len(examples)} {name} examples left out: prompt too long"
            )
        # A loader without a generator of its own draws from the global one at each epoch.
        options: dict[str, Any] = {"collate_fn": module.collate, "generator": torch.Generator()}
        if batch_sampler is not None:
            options["batch_sampler"] = batch_sampler(len(encoded))
        else:
            options["batch_size"] = batch_size
            if shared and rank_and_size()[1] > 1:
                require_whole(self.trainer.limit_val_batches)
                options["sampler"] = ShareSampler(len(encoded))
            if seed is not None:
                options["sampler"] = EpochSampler(
                    len(encoded), seed, lambda: self._batches_done() * batch_size
                )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            return DataLoader(encoded, **options)

    def _batches_done(self) -> int:
        """How many batches of this epoch are behind the module: not 0 in a run that is resumed."""
        return self.trainer.fit_loop.batch_idx + 1 if self.trainer is not None else 0


class EpochSampler(DistributedSampler[int]):
    """All examples, in an order of its own in every epoch: a function of (seed, epoch) alone.

    Of several processes each takes every so manieth place of that order; what is left over at its
    end, fewer examples than processes, is left out of that epoch.

    Args:
        done: how many of its examples of the epoch are behind this process when an iteration
            begins; they are left out, so that a resumed run goes on where the broken one was.

    Raises:
        InputError: there are fewer examples than processes.
    """

    def __init__(self, examples: int, seed: int, done: Callable[[], int] = lambda: 0) -> None:
        # Not its own constructor, which wants a data set: Lightning only asks for the class, and
        # leaves a sampler of it alone.
        Sampler.__init__(self)
        self.rank, self.num_replicas = rank_and_size()
        require_one_each(examples, self.num_replicas)
        self.examples, self.seed, self.done = examples, seed, done
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before the first batch of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.examples // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        order = shuffled(self.examples, self.seed, "order", self.epoch).tolist()
        own = order[self.rank : len(self) * self.num_replicas : self.num_replicas]
        yield from own[self.done() :]


class ShareSampler(DistributedSampler[int]):
    """Every held-out example once: of several processes each takes every so manieth.

    Lightning's own repeats some where they cannot be shared evenly, and figures would count them
    twice.

    Raises:
        InputError: there are fewer examples than processes.
    """

    def __init__(self, examples: int) -> None:
        Sampler.__init__(self)  # as `EpochSampler`
        self.rank, self.num_replicas = rank_and_size()
        require_one_each(examples, self.num_replicas)
        self.own = range(self.rank, examples, self.num_replicas)

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[int]:
        return iter(self.own)


def require_whole(limit: float) -> None:
    """
    Raises:
        InputError: a share of the batches, which processes with more and fewer would round
            otherwise, to none perhaps.
    """
    if isinstance(limit, float) and limit != 1.0:
        raise InputError(
            f"trainer.limit_val_batches {limit} is a share, of which several processes would make "
            "different numbers; give a whole number of batches"
        )


def require_one_each(examples: int, processes: int) -> None:
    if examples < processes:
        raise InputError(f"{examples} examples cannot be shared by {processes} processes")


def check_batch_size(value: int, name: str = "batch_size") -> int:
    if not 1 <= value < 2**31:
        raise InputError(f"{name} is a whole number from 1 to 2^31 - 1, got {value}")
    return value
