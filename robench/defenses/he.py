"""HE, hypersphere embedding (Pang et al., arXiv:2002.08619), in any objective."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from robench.architectures.with_head import CosineHead
from robench.catalog import DefenseEntry, NonNegativeFloat
from robench.defenses import LossParts, accuracy_of, last_layer
from robench.defenses._margins import classified, surcharge
from robench.errors import UserError
from robench.random_streams import RandomStream


class HypersphereEmbedding:
    """An angular margin in the cross-entropy of a network whose logits are s cos(theta_j).

    The network itself has the unit features and rows (:class:`robench.architectures.with_head.CosineHead`), so that the
    objective, its inner maximisation and whoever evaluates the network see s cos(theta) without a margin. What is added
    here turns the objective's cross-entropy into

        -log exp(s (cos(theta_y) - m)) / (exp(s (cos(theta_y) - m)) + sum over j != y of exp(s cos(theta_j))).
    """

    def __init__(self, *, margin: NonNegativeFloat = 0.2, at: Literal["clean", "adversarial"] | None = None) -> None:
        """Take the parameters.

        Args:
            margin: m; 0 leaves the objective as it is.
            at: the images whose cross-entropy gets the margin. None: the clean ones where the objective evaluates them
                (standard training, and TRADES), else the adversarial ones.
        """
        self.margin, self.at = margin, at

    def check(self, model: nn.Module) -> None:
        """Raise UserError for a network without a cosine head."""
        if not isinstance(last_layer(model), CosineHead):
            raise UserError(
                "regularizer he: the margin is one between angles, and this network's logits are no cosines; take an "
                "architecture with a cosine head, such as wrn_34_10_cosine, or --set architecture.name=with_head "
                "--set architecture.network=NAME"
            )

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,  # noqa: ARG002  the contract's argument; the objective has evaluated them
        labels: Tensor,
        *,
        random: RandomStream,  # noqa: ARG002  likewise; nothing is random here
        progress: float,  # noqa: ARG002  likewise
        base: LossParts,
    ) -> LossParts:
        """Return by how much the margin raises the cross-entropy."""
        self.check(model)
        head = last_layer(model)
        assert isinstance(head, CosineHead)
        logits = classified(base, self.at, name="he").logits
        margin = logits.new_full((len(labels), 1), head.scale * self.margin)
        harder = logits.scatter_add(1, labels[:, None], -margin)
        loss = surcharge(harder, logits, labels)
        return LossParts(loss, {"he": loss.detach(), "he_accuracy": accuracy_of(harder, labels)})


ENTRY = DefenseEntry(
    name="he",
    objective=HypersphereEmbedding,
    summary="a margin between angles, for networks whose logits are scaled cosines",
    source="Pang et al., NeurIPS 2020 (arXiv:2002.08619), section 3",
    role="regularizer",
)
