"""Attacks: one file per idea, each a plain function that reads like its paper.

``attack(model, images, labels, *, threat, random, **parameters) -> adversarial images`` where

* `model` maps `(N, C, H, W)` images in [0, 1] to `(N, K)` logits and gives gradients to its input only,
* `images` `(N, C, H, W)` float in [0, 1], `labels` `(N,)` int64; N may be 0,
* `threat` is the ball to stay in, `random` the examples' :class:`~robench.random_streams.RandomStream`.

An attack changes no input, no weight, no mode and no global random state. What it returns is never trusted: the engine
alone decides what counts as broken.
"""
