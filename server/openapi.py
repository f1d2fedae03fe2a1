"""Our HTTP interface as OpenAPI: the app's routes, the inference routes from their table of fields, and every error.

An error status is declared where a route can answer it; a run of schemathesis over the whole document holds that.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server import session
from server.access import ROUTES, Kind, Route
from server.dialect import is_anthropic
from server.fields import FIELDS, RouteFields
from server.routes.files import REQUIRED as FILE_REQUIRED
from server.routes.files import TEXTS as FILE_TEXTS
from server.uploads import FILE_PARTS, REQUIRED, TEXT_PARTS

ALWAYS = (400, 401, 403, 413, 415, 422, 431, 503)
WITH_BODY = (408, 409)
INFERENCE = (404, 405, 408, 409, 429, 502)
MORE: dict[str, tuple[int, ...]] = {
    "/v1/adapters": (404, 429, 507),
    "/v1/adapters/{name}/aliases/{alias}": (412, 502),
    "/v1/adapters/{name}/versions/{number}/warm": (502,),
    "/v1/sources/pull": (404, 429, 502, 507),
    "/v1/load_lora_adapter": (404, 429, 502, 507),
    "/v1/unload_lora_adapter": (404,),
    "/v1/files": (404, 429, 507),
    "/v1/files/{file_id}": (507,),
    "/v1/uploads": (429,),
    "/v1/uploads/{upload_id}/parts": (429, 507),
    "/v1/uploads/{upload_id}/complete": (507,),
    "/v1/uploads/{upload_id}/cancel": (507,),
    "/v1/exports": (404, 429, 507),
    "/v1/exports/{export_id}/content": (409, 416, 500, 507),
    "/v1/keys": (404, 429),
}
TEXT_OR_NULL = {"type": ["string", "null"]}
COMPONENTS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": TEXT_OR_NULL,
                    "code": {"type": "string"},
                    "problems": {"type": "array", "items": {"type": "object"}},
                },
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}
SESSION = {
    "name": session.HEADER,
    "in": "header",
    "required": False,
    "description": "Requests of one session get the same of an alias's two versions",
    "schema": {"type": "string", "maxLength": session.MAX_SESSION_BYTES},
}
REQUIRED_FIELDS = {
    "/v1/chat/completions": ["model", "messages"],
    "/v1/completions": ["model", "prompt"],
    "/v1/responses": ["model", "input"],
    "/v1/messages": ["model", "messages", "max_tokens"],
    "/tokenize": [],
    "/detokenize": ["tokens"],
}


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """The whole document."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    components.update(COMPONENTS)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for route in ROUTES:
        operations = document["paths"].setdefault(route.path, {})
        if route.kind is Kind.PROXIED:
            operations[route.method.lower()] = inference_operation(route.path, FIELDS[route.path])
        operation = operations.get(route.method.lower())
        if operation is not None:
            declare(operation, route)
    return document


def declare(operation: dict[str, Any], route: Route) -> None:
    """The key that a route wants, the parts of an upload, and the errors that it can answer."""
    operation["security"] = [] if route.scope is None else [{"key": []}]
    if route.kind is Kind.UPLOAD:
        operation["requestBody"] = {"required": True, "content": upload_content(route.path)}
    name = "AnthropicError" if is_anthropic(route.path) else "Error"
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    for status in errors_of(route):
        operation["responses"][str(status)] = {"description": HTTPStatus(status).phrase, "content": content}
    if route.path == "/v1/exports/{export_id}/content":
        operation["responses"]["206"] = {"description": "The part that Range asks for"}
        operation["responses"]["304"] = {"description": "It is what If-None-Match names"}
    if route.path == "/v1/adapters" and route.kind is Kind.UPLOAD:
        operation["responses"]["200"] = {"description": "The same files are a version already"}


def errors_of(route: Route) -> list[int]:
    """Which errors a route can answer, in order."""
    found = {*ALWAYS, *MORE.get(route.path, ())}
    if "{" in route.path:  # a value with a slash in it is another path
        found |= {404, 405}
    if route.method != "GET":
        found |= set(WITH_BODY)
    if route.kind is Kind.PROXIED:
        found |= set(INFERENCE)
    return sorted(found)


def inference_operation(path: str, fields: RouteFields) -> dict[str, Any]:
    """An inference route: which fields there are; what they mean is the engine's to say."""
    schema = {
        "type": "object",
        "properties": {name: {} for name in sorted(fields.taken | set(fields.idle))} | {"model": {"type": "string"}},
        "required": REQUIRED_FIELDS[path],
        "additionalProperties": False,
    }
    return {
        "tags": ["inference"],
        "summary": "Inference, by the engine",
        "operationId": f"infer{path.replace('/', '_')}",
        "parameters": [SESSION],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {
                "description": "The engine's answer; a stream of events where the request asks for one",
                "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
            }
        },
    }


def upload_content(path: str) -> dict[str, Any]:
    """What a route takes that streams its body: a form, and for an adapter also the ids of files."""
    if path == "/v1/files":
        return {"multipart/form-data": {"schema": form_schema(FILE_TEXTS, ("file",), FILE_REQUIRED)}}
    if path.startswith("/v1/uploads/"):
        return {"multipart/form-data": {"schema": form_schema((), ("data",), ("data",))}}
    return {
        "multipart/form-data": {"schema": form_schema(TEXT_PARTS, FILE_PARTS, REQUIRED)},
        "application/json": {"schema": order_schema()},
    }


def form_schema(texts: Iterable[str], files: Iterable[str], required: Iterable[str]) -> dict[str, Any]:
    parts: dict[str, Any] = {name: {"type": "string"} for name in texts}
    parts |= {name: {"type": "string", "format": "binary"} for name in files}
    return {"type": "object", "properties": parts, "required": list(required), "additionalProperties": False}


def order_schema() -> dict[str, Any]:
    """An adapter whose parts are files that were sent before, or objects where they are JSON."""
    parts: dict[str, Any] = {name: {"type": "string"} for name in TEXT_PARTS}
    parts |= {name: {"type": ["string", "object"]} for name in FILE_PARTS}
    return {"type": "object", "properties": parts, "required": list(REQUIRED), "additionalProperties": False}
