"""Long-range correlated noise, computed: its covariance matrices, and samples of it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robench.catalog import DrawingEntry, PositiveFloat, PositiveInt, Probability
from robench.covariances import block_means, displacements
from robench.panels import HeatMap, Panel, Samples
from robench.papers.figures import Evidence

#: Correlation of two channels at the same pixel.
_BETWEEN_CHANNELS = 0.5
_CHANNELS = 3
#: Rows of a heat map.
_LARGEST_MAP = 192
#: Sides of the torus on which noise is drawn, in sides of the image.
_TORUS = 4


def draw(
    evidence: Evidence,
    *,
    form: Literal["matrices", "samples"] = "matrices",
    decay_lengths: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0),
    side: PositiveInt = 32,
    trimmed: Probability = 0.25,
    deviations: PositiveFloat = 2.5,
) -> list[Panel]:
    """Return the covariance of the noise for each decay length, or one sample of each.

    Args:
        form: `matrices` as heat maps, or `samples`.
        decay_lengths: zeta in pixels.
        side: of the image, which has three channels.
        trimmed: of a matrix: the share of the image that is cut off on each side.
        deviations: of a sample: how many standard deviations from grey are black and white.
    """
    del evidence
    if form == "matrices":
        cut = int(trimmed * side)
        return [_matrix(zeta, side - 2 * cut) for zeta in decay_lengths]
    normal = np.random.RandomState(0).standard_normal((_CHANNELS, _TORUS * side, _TORUS * side))
    pictures = [_sample(zeta, side, normal, deviations) for zeta in decay_lengths]
    return [
        Samples(
            title="One draw of standard normal numbers, correlated over each decay length",
            captions=tuple(f"decay length {zeta:g}" for zeta in decay_lengths),
            pictures=tuple(pictures),
        )
    ]


def covariance(zeta: float, height: int, width: int) -> NDArray[np.float64]:
    """Return M x E_zeta over the flattened pixels `(C, H, W)`: E has exp(-|i - j| / zeta) with the exact distances."""
    between = np.full((_CHANNELS, _CHANNELS), _BETWEEN_CHANNELS)
    np.fill_diagonal(between, 1.0)
    return np.kron(between, np.exp(-displacements(height, width) / zeta))


def _matrix(zeta: float, side: int) -> HeatMap:
    cells, block = block_means(covariance(zeta, side, side), _LARGEST_MAP)
    lengths = np.arange(side + 1)
    own = np.exp(-lengths / zeta)
    return HeatMap(
        title=f"Decay length {zeta:g}",
        caption=f"the inner {side} x {side} pixels of three channels; each cell is the mean of {block} x {block}",
        values=cells,
        header=("displacement", "within_channels", "between_channels"),
        rows=tuple(zip(lengths.tolist(), own.tolist(), (_BETWEEN_CHANNELS * own).tolist(), strict=True)),
    )


def _sample(zeta: float, side: int, normal: NDArray[np.float64], deviations: float) -> NDArray[np.uint8]:
    """Return a picture `(C, H, W)` of a sample: a corner of noise that is correlated on a larger torus."""
    between = np.linalg.cholesky(covariance(zeta, 1, 1))
    around = np.minimum(np.arange(normal.shape[-1]), normal.shape[-1] - np.arange(normal.shape[-1]))
    spectrum = np.fft.fft2(np.exp(-np.hypot(around[:, None], around) / zeta)).real
    # On the torus a few waves would have a variance just below 0.
    along = np.sqrt(np.maximum(spectrum, 0.0))
    noise = np.fft.ifft2(np.fft.fft2(np.tensordot(between, normal, 1)) * along).real[:, :side, :side]
    return np.clip(127.5 + 127.5 * noise / deviations, 0, 255).round().astype(np.uint8)


ENTRY = DrawingEntry(
    name="noise-covariances",
    draw=draw,
    summary="Covariance matrices of long-range correlated noise, or samples of it.",
    source="Roth et al., arXiv:1805.08736, section 4.3, figures 3 and 5",
    measures=False,
    presets={"noise-samples": {"form": "samples", "decay_lengths": (1.0, 2.0, 4.0, 8.0, 12.0)}},
)
