"""``bayeslora export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bayeslora.cli.options import ShapeOptions, option, part
from bayeslora.cli.runs import posterior_name
from bayeslora.errors import InputError

EXAMPLES = """examples:
  bayeslora export run --out adapters --draws 10     ten plain PEFT adapters, adapters/draw-000 …
  bayeslora export run --out mean --mean             one, of the posterior's mean

Every tool that loads PEFT adapters loads them; average the probabilities of their answers, not the logits."""


@dataclass(kw_only=True)
class Options(ShapeOptions):
    """Write draws of a posterior, or its mean, as plain PEFT adapters."""

    run: str = option("", "Folder of `bayeslora train`, a posterior's folder, or its repository on the Hub.")
    out: str = option("", "Folder to make.")
    draws: int = option(10, "How many draws; of an ensemble no more than it has members.")
    mean: bool = option(False, "Write the mean instead of draws.")


def run(options: Options) -> None:
    """Write the adapters and print their folders.

    Args:
        options: The options.

    Raises:
        InputError: If the run or the folder is not named, or the folder is there already.
    """
    if not options.run or not options.out:
        raise InputError("name what to export and where to: bayeslora export RUN --out FOLDER")
    out, name = Path(options.out), posterior_name(options.run)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} is there already; choose another --out")
    from bayeslora.cli.build import shaped
    from bayeslora.cli.progress import own_progress
    from bayeslora.posteriors import Point
    from bayeslora.storage import export_draws, load_posterior

    with own_progress():
        posterior = shaped(load_posterior(name), part(ShapeOptions, options))
        if options.mean:
            Point(posterior.mean, posterior.origin).save_pretrained(out)
            print(out)
            return
        paths = export_draws(posterior, out, options.draws, seed=options.draw_seed, sampling=options.sampling)
    print("\n".join(map(str, paths)))
