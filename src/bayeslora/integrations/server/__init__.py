"""A server with OpenAI's interface and uncertainty, and a page to try it."""

from bayeslora.integrations.server.app import Limits, make_app

__all__ = ["Limits", "make_app"]
