"""The t-SNE plane of MNIST's test images: how the points of `mnist-5v8-tsne` were made, and the file they stand in.

`python -m robench.datasets._tsne_plane [DATA_ROOT]` makes them again, in about a minute, and replaces the file. It is
kept with the package because an embedding is no function of its data alone: it changes with scikit-learn's version and
the processor's rounding, and with it every number that is measured on it. So nobody needs scikit-learn, MNIST or that
minute, and all have the same points.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robench.datasets import mnist
from robench.datasets._image_set import Pixels, Positions
from robench.errors import UnsafeFile, UserError

POINTS = Path(__file__).with_name("mnist_5v8_tsne.csv")
HEADER = "test image,digit,t-SNE 1,t-SNE 2"
DIGITS = (5, 8)
#: The points are clamped to [-10, 10] in both coordinates by the authors' attacks.
EDGE = 10.0


def embed(images: Pixels) -> NDArray[np.float32]:
    """Return t-SNE coordinates `(N, 2)` of images `(N, H, W)`: perplexity 40, 300 iterations, of the pixels in [0, 1].

    Those are the settings of StochAT's notebook for figure 1 of arXiv:2008.12338, which takes no principal components
    first. It starts at random and names no seed, so its plane is lost; the start here is scikit-learn's own of today,
    the first two principal components.
    """
    from sklearn.manifold import TSNE

    if len(images) <= 40:
        raise UserError(f"{len(images)} images have no embedding of perplexity 40; give more than 40")
    tsne = TSNE(n_components=2, perplexity=40, max_iter=300, init="pca", learning_rate="auto", random_state=0)
    points: NDArray[np.float32] = tsne.fit_transform(images.reshape(len(images), -1) / 255.0)
    return points


def write_points(root: Path, path: Path = POINTS) -> None:
    """Embed all 10,000 test images of MNIST and write the points of the two digits, in the order of the test images."""
    images = mnist.read_idx(root, "t10k-images-idx3-ubyte", item_shape=(28, 28))
    digits = mnist.read_idx(root, "t10k-labels-idx1-ubyte", item_shape=())
    kept = np.flatnonzero(np.isin(digits, DIGITS))
    rows = zip(kept.tolist(), digits[kept].tolist(), embed(images)[kept].tolist(), strict=True)
    lines = [HEADER, *(f"{i},{digit},{x:.4f},{y:.4f}" for i, digit, (x, y) in rows)]
    path.write_text("\n".join([*lines, ""]))


def read_points(path: Path = POINTS) -> tuple[NDArray[np.float64], Positions]:
    """Return coordinates `(N, 2)` and digits `(N,)`; raise UnsafeFile for a file that holds something else."""
    try:
        header, *lines = path.read_text().splitlines()
        table = np.array([[float(value) for value in line.split(",")] for line in lines])
    except (OSError, ValueError) as error:
        raise UnsafeFile(f"{path} is damaged ({error}); install robench again") from None
    if header != HEADER or table.ndim != 2 or table.shape[1] != 4 or not np.isin(table[:, 1], DIGITS).all():
        raise UnsafeFile(f"{path} is damaged: no rows of {HEADER}; install robench again")
    points = table[:, 2:]
    if not (np.abs(points) <= EDGE).all():
        row = int((~(np.abs(points) <= EDGE).all(1)).argmax())
        raise UnsafeFile(f"{path} is damaged: point {points[row].tolist()} is not in [-10, 10]; install robench again")
    return points, table[:, 1].astype(np.int64)


if __name__ == "__main__":
    write_points(Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("ROBENCH_DATA", "data")))
