"""How an adapter is made: data, training, evaluation, the report card. Runs without vLLM installed."""
