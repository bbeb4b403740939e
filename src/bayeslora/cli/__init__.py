"""The command line: one verb, one file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from bayeslora.errors import InputError, Interrupted
from bayeslora.version import __version__

VERBS = {
    "train": "fine-tune a model by a method and keep its posterior",
    "evaluate": "measure accuracy, calibration and out-of-distribution detection of a posterior",
    "predict": "answer rows of a file or of standard input, with uncertainty",
    "compare": "run several methods on one task and print one table",
    "export": "write the mean or draws as plain PEFT adapters",
    "demo": "see over-confidence and its cure, in a few minutes on a CPU",
}
HELP = f"""bayeslora {__version__}: Bayesian LoRA fine-tuning.

usage: bayeslora VERB [options]      bayeslora VERB --help says more

{chr(10).join(f"  {verb:<10} {text}" for verb, text in VERBS.items())}

A first run:   bayeslora demo
Your own data: bayeslora train --model MODEL --data rows.csv --text-column review --label-column stars --out run
               bayeslora predict run --input new.csv
Set BAYESLORA_TRACEBACK=1 to see where an error came from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None takes the process's.

    Returns:
        Exit status: 0, 2 for input that cannot be used, 130 after Ctrl-C.

    Raises:
        InputError: With BAYESLORA_TRACEBACK set, instead of its message.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb, *rest = words
    if verb not in VERBS:
        print(f"bayeslora: unknown verb {verb!r}; known: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        import_module(f"bayeslora.cli.{verb}").run(rest)
    except Interrupted as stop:
        print(f"bayeslora: {stop}; the same command with --resume goes on from there", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("bayeslora: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except InputError as error:
        if os.environ.get("BAYESLORA_TRACEBACK"):
            raise
        print(f"bayeslora: {error}", file=sys.stderr)
        return 2
    return 0
