"""The HTTP service: one base, hot-swappable adapters, the OpenAI API."""
