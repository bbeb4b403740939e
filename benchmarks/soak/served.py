"""A server with a tiny model in a process of its own, for the soaks: ``python served.py --port 8123``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from support.serving import served
from support.tiny import make_tokenizer

from bayeslora.integrations.server import Limits, make_app
from bayeslora.integrations.server.connections import Server

KEY = "soak"


@contextmanager
def serving(port: int, **limits: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server until the end of the context; it has to stop by itself on SIGTERM."""
    command = [sys.executable, __file__, "--port", str(port), *(f"--{key}={value}" for key, value in limits.items())]
    process = subprocess.Popen(command, env=os.environ)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    for name, value in (("waiting", 64), ("rows", 16), ("tokens", 64), ("timeout", 10), ("characters", 2**18)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = vars(parser.parse_args())
    port = asked.pop("port")
    limits = Limits(**asked, api_key=KEY)
    what = served(make_tokenizer())
    what.model.get_base_model().config.max_position_embeddings = 2**17  # rotary embeddings have no table
    Server(make_app(what, limits), limits, port).run()


if __name__ == "__main__":
    main()
