"""A server with OpenAI's interface and uncertainty, and a page to try it."""

from bayeslora.integrations.server.app import make_app
from bayeslora.integrations.server.served import Limits, Served

__all__ = ["Limits", "Served", "make_app"]
