"""``bayeslora verify``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from bayeslora.cli.options import RUN, ModelOptions, TaskOptions, TransformOptions, option
from bayeslora.cli.runs import run_folder
from bayeslora.errors import InputError

EXAMPLES = """examples:
  bayeslora export run --draws 10 --out adapters      prints the line that starts vLLM with them
  bayeslora verify run --server http://localhost:8000
  bayeslora verify run --server http://localhost:8000 --input new.jsonl --rows 20   on rows of your own

Each adapter of the server answers a few questions, and so does its draw here: an adapter whose name ends in a number is
the draw of that number. What bf16's rounding moves the answers by is estimated. The exit status is 0 if all agree, and
2 if one differs or the server cannot be asked. Give --draw-seed, --temperature and so on as to `export`."""


@dataclass(kw_only=True)
class Options(ModelOptions, TaskOptions, TransformOptions):
    """Compare a server of exported draws with the posterior here, adapter by adapter, on a few rows."""

    run: str = option("", RUN, required="name what was exported: bayeslora verify RUN --server URL")
    server: str = option("", "Address of the server.", required="name the server: --server http://localhost:8000")
    names: list[str] = option([], "Adapters to compare; none: all that the server has.")
    rows: int = option(8, "How many rows each adapter answers.", least=1)
    input: str = option("", "JSON-lines or CSV file to take the rows from; empty: questions about odds.")
    echo: bool = option(False, "Score texts by echoed prompts, as a client that is told echo=True does.")
    timeout: float = option(120.0, "Most seconds to wait for an answer of the server.", least=0.001)
    api_key: str = option("", "The server's key, if it wants one; empty: that of BAYESLORA_API_KEY, if it is set.")


def run(options: Options) -> None:
    """Ask the server, ask the posterior, print how far they are apart, and refuse a server that differs."""
    try:
        from bayeslora.integrations.openai.client import Adapters
    except ImportError as error:
        raise InputError(f"the client of servers needs {error.name}: pip install 'bayeslora[client]'") from error
    from bayeslora.cli import build, data, progress
    from bayeslora.tasks import read_rows

    client = Adapters(
        options.server, options.names, options.api_key or os.environ.get("BAYESLORA_API_KEY"),
        echo=options.echo or None, timeout=options.timeout, retries=2, check=False,
    )  # fmt: skip
    if not client.names:
        client.served()  # whether anybody answers is better known before the model is loaded
    with progress.own_progress():
        posterior, split = build.load_transformed(options.run, options), None
        if options.input:
            folder = run_folder(Path(options.run))
            split = data.split_as_trained(read_rows(options.input), options, folder, posterior.origin)
        model, tokenizer = build.model_for(posterior, options, None if split is None else split.classes)
        client, draws = replace(client, tokenizer=tokenizer), build.draws_of(options, 0)
        verified = client.verify(model, posterior, options.rows, draws=draws, split=split)
    for each in verified:
        print(each.table(), flush=True)
    for each in verified:
        each.check(client.server)
