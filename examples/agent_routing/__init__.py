"""Agent routing: a sentence to a voice assistant becomes a function call as JSON. The demo's task."""
