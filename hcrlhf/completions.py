"""Tables of what a policy answers: aligned for a terminal, Markdown for TensorBoard."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("prompt", "response", "reward", "cost")
LINES = 3  # per row in a terminal; the rest is in completions.jsonl


def console_table(title: str, records: Sequence[Mapping[str, Any]], width: int) -> str:
    """Prompt, response, reward and cost under one another, wrapped to `width` characters.

    Args:
        records: with the keys prompt, response, reward, cost, as `Policy.predict_step` gives.
    """
    width = min(max(width, 60), 120)
    left = (width - 22) * 2 // 5
    right = width - 22 - left
    head = f"  {'prompt':<{left}}  {'response':<{right}}  {'reward':>6}  {'cost':>6}"
    lines = [f"  {title}", head]
    for record in records:
        prompt = _wrapped(record["prompt"], left)
        response = _wrapped(record["response"] or "(nothing)", right)
        scores = f"{record['reward']:>6.2f}  {record['cost']:>6.2f}"
        for i in range(max(len(prompt), len(response))):
            cells = [column[i] if i < len(column) else "" for column in (prompt, response)]
            line = f"  {cells[0]:<{left}}  {cells[1]:<{right}}  {scores if i == 0 else ''}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same cells as a Markdown table; no cell can break it."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def table_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The `COLUMNS` of each record as text."""
    return [[r["prompt"], r["response"], f"{r['reward']:.2f}", f"{r['cost']:.2f}"] for r in records]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(_printable(text), width, max_lines=LINES, placeholder=" …")


def _printable(text: str) -> str:
    """One line without control characters: a model may write escape sequences too."""
    return "".join(c if c.isprintable() else " " for c in text)


def _cell(text: str) -> str:
    cell = _printable(text).replace("\\", "\\\\").replace("|", "\\|")
    return cell.replace("<", "&lt;")
