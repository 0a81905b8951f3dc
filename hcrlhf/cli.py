"""The command line: Lightning's fit, validate, test and predict, and our own commands beside them.

Exit codes: 0 PASS, or done where nothing is to be tested; 1 crash; 2 bad input; 3 no solution
found; 4 a policy fit without verdict; 5 verification failed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from io import TextIOWrapper
from pathlib import Path

from hcrlhf import __version__
from hcrlhf.errors import InputError

PASSED, CRASHED, BAD_INPUT, NO_SOLUTION, NOT_TESTED, INTERRUPTED = 0, 1, 2, 3, 4, 130
PLAIN_COMMANDS = ("certify", "verify", "power", "unseal", "ledger", "human")  # without torch
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
SHOWS = re.compile(r"-h$|--([\w.]+\.)?help|--print_config|--version")  # and runs nothing

USAGE = """usage: hcrlhf COMMAND ...

  fit       train a stage: hcrlhf fit --config configs/demo/sft.yaml
  validate  measure a stage on its held-out data
  test      run the safety test of a policy: --config ... --ckpt_path ..., or --policy FOLDER
  predict   write a policy's responses to the evaluation prompts

  split     disjoint files of prompts, and stage data without the held-out ones
  doctor    foretell the memory of a stage and check its config, before weights are loaded

  certify   bound a table of costs: hcrlhf certify costs.csv --constraint mean:0 --upper 5 ...
  verify    recompute a certificate: hcrlhf verify runs/x/certificate.json
  power     how many safety prompts a claim needs, and how likely a policy is to pass
  ledger    the tests of a claim and what is left of its δ: hcrlhf ledger runs/ledger.jsonl
  unseal    show the numbers behind "no solution found": hcrlhf unseal runs/x
  human     people's labels of a passed test: hcrlhf human runs/x labels.csv

  export    merge a released adapter into its base model: hcrlhf export runs/x/policy FOLDER

  demo      the whole path on the embedded world, in a few minutes on a CPU
  world     write the embedded world's model and data: hcrlhf world FOLDER

hcrlhf COMMAND --help says more. A config is YAML; --print_config shows it filled in.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, TextIOWrapper):  # whose encoding may have no δ
        sys.stdout.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return PASSED if arguments else BAD_INPUT
    if arguments[0] == "--version":
        print(f"hcrlhf {__version__}")
        return PASSED
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"hcrlhf: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("hcrlhf: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who read our output has gone, as `| head` does
        if arguments[0] not in PLAIN_COMMANDS:  # training has other pipes, whose end is no detail
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is not yet said
        return CRASHED
    except SystemExit as end:  # argparse leaves by this door, and Lightning after Ctrl-C
        if isinstance(end.__context__, KeyboardInterrupt):
            return INTERRUPTED
        code = end.code if isinstance(end.code, int) else (CRASHED if end.code else PASSED)
        # Of a run PASSED means a verdict, which code of the user's that leaves has not given.
        left = arguments[0] in TRAINER_COMMANDS and not any(map(SHOWS.match, arguments))
        return CRASHED if left and code == PASSED else code


def _run(arguments: list[str]) -> int:
    command, rest = arguments[0], arguments[1:]
    if command in TRAINER_COMMANDS:
        return run_trainer(_with_policy(arguments) if command in ("test", "predict") else arguments)
    if command == "demo":
        from hcrlhf import demo

        quiet_loading()
        return demo.main(rest, run_trainer)
    if command == "world":
        return _world(rest)
    if command == "export":
        return _export(rest)
    if command == "doctor":
        return _doctor(rest)
    if command == "split":
        from hcrlhf import holdout

        holdout.main(rest)
        return PASSED
    if command in PLAIN_COMMANDS:
        return _plain(command)(rest)
    known = [*TRAINER_COMMANDS, *PLAIN_COMMANDS, "demo", "world", "doctor", "split", "export"]
    raise InputError(f"no command {command!r}{did_you_mean(command, known)}; see hcrlhf --help")


def _with_policy(arguments: Sequence[str]) -> list[str]:
    """`--policy FOLDER` as the module's own key, and last: the config has to name the class first.

    Raises:
        InputError: no folder follows.
    """
    rest, given = [], []
    words = iter(arguments)
    for word in words:
        if word == "--policy" or word.startswith("--policy="):
            folder = word.partition("=")[2] or next(words, "")
            if not folder or not Path(folder).is_dir():
                raise InputError(f"--policy {folder}: expected the folder of a policy")
            given = ["--model.init_args.policy", folder]
        else:
            rest.append(word)
    return [*rest, *given]


def _plain(command: str) -> Callable[[Sequence[str]], int]:
    from hcrlhf import commands, power

    return {
        "certify": commands.certify_main,
        "verify": commands.verify_main,
        "power": power.main,
        "unseal": commands.unseal_main,
        "ledger": commands.ledger_main,
        "human": commands.human_main,
    }[command]


def _export(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "hcrlhf export", description="Merge a released adapter into its base model."
    )
    parser.add_argument("policy", type=Path, help="folder of a released policy, runs/x/policy")
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args(arguments)
    quiet_loading()
    from hcrlhf.export import merge

    print(merge(options.policy, options.folder, options.dtype))
    return PASSED


def _doctor(arguments: list[str]) -> int:
    from hcrlhf import doctor, lightning_cli

    return doctor.main(arguments, lightning_cli.parse)


def _world(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("hcrlhf world", description="Write the embedded world.")
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    from hcrlhf.hashing import require_empty
    from hcrlhf.world import write_world

    require_empty(options.folder)
    quiet_loading()
    write_world(options.folder, options.seed)
    print(f"wrote {options.folder}")
    return PASSED


def quiet_loading() -> None:
    """transformers draws a bar for every weight file, bitsandbytes names a package it can miss."""
    import logging

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean …?)" where a known word is near, else nothing."""
    others = [name for name in known if name != word]
    near = difflib.get_close_matches(word, others, n=1, cutoff=0.7)
    return f" (did you mean {near[0]!r}?)" if near else ""


def run_trainer(arguments: Sequence[str]) -> int:
    """One of Lightning's commands; returns the exit code of the verdict where there is one."""
    from hcrlhf import lightning_cli

    return lightning_cli.run(arguments)
