"""``bayeslora export``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.cli.options import TransformOptions, option, run_option
from bayeslora.cli.runs import posterior_name, read_options, run_folder
from bayeslora.errors import InputError

if TYPE_CHECKING:
    from bayeslora.posteriors import Posterior
    from bayeslora.posteriors.provenance import Origin

EXAMPLES = """examples:
  bayeslora export run --out adapters --draws 10     ten plain PEFT adapters, adapters/draw-000 …
  bayeslora export run --out adapters --name birds   the same, named birds-000 …, for a server that has others too
  bayeslora export run --out mean --mean             one, of the posterior's mean
  bayeslora export run --out adapters --mean --draws 10   both: adapters/mean, adapters/draw-000 …

Every tool that loads PEFT adapters loads them; average the probabilities of their answers, not the logits. After the
folders comes the line that starts vLLM with them, on standard error."""
MISSING = "name what to export and where to: bayeslora export RUN --out FOLDER"
DRAWS = 10
"""How many draws are written of what is no run and if no number is given."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes as --max-lora-rank."""


@dataclass(kw_only=True)
class Options(TransformOptions):
    """Write draws of a posterior, its mean, or both as plain PEFT adapters."""

    run: str = run_option(MISSING)
    out: str = option("", "Folder to make.", required=MISSING)
    draws: int = option(
        0,
        "How many draws; of an ensemble no more than it has members. 0: as many as the run predicts with, and none "
        "beside --mean.",
        own=True,
    )
    name: str = option("draw", "What the adapters are called, with a number each; a server needs different names.")
    mean: bool = option(
        False, "Write the mean: alone into --out, or with --draws too, into a folder `mean` beside theirs."
    )


def run(options: Options) -> None:
    """Write the adapters, print their folders, and say how vLLM serves them."""
    out = Path(options.out)
    posterior_name(options.run)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} is there already; choose another --out")
    from bayeslora.cli.build import load_transformed
    from bayeslora.cli.progress import own_progress
    from bayeslora.cli.terminal import say

    with own_progress():
        posterior = load_transformed(options.run, options)
        folders = _written(posterior, options, out)
    print("\n".join(map(str, folders.values())), flush=True)
    if posterior.origin is not None:
        say(serving(posterior.origin, folders))


def _written(posterior: Posterior, options: Options, out: Path) -> dict[str, Path]:
    """Write what is asked for, all of it or nothing, and return the folders by the names to serve them under."""
    from bayeslora.files import atomic_folder
    from bayeslora.posteriors import Draws, Point
    from bayeslora.posteriors.loading import export_draws

    plain = options.name == "draw"
    mean = Point(posterior.mean, posterior.origin)
    if options.mean and not options.draws:
        mean.save_pretrained(out)
        return {"mean" if plain else options.name: out}
    count = options.draws or int(read_options(run_folder(Path(options.run))).get("draws", DRAWS))
    draws = Draws(count, options.draw_seed, options.sampling)
    with atomic_folder(out) as work:
        paths = export_draws(posterior, work, draws, name=options.name)
        names = [path.name for path in paths]
        if options.mean:
            names.insert(0, "mean" if plain else f"{options.name}-mean")
            mean.save_pretrained(work / names[0])
    return {name: out / name for name in names}


def serving(origin: Origin, folders: Mapping[str, Path]) -> str:
    """Return the line that starts vLLM with exported adapters, or the sentence why it would refuse them.

    Args:
        origin: Where the posterior comes from.
        folders: The adapters' folders, by the names to serve them under.

    Returns:
        One line.
    """
    config = origin.adapter_config
    refused = _refused(config)
    if refused:
        return f"vLLM does not serve these adapters: {' and '.join(refused)}; other tools load them with PEFT"
    rank = next(allowed for allowed in VLLM_RANKS if allowed >= int(config.get("r", 1)))
    base = origin.base_model or "BASE"
    words = ["vllm", "serve", str(Path(base).resolve()) if Path(base).is_dir() else base, "--enable-lora"]
    words += ["--max-loras", str(len(folders)), "--max-lora-rank", str(rank), "--lora-modules"]
    return shlex.join([*words, *(f"{name}={path.resolve()}" for name, path in folders.items())])


def _refused(config: Mapping[str, Any]) -> list[str]:
    """Return what vLLM refuses of an adapter, or would load as something else."""
    found = []
    if config.get("modules_to_save"):
        found.append(f"whole modules are saved with them ({', '.join(config['modules_to_save'])})")
    if config.get("use_dora"):
        found.append("they are DoRA")
    if config.get("bias", "none") != "none":
        found.append(f"they have biases (bias={config['bias']!r})")
    if int(config.get("r", 1)) > VLLM_RANKS[-1]:
        found.append(f"their rank {config['r']} is above {VLLM_RANKS[-1]}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        found.append("their rank or alpha differs from layer to layer (rank_pattern, alpha_pattern), which it ignores")
    return found
