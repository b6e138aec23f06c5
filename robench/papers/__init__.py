"""The papers that robench mirrors: their printed tables and claims, and what our own records say of each number.

A paper is a TOML file of this folder (title, claims), each of its tables one of `robench/leaderboards/*.toml`;
:mod:`robench.papers.definitions` says what both may hold. :mod:`robench.papers.work` lists what a table takes,
:mod:`robench.papers.filling` puts records beside the printed values, :mod:`robench.papers.claims` evaluates the claims
on the result, with :mod:`robench.papers.intervals` for what our numbers leave open. Nothing here imports torch.
"""
