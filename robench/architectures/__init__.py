"""Architectures: one file per family, found by :mod:`robench.catalog`.

A builder is ``build(*, num_classes, input_shape, **parameters) -> torch.nn.Module``. The module maps images
`(N, C, H, W)` in [0, 1] to logits `(N, num_classes)` for any N, 0 included; normalisation by a data set's
mean and deviation is a layer that others put in front of it. `input_shape` is (channels, height, width) of
one image. Weights are drawn from torch's global generator, which the caller seeds, by the rule of each
family's source. Parts are named as in the authors' release where there is one, so that its weights load.
"""
