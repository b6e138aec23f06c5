"""The papers' figures, a TOML file each, and the ways of drawing them, a Python file each.

A figure (:class:`robench.papers.figures.PaperFigure`) names a drawing and its lines. A drawing is a function
``draw(evidence, **parameters) -> list[Panel]``: it asks :class:`robench.papers.figures.Evidence` for what the records
hold and returns numbers as :mod:`robench.panels`; a panel that nothing can be drawn in is left out. Nothing here
imports torch.
"""
