"""robench: robustness benchmarking and evaluation of image classifiers.

The package has two halves that meet at the records (:mod:`robench.records`). What computes (models, attacks,
defenses, training, evaluation) needs torch; what reads (tables, leaderboards, planning, the command line's listings)
never imports it, so nothing is imported here.
"""

__version__ = "0.1.0"
