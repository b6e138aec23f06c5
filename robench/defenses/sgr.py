"""Structured gradient regularisation (Roth, Lucchi, Nowozin, Hofmann, "Adversarially robust training through structured
gradient regularization", arXiv:1805.08736): the likelihood is made flat in the directions that perturbations take.

Expanding the expected loss under noise of covariance Sigma to second order gives the penalty (equation 11)

    lambda / 2 E[g^T Sigma g],    g = gradient of log phi_y(x) by the image,

and Sigma is estimated while the network is trained, from perturbations that the network itself suggests. GN is the
case Sigma = I (:mod:`robench.defenses.gn`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from robench.attacks.fgsm import fgsm
from robench.attacks.pgd import pgd
from robench.catalog import DefenseEntry, NonNegativeFloat, PositiveFloat, PositiveInt, Probability
from robench.classifier import frozen, mode
from robench.defenses import LossParts, View, seen
from robench.defenses._covariance import (
    convolution_product,
    covariance_function,
    full_matrix,
    matrix_product,
    mean_variance,
    mean_variance_of_transfer,
    positive_part,
    transfer_function,
)
from robench.defenses.gn import gradient_of_log_likelihood, standardized
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel

#: Numbers per image up to which the full matrix (64 MiB in float32) is kept.
_LARGEST_DIMENSION = 4096


class StructuredGradientRegularization:
    """The penalty, and the running average of the covariance (Algorithm 1 of the paper's second version)."""

    def __init__(
        self,
        *,
        strength: NonNegativeFloat = 0.3,
        perturbation: Literal["grad", "sign", "fgsm", "pgd"] = "grad",
        form: Literal["full", "function"] = "function",
        decay: Probability = 0.9,
        refresh: PositiveInt = 10,
        cov_scale: Literal["unit_diag", "data_diag", "none"] = "unit_diag",
        psd: Literal["clip_spectrum", "none"] = "clip_spectrum",
        at: Literal["clean", "adversarial"] = "clean",
        gradient_by: Literal["pixels", "standardized"] = "pixels",
        epsilon: PositiveFloat | None = None,
        steps: PositiveInt = 10,
        step_size: PositiveFloat | None = None,
    ) -> None:
        """Take the parameters; raise UserError where they contradict each other.

        Args:
            strength: lambda of equation (11); with a mean diagonal of 1, a variance on the [0, 1] scale of pixels.
            perturbation: what the covariance is taken of: the loss's `grad`ient (the paper's SGR_grad), its `sign`, or
                what `fgsm` and `pgd` add to the image in the L-infinity ball, attacking the predicted label.
            form: the `full` matrix of equation (15), for up to 4,096 numbers per image, or the covariance `function` of
                the pixels' displacement, equation (16), for images of any size.
            decay: 1 - beta of equation (14). The first 1 / (1 - decay) estimates count equally, so that the average
                neither begins at an invented matrix nor clings to the untrained network's.
            refresh: steps from one estimate to the next; the paper's algorithm makes one at each step and says that
                fewer will do.
            cov_scale: every estimate gets a mean diagonal of 1 (`unit_diag`), or that of the covariance of the batch's
                images (`data_diag`: then lambda is a ratio of noise to signal), or stays as it is (`none`).
            psd: `clip_spectrum` leaves out the negative eigenvalues that rounded displacements bring into a covariance
                function; `none` keeps them, and the penalty can be negative. A full matrix has none.
            at: where the gradient is taken.
            gradient_by: by the `pixels` in [0, 1], on whose scale attacks live; or by what the network standardises
                them to, as the paper may be read, too (at the price of a pass).
            epsilon: radius of the ball for `fgsm` and `pgd`.
            steps: of `pgd`.
            step_size: of `pgd`, on the [0, 1] scale; None: 2.5 epsilon / steps.
        """
        attacked = perturbation in {"fgsm", "pgd"}
        if decay == 1:
            raise UserError(f"sgr: decay = {decay} would never learn a covariance; take one in [0, 1), such as 0.9")
        if attacked and epsilon is None:
            raise UserError(f"sgr: perturbation = {perturbation} needs epsilon, the radius of its ball, such as 8/255")
        if not attacked and epsilon is not None:
            raise UserError(
                f"sgr: epsilon = {epsilon} says nothing about perturbation = {perturbation}; leave it out, or take "
                "perturbation=fgsm or pgd"
            )
        if perturbation != "pgd" and step_size is not None:
            raise UserError(f"sgr: step_size = {step_size} belongs to perturbation=pgd, not to {perturbation}")
        self.strength, self.at, self.gradient_by = strength, at, gradient_by
        self.perturbation, self.steps, self.step_size = perturbation, steps, step_size
        self.threat = None if epsilon is None else ThreatModel.parse(f"Linf@{epsilon}")
        self.form, self.cov_scale, self.psd = form, cov_scale, psd
        self.decay, self.refresh = decay, refresh
        self.step = 0
        self.estimates = 0
        self.covariance: Tensor | None = None
        """`(d, d)`, or the function `(C, C, R + 1)`."""
        self._transfer: Tensor | None = None

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        random: RandomStream,
        progress: float,  # noqa: ARG002  the contract's argument
        base: LossParts,
    ) -> LossParts:
        """Return lambda / 2 g^T Sigma g averaged over the batch: equation (11)."""
        view = seen(base, self.at, model, images)
        point = view if self.gradient_by == "pixels" else standardized(model, view.images)
        gradient = gradient_of_log_likelihood(point, labels)
        with torch.autocast(images.device.type, enabled=False):
            if self.step % self.refresh == 0 or self.covariance is None:
                self._average(self._estimate(self._perturbations(model, view, gradient.detach(), random), point.images))
            self.step += 1
            quadratic = 0.5 * (gradient * self._product(gradient)).flatten(1).sum(1)
        loss = self.strength * quadratic.mean()
        negative = (quadratic.detach() < 0).to(quadratic.dtype).mean()
        return LossParts(loss, {"sgr_loss": loss.detach(), "sgr_negative": negative})

    def _perturbations(self, model: nn.Module, view: View, gradient: Tensor, random: RandomStream) -> Tensor:
        """Return xi `(N, C, H, W)`: section 4.1 (a) to (d)."""
        if self.perturbation == "grad":
            return -gradient
        if self.perturbation == "sign":
            return -gradient.sign()
        images, predicted = view.images.detach(), view.logits.detach().argmax(1)
        random = random.at("perturbation", self.perturbation)
        assert self.threat is not None
        with frozen(model), mode(model, training=False):
            if self.perturbation == "fgsm":
                return fgsm(model, images, predicted, threat=self.threat, random=random) - images
            walked = pgd(
                model,
                images,
                predicted,
                threat=self.threat,
                random=random,
                steps=self.steps,
                step_size=self.step_size,
                stop_when_broken=False,
            )
            return walked - images

    @torch.no_grad()
    def _estimate(self, perturbations: Tensor, images: Tensor) -> Tensor | None:
        """Return the covariance of a batch's perturbations, scaled; None where there are no perturbations."""
        largest = perturbations.abs().max()
        if not bool(largest.isfinite()):
            raise UserError(
                f"sgr: the covariance of the {self.perturbation} perturbations is not finite; "
                "try a lower learning rate (optimizer.lr) or a smaller strength"
            )
        if largest == 0:
            # A network whose last layer begins at zero has no gradient yet; then the penalty is 0 whatever Sigma is.
            return None
        if self.cov_scale != "none":
            # By the largest first: squares of gradients below 1e-19 would vanish in float32.
            perturbations = perturbations / largest
        covariance = self._second_moments(perturbations)
        if self.cov_scale == "none":
            return covariance
        target = images.var(0, correction=0).mean() if self.cov_scale == "data_diag" else 1.0
        if target == 0:
            raise UserError("sgr: cov_scale = data_diag, but the images of a batch are all equal; take unit_diag")
        return covariance * (target / mean_variance(covariance))

    def _second_moments(self, perturbations: Tensor) -> Tensor:
        if self.form == "function":
            return covariance_function(perturbations)
        shape = tuple(perturbations.shape[1:])
        dimension = perturbations[0].numel()
        if dimension > _LARGEST_DIMENSION:
            raise UserError(
                f"sgr: form = full keeps a matrix of {dimension:,} x {dimension:,} numbers "
                f"({dimension**2 * perturbations.element_size() / 2**30:.1f} GiB) for images of {shape}; above "
                f"{_LARGEST_DIMENSION:,} take form=function"
            )
        return full_matrix(perturbations)

    def _average(self, estimate: Tensor | None) -> None:
        """Move the running average towards an estimate: equation (14)."""
        if estimate is None:
            return
        self.estimates += 1
        beta = max(1 - self.decay, 1 / self.estimates)
        self.covariance = estimate if self.covariance is None else torch.lerp(self.covariance, estimate, beta)
        self._transfer = None

    def _product(self, vectors: Tensor) -> Tensor:
        """Return Sigma g for each of `vectors` `(N, C, H, W)`."""
        if self.covariance is None:
            return vectors
        if self.form == "full":
            return matrix_product(self.covariance, vectors)
        if self._transfer is None:
            self._transfer = self._prepared(self.covariance, *vectors.shape[2:])
        return convolution_product(self._transfer, vectors)

    def _prepared(self, function: Tensor, height: int, width: int) -> Tensor:
        """Return what products with a covariance function need; its mean diagonal survives the clipping."""
        transfer = transfer_function(function, height, width)
        if self.psd == "none":
            return transfer
        clipped = positive_part(transfer)
        return clipped * (mean_variance(function) / mean_variance_of_transfer(clipped, width))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running average, and how many steps and estimates it has seen."""
        counts = {"step": torch.tensor(self.step), "estimates": torch.tensor(self.estimates)}
        return counts if self.covariance is None else {**counts, "covariance": self.covariance}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; raise UserError where its covariance is not finite."""
        covariance = state.get("covariance")
        if covariance is not None and not bool(covariance.isfinite().all()):
            raise UserError("sgr: the covariance of this checkpoint is not finite; train again with --restart")
        self.step, self.estimates = int(state["step"]), int(state["estimates"])
        self.covariance, self._transfer = covariance, None


ENTRY = DefenseEntry(
    name="sgr",
    objective=StructuredGradientRegularization,
    summary="penalty on the loss's gradient in the directions that its own perturbations take",
    source="Roth, Lucchi, Nowozin, Hofmann, 2018, arXiv:1805.08736, equation (11), section 3.3 and Algorithm 1",
    role="regularizer",
    differentiates_images=True,
    passes="2",
    presets={
        # The paper's four perturbations. Its attacks' strengths and steps are lost: these are robench's.
        "sgr_grad": {"perturbation": "grad"},
        "sgr_sign": {"perturbation": "sign"},
        "fgsm_sgr": {"perturbation": "fgsm", "epsilon": 0.03137254901960784, "refresh": 20},
        "pgd_sgr": {"perturbation": "pgd", "epsilon": 0.03137254901960784, "refresh": 100},
    },
)
