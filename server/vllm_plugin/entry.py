"""The engine's process: stock vLLM, once its own parser has read the flags and what is ours among them is ours still.

No list of words knows every spelling in which vLLM takes a flag: `--no-` before it, abbreviations, dotted keys, a file.
So the flags are parsed twice, ours alone and with the user's behind them; what is ours has to come out the same.

vLLM is imported in here and not above: its children import this module again when they start.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from server.engine.vllm_flags import VLLM, advice_for, is_cpu_build
from server.vllm_plugin import early_core


def main() -> None:
    """`python -m server.vllm_plugin.entry COUNT FLAG...`: the first COUNT words are ours, the others the user's."""
    count, flags = int(sys.argv[1]), sys.argv[2:]
    if is_cpu_build() and early_core.is_wanted():
        early_core.begin()
    taken = taken_over(flags, count) if flags[count:] else []
    if taken:
        listed = "; ".join(f"--{name} ({advice_for(name)})" for name in taken)
        raise SystemExit(f"error: These vLLM flags are not passed through: {listed}.")
    from vllm.entrypoints.launchers.api_server import entry

    sys.argv = [VLLM, *flags]
    entry.main()


def taken_over(flags: Sequence[str], count: int) -> list[str]:
    """Names of flags of ours whose value the words after the first `count` would change, as vLLM reads them."""
    parser = vllm_parser()
    return differing(parser.parse_args(list(flags[:count])), parser.parse_args(list(flags)))


def vllm_parser() -> ArgumentParser:
    """The parser that vLLM reads its command line with."""
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # before 0.33
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: ArgumentParser = make_arg_parser(FlexibleArgumentParser(prog=VLLM))
    return parser


def differing(own: Namespace, whole: Namespace) -> list[str]:
    """Names of flags of ours that have another value in `whole`."""
    names = (attribute.replace("_", "-") for attribute, value in vars(whole).items() if vars(own)[attribute] != value)
    return sorted(name for name in names if advice_for(name) is not None)


if __name__ == "__main__":
    main()
