"""The rule of dependence: who may import whom, and what starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIGHTNING_FOLDERS = ("lightning_modules", "datamodules", "callbacks")
KNOW_EVERYTHING = {"cli.py", "lightning_cli.py", "__main__.py"}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_hcrlhf_knows_neither_lightning_nor_the_folders_beside_it() -> None:
    forbidden = {"lightning", "pytorch_lightning", *LIGHTNING_FOLDERS}
    for path in (ROOT / "hcrlhf").glob("*.py"):
        if path.name not in KNOW_EVERYTHING:
            assert not imported(path) & forbidden, path


@pytest.mark.parametrize("folder", LIGHTNING_FOLDERS)
def test_the_lightning_folders_do_not_import_one_another(folder: str) -> None:
    others = set(LIGHTNING_FOLDERS) - {folder}
    files = list((ROOT / folder).glob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & others, path


def test_bounds_constraints_and_certificates_start_without_torch_and_lightning() -> None:
    modules = "hcrlhf.gate, hcrlhf.verify, hcrlhf.commands, hcrlhf.power, hcrlhf.multiplier"
    code = (
        f"import sys, {modules}; "
        "print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
