"""Measurements against peers started in the same run. Prints tables; asserts nothing."""
