"""Prints, as JSON, each method and path of the app that vLLM builds for our flags. Its own process: slow to import.

`python vllm_routes.py FLAGS`, with what the engine's own command has after its module.
"""

from __future__ import annotations

import json
import sys

from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    given = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
    app = build_app(given, ("generate",))
    found = {(method, route.path) for route in app.routes for method in getattr(route, "methods", None) or ("GET",)}
    print(json.dumps(sorted(found)))
