"""Whether a run has learned enough: evidence from its curves and rows, rules that are written down, and what to do."""
