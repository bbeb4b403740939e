"""``bayeslora serve``."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from bayeslora.cli.options import RUN, ModelOptions, TaskOptions, TransformOptions, option
from bayeslora.cli.runs import run_folder
from bayeslora.errors import InputError

EXAMPLES = """examples:
  bayeslora serve run                     the page is at http://127.0.0.1:8000, the interface at /v1
  bayeslora serve run --port 8100 --draws 5 --most-draws 20
  BAYESLORA_API_KEY=secret bayeslora serve run --host 0.0.0.0

  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="secret or anything")
  client.chat.completions.create(model="run", messages=[{"role": "user", "content": "Hello"}])

The model NAME averages the draws at each token; NAME/mean and NAME/draw-000 … are its parts. Answers have a field
`uncertainty`; POST /v1/classify chooses among choices."""


@dataclass(kw_only=True)
class Options(ModelOptions, TaskOptions, TransformOptions):
    """Answer over HTTP as OpenAI's interface does, with each token's and each answer's uncertainty."""

    run: str = option("", RUN, required="name what to serve: bayeslora serve RUN")
    name: str = option("", "Name of the model; empty: that of the run's folder.")
    host: str = option("127.0.0.1", "Address to listen at; the default is reached from this machine only.")
    port: int = option(8000, "Port to listen at; 0: any that is free.")
    draws: int = option(5, "Draws unless a request says otherwise; 0: the mean.")
    most_draws: int = option(32, "Most draws of a request.", least=1)
    most_tokens: int = option(1024, "Most new tokens of an answer.", least=1)
    most_rows: int = option(16, "Most answers that are generated at once.", least=1)
    most_waiting: int = option(64, "Most requests in the queue; further requests get HTTP 429.", least=1)
    most_context: int = option(32768, "Most tokens of a prompt with its answer; the model's limit counts too.", least=2)
    most_texts: int = option(1024, "Most texts to classify in one request.", least=1)
    most_connections: int = option(256, "Most connections; further ones get HTTP 503.", least=1)
    allowed_hosts: list[str] = option(
        [], "Names that clients call the server by; none: those of this machine, or any if --host is not this machine."
    )
    timeout: float = option(120.0, "Most seconds of a request.", least=0.001)
    api_key: str = option("", "Key that clients must send; empty: that of BAYESLORA_API_KEY, if it is set.")


def run(options: Options) -> None:
    """Serve until the process is told to stop."""
    if options.draws > options.most_draws:
        raise InputError(f"--draws is {options.draws}, more than --most-draws, {options.most_draws}")
    try:
        from bayeslora.integrations.server import Limits, Served, make_app
        from bayeslora.integrations.server.connections import Server
        from bayeslora.integrations.server.served import LOOPBACK
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: pip install 'bayeslora[serve]'") from error
    from bayeslora.cli import build, data, progress

    local = options.host in ("localhost", "::1") or options.host.startswith("127.")
    with _listening(options.host, options.port) as listening:
        key = options.api_key or os.environ.get("BAYESLORA_API_KEY", "")
        limits = Limits(
            waiting=options.most_waiting, rows=options.most_rows, tokens=options.most_tokens, timeout=options.timeout,
            api_key=key, context=options.most_context, texts=options.most_texts, connections=options.most_connections,
            hosts=tuple(options.allowed_hosts) or ((*LOOPBACK, options.host) if local else ("*",)),
        )  # fmt: skip
        folder = run_folder(Path(options.run))
        with progress.own_progress():
            posterior = build.load_transformed(options.run, options)
            like = data.saved_format(folder, options)
            if like is None:
                like = data.format_from_options(options, "input", posterior.origin)
            model, tokenizer = build.model_for(posterior, options, like.classes)
        served = Served(
            options.name or folder.resolve().name, model, tokenizer, posterior, options.draws, options.most_draws, like,
            options.draw_seed, options.text_column,
        )  # fmt: skip
        place = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{listening.getsockname()[1]}"
        print(f"serving {served.name} at {place}   interface: {place}/v1   Ctrl-C stops", flush=True)
        if not key and not local:
            print("anybody who reaches this address can use it: set --api-key", flush=True)
        Server(make_app(served, limits), limits).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(f"{host}:{port} cannot be listened at ({error}); choose another --port or --host") from error
    return listening
