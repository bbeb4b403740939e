"""``bayeslora export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bayeslora.cli.options import RUN, TransformOptions, option
from bayeslora.cli.runs import read_options, run_folder
from bayeslora.errors import InputError

EXAMPLES = """examples:
  bayeslora export run --out adapters --draws 10     ten plain PEFT adapters, adapters/draw-000 …
  bayeslora export run --out adapters --name birds   the same, named birds-000 …, for a server that has others too
  bayeslora export run --out mean --mean             one, of the posterior's mean
  bayeslora export run --out adapters --mean --draws 10   both: adapters/mean, adapters/draw-000 …

Every tool that loads PEFT adapters loads them; average the probabilities of their answers, not the logits. After the
folders comes the line that starts vLLM with them, on standard error; names there end in a hash of the adapter. Then
`bayeslora verify run --server http://localhost:8000` compares the server with the posterior."""
MISSING = "name what to export and where to: bayeslora export RUN --out FOLDER"
DRAWS = 10
"""How many draws are written of what is no run and if no number is given."""


@dataclass(kw_only=True)
class Options(TransformOptions):
    """Write draws of a posterior, its mean, or both as plain PEFT adapters."""

    run: str = option("", RUN, required=MISSING)
    out: str = option("", "Folder to make.", required=MISSING)
    draws: int = option(
        -1,
        "How many draws; of an ensemble no more than it has members. 0: none, but the mean; -1: as many as the run "
        "predicts with, and none beside --mean.",
        least=-1,
        own=True,
    )
    name: str = option("draw", "What the adapters are called, with a number each; a server needs different names.")
    mean: bool = option(
        False, "Write the mean: alone into --out, or with --draws too, into a folder `mean` beside theirs."
    )


def run(options: Options) -> None:
    """Write what is asked for, all of it or nothing, print the folders, and say how vLLM serves them."""
    out = Path(options.out)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} is there already; choose another --out")
    from bayeslora.cli import build, progress, terminal
    from bayeslora.files import atomic_folder
    from bayeslora.integrations.openai.serving import HEAD_WARNING, changes_head, served_name, vllm_command
    from bayeslora.posteriors import Point
    from bayeslora.posteriors.loading import export_draws

    with progress.own_progress():
        posterior = build.load_transformed(options.run, options)
        mean = Point(posterior.mean, posterior.origin)
        count = options.draws
        if count < 0:
            count = 0 if options.mean else int(read_options(run_folder(Path(options.run))).get("draws", DRAWS))
        if not count:
            mean.save_pretrained(out)
            folders = {"mean" if options.name == "draw" else options.name: out}
        else:
            with atomic_folder(out) as work:
                paths = export_draws(posterior, work, build.draws_of(options, count), name=options.name)
                names = [path.name for path in paths]
                if options.mean:
                    names.insert(0, "mean" if options.name == "draw" else f"{options.name}-mean")
                    mean.save_pretrained(work / names[0])
            folders = {name: out / name for name in names}
    print("\n".join(map(str, folders.values())), flush=True)
    if posterior.origin is not None:
        served = {served_name(name, folder): folder for name, folder in folders.items()}
        terminal.say(vllm_command(posterior.origin, served))
        if changes_head(posterior.mean):
            terminal.say(HEAD_WARNING)
