"""Options and arguments that several verbs have, each with its words once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ColumnNames = Annotated[
    str | None, typer.Option("--columns", help="Your own column names, as prompt=Question,completion=Answer.")
]
Data = Annotated[Path, typer.Argument(help="JSONL, JSON, CSV or Parquet, or a folder of them.")]
EmbeddedByDefault = Annotated[
    str | None, typer.Option("--base", help="Base folder or OWNER/NAME@REVISION; default the embedded base.")
]
Rules = Annotated[str | None, typer.Option(help="Levels of rules: CODE=block, warn, note or off, with commas between.")]
Strict = Annotated[bool, typer.Option("--strict", help="Leave with 1 where anything is warned of.")]
