"""Certificates: how far each example's prediction is guaranteed. One file each;
:class:`robench.catalog.CertificateEntry` states the contract.

A certificate is called with a batch, in eval mode and without gradients unless it asks for them::

    certify(model, images, labels, **parameters) -> Certified

`model` is a :class:`NoisyModel`: the model behind a source of noise that belongs to the examples, so that no answer
depends on the batch. `images` `(N, C, H, W)` are in [0, 1], `labels` `(N,)` int64; what is guaranteed may use no label,
only `correct` does. Radii are L2, on the [0, 1] scale of pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robench.random_streams import RandomStream

#: So many noisy copies of an example draw from one generator. Part of what defines the noise.
NOISE_CHUNK = 100


@dataclass(frozen=True, kw_only=True)
class Certified:
    """What a certificate says of N examples."""

    prediction: NDArray[np.int64]
    """(N,) the certified class, -1 where it abstains."""
    correct: NDArray[np.bool_]
    """(N,) by the certificate's own rule; never where it abstains."""
    radius: NDArray[np.float64]
    """(N,) within which the prediction is guaranteed; 0 where it abstains."""
    hits: NDArray[np.int64] | None = None
    """(N,) of the samples that the bound is of."""
    premise_gap: NDArray[np.float64] | None = None
    """(N,) how far the model's probabilities are from those of the Gaussian average that it is supposed to be (L2)."""


@dataclass
class NoisyModel:
    """A model, and its answers on noisy copies of some examples; counts what it is asked."""

    model: nn.Module
    ids: NDArray[np.int64]
    """(N,) positions of the examples in their split, which with the seed decide their noise."""
    seed: int
    num_classes: int
    batch_size: int
    """Images per call of the model."""
    samples: NDArray[np.int64] = field(init=False)
    """(N,) noisy copies that were looked at so far."""
    passes: int = 0
    """Of all kinds, one image through the network once being one."""

    def __post_init__(self) -> None:
        self.samples = np.zeros(len(self.ids), np.int64)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of `(M, C, H, W)` images; raise FloatingPointError for NaN or infinity."""
        logits = torch.cat([self.model(part) for part in images.split(self.batch_size)])
        self.passes += len(images)
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the model returns NaN or infinity")
        return logits

    def counts(
        self,
        images: Tensor,
        *,
        sigma: float,
        samples: int,
        purpose: str,
        first: int = 0,
        rows: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """Return `(M, K)` how often each class had the largest logit among noisy copies.

        Args:
            images: `(N, C, H, W)`, all of them.
            sigma: standard deviation of the noise; noisy images leave [0, 1], as the theorem has it.
            samples: copies of each image.
            purpose: noise for one purpose is independent of that for another: what chose a class must not judge it.
            first: how many copies for this purpose came before; a multiple of NOISE_CHUNK.
            rows: `(M,)` the examples that are meant; None: all.

        Raises FloatingPointError where the model gives NaN or infinity.
        """
        chosen = np.arange(len(self.ids)) if rows is None else rows
        counts = torch.zeros(len(chosen), self.num_classes, dtype=torch.int64, device=images.device)
        finite = torch.ones((), dtype=torch.bool, device=images.device)
        for some, noisy in self._noisy(images, chosen, sigma=sigma, samples=samples, purpose=purpose, first=first):
            logits = self.model(noisy)
            finite &= torch.isfinite(logits).all()
            classes = logits.argmax(1)
            counts.view(-1).scatter_add_(0, some * self.num_classes + classes, torch.ones_like(classes))
        self._charge(chosen, samples)
        if not bool(finite):
            raise FloatingPointError("the model returns NaN or infinity for a noisy image")
        found: NDArray[np.int64] = counts.cpu().numpy()
        return found

    def uniform(self, purpose: str) -> NDArray[np.float64]:
        """Return `(N,)` a number in [0, 1) for each example."""
        stream = RandomStream(self.seed, torch.from_numpy(self.ids), (purpose,))
        drawn: NDArray[np.float64] = stream.uniform(torch.empty(len(self.ids), dtype=torch.float64)).numpy()
        return drawn

    def mean_probabilities(self, images: Tensor, *, sigma: float, samples: int, purpose: str) -> Tensor:
        """Return `(N, K)` float64: the softmax averaged over noisy copies; see :meth:`counts`."""
        total = torch.zeros(len(images), self.num_classes, dtype=torch.float64, device=images.device)
        everyone = np.arange(len(self.ids))
        for some, noisy in self._noisy(images, everyone, sigma=sigma, samples=samples, purpose=purpose, first=0):
            total.index_add_(0, some, self.model(noisy).double().softmax(1))
        self._charge(everyone, samples)
        if not bool(torch.isfinite(total).all()):
            raise FloatingPointError("the model returns NaN or infinity for a noisy image")
        return total / samples

    def _charge(self, rows: NDArray[np.int64], samples: int) -> None:
        self.samples[rows] += samples
        self.passes += len(rows) * samples

    def _noisy(
        self, images: Tensor, rows: NDArray[np.int64], *, sigma: float, samples: int, purpose: str, first: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of noisy copies with their places in `rows`: many images' chunks together, one buffer."""
        if first % NOISE_CHUNK:
            raise ValueError(f"{first} samples are no whole number of chunks of {NOISE_CHUNK}")
        chunks = range(first // NOISE_CHUNK, -(-(first + samples) // NOISE_CHUNK))
        pieces = [(place, chunk) for place in range(len(rows)) for chunk in chunks]
        last = first + samples - NOISE_CHUNK * chunks[-1] if chunks else 0
        sizes = {chunk: last if chunk == chunks[-1] else NOISE_CHUNK for chunk in chunks}
        together = max(1, self.batch_size // NOISE_CHUNK)
        generator = torch.Generator(images.device)
        buffer = torch.empty(together * NOISE_CHUNK, *images.shape[1:], dtype=images.dtype, device=images.device)
        for begin in range(0, len(pieces), together):
            filled, places = 0, []
            for place, chunk in pieces[begin : begin + together]:
                generator.manual_seed(noise_key(self.seed, int(self.ids[rows[place]]), purpose, chunk))
                size = sizes[chunk]
                buffer[filled : filled + size].normal_(0.0, sigma, generator=generator).add_(images[rows[place]])
                filled += size
                places.append(np.full(size, place))
            some = torch.from_numpy(np.concatenate(places)).to(images.device)
            yield from zip(some.split(self.batch_size), buffer[:filled].split(self.batch_size), strict=False)


def noise_key(seed: int, example: int, purpose: str, chunk: int) -> int:
    """Return the seed of a chunk's generator, below 2^63."""
    text = f"{seed} {example} {purpose} {chunk}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def most_frequent(counts: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Return `(N, k)` the classes that came most often, of equal counts the first class first."""
    return np.argsort(-counts, axis=1, kind="stable")[:, :k]


def hits_of(counts: NDArray[np.int64], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `(N,)` how often any of the `(N, k)` classes came."""
    found: NDArray[np.int64] = np.take_along_axis(counts, classes, axis=1).sum(1)
    return found
