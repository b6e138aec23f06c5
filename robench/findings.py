"""What the probes see of a model, and how much they look at: all of it without torch.

:mod:`robench.evaluation.probes` makes findings, :mod:`robench.evaluation.diagnostics` judges records by them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from robench.planning import attack_settings
from robench.records import Diagnostic, EvalSpec, Value, canonical_hash

#: Shares of the sample up to which a sign is no sign: one in a hundred may have died in a ReLU or sit on a plateau.
ZERO_GRADIENTS, UNBROKEN_IN_BOX = 0.01, 0.01
#: On sound models the loss of up to one example in fifty ends lower than it began: the walk started at a random point,
#: and its last step may have overshot.
NO_RISE = 0.05
#: How much lower than stated a robust accuracy may be before it is called too high: one point.
TOO_HIGH = 0.01
#: How far above the worst case of all that was tried an attack on the cross-entropy is called far above it. Plain
#: adversarial training loses a point or two from PGD on the cross-entropy to PGD on the margin, methods that train what
#: PGD sees more: from PGD-10 to AutoAttack AT 4.1, TRADES 4.0, MART 7.2 points (README of the MAIR library).
CROSS_ENTROPY_ALONE = 0.02
#: Two equal calls may differ by this share of the largest logit: parallel sums on a GPU have no fixed order.
SAME_OUTPUTS = 1e-5

#: How the reason begins where time was too short, or nothing at hand, to look for signs.
NOT_EXAMINED = "not examined"

Role = Literal["reference", "longer", "margin", "black-box", "surrogate", "rescaled", "long-black-box", "averaged"]

#: What each probe runs. The reference is the attack that papers print; the others differ from it in one thing.
ATTACKS: dict[Role, str] = {
    "reference": "pgd-20",
    "longer": "pgd-100",
    "margin": "pgd-20:loss=margin",
    "black-box": "square:queries=200",
    "surrogate": "pgd-10",
    "rescaled": "pgd-40",
    "long-black-box": "square:queries=1000",
    "averaged": "pgd-20",
}
#: Forward passes per gradient of the surrogate, which averages over noisy copies.
NOISY_COPIES = 4
#: Balls as shares of the box in which walks on each of the two losses must break everything, with their steps.
WALKS = ((0.5, 20), (1.0, 40))
#: Examples looked at: a twentieth, so that the probes stay cheap next to the evaluation.
_SHARE, _FEWEST, _MOST = 20, 50, 128


class Run(Value):
    """An attack on those examples of the sample that the reference left standing."""

    role: Role
    attack: str
    """As it was run; `pgd-10 on ...` where it did not see the model itself."""
    broken: tuple[int, ...]
    """Examples that fell to it, judged by the plain model as everywhere."""


class Findings(Value):
    """What the probes saw on one model, threat model, precision and sample."""

    schema_version: Literal[1] = 1
    ids: tuple[int, ...]
    """The sample: correctly classified examples, in the split's fixed random order."""
    zero_gradients: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """By loss (`ce`, `margin`): examples whose gradient is exactly zero or not finite at the image or at a step of the
    attack."""
    no_rise: tuple[int, ...] = ()
    """Examples that stand after the reference and whose cross-entropy was no higher at its last step than at its
    first."""
    unbroken_in_box: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """By loss: examples that stand where every image of the box is allowed (`margin`: after both losses)."""
    output_gap: float = 0.0
    """Largest difference of two equal calls, as a share of the largest logit."""
    runs: tuple[Run, ...] = ()
    problem: str | None = None
    """Why there are no findings."""

    def run(self, role: Role) -> Run | None:
        """Return what one probe ran, None where it did not."""
        return next((run for run in self.runs if run.role == role), None)


def loss_of(spec: EvalSpec) -> Literal["ce", "margin"] | None:
    """Return whose gradient an attack follows (the DLR is a scaled margin); None where that is not said."""
    name = spec.attack.parameters.get("loss")
    if name is None:
        return None
    return "ce" if str(name).startswith("ce") else "margin"


def sample_of(order: NDArray[np.int64], correct: NDArray[np.int64], answered: int) -> NDArray[np.int64]:
    """Return the examples to look at: the first of the `correct` ones in the split's fixed `order`.

    As many as a twentieth of those `answered`, but at least 50 and at most 128: with 50 an attack is called stronger
    from 4 further examples on (8 %), with 128 from 5 on (4 %).
    """
    return order[np.isin(order, correct)][: min(max(answered // _SHARE, _FEWEST), _MOST)]


def probe_work(spec: EvalSpec) -> tuple[str, int, int]:
    """Return a key of the questions that share their probes, and the gradients and queries that these take at most.

    Where a sign is seen more follows; nobody knows that before.
    """
    shared = spec.model_dump(mode="json", include={"model", "examples", "threat", "seed", "precision", "decision"})
    gradients, queries = 2 + 2 * sum(steps for _, steps in WALKS), 2
    always: tuple[Role, ...] = ("reference", "longer", "margin", "black-box", "surrogate")
    for role in always:
        plugin, settings = attack_settings(ATTACKS[role])
        followed, asked = plugin.passes(settings, classes=2)
        gradients, queries = gradients + followed * (NOISY_COPIES if role == "surrogate" else 1), queries + asked
    count = min(max(spec.examples.count // _SHARE, _FEWEST), _MOST, spec.examples.count)
    return canonical_hash(shared), count * gradients, count * queries


def findings_key(spec: EvalSpec, ids: NDArray[np.int64], code: str) -> str:
    """Return the name under which findings are kept: all that can change them. `code` is the program's hash."""
    asked = spec.model_dump(mode="json", include={"model", "threat", "seed", "precision", "decision"})
    data = spec.examples.dataset, spec.examples.split_sha256, ids.tolist()
    return canonical_hash([asked, data, ATTACKS, code])[:16]


def unexamined(diagnostics: Iterable[Diagnostic]) -> str | None:
    """Return why a record's diagnostics did not look at the model, None where they did."""
    return next((d.evidence for d in diagnostics if d.evidence.startswith(NOT_EXAMINED)), None)
