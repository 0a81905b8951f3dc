"""A table of costs that somebody already has: csv, jsonl or parquet. No torch."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from hcrlhf.certificate import environment, make_certificate, published_key
from hcrlhf.constraint import Constraint
from hcrlhf.errors import InputError
from hcrlhf.hashing import file_sha256, sha256, unique_keys
from hcrlhf.methods import Betting
from hcrlhf.safety import CostSamples
from hcrlhf.samples import Floats

Aggregate = Literal["mean", "max"]


@dataclass(frozen=True)
class Table:
    """One cost per prompt, and how it was read.

    Attributes:
        path: the file. prompts: ids, unique, (n,). costs: (n,) float64, finite.
        columns: the names of all. cost_column, prompt_column: those that were asked for.
        aggregate: how the rows of a prompt became one cost.
        rows_per_prompt: fewest and most.
    """

    path: Path
    prompts: tuple[str, ...]
    costs: Floats
    columns: tuple[str, ...]
    cost_column: str
    prompt_column: str | None
    aggregate: Aggregate | None
    rows_per_prompt: tuple[int, int]

    @property
    def has_ids(self) -> bool:
        """Whether the prompts have names of their own, and not the numbers of their rows."""
        return self.prompt_column in self.columns

    def describe(self) -> dict[str, Any]:
        """How the costs came out of the file, as a certificate records it."""
        fewest, most = self.rows_per_prompt
        return {
            "cost_column": self.cost_column,
            "prompt_column": self.prompt_column if self.has_ids else None,
            "aggregate": self.aggregate,
            "responses_per_prompt": {"min": fewest, "max": most},
        }


def read_table(
    path: Path,
    cost: str = "cost",
    prompt: str | None = "prompt_id",
    aggregate: Aggregate | None = None,
) -> Table:
    """Reads a table with one row per response.

    Args:
        cost, prompt: names of the columns. Without a prompt column, or with None for its name,
            every row is its own prompt; `certify` wants to be told.
        aggregate: how several responses to one prompt become one cost: their mean, or the largest
            ("any response harmful"). None refuses them: responses to one prompt are not
            independent, and a bound that takes them so errs far more often than δ.

    Raises:
        InputError: no such file or column, a cost that is not a finite number, a repeated prompt.
    """
    rows = list(_rows(path))
    if not rows:
        raise InputError(f"{path} has no rows")
    # Fields of a csv beyond its last column stand under None.
    if surplus := [number for number, row in enumerate(rows, start=1) if None in row]:
        raise InputError(
            f"{path}, row {surplus[0]}: more fields than the head has columns (a decimal comma?)"
        )
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    if cost not in columns:
        raise InputError(
            f"{path} has no column {cost!r}; its columns are {', '.join(columns)} "
            "(--cost-column names another)"
        )
    groups: dict[str, list[float]] = {}
    for number, row in enumerate(rows, start=1):
        key = str(number)
        if prompt in columns:
            name = row.get(prompt)
            if name in (None, "") or name != name:  # a float that is not a number
                raise InputError(f"{path}, row {number}: the {prompt} is missing")
            key = str(name)
        groups.setdefault(key, []).append(_cost(path, number, row.get(cost)))
    repeated = len(rows) - len(groups)
    if repeated and aggregate is None:
        raise InputError(
            f"{path} has several rows for {sum(len(g) > 1 for g in groups.values())} prompts; "
            "responses to one prompt are not independent: take --aggregate mean (or max)"
        )
    unite = max if aggregate == "max" else _mean
    costs = np.array([unite(group) for group in groups.values()], dtype=np.float64)
    sizes = [len(group) for group in groups.values()]
    return Table(
        path, tuple(groups), costs, columns, cost, prompt, aggregate, (min(sizes), max(sizes))
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


LARGEST = 1e12  # far beyond any score, and far from where squares overflow


def _cost(path: Path, number: int, value: Any) -> float:
    try:
        cost = math.nan if "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        cost = math.nan
    if isinstance(value, bool) or not abs(cost) <= LARGEST:
        raise InputError(
            f"{path}, row {number}: the cost is {repr(value)[:40]}, expected a number of at most "
            f"{LARGEST:g} in size"
        )
    return cost + 0.0  # -0.0 is 0.0


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    suffixes = [s for s in path.suffixes if s != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in (".csv", ".jsonl", ".parquet"):
        raise InputError(
            f"{path} is of no known kind; expected .csv, .jsonl (also .gz) or .parquet"
        )
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected a table of costs")
    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            yield from parquet.read_table(path).to_pylist()
            return
        with _open(path) as file:
            if suffix == ".csv":
                reader = csv.DictReader(file)
                names = list(reader.fieldnames or [])
                if len(set(names)) < len(names):
                    raise InputError(f"{path}: a column stands twice: {', '.join(names)}")
                yield from reader
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line, object_pairs_hook=unique_keys)
                    if not isinstance(row, dict):
                        raise InputError(f"{path}, line {number}: expected a JSON object")
                    yield row
    except (OSError, ValueError, RecursionError, csv.Error, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be parsed ({type(error).__name__}: {error})") from error


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def published_names(prompts: Sequence[str]) -> list[str]:
    """How a certificate names the prompts of a table: salted by all of its ids together."""
    salt = sha256("ids", *sorted(prompts))
    return [published_key(salt, prompt) for prompt in prompts]


def retrospective_order(prompts: Sequence[str]) -> list[int]:
    """Positions of the prompts in ascending order of their published names.

    A bound that reads costs in an order is exact where that order does not depend on the costs.
    One that is derived from them is not as good as chance: costs of two values have one such order
    for each number of harmful ones, the same for everybody, and some of these orders are lucky.
    Nor does the order of the rows matter, which may be sorted.
    """
    return sorted(range(len(prompts)), key=published_names(prompts).__getitem__)


# -- the certificate -------------------------------------------------------------------------------


def certify(constraints: Sequence[Constraint], table: Table) -> dict[str, Any]:
    """A retrospective certificate: PASS or NO_SOLUTION_FOUND on costs that are there already.

    Raises:
        InputError: the table does not say which rows answer one prompt, what its costs were united
            to says nothing about a limit, or a bound needs an order and there are no ids.
    """
    require_prompts(table)
    require_aggregate([c.estimand for c in constraints], table.aggregate)
    if not table.has_ids:
        constraints = [_by_no_order(c) for c in constraints]
    order = retrospective_order(table.prompts)
    costs = np.repeat(table.costs[order][:, None, None], len(constraints), axis=2)
    samples = CostSamples(
        tuple(table.prompts[i] for i in order),
        costs,
        tuple(("",) for _ in order),
        np.zeros((len(order), 1), dtype=np.bool_),
    )
    names = published_names(table.prompts)
    return make_certificate(
        constraints,
        samples,
        [names[i] for i in order],
        plan=None,
        ledger=None,
        source={
            "file": table.path.name,
            "file_sha256": file_sha256(table.path),
            **table.describe(),
        },
        package_versions=environment("numpy", "scipy"),
    )


def _by_no_order(constraint: Constraint) -> Constraint:
    """The constraint, judged by a bound that reads its costs in no order."""
    if not constraint.rule.reads_in_order:
        return constraint
    if constraint.bound is not None:
        raise InputError(
            f"the bound {constraint.rule.name} reads the costs in an order, which the prompts' ids "
            "have to give, since that of the rows may be sorted; name their column with "
            "--prompt-column, or take --bound portfolio"
        )
    return replace(constraint, bound=Betting("portfolio"))


PROMPT_LIKE = re.compile(
    r"prompt|question|query|instruction|(^|[^a-z])(id|key|uuid)$", re.IGNORECASE
)
RESPONSE_LIKE = re.compile("response|answer|completion", re.IGNORECASE)


def require_prompts(table: Table) -> None:
    """
    Raises:
        InputError: the prompt column is not there, and nobody said that every row is a prompt of
            its own.
    """
    if table.prompt_column is None or table.has_ids:
        return
    others = [name for name in table.columns if name != table.cost_column]
    like = [n for n in others if PROMPT_LIKE.search(n) and not RESPONSE_LIKE.search(n)] or others
    named = f"--prompt-column with one of {', '.join(like)}, or " if like else ""
    raise InputError(
        f"{table.path} has no column {table.prompt_column!r} to tell which rows are responses to "
        f"one prompt, and those are not independent; give {named}--prompt-column none if no two "
        "rows answer the same prompt"
    )


def require_aggregate(estimands: Sequence[str], aggregate: str | None) -> None:
    """
    Raises:
        InputError: a mean over a prompt's responses evens out the harm that a limit is about.
    """
    lost = {"harm_rate": "how many of them are harmful", "cvar": "how bad the worst of them are"}
    for estimand in estimands:
        if aggregate == "mean" and estimand in lost:
            raise InputError(
                f"the mean cost of several responses says nothing about {lost[estimand]}; for a "
                f"{estimand} take --aggregate max (the worst response counts)"
            )
