"""A released adapter merged into its base model, for tools that know no adapters.

What is tested is what is shipped: the adapter. A merged model is another artefact (its base is not
4-bit, its sums are rounded anew), to which no certificate belongs until it has been tested itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from hcrlhf.backbone import ADAPTER_FILE, load_causal_lm
from hcrlhf.errors import InputError
from hcrlhf.hashing import require_empty
from hcrlhf.stages import PROMPTS_FILE, BackboneSource, fingerprint, read_prompt_keys, read_stage
from hcrlhf.text import load_tokenizer


def merge(policy: Path, folder: Path, dtype: str = "bfloat16") -> str:
    """Writes W + (alpha / r) B A, tokenizer and decoding to `folder`; returns what to say of it.

    Args:
        policy: a released policy: adapter, tokenizer, generation_config.json, hcrlhf.json.
        dtype: of the weights; the sums are made in float32.

    Raises:
        InputError: not a released policy, another backbone, or a folder that is in use.
    """
    from peft import PeftModel

    if not (policy / ADAPTER_FILE).is_file():
        raise InputError(
            f"{policy} holds no {ADAPTER_FILE}; expected the policy/ folder of a run that passed"
        )
    require_empty(folder)
    stage = read_stage(str(policy), "policy", "policy")
    read_prompt_keys(str(policy))  # refuses now what would be missing after the merge
    source = stage.backbone
    if fingerprint(source.folder) != stage.fingerprint:
        raise InputError(
            f"the weights in {source.model} are not those that {policy} was trained on"
        )
    model = load_causal_lm(BackboneSource(source.folder))
    merged = PeftModel.from_pretrained(model, str(policy)).merge_and_unload()
    merged.to(getattr(torch, dtype)).save_pretrained(str(folder))
    load_tokenizer(str(policy)).save_pretrained(str(folder))
    for file in ("generation_config.json", PROMPTS_FILE):
        shutil.copy(policy / file, folder)
    base = "its base is not 4-bit, and " if source.quantization != "none" else ""
    return (
        f"wrote {folder}: {dtype} weights, no adapter. This is not the policy that was tested "
        f"({base}sums are rounded anew), so no certificate is its own. To test it: hcrlhf test "
        f"--policy {folder} --config ... --trainer.default_root_dir runs/another"
    )
