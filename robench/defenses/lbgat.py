"""LBGAT, learnable boundary guided adversarial training (Cui et al., arXiv:2011.11164), in L-infinity and L2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor, nn

from robench.catalog import DefenseEntry, NonNegativeFloat, PositiveFloat, PositiveInt
from robench.defenses import LossParts, accuracy_of, evaluated
from robench.defenses.trades import worst_images
from robench.losses import cross_entropy, kl_divergence
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel


class LearnableBoundaryGuidance:
    """The network learns to say of worst images what a second network, trained along on clean ones, says of those.

    With f the network and q its companion, the mean over the batch (and in the first term over the classes) of

        (f(x') - q(x))^2 + CE(q(x), y) + beta KL(p_f(x) || p_f(x')).

    Gradients flow into both networks. The companion is not deployed.
    """

    def __init__(
        self,
        *,
        new_network: Callable[[str], nn.Module],
        companion: str = "resnet18",
        beta: NonNegativeFloat = 6.0,
        inner: Literal["kl", "ce"] = "kl",
        steps: PositiveInt = 10,
        step_size: PositiveFloat | None = None,
        start: Literal["noise", "random"] | None = None,
        attack_mode: Literal["eval", "train"] = "eval",
    ) -> None:
        """Build the companion.

        Args:
            new_network: builds an untrained network by its architecture's name.
            companion: the architecture of the network that is trained on clean images.
            beta: weight of the divergence; the paper has 0 and 6.
            inner: what the inner maximisation ascends: `kl` the network's divergence from its clean prediction, `ce`
                the cross-entropy with the label.
            steps: gradient steps of the inner maximisation.
            step_size: length of a step in the threat's norm, on the [0, 1] scale; None: 2.5 epsilon / steps in Linf and
                2 epsilon / steps in L2.
            start: `noise` is the image plus normal noise of standard deviation 0.001, `random` a uniformly random point
                of the ball; None: `noise` for kl, `random` for ce.
            attack_mode: the network's mode during the inner maximisation. `eval`, as in the authors' code, uses the
                running statistics; `train` normalises by the batch and updates them with the iterates.
        """
        self.companion = new_network(companion)
        self.beta = beta
        self.inner, self.steps, self.step_size = inner, steps, step_size
        self.start, self.attack_mode = start, attack_mode

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        random: RandomStream,
        progress: float,  # noqa: ARG002  the contract's argument; nothing changes in the course of the training
        threat: ThreatModel,
    ) -> LossParts:
        """Return the loss of both networks."""
        adversarial = worst_images(
            model,
            images,
            labels,
            random=random.at("lbgat"),
            threat=threat,
            inner=self.inner,
            steps=self.steps,
            step_size=self.step_size,
            start=self.start,
            attack_mode=self.attack_mode,
        )
        worst = evaluated(model, adversarial, images)
        # With beta = 0, too, as in the authors' code: batch norms see both kinds of images.
        clean = evaluated(model, images, images)
        guide = self.companion(images.detach())
        guidance = (worst.logits - guide).square().mean()
        natural = cross_entropy(guide, labels).mean()
        divergence = kl_divergence(clean.logits, worst.logits).mean()
        parts = {
            "accuracy": accuracy_of(clean.logits, labels),
            "adversarial_accuracy": accuracy_of(worst.logits, labels),
            "companion_accuracy": accuracy_of(guide, labels),
            "guidance": guidance.detach(),
        }
        total = guidance + natural + self.beta * divergence
        return LossParts(total, parts, {"clean": clean, "adversarial": worst})

    def state_dict(self) -> dict[str, Tensor]:
        """Return the companion's weights."""
        return dict(self.companion.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self.companion.load_state_dict(state)


ENTRY = DefenseEntry(
    name="lbgat",
    objective=LearnableBoundaryGuidance,
    summary="logits at the worst images like those of a second network at the clean ones, which is trained along",
    source="Cui et al., ICCV 2021 (arXiv:2011.11164); the loss as in the authors' code",
    views=("clean", "adversarial"),
    passes="steps + 2",
    presets={
        # github.com/dvlab-research/LBGAT, WRN-34-10 on CIFAR-100, Linf@0.031.
        "lbgat_official": {"companion": "resnet18", "beta": 6.0, "steps": 10, "step_size": 0.007},
        # What EMR (arXiv:2210.05118), appendix A, adds its term to, on CIFAR-10, Linf@0.031.
        "lbgat_emr": {"companion": "resnet18", "beta": 0.0, "steps": 10, "step_size": 0.003},
    },
)
