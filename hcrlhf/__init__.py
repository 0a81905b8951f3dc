"""hcrlhf: fine-tune a language model for helpfulness under a harm constraint, and test the result.

This folder is plain PyTorch, Hugging Face and SciPy; Lightning is known only to `cli.py` and to
the three folders beside it (`lightning_modules`, `datamodules`, `callbacks`).
"""

__version__ = "0.1.0"
