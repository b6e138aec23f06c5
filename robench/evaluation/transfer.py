"""Transfer: what is left of a model's accuracy on images that were made to fool another.

Entry (t, s) of a transfer matrix is the accuracy of target t on the adversarial images of source s; on the diagonal
the attack saw the model that it fools (Roth et al., "Structured Gradient Regularization", arXiv:1805.08736, appendix
7.3). The images are those of an ordinary evaluation of the source, saved and looked at again
(:mod:`robench.evaluation.second_look`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robench.classifier import Classifier
from robench.datasets import ImageSet
from robench.evaluation.adversarials import AdversarialFiles, SavedAdversarials
from robench.evaluation.merging import share, sort_rows
from robench.evaluation.second_look import Judge, Shown, verify
from robench.evaluation.verification import inside_ball
from robench.losses import Criterion, rank_of
from robench.lp_geometry import distance
from robench.records import Cost, EvalRecord, ModelIdentity, Precision, Provenance, TransferRecord, TransferSpec
from robench.store import Rows, Store, outcome_sha256


@dataclass
class Bench:
    """The judges, one in memory at a time: a matrix of large models needs no more room than one of them."""

    load: Callable[[ModelIdentity], Classifier]
    """Returns the model of an identity."""
    device: torch.device
    _held: tuple[ModelIdentity, Precision, Judge] | None = field(default=None, init=False)

    def judge(self, model: ModelIdentity, precision: Precision) -> Judge:
        """Return the model as it judges a search of this precision."""
        if self._held is None or self._held[:2] != (model, precision):
            self._held = None
            judge = Judge(self.load(model), device=self.device, double=precision == "fp64")
            self._held = (model, precision, judge)
        return self._held[2]


def fill_matrix(
    sources: Sequence[EvalRecord],
    targets: Sequence[ModelIdentity],
    *,
    bench: Bench,
    images: ImageSet,
    store: Store,
    provenance: Callable[[], Provenance],
) -> Iterator[TransferRecord]:
    """Yield what each target does on each source's images, targets outermost; what is known is not computed again.

    Args:
        sources: complete records whose images were saved, those of misclassified examples attacked, too.
        targets: the models that classify.
        bench: where models come from.
        images: the split that all examples are of.
        store: where the images are and the records go.
        provenance: made when a record is.

    Raises UnsafeFile for images that contradict their record, before any target has seen one of them.
    """
    wanted = [TransferSpec(source=source.spec, target=target) for target in targets for source in sources]
    missing = {spec.identity for spec in wanted if store.find_transfer(spec) is None}
    needed = {spec.source.identity for spec in wanted if spec.identity in missing}
    files, believed = AdversarialFiles(store.root), {}
    for source in sources:
        if source.spec.identity in needed:
            saved, rows = files.open(source), store.outcomes(source)
            judge = bench.judge(source.spec.model, source.spec.precision)
            verify(saved, source, rows, images=images, judge=judge)
            believed[source.spec.identity] = saved, rows
    for spec in wanted:
        if spec.identity in missing:
            saved, source_rows = believed[spec.source.identity]
            target = bench.judge(spec.target, spec.source.precision)
            record, rows = transfer(spec, saved, source_rows, images=images, target=target, provenance=provenance())
            store.write_transfer(record, rows)
        found = store.find_transfer(spec)
        assert found is not None, "it was known, or was just written"
        yield found


def transfer(
    spec: TransferSpec,
    saved: SavedAdversarials,
    source_rows: Rows,
    *,
    images: ImageSet,
    target: Judge,
    provenance: Provenance,
) -> tuple[TransferRecord, dict[str, NDArray[Any]]]:
    """Show a source's adversarial images to a target; return the record and its rows.

    Args:
        spec: the question.
        saved: the source's images, verified; those of misclassified examples attacked, too.
        source_rows: the rows of the source's record.
        images: the split that the examples are of.
        target: the model of `spec.target`, in the precision that judged the source.
        provenance: of this look.

    Raises ValueError for images that leave misclassified examples alone.
    """
    if saved.misclassified != "attacked":
        raise ValueError(f"{saved.path} leaves examples alone that the source misclassifies")
    started = time.perf_counter()
    rows = sort_rows([_classified(spec, shown, target) for shown in target.shown(saved, images)])
    passes = int(rows["forward_passes"].sum())
    fell = source_rows["attacked"] & ~source_rows["robust"] & rows["attacked"]
    record = TransferRecord(
        spec=spec,
        clean=share(rows["attacked"]),
        robust=share(rows["robust"]),
        fooled=share(~rows["robust"][fell]) if fell.any() else None,
        cost=Cost(forward_passes=passes, backward_passes=0, seconds=round(time.perf_counter() - started, 3)),
        provenance=provenance,
        outcomes_sha256=outcome_sha256(rows),
    )
    return record, rows


def _classified(spec: TransferSpec, shown: Shown, target: Judge) -> dict[str, NDArray[Any]]:
    """Return the rows of some examples: the target's answers to the clean and to the adversarial images."""
    criterion, threat = Criterion(spec.source.decision.top_k), spec.source.threat
    ids, labels, clean, adversarial = shown
    before, after = target.logits(clean), target.logits(adversarial)
    right, broken = ~criterion.broken(before, labels), criterion.broken(after, labels)
    broken_in_8_bit = broken.clone()
    if broken.any():
        rounded = (adversarial[broken] * 255).round() / 255
        broken_in_8_bit[broken] = criterion.broken(target.logits(rounded), labels[broken])
    difference = adversarial.double() - clean.double()
    length = {norm: distance(difference, norm) for norm in ("Linf", "L2")}
    size = distance(clean.double(), "L2")
    found = {
        "label": labels,
        "clean_prediction": before.argmax(1),
        "clean_rank": rank_of(before, labels),
        "adversarial_prediction": after.argmax(1),
        "adversarial_rank": rank_of(after, labels),
        "attacked": right,
        "broken": broken,
        "robust": right & ~(broken & inside_ball(length[threat.norm], threat)),
        "linf": length["Linf"],
        "l2": length["L2"],
        "relative_l2": length["L2"] / torch.where(size > 0, size, 1.0),
        "broken_in_8_bit": broken_in_8_bit,
        "forward_passes": 2 + broken.int(),
        "backward_passes": torch.zeros_like(labels),
    }
    return {
        "example_id": ids,
        **{name: values.cpu().numpy() for name, values in found.items()},
        "wrong_decisions": np.zeros(len(ids), np.int64),
        "broken_by": np.full(len(ids), ""),
    }
