"""Transfer: what is left of a model's accuracy on images that were made to fool another.

Entry (t, s) of a transfer matrix is the accuracy of target t on the adversarial images of source s; on the diagonal
the attack saw the model that it fools (Roth et al., "Structured Gradient Regularization", arXiv:1805.08736, appendix
7.3). The images are those of an ordinary evaluation of the source, saved and looked at again
(:mod:`robench.evaluation.second_look`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robench.datasets import ImageSet
from robench.errors import EvaluationFailed
from robench.evaluation.adversarials import AdversarialFiles, SavedAdversarials
from robench.evaluation.judging import Answer, Judge
from robench.evaluation.merging import share, sort_rows
from robench.evaluation.second_look import Bench, random_of, verify
from robench.evaluation.shards import Batch, InvalidAnswer
from robench.evaluation.verification import rules_of
from robench.losses import Criterion, rank_of
from robench.lp_geometry import distance
from robench.records import (
    Cost,
    Decision,
    EvalRecord,
    EvalSpec,
    ModelIdentity,
    Provenance,
    TransferRecord,
    TransferSpec,
)
from robench.store import Rows, Store, outcome_sha256


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
            verify(saved, source, rows, images=images, bench=bench)
            believed[source.spec.identity] = saved, rows
    for spec in wanted:
        if spec.identity in missing:
            saved, source_rows = believed[spec.source.identity]
            record, rows = transfer(spec, saved, source_rows, images=images, bench=bench, provenance=provenance())
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
    bench: Bench,
    provenance: Provenance,
) -> tuple[TransferRecord, dict[str, NDArray[Any]]]:
    """Show a source's adversarial images to a target; return the record and its rows.

    Args:
        spec: the question.
        saved: the source's images, verified; those of misclassified examples attacked, too.
        source_rows: the rows of the source's record.
        images: the split that the examples are of.
        bench: where the target comes from; it decides as the source did, votes and precision included.
        provenance: of this look.

    Raises ValueError for images that leave misclassified examples alone, EvaluationFailed for a target that gives NaN.
    """
    if saved.misclassified != "attacked":
        raise ValueError(f"{saved.path} leaves examples alone that the source misclassifies")
    started = time.perf_counter()
    target = bench.judge(spec.target, spec.source.precision)
    shown = bench.shown(saved, images, spec.source.precision)
    try:
        rows = sort_rows([_classified(spec.source, *some, target) for some in shown])
    except InvalidAnswer as problem:
        raise EvaluationFailed(f"{spec.target.id} on images of {spec.source.model.id}: {problem}") from None
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


def _classified(source: EvalSpec, batch: Batch, adversarial: Tensor, target: Judge) -> dict[str, NDArray[Any]]:
    """Return the rows of some examples: the target's answers to the clean and to the adversarial images."""
    ids, images, labels = batch
    random = random_of(source, batch)
    clean_prediction, clean_rank = target.of_clean(source, batch, random)
    right = torch.from_numpy(clean_rank < source.decision.top_k).to(labels.device)
    scores = target.scores(source.decision, adversarial, random.at("judge"))
    broken = Criterion(source.decision.top_k).broken(scores, labels)
    answer, attacked = Answer(adversarial, labels, broken), right.nonzero().squeeze(1)
    difference = adversarial.double() - images.double()
    size = distance(images.double(), "L2")
    found = {
        "label": labels,
        "adversarial_prediction": scores.argmax(1),
        "adversarial_rank": rank_of(scores, labels),
        "attacked": right,
        "broken": broken,
        "robust": right & ~(broken & rules_of(source).counts(difference)),
        "linf": distance(difference, "Linf"),
        "l2": distance(difference, "L2"),
        "relative_l2": distance(difference, "L2") / torch.where(size > 0, size, 1.0),
        "broken_in_8_bit": target.broken_in_8_bit(source, answer, random),
        "wrong_decisions": target.wrong_decisions(source, answer, attacked, random),
        "forward_passes": _passes(source.decision, right, broken),
        "backward_passes": torch.zeros_like(labels),
    }
    return {
        "example_id": ids,
        "clean_prediction": clean_prediction,
        "clean_rank": clean_rank,
        **{name: values.cpu().numpy() for name, values in found.items()},
        "broken_by": np.full(len(ids), ""),
    }


def _passes(decision: Decision, attacked: Tensor, broken: Tensor) -> Tensor:
    """Return the passes of each example `(N,)`: the clean image, the adversarial one, its rounding, and repeats."""
    repeats = decision.repeats if decision.repeats > 1 else 0
    return decision.votes * (2 + broken.int() + repeats * attacked.int())
