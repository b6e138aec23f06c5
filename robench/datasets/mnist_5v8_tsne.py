"""The digits 5 and 8 of MNIST as points of a t-SNE plane, after figure 1 of ATENT (arXiv:2008.12338): a toy.

A point is an image of one row of two pixels, t-SNE 1 and t-SNE 2. Pixels lie in [0, 1] everywhere in robench, the
points in the square [-10, 10]^2 to which the authors' attacks clamp: a pixel is (coordinate + 10) / 20. So every length
is a twentieth of what it is in the plane: the figure's epsilon 1 is 0.05, its step 0.1 is 0.005. The pixels are bytes
as those of all images, so a point stands up to 0.04 from where t-SNE put it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robench.catalog import DatasetEntry
from robench.datasets import ArrayImages, Pixels, fixed_shuffle
from robench.datasets._tsne_plane import DIGITS, EDGE, POINTS, read_points
from robench.errors import UnsafeFile

#: As many as in the authors' notebook, 70 and 30 %. Which ones is not known; here a fixed shuffle says it.
TRAIN, TEST = 1307, 559


def load(_root: Path, split: str) -> ArrayImages:
    """Return the first 1,307 points of a fixed shuffle (train, in that order), or the other 559 (test, MNIST's)."""
    points, digits = read_points()
    if len(points) != TRAIN + TEST:
        raise UnsafeFile(f"{POINTS} is damaged: {len(points)} points, not {TRAIN + TEST}; install robench again")
    order = fixed_shuffle(len(points))
    rows = np.sort(order[TRAIN:]) if split == "test" else order[:TRAIN]
    return ArrayImages(
        images=pixels_of(points[rows]),
        labels=np.searchsorted(DIGITS, digits[rows]).astype(np.int64),
        classes=ENTRY.classes,
        origin=str(POINTS),
    )


def pixels_of(points: NDArray[np.float64]) -> Pixels:
    """Return points `(N, 2)` of the plane as images `(N, 1, 1, 2)`: (t + 10) / 20, in steps of 1/255."""
    return np.rint((points + EDGE) / (2 * EDGE) * 255).astype(np.uint8)[:, None, None, :]


ENTRY = DatasetEntry(
    name="mnist-5v8-tsne",
    load=load,
    summary="1,866 points of the t-SNE plane of MNIST's digits 5 and 8, as images of 1 x 2; comes with robench",
    source="Jagatap et al., arXiv:2008.12338, figure 1; code StochAT; start of the embedding and split are robench's",
    licence="CC BY-SA 3.0, as commonly stated of MNIST",
    classes=("5", "8"),
    image_shape=(1, 1, 2),
    held_out=107,
    images={"train": 1307, "test": 559},
    threats=("Linf@0.05",),
    plane=("t-SNE", -10.0, 10.0),
)
