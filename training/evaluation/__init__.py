"""What an evaluation says: every figure with its interval, against others, by distance from the training data.

`training.metrics` scores rows; here scores become figures that can be told from. Answers come from `answering`, the
report is `report.Report`, and `page` and `lines` show it.
"""
