"""The command line: one verb, one file.

A verb's module is a `Verb`. It imports what is slow inside its functions, so that help and refusals are there at once.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Protocol, cast

from bayeslora.cli import launch
from bayeslora.cli.parse import parse
from bayeslora.cli.terminal import quiet
from bayeslora.errors import InputError, Interrupted, SharedError, close_matches
from bayeslora.version import __version__

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

VERBS = {
    "train": "fine-tune a model by a method and keep its posterior",
    "fit": "make a posterior of an adapter that is trained already, by anyone",
    "evaluate": "measure accuracy, calibration and out-of-distribution detection of a posterior",
    "predict": "answer rows of a file or of standard input, with uncertainty",
    "compare": "run several methods on one task and print one table",
    "distill": "train one plain adapter to answer as the draws do on average",
    "export": "write the mean or draws as plain PEFT adapters",
    "verify": "compare a server of exported draws with the posterior here",
    "generate": "write text token by token from the average of the draws, with uncertainty",
    "serve": "answer over HTTP as OpenAI's interface does, with uncertainty, and a page to try it",
    "lm-eval": "run tasks of the LM evaluation harness, averaged over draws, with calibration",
    "demo": "see over-confidence and its cure, in a few minutes on a CPU",
}
RESUMABLE = ("train", "compare", "demo")
HELP = f"""bayeslora {__version__}: Bayesian LoRA fine-tuning.

usage: bayeslora VERB [options]      bayeslora VERB --help says more

{chr(10).join(f"  {verb:<10} {text}" for verb, text in VERBS.items())}

A first run:   bayeslora demo
Your own data: bayeslora train --model MODEL --data rows.csv --text-column review --label-column stars --out run
               bayeslora predict run --input new.csv
Set BAYESLORA_TRACEBACK=1 to see where an error came from."""


class Verb(Protocol):
    """What the module of a verb has; ``Options`` is a dataclass whose docstring is the verb's help."""

    Options: type[DataclassInstance]
    EXAMPLES: str

    def run(self, options: DataclassInstance) -> None:
        """Do what the verb is for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 for input that cannot be used, 130 after Ctrl-C, or 143 after SIGTERM."""
    typed = list(sys.argv[1:] if argv is None else argv)
    try:
        with launch.silenced():
            return _run(typed)
    except InputError as error:  # of the environment, or one whose traceback was asked for
        if os.environ.get("BAYESLORA_TRACEBACK"):
            raise
        print(f"bayeslora: {error}", file=sys.stderr)
        return 2


def _run(typed: Sequence[str]) -> int:
    """Run one command."""
    if not typed or typed[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if typed[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if re.search("[\ud800-\udfff]", " ".join(typed)):
        return _refuse("a word of the command is not UTF-8; write it, and name files, in UTF-8")
    verb, *rest = typed
    if verb not in VERBS:
        return _refuse(f"unknown verb {verb!r}, {close_matches(verb, VERBS)}")
    try:
        launch.check(verb)
        module = cast(Verb, import_module(f"bayeslora.cli.{verb.replace('-', '_')}"))
        options = parse(module.Options, rest, verb=verb, examples=module.EXAMPLES)
        with quiet(), terminable(verb in RESUMABLE), launch.joined(getattr(options, "device", "") == "cpu"):
            module.run(options)
    except SystemExit as left:
        return int(left.code or 0)
    except KeyboardInterrupt as stop:
        words, number = (str(stop), stop.signal) if isinstance(stop, Interrupted) else ("stopped", signal.SIGINT)
        hint = "; the same command with --resume goes on from there" if verb in RESUMABLE else ""
        return _refuse(words + hint, 128 + number)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UnicodeEncodeError as error:
        if error.encoding == "utf-8":
            raise
        return _refuse(f"the output has characters that {error.encoding} lacks; set PYTHONIOENCODING=utf-8")
    except (InputError, OSError, RuntimeError) as error:
        if launch.lost(error):
            return _refuse("another process of this run has ended, so that this one cannot go on", 1)
        if os.environ.get("BAYESLORA_TRACEBACK"):
            raise
        if isinstance(error, InputError):
            return _refuse(str(error), shared=isinstance(error, SharedError))
        if isinstance(error, OSError):
            return _refuse(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        if type(error).__name__ == "OutOfMemoryError":
            return _refuse("the accelerator has too little memory; lower --batch-size, --max-length or --token-budget")
        raise
    return 0


@contextmanager
def terminable(resumable: bool) -> Iterator[None]:
    """Let SIGTERM end a verb as Ctrl-C does, where it can be gone on with; training notes it and saves first."""
    if not resumable or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        """Stop at once."""
        raise Interrupted("stopped", number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse(message: str, status: int = 2, *, shared: bool = False) -> int:
    """Print a sentence on standard error, in one process of the run, and return the exit status."""
    if launch.speaks(shared):
        print(f"bayeslora: {message}", file=sys.stderr)
    return status
