"""Text that others wrote, as it can be shown."""

from __future__ import annotations


def printable(text: str, kept: str = "") -> str:
    """The text with control and direction characters replaced, so that nothing in it can hide or turn the line.

    Those of `kept` stay.
    """
    return "".join(letter if letter.isprintable() or letter in kept else "\N{REPLACEMENT CHARACTER}" for letter in text)
