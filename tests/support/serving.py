"""A server with a tiny model, in a thread of its own."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bayeslora.integrations.server import Limits, Served, make_app
from bayeslora.integrations.server.connections import Server
from bayeslora.tasks.types import Format, Split
from support.tiny import gaussian, make_model

DRAWN = ("tiny/draw-000", "tiny/draw-001", "tiny/draw-002")
TEMPLATE = "{% for m in messages %}Question: {{ m.content }}{% endfor %} Answer:"


def served(tokenizer: Any, **changes: Any) -> Served:
    """What the tests serve: texts go on to their length, for no token ends them."""
    model = changes.pop("model", None) or make_model("llama")
    model.get_base_model().generation_config.eos_token_id = None
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    like = Split("input", (), Format("", "likelihood"), None)
    parts = {"name": "tiny", "draws": 3, "most_draws": 4, "like": like, **changes}
    return Served(model=model, tokenizer=tokenizer, posterior=gaussian(model), **parts)


@contextmanager
def running(what: Served, limits: Limits | None = None) -> Iterator[tuple[str, Any]]:
    """Serve on a free port; yields the address and the worker."""
    limits = limits or Limits()
    app = make_app(what, limits)
    server = Server(app, limits)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", app.state.worker
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()
