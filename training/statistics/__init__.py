"""How sure a figure is: intervals, paired tests, corrections for several looks, and how many rows would be enough.

Pure functions over numpy arrays, the same for the same seed. Rows that belong together (one template, one group, one
conversation) are one cluster, and clusters are what is drawn or flipped: rows of one cluster are no independent proof.
A result carries how many clusters it rests on; under FEWEST_CLUSTERS its caller says that it cannot tell.
"""

from __future__ import annotations

from training.statistics.amount import design_effect, rows_needed
from training.statistics.bootstrap import Interval, interval, statistic_beyond, statistic_interval
from training.statistics.clusters import FEWEST_CLUSTERS
from training.statistics.flips import flip_p
from training.statistics.ranks import auc
from training.statistics.several import holm

__all__ = [
    "FEWEST_CLUSTERS",
    "Interval",
    "auc",
    "design_effect",
    "flip_p",
    "holm",
    "interval",
    "rows_needed",
    "statistic_beyond",
    "statistic_interval",
]
