"""Cleans data: private values become pseudonyms that only the map's owner can turn back, or their rows are dropped."""
