"""Whether fine-tuning is needed: what the base does when it is only asked well, and what simple models do beside it.

Before training the best prompt is chosen on validation rows. After it the adapter is compared with that prompt on test
rows, which a ledger counts every reading of. `before.measure` and `after.decide` are the two halves; `report.summary`
is what a card keeps.
"""
