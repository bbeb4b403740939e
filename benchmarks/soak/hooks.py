"""What JSON Schema cannot say about a request, for schemathesis: these cases are refused with 400, and tested alone."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Leave out streams of an echo, and more answers in all than the server has rows."""
    body = case.body
    if not isinstance(body, dict):
        return True
    prompt, n = body.get("prompt"), body.get("n", 1)
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], (list, str))
    answers = (len(prompt) if several else 1) * (n if isinstance(n, (int, float)) else 1)
    return answers <= 16 and not (body.get("echo") and body.get("stream"))
