"""The description of the interface at ``/openapi.json``, with what this server has and allows."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from bayeslora.integrations.server.schemas import ErrorAnswer
from bayeslora.integrations.server.served import Limits, Served
from bayeslora.tasks.columns import TEXT_COLUMNS
from bayeslora.tasks.templates import template_columns
from bayeslora.version import __version__

Schema = dict[str, Any]
BLANKS = r"\x09-\x0d\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # what `str.strip` takes off
FILLED = {"type": "string", "pattern": f"[^{BLANKS}]"}


def errors(statuses: Sequence[int]) -> dict[int | str, Schema]:
    """Return the description of errors; what is refused before it is read has its answer in plain text."""
    plain = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    return {
        status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase}
        | (plain if status in (400, 503) else {})
        for status in statuses
    }


def describe(app: FastAPI, served: Served, limits: Limits) -> Schema:
    """Return an application's description, in which the requests' fields have this server's names and limits."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    found = get_openapi(title="bayeslora", version=__version__, routes=app.routes)
    for operation in (operation for path in found["paths"].values() for operation in path.values()):
        operation["responses"].pop("422", None)  # FastAPI's; here a request that does not fit gets 400
    schemas = found["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    fields = {name: schemas[name]["properties"] for name in ("CompletionRequest", "ChatRequest", "ClassifyRequest")}
    for properties in fields.values():
        properties["model"]["enum"] = served.names
        _part(properties["draws"], "integer")["maximum"] = served.most_draws
    completion, chat = fields["CompletionRequest"], fields["ChatRequest"]
    for properties in (completion, chat):
        properties["n"]["maximum"] = min(128, limits.rows)
        for name in {"max_tokens", "max_completion_tokens"} & set(properties):
            _part(properties[name], "integer")["maximum"] = limits.tokens
    _bound_prompts(completion["prompt"], served, limits)
    content = schemas["Message"]["properties"]["content"]
    _part(content, "string")["maxLength"] = limits.characters
    schemas["Part"]["properties"]["text"]["maxLength"] = limits.characters
    _bound_inputs(schemas["ClassifyRequest"], served, limits)
    app.openapi_schema = found
    return found


def _part(schema: Schema, kind: str) -> Schema:
    """Return the alternative of a type, or the schema itself where it has no alternatives."""
    return next((part for part in schema.get("anyOf", ()) if part.get("type") == kind), schema)


def _bound_prompts(schema: Schema, served: Served, limits: Limits) -> None:
    """Bound the texts and token ids of prompts."""
    text: Schema = {"type": "string", "maxLength": limits.characters}
    if not served.tokenizer("")["input_ids"]:
        text["minLength"] = 1
    ids: Schema = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": len(served.tokenizer) - 1},
        "minItems": 1,
        "maxItems": limits.characters,
    }
    several = {"type": "array", "minItems": 1, "maxItems": limits.rows}
    schema["anyOf"] = [text, {**several, "items": text}, ids, {**several, "items": ids}]


def _bound_inputs(request: Schema, served: Served, limits: Limits) -> None:
    """Bound what is classified, and the choices."""
    properties, classes = request["properties"], served.like.classes
    named = template_columns(served.like.format.template)
    cell = {"anyOf": [FILLED | {"maxLength": limits.characters}, {"type": ["number", "boolean"]}]}
    text_columns = [served.text_column] if served.text_column else list(TEXT_COLUMNS)
    row: Schema = {
        "type": "object",
        "required": list(named),
        "properties": dict.fromkeys(named, cell),
        "anyOf": [_first(column, text_columns[:place], cell) for place, column in enumerate(text_columns)],
    }
    one = [row] if named else [{"type": "string", "maxLength": limits.characters}, row]
    several = {"type": "array", "items": {"anyOf": one}, "minItems": 1, "maxItems": limits.texts}
    properties["input"]["anyOf"] = [*one, several]
    if classes is not None:
        properties["choices"] = {"enum": [None, list(classes)], "default": None}
        return
    properties["choices"] = {
        "type": "array",
        "items": FILLED | {"maxLength": limits.characters},
        "minItems": 2,
        "maxItems": limits.choices,
        "uniqueItems": True,
    }
    request["required"].append("choices")


def _first(column: str, before: Sequence[str], cell: Schema) -> Schema:
    """Return what is true of a row whose text is in a column, for it has none of those before."""
    found: Schema = {"required": [column], "properties": {column: cell}}
    return found | ({"not": {"anyOf": [{"required": [name]} for name in before]}} if before else {})
