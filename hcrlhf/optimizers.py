"""AdamW by name: PyTorch's, or bitsandbytes' with 8-bit states."""

from __future__ import annotations

from typing import Any, Literal

import torch

from hcrlhf.errors import InputError
from hcrlhf.text import one_line

Name = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]


def adamw(
    name: Name, parameters: Any, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), betas 0.9 and 0.999.

    Args:
        name: "adamw" keeps two float32 numbers per trained weight, "adamw_8bit" two bytes
            (Dettmers et al., arXiv 2110.02861; tensors below 4,096 weights stay float32),
            "paged_adamw_8bit" keeps these where the GPU's driver may move them to main memory.
        parameters: tensors, or groups with a learning rate of their own.

    Raises:
        InputError: 8 bits are asked for without bitsandbytes.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise InputError(
            f"optimizer {name} needs bitsandbytes ({one_line(error)}); pip install bitsandbytes, "
            "or set optimizer: adamw"
        ) from error
    made = optim.AdamW8bit if name == "adamw_8bit" else optim.PagedAdamW8bit
    result: torch.optim.Optimizer = made(parameters, lr=learning_rate, weight_decay=weight_decay)
    return result
