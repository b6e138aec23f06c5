"""Covariances of images' perturbations, and their products with gradients (Roth et al., arXiv:1805.08736, section 3.3).

A perturbation of d = C H W pixels has a covariance of d^2 numbers: 784^2 for MNIST, 3072^2 for CIFAR-10, and 22 billion
for 224 x 224 pixels in three channels. The *covariance function* holds what a stationary and isotropic one needs: a
number for every pair of channels and every displacement of two pixels, rounded to whole pixels. Estimate and product
are then convolutions, computed by Fourier transforms of images padded with zeros: O(d log d), and nothing of size d^2.

Both are second moments, not centred: the mean of the perturbations adds a term that the paper reports negligible (12).
"""

from __future__ import annotations

import torch
from torch import Tensor


def full_matrix(perturbations: Tensor) -> Tensor:
    """Return the mean of xi xi^T over perturbations `(N, C, H, W)`, as `(d, d)`: equation (15)."""
    flat = perturbations.flatten(1)
    return flat.T @ flat / len(flat)


def matrix_product(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return Sigma g for each g of `vectors` `(N, C, H, W)`, in their shape; `matrix` is `(d, d)`."""
    return (vectors.flatten(1) @ matrix.T).view(vectors.shape)


def covariance_function(perturbations: Tensor) -> Tensor:
    """Return the mean of xi_c(i) xi_c'(j) over all pairs of pixels i, j at each displacement: equation (16).

    Perturbations are `(N, C, H, W)`; the answer is `(C, C, R + 1)`, symmetric in the channels, for the displacements
    |i - j| that round to 0, ..., R pixels. The autocorrelation A_cc'(D), a sum over the pairs (i, i + D), is the
    inverse transform of conj(F xi_c) F xi_c' (Wiener and Khinchin).
    """
    count, channels, height, width = perturbations.shape
    bins, pairs = _displacements(height, width, perturbations.device)
    pairs_in_bin = _sums(pairs.to(perturbations.dtype), bins)
    transformed = torch.fft.rfft2(perturbations, s=(2 * height, 2 * width))
    function = perturbations.new_empty(channels, channels, len(pairs_in_bin))
    for c in range(channels):
        for other in range(c, channels):
            spectrum = (transformed[:, c].conj() * transformed[:, other]).sum(0) / count
            correlation = torch.fft.irfft2(spectrum, s=(2 * height, 2 * width))
            function[c, other] = function[other, c] = _sums(torch.where(pairs > 0, correlation, 0.0), bins)
    return function / pairs_in_bin


def transfer_function(function: Tensor, height: int, width: int) -> Tensor:
    """Return the real Fourier transform of the kernel k_cc'(D) = function[c, c', round |D|], `(C, C, 2 H, W + 1)`.

    Displacements run over twice the image, so that what is moved out at one side does not come in at the other. The
    kernel is even, and its transform therefore real: a symmetric C x C matrix for each frequency.
    """
    bins, pairs = _displacements(height, width, function.device)
    kernel = torch.where(pairs > 0, function[:, :, bins], 0.0)
    transfer: Tensor = torch.fft.rfft2(kernel).real
    return transfer


def positive_part(transfer: Tensor) -> Tensor:
    """Return `transfer` `(C, C, 2 H, W + 1)` without the negative eigenvalues of its C x C matrices.

    Rounding displacements makes a covariance function indefinite in general. A convolution without negative
    eigenvalues, cut down to the image, is positive semidefinite.
    """
    matrices = transfer.permute(2, 3, 0, 1)
    if matrices.shape[-1] == 1:
        return transfer.clamp_min(0.0)
    values, vectors = torch.linalg.eigh(matrices)
    clipped: Tensor = (vectors * values.clamp_min(0.0).unsqueeze(-2)) @ vectors.mT
    return clipped.permute(2, 3, 0, 1).contiguous()


def convolution_product(transfer: Tensor, vectors: Tensor) -> Tensor:
    """Return (Sigma g)_c = sum over c' of k_cc' * g_c' for each g of `vectors` `(N, C, H, W)`, in their shape."""
    height, width = vectors.shape[2:]
    size = 2 * height, 2 * width
    transformed = torch.fft.rfft2(vectors, s=size)
    # Channel by channel: all products at once would take C times the memory.
    filtered = sum(transfer[:, c] * transformed[:, c, None] for c in range(vectors.shape[1]))
    product: Tensor = torch.fft.irfft2(filtered, s=size)[..., :height, :width]
    return product


def mean_variance(covariance: Tensor) -> Tensor:
    """Return the mean diagonal of a covariance `(d, d)`, or of a covariance function `(C, C, R + 1)`."""
    if covariance.dim() == 2:
        return covariance.diagonal().mean()
    return covariance[:, :, 0].diagonal().mean()


def mean_variance_of_transfer(transfer: Tensor, width: int) -> Tensor:
    """Return the mean over the channels of k_cc(0): the mean of the transform over all frequencies."""
    kernel: Tensor = torch.fft.irfft2(transfer.diagonal().mean(-1), s=(transfer.shape[2], 2 * width))
    return kernel[0, 0]


def _displacements(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, for each displacement on the doubled image `(2 H, 2 W)`, its rounded length and its number of pairs.

    Displacement -1 stands last, as Fourier transforms have it. No pair is H rows or W columns apart.
    """
    down, across = (
        torch.minimum(torch.arange(2 * side, device=device), 2 * side - torch.arange(2 * side, device=device))
        for side in (height, width)
    )
    pairs = (height - down)[:, None] * (width - across)[None]
    lengths = torch.hypot(down[:, None].double(), across[None].double()).round().long()
    return torch.where(pairs > 0, lengths, 0), pairs


def _sums(values: Tensor, bins: Tensor) -> Tensor:
    """Return the sums of `values` by bin, both `(2 H, 2 W)`."""
    sums = values.new_zeros(int(bins.max()) + 1)
    return sums.index_add(0, bins.flatten(), values.flatten())
