"""Answers against what was expected: pure functions to a score of each row, and to the figure of all of them.

A score and a figure lie between 0 and 1; BLEU, chrF and ROUGE are usually printed times 100. `items` makes all that
mean something for the data at hand; each `Measure` has the scores of the rows, and its figure for any draw of them,
which is what intervals are made from.
"""

from __future__ import annotations

from training.metrics.items import Items, items
from training.metrics.measure import Measure
from training.metrics.task import METRICS, Task, task_of

__all__ = ["METRICS", "Items", "Measure", "Task", "items", "task_of"]
