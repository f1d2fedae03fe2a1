"""The prefix under which a proxy shows the server. Some proxies strip it, some do not; both lead to the same route.

It is taken off once, as whole segments, and before anything looks at the path: key, scope and route see what the routes
are named by. So `/llm/llm/v1` and `/llmx/v1` are no routes, and a prefix opens nothing.
"""

from __future__ import annotations

from starlette.types import Scope


def at_root(scope: Scope, root_path: str) -> Scope:
    """The scope with the path as our routes name it."""
    path: str = scope["path"]
    if not root_path or not path.startswith(root_path + "/"):
        return scope
    return {**scope, "path": path[len(root_path) :]}


def under_root(scope: Scope, root_path: str) -> Scope:
    """The scope as ASGI wants it for an app at `root_path`: the path has the prefix, and the app takes it off."""
    if not root_path:
        return scope
    return {**scope, "root_path": root_path, "path": root_path + scope["path"]}
