"""One evaluation: split into shards, each attacked and verified by a worker, merged into a record.

The engine returns values. Only :mod:`robench.evaluation.campaign`, which runs a list of questions for the command line,
knows the store.
"""
