"""Answer certification questions about one model: what is known is not computed again, what was begun goes on.

Examples are independent and their noise is keyed by (seed, example, purpose, chunk), so shards may be of any size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from robench import catalog
from robench.certification import NOISE_CHUNK, NoisyModel
from robench.classifier import Classifier, give_back_buffers, keep_large_buffers, search_copy, tensor_float32
from robench.compilation import compiled
from robench.datasets import ImageSet
from robench.errors import EvaluationFailed, RobenchError
from robench.evaluation.campaign import Execution
from robench.evaluation.merging import share
from robench.planning import guarantee_of, journal_key
from robench.records import (
    CERTIFICATE_COLUMNS,
    CertificateIdentity,
    CertificateRecord,
    CertificateSpec,
    Cost,
    Precision,
    Provenance,
    Radii,
)
from robench.store import Rows, Store, outcome_sha256

#: Examples between two savings of progress.
_SHARD_SIZE = {"cpu": 20, "cuda": 200}
#: Batch sizes that are tried, in chunks of noise; a larger one must be faster by this factor to be taken.
_CANDIDATES = {"cpu": (1, 2, 4), "cuda": (4, 10, 20, 40, 80)}
_WORTHWHILE = 0.97


class _Indifferent(nn.Module):
    """Some function of images, with gradients."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return `(N, K)` logits, all the same."""
        return images.flatten(1).sum(1, keepdim=True).expand(-1, self.num_classes)


def rehearse(certificate: CertificateIdentity, images: ImageSet) -> None:
    """Ask a certificate about no image of a split, which takes no time; UserError says which parameters cannot be.

    Some contradict each other, or the number of classes; what a value by itself has to be its type says.
    """
    none = np.arange(0)
    asked = NoisyModel(_Indifferent(len(images.classes)), none, 0, len(images.classes), NOISE_CHUNK)
    plugin = catalog.find("certificates", certificate.entry)
    with torch.no_grad():
        plugin.load().certify(
            asked, torch.zeros(0, *images.image_shape), torch.zeros(0, dtype=torch.int64), **certificate.parameters
        )


class Certifier:
    """One model on one device, which certifies examples of one split."""

    def __init__(self, model: Classifier, images: ImageSet, *, store: Store, execution: Execution) -> None:
        """Take a model that passed the preflight, and the whole split."""
        self.images, self.store, self.execution = images, store, execution
        self.device = execution.device
        self.plain = model
        self.batch_size = execution.batch_size
        self._evaluated: dict[tuple[Precision, bool], nn.Module] = {}

    def answer(self, specs: Sequence[CertificateSpec], ids: NDArray[np.int64]) -> list[CertificateRecord]:
        """Answer all questions on these examples, in order; raise EvaluationFailed where the model gives no answer."""
        self.store.check_writable()
        keep_large_buffers()
        return [self.store.find_certificate(spec) or self._answer(spec, ids) for spec in specs]

    def _answer(self, spec: CertificateSpec, ids: NDArray[np.int64]) -> CertificateRecord:
        key = journal_key(spec)
        done = self.store.journal_read(key, "certificates")["example_id"]
        rest = ids[~np.isin(ids, done)]
        size = self.execution.shard_size or _SHARD_SIZE[self.device.type]
        for start in range(0, len(rest), size):
            rows, cost = self._shard(spec, rest[start : start + size])
            self.store.journal_write(key, rows, cost=cost, kind="certificates")
        rows = self.store.journal_read(key, "certificates")
        record = record_of(
            spec,
            rows,
            cost=self.store.journal_cost(key, "certificates"),
            provenance=self.execution.provenance(),
        )
        self.store.write_certificate(record, rows)
        self.store.journal_clear(key)
        give_back_buffers()
        return record

    def _model(self, spec: CertificateSpec) -> nn.Module:
        """Return the function that is evaluated, and so certified: the model in the form that attacks search.

        It equals the plain model up to rounding in this precision: batch norms are folded, layers have cheaper forms,
        or are compiled. A certificate that differentiates is not compiled.
        """
        key = spec.precision, self.execution.compile_search and not _differentiates(spec)
        if key not in self._evaluated:
            precision, compile_it = key
            # The compiler knows no layers but torch's own.
            search = search_copy(self.plain, precision=precision, device=self.device, cheap_layers=not compile_it)
            shape = self.images.image_shape
            self._evaluated[key] = compiled(search, input_shape=shape, device=self.device) if compile_it else search
        return self._evaluated[key]

    def _shard(self, spec: CertificateSpec, ids: NDArray[np.int64]) -> tuple[Rows, Cost]:
        started = time.perf_counter()
        plugin = catalog.find("certificates", spec.certificate.entry)
        dtype = torch.float64 if spec.precision == "fp64" else torch.float32
        images = torch.from_numpy(self.images.read(ids)).to(self.device).to(dtype) / 255
        labels = torch.from_numpy(self.images.labels[ids]).to(self.device)
        model = self._model(spec)
        with torch.no_grad(), tensor_float32(allowed=spec.precision == "tf32"):
            if self.batch_size is None:
                self.batch_size = self._fastest_batch_size(model, images)
            asked = NoisyModel(model, ids, spec.seed, len(self.images.classes), self.batch_size)
            try:
                plain = asked.logits(images).argmax(1).cpu().numpy()
                found = plugin.load().certify(asked, images, labels, **spec.certificate.parameters)
            except RobenchError:
                raise
            except FloatingPointError as error:
                raise EvaluationFailed(
                    f"{spec.certificate.name} on {spec.model.id}: {error}, at examples {ids[0]} to {ids[-1]}; "
                    "look at the model's range of inputs"
                ) from None
        nothing = np.full(len(ids), -1)
        columns = {
            "example_id": ids,
            "label": labels.cpu().numpy(),
            "plain_prediction": plain,
            "prediction": found.prediction,
            "correct": found.correct,
            "radius": found.radius,
            "hits": nothing if found.hits is None else found.hits,
            "samples": asked.samples,
            "premise_gap": nothing.astype(np.float64) if found.premise_gap is None else found.premise_gap,
        }
        rows = {name: np.asarray(columns[name]).astype(kind) for name, kind in CERTIFICATE_COLUMNS.items()}
        backward = len(ids) * len(self.images.classes) if _differentiates(spec) else 0
        cost = Cost(
            forward_passes=asked.passes - backward, backward_passes=backward, seconds=time.perf_counter() - started
        )
        return rows, cost

    def _fastest_batch_size(self, model: nn.Module, images: torch.Tensor) -> int:
        """Return how many noisy copies one call of the model takes, by trial; memory that runs out ends the trial."""
        best, fastest = NOISE_CHUNK, float("inf")
        for chunks in _CANDIDATES[self.device.type]:
            count = chunks * NOISE_CHUNK
            try:
                batch = images[:1].expand(count, *images.shape[1:]).contiguous()
                seconds = min(self._seconds(model, batch) for _ in range(2)) / count
            except torch.OutOfMemoryError:
                break
            if seconds < _WORTHWHILE * fastest:
                best, fastest = count, seconds
        return best

    def _seconds(self, model: nn.Module, batch: torch.Tensor) -> float:
        started = time.perf_counter()
        model(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def _differentiates(spec: CertificateSpec) -> bool:
    return "sigma" not in spec.certificate.parameters


def record_of(spec: CertificateSpec, rows: Rows, *, cost: Cost, provenance: Provenance) -> CertificateRecord:
    """Return the record of `rows`, one per example asked about. Pure: the same rows give the same record."""
    correct, radius = rows["correct"], rows["radius"]
    gaps = rows["premise_gap"]
    return CertificateRecord(
        spec=spec,
        status="complete",
        guarantee=guarantee_of(spec.certificate),
        plain=share(rows["plain_prediction"] == rows["label"]),
        correct=share(correct),
        abstained=share(rows["prediction"] < 0),
        average_radius=_average(np.where(correct, radius, 0.0)),
        radii=_radii(radius[correct]),
        positive_radii=_radii(radius[radius > 0]),
        premise_gap=float(gaps.mean()) if len(gaps) and (gaps >= 0).all() else None,
        cost=Cost(
            forward_passes=cost.forward_passes, backward_passes=cost.backward_passes, seconds=round(cost.seconds, 3)
        ),
        provenance=provenance,
        outcomes_sha256=outcome_sha256(rows, "certificates"),
    )


def _average(radius: NDArray[np.float64]) -> float:
    finite = radius[np.isfinite(radius)]
    return float(finite.mean()) if len(finite) else 0.0


def _radii(radius: NDArray[np.float64]) -> Radii | None:
    finite = radius[np.isfinite(radius)]
    if not len(finite):
        return None
    return Radii(
        n=len(finite),
        mean=float(finite.mean()),
        median=float(np.median(finite)),
        std=float(finite.std()),
        maximum=float(finite.max()),
    )
