"""Which routes there are, what each needs, and who is asking. A route that is not in the table does not exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from urllib.parse import urlsplit

from adapters.errors import InvalidRequest
from server.edge_settings import MAX_HEAD_BYTES
from server.errors import Forbidden, HeadersTooLarge, MethodNotAllowed, RouteNotFound, Unauthenticated
from server.forwarded import is_forwarded
from server.keyring import Keyring
from server.services import Caller
from server.settings import LOOPBACK_NAMES, is_loopback

Headers = Iterable[tuple[bytes, bytes]]


class Kind(StrEnum):
    """Who answers a route, and how its body is taken."""

    PROXIED = "proxied"  # the engine, after the gateway named the version
    PLAIN = "plain"  # ours; the body is read whole, up to the limit
    UPLOAD = "upload"  # ours; the body streams


@dataclass(frozen=True)
class Route:
    """One method and path, and the scope a caller needs; no scope means public."""

    method: str
    path: str
    scope: str | None
    kind: Kind = Kind.PLAIN

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\{\w+\}", "[^/]+", self.path))


ROUTES: tuple[Route, ...] = (
    Route("POST", "/v1/chat/completions", "infer", Kind.PROXIED),
    Route("POST", "/v1/completions", "infer", Kind.PROXIED),
    Route("POST", "/v1/responses", "infer", Kind.PROXIED),
    Route("POST", "/v1/messages", "infer", Kind.PROXIED),
    Route("POST", "/tokenize", "infer", Kind.PROXIED),
    Route("POST", "/detokenize", "infer", Kind.PROXIED),
    Route("GET", "/v1/models", "infer"),
    Route("GET", "/v1/models/{model}", "infer"),
    Route("DELETE", "/v1/models/{model}", "promote"),
    Route("GET", "/v1/models/{owner}/{model}", "infer"),
    Route("POST", "/v1/adapters", "upload", Kind.UPLOAD),
    Route("GET", "/v1/adapters", "read"),
    Route("GET", "/v1/adapters/{name}", "read"),
    Route("GET", "/v1/adapters/{name}/versions", "read"),
    Route("GET", "/v1/adapters/{name}/versions/{number}", "read"),
    Route("DELETE", "/v1/adapters/{name}/versions/{number}", "promote"),
    Route("GET", "/v1/adapters/{name}/versions/{number}/card", "read"),
    Route("GET", "/v1/adapters/{name}/versions/{number}/files/{file}", "read"),
    Route("POST", "/v1/adapters/{name}/versions/{number}/warm", "promote"),
    Route("PUT", "/v1/adapters/{name}/aliases/{alias}", "promote"),
    Route("POST", "/v1/adapters/{name}/rollback", "promote"),
    Route("GET", "/v1/adapters/{name}/gate", "read"),
    Route("PUT", "/v1/adapters/{name}/gate", "promote"),
    Route("DELETE", "/v1/adapters/{name}/gate", "promote"),
    Route("GET", "/v1/adapters/{name}/events", "read"),
    Route("GET", "/v1/sources", "admin"),
    Route("POST", "/v1/sources/pull", "upload"),
    Route("POST", "/v1/load_lora_adapter", "promote"),
    Route("POST", "/v1/unload_lora_adapter", "promote"),
    Route("POST", "/v1/files", "upload", Kind.UPLOAD),
    Route("GET", "/v1/files", "upload"),
    Route("GET", "/v1/files/{file_id}", "upload"),
    Route("GET", "/v1/files/{file_id}/content", "upload"),
    Route("DELETE", "/v1/files/{file_id}", "upload"),
    Route("POST", "/v1/uploads", "upload"),
    Route("GET", "/v1/uploads", "upload"),
    Route("GET", "/v1/uploads/{upload_id}", "upload"),
    Route("POST", "/v1/uploads/{upload_id}/parts", "upload", Kind.UPLOAD),
    Route("POST", "/v1/uploads/{upload_id}/complete", "upload"),
    Route("POST", "/v1/uploads/{upload_id}/cancel", "upload"),
    Route("POST", "/v1/fine_tuning/jobs", "train"),
    Route("GET", "/v1/fine_tuning/jobs", "train"),
    Route("GET", "/v1/fine_tuning/jobs/{job_id}", "train"),
    Route("POST", "/v1/fine_tuning/jobs/{job_id}/cancel", "train"),
    Route("POST", "/v1/fine_tuning/jobs/{job_id}/pause", "train"),
    Route("POST", "/v1/fine_tuning/jobs/{job_id}/resume", "train"),
    Route("GET", "/v1/fine_tuning/jobs/{job_id}/events", "train"),
    Route("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints", "train"),
    Route("POST", "/v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint_id}/publish", "train"),
    Route("DELETE", "/v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint_id}", "train"),
    Route("POST", "/v1/exports", "export"),
    Route("GET", "/v1/exports", "export"),
    Route("GET", "/v1/exports/{export_id}", "export"),
    Route("DELETE", "/v1/exports/{export_id}", "export"),
    Route("GET", "/v1/exports/{export_id}/content", "export"),
    Route("HEAD", "/v1/exports/{export_id}/content", "export"),
    Route("POST", "/v1/exports/{export_id}/cancel", "export"),
    Route("GET", "/v1/usage", "read"),
    Route("GET", "/v1/keys", "admin"),
    Route("POST", "/v1/keys", "admin"),
    Route("DELETE", "/v1/keys/{key_id}", "admin"),
    Route("GET", "/v1/tenants", "admin"),
    Route("GET", "/v1/tenants/{tenant}", "admin"),
    Route("PUT", "/v1/tenants/{tenant}", "admin"),
    Route("GET", "/v1/tenants/{tenant}/grants", "admin"),
    Route("PUT", "/v1/tenants/{tenant}/grants/{name}/{grantee}", "admin"),
    Route("DELETE", "/v1/tenants/{tenant}/grants/{name}/{grantee}", "admin"),
    Route("GET", "/health", None),
    Route("GET", "/ready", None),
    Route("GET", "/metrics", "metrics"),
    Route("GET", "/v1/system", "read"),
    Route("GET", "/openapi.json", "read"),
)
NOT_OFFERED = {  # paths of OpenAI's that clients try, each with what to do instead
    "/v1/batches": "Batches are not offered: send the requests one by one; many at a time are answered together.",
    "/v1/fine_tuning/alpha": "Graders and reinforcement fine-tuning are not offered: a job is supervised.",
    "/v1/fine_tuning/checkpoints": "A checkpoint is shared by publishing it as a version, whose adapter is granted.",
}
PUBLIC = frozenset(route.path for route in ROUTES if route.scope is None)


def find_route(method: str, path: str) -> Route:
    """The table's row; raises RouteNotFound, or MethodNotAllowed when the path exists with other methods."""
    others = []
    for route in ROUTES:
        if route.pattern.fullmatch(path):
            if route.method == method:
                return route
            others.append(route.method)
    if others:
        raise MethodNotAllowed(f"{method[:20]} is not a method of this path; it has {', '.join(sorted(others))}.")
    why = next((says for start, says in NOT_OFFERED.items() if path.startswith(start)), "There is no such path here")
    raise RouteNotFound(f"{why.rstrip('.')}; docs/http.md lists the routes.")


class Access:
    """Decides who a request is from, by the keys of one server."""

    def __init__(self, keyring: Keyring, is_listed: Callable[[str], bool] = lambda _: False) -> None:
        """`is_listed`: whether the operator lets pages of this origin in."""
        self.keyring = keyring
        self.is_listed = is_listed

    async def caller(self, headers: Headers, path: str) -> Caller:
        """The caller, who may be nobody in particular on a public path; raises Unauthenticated or Forbidden."""
        found = list(headers)
        if await self.keyring.is_open():
            check_local(found, self.is_listed)
            return Caller()
        if path in PUBLIC:
            return Caller(actor="anonymous", scopes=frozenset())
        sent = sent_key(found, path)
        if self.keyring.is_operator(sent):
            return Caller(actor="api-key")
        key = await self.keyring.find(sent)
        if key is None:
            raise Unauthenticated("The API key is not one of this server's.")
        return Caller(key.tenant, key.id, key.all_scopes, key)


def sent_key(headers: Headers, path: str) -> bytes:
    """The key in the request: `Authorization: Bearer KEY`, or `x-api-key` as Anthropic's clients send it."""
    sent = [value for name, value in headers if name == b"authorization"]
    if path == "/v1/messages" and not sent:
        sent = [b"Bearer " + value for name, value in headers if name == b"x-api-key"]
    if len(sent) != 1:
        raise Unauthenticated("Send one API key as `Authorization: Bearer KEY`.")
    scheme, _, key = sent[0].partition(b" ")
    if scheme.lower() != b"bearer" or not key.strip():
        raise Unauthenticated("Send one API key as `Authorization: Bearer KEY`.")
    return key.strip()


def check_local(headers: Headers, is_listed: Callable[[str], bool]) -> None:
    """Without keys only this machine's own programs are served: a web page that the user visits is not one.

    A page of a foreign site can post here, or have a name of its own resolve to this address; it cannot choose Host and
    Origin. And what a proxy of this machine passes on comes from loopback, whoever sent it.
    """
    found = list(headers)
    hosts = [value for name, value in found if name == b"host"]
    if len(hosts) != 1 or not _is_local_name(f"//{hosts[0].decode('latin-1')}"):
        raise Forbidden(
            f"Host must be one of {', '.join(LOOPBACK_NAMES)} while the server has no API key.", param="host"
        )
    for name, value in found:
        origin = value.decode("latin-1")
        if name == b"origin" and not _is_local_name(origin) and not is_listed(origin):
            raise Forbidden("A foreign Origin is refused while the server has no API key.", param="origin")
    if is_forwarded(found):
        raise Forbidden(
            "A request that came through a proxy is refused while the server has no API key: anybody may have sent it. "
            "Make a key with `hotshoe keys create --scope admin`, and name the proxy in HOTSHOE_TRUSTED_PROXIES.",
            param="x-forwarded-for",
        )


def check_scope(caller: Caller, route: Route) -> None:
    """Raises Forbidden when the caller lacks the route's scope."""
    if route.scope is not None and route.scope not in caller.scopes:
        raise Forbidden(f"This needs the scope {route.scope}, which the key does not have.")


def check_headers(headers: Headers) -> None:
    """Refuse what would make two readers of the request disagree, and a head that is too large; raises."""
    found = list(headers)
    size = sum(len(name) + len(value) + 4 for name, value in found)
    if size > MAX_HEAD_BYTES:
        raise HeadersTooLarge(f"The headers have {size} bytes; at most {MAX_HEAD_BYTES} are taken.")
    lengths = {value for name, value in found if name == b"content-length"}
    if len(lengths) > 1:
        raise InvalidRequest("The request has more than one Content-Length.")


def _is_local_name(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and is_loopback(parts.hostname or "") and not (parts.path or parts.query)
    except ValueError:
        return False
