"""HeatSmoothing (Campbell, Finlay, Oberman, arXiv:2010.02508): a network taught to be the Gaussian average of another.

The average u(x, t) of a teacher f over noise of variance t sigma^2 solves the heat equation u_t = sigma^2/2 Laplace u.
An implicit step of length h of that equation is the minimiser of a distance to f plus a penalty on the gradient. So a
student that is trained on both smooths the teacher without any noise when it predicts. No label is used.

Equation 10 takes one step of length 1, noise included, from a trained network (ImageNet). Equation 15 takes a recipe's
`rounds` steps of length h = 1 / rounds, each of them a training whose teacher is the student before (CIFAR-10).
Whether a student begins at its teacher or at random is the recipe's: `start` or `teacher` names the first teacher.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from robench.catalog import DefenseEntry, PositiveFloat, PositiveInt, Probability
from robench.defenses import LossParts
from robench.errors import UserError
from robench.lp_geometry import per_example, steepest
from robench.random_streams import RandomStream


class HeatSmoothing:
    """Algorithm 1: distance to the teacher plus h sigma^2/2 times the squared gradient's norm."""

    def __init__(
        self,
        *,
        teacher: nn.Module,
        num_rounds: int,
        sigma: PositiveFloat = 0.25,
        distance_on: Literal["softmax", "logits"] = "softmax",
        noise_share: Probability = 0.5,
        kappa: PositiveInt = 10,
        delta: PositiveFloat = 0.1,
        jl_scale: Literal["paper", "unbiased"] = "paper",
        penalty_coeff: Literal["alg1", "heat"] = "alg1",
        use_h: bool = False,
    ) -> None:
        """Keep the settings.

        Args:
            teacher: the frozen network f in eval mode; it sees clean images.
            num_rounds: the recipe's `rounds`: the number n_T of time steps.
            sigma: standard deviation of the Gaussian whose average is learned, on the [0, 1] scale of pixels.
            distance_on: outputs that are compared: probabilities (equation 10) or logits (equation 15).
            noise_share: probability with which the student sees an image with noise of that deviation (equation 10:
                half of the images), not clipped to the box; equation 15 has none.
            kappa: random directions in the space of logits, of which each costs the student a backward pass to the
                images and an evaluation.
            delta: length in pixel space of the finite difference.
            jl_scale: `paper` sums over the directions, which on average is kappa / K times the squared norm for K
                classes (0.01 on ImageNet); `unbiased` corrects that.
            penalty_coeff: `alg1` weighs the squared norm with sigma^2/2, as printed beside a distance that is halved;
                that is a step of the heat equation twice as long as meant. `heat` takes half of it.
            use_h: whether it is weighed with h = 1 / rounds too, as in equation 15. The authors' code leaves h out, so
                that every round smooths as much as one alone.
        """
        self.teacher = teacher
        self.sigma = sigma
        self.distance_on = distance_on
        self.noise_share = noise_share
        self.kappa = kappa
        self.delta = delta
        self.jl_scale = jl_scale
        self.weight = sigma**2 / 2 * (0.5 if penalty_coeff == "heat" else 1.0) / (num_rounds if use_h else 1)
        self.follows_a_student = False

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,  # noqa: ARG002  the contract's argument; nothing is learned from labels
        *,
        random: RandomStream,
        progress: float,  # noqa: ARG002  likewise
    ) -> LossParts:
        """Return the mean of Algorithm 1's loss over the batch."""
        clean = images.detach()
        with torch.no_grad():
            target = self.teacher(clean)
        points = self._noisy(clean, random.at("noise")).requires_grad_()
        # The difference of two evaluations that lie so close together drowns in bfloat16's rounding.
        with torch.autocast(images.device.type, enabled=False):
            logits = model(points)
            target = _of_the_shape(target, logits)
            squared_norm = squared_gradient_norm(
                model, points, logits, random=random.at("directions"), kappa=self.kappa, delta=self.delta
            )
        if self.jl_scale == "unbiased":
            squared_norm = squared_norm * (logits.shape[1] / self.kappa)
        distance = self._distance(logits, target).mean()
        penalty = self.weight * squared_norm.mean()
        agreement = (logits.detach().argmax(1) == target.argmax(1)).float().mean()
        return LossParts(
            distance + penalty,
            {"distance": distance.detach(), "penalty": penalty.detach(), "agreement": agreement},
        )

    def _noisy(self, images: Tensor, random: RandomStream) -> Tensor:
        """Return a copy of the images in which some, each by its own lot, have Gaussian noise."""
        chosen = random.at("chosen").uniform(images.new_empty(len(images), 1)) < self.noise_share
        return images + self.sigma * random.at("gaussian").normal(images) * per_example(chosen, images)

    def _distance(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return half the squared distance of the student's outputs to the teacher's, `(N,)`."""
        if self.distance_on == "softmax":
            logits, target = logits.softmax(1), target.softmax(1)
        return (logits - target).square().sum(1) / 2

    def finish_round(self, model: nn.Module) -> None:
        """Learn from what the round that ends has made: f^{k+1} = v."""
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        self.follows_a_student = True

    def state_dict(self) -> dict[str, Tensor]:
        """Return the teacher's weights, unless it is the model that the recipe names."""
        return dict(self.teacher.state_dict()) if self.follows_a_student else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put them back, into the teacher of that round."""
        if self.follows_a_student:
            self.teacher.load_state_dict(state)


def squared_gradient_norm(
    model: nn.Module, points: Tensor, logits: Tensor, *, random: RandomStream, kappa: int, delta: float
) -> Tensor:
    """Return the estimate of the squared Frobenius norm of the Jacobian of the logits, `(N,)`: appendix B.

    By Johnson and Lindenstrauss: the sum over directions w_i ~ N(0, I / K) of the squared derivative of w_i . v along
    its steepest direction, by finite differences. On average it is kappa / K times the squared norm.

    The steepest direction counts as a constant, so that no second derivative is needed; parameters get gradients
    through both evaluations. The displaced images of all directions are evaluated in one batch: with batch norm in
    training mode, as Algorithm 1 has the student, they share their batch statistics.

    Args:
        model: v; its logits `(N, K)` at `points` are given.
        points: `(N, C, H, W)`, requiring a gradient.
        logits: `(N, K)`, with the graph that leads to them.
        random: the examples' numbers.
        kappa: number of directions.
        delta: length of the finite difference, in pixel space.
    """
    classes = logits.shape[1]
    directions = [random.at(i).normal(logits.detach()) / math.sqrt(classes) for i in range(kappa)]
    displaced = []
    for direction in directions:
        (gradient,) = torch.autograd.grad(logits, points, direction, retain_graph=True)
        displaced.append(points.detach() + delta * steepest(gradient, "L2"))
    beyond = model(torch.cat(displaced)).view(kappa, *logits.shape)
    slopes: Tensor = (torch.stack(directions) * (beyond - logits)).sum(2) / delta
    return slopes.square().sum(0)


def _of_the_shape(target: Tensor, logits: Tensor) -> Tensor:
    if target.shape != logits.shape:
        raise UserError(
            f"the teacher gives {tuple(target.shape[1:])} outputs for an image, the student {tuple(logits.shape[1:])}; "
            "name a teacher of the same classes with --set start=MODEL or --set teacher=MODEL"
        )
    return target.to(logits.dtype)


ENTRY = DefenseEntry(
    name="heat_smoothing",
    objective=HeatSmoothing,
    summary="learns the Gaussian average of a trained model, without labels",
    source="Campbell, Finlay, Oberman, 2020, arXiv:2010.02508, equation (10), Algorithm 1, appendix B",
    views=(),
    uses_labels=False,
    passes="kappa + 1",
    presets={
        # CIFAR-10: equation 15 as the authors ran it, and as it is printed (h kept).
        "heat_smoothing_iterated": {"sigma": 0.1, "distance_on": "logits", "noise_share": 0.0},
        "heat_smoothing_iterated_paper": {"sigma": 0.1, "distance_on": "logits", "noise_share": 0.0, "use_h": True},
        # ImageNet, the authors' code: delta is 0.01 of inputs that were divided by deviations of 0.226 on average.
        "heat_smoothing_official": {"kappa": 6, "delta": 0.00226},
    },
)
