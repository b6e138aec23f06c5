"""No attack goes inside a guaranteed radius: where one does, the attack's judge or the certificate is wrong."""

from __future__ import annotations

import numpy as np

from robench.records import CertificateRecord, EvalRecord
from robench.store import Rows


def contradictions(certificate: CertificateRecord, rows: Rows, attack: EvalRecord, attacked: Rows) -> list[str]:
    """Return the examples that an attack broke inside the radius that a certificate guarantees, one sentence each.

    Both are about the smoothed classifier of the same model and noise. A few can be chance: each certificate is wrong
    with its probability alpha, and the attack's judge takes a vote for the smoothed classifier's answer.
    """
    shared, here, there = np.intersect1d(rows["example_id"], attacked["example_id"], return_indices=True)
    certified, broken = rows["radius"][here], attacked["broken"][there] & attacked["attacked"][there]
    inside = rows["correct"][here] & broken & (attacked["l2"][there] < certified)
    return [
        f"example {shared[i]}: {attack.spec.attack.title} breaks it at L2 distance {attacked['l2'][there][i]:.4g}, "
        f"{certificate.spec.certificate.name} guarantees {certified[i]:.4g}"
        for i in np.flatnonzero(inside)
    ]
