"""``bayeslora export``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bayeslora.cli.build import shaped
from bayeslora.cli.options import PredictOptions, option, parse
from bayeslora.cli.runs import posterior_folder
from bayeslora.errors import InputError
from bayeslora.posteriors import Point
from bayeslora.storage import export_draws, load_posterior

EXAMPLES = """examples:
  bayeslora export run --out adapters --draws 10     ten plain PEFT adapters, adapters/draw-000 …
  bayeslora export run --out mean --mean             the mean alone

Every tool that loads PEFT adapters loads them; average the probabilities of their answers, not the logits."""


@dataclass(kw_only=True)
class ExportVerb(PredictOptions):
    """Write draws of a posterior, or its mean, as plain PEFT adapters."""

    run: str = option("", "Folder of `bayeslora train`, a posterior's folder, or its repository; also as first word.")
    mean: bool = option(False, "Write the mean instead of draws.")
    out: str = option("", "Folder to make.")


def run(argv: Sequence[str]) -> None:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Raises:
        InputError: If the run or the folder is not named.
    """
    options = parse(ExportVerb, argv, verb="export", examples=EXAMPLES, first="run")
    if not options.run or not options.out:
        raise InputError("name what to export and where to: bayeslora export RUN --out FOLDER")
    folder = Path(options.run)
    posterior = shaped(load_posterior(posterior_folder(folder) if folder.is_dir() else options.run), options)
    if options.mean:
        posterior = Point(posterior.mean, posterior.origin)
    for path in export_draws(posterior, options.out, options.draws, seed=options.draw_seed):
        print(path)
