"""Serving many adapters, beside peers in the same run: `python -m bench many`."""
