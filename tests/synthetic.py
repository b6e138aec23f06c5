"""Records, cards and outcomes with made-up fixed values, for tests of what reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from robench.planning import identify_certificate
from robench.records import (
    CERTIFICATE_COLUMNS,
    AttackIdentity,
    CertificateRecord,
    CertificateSpec,
    Configured,
    Cost,
    Diagnostic,
    Distances,
    EvalRecord,
    EvalSpec,
    Examples,
    ModelCard,
    ModelIdentity,
    Provenance,
    ShardError,
    TimingRecord,
    TimingSpec,
    TransferRecord,
    TransferSpec,
    WeightsFile,
)
from robench.statistics import proportion
from robench.store import Store, StoredCard, outcome_sha256
from robench.threat_model import ThreatModel

PROVENANCE = Provenance(
    robench="0.1.0",
    code="0123456789abcdef",
    torch="2.11.0",
    python="3.11.9",
    device="cpu",
    threads=2,
    command="robench eval --model small_cnn",
    finished="2026-01-02T03:04:05Z",
)
PGD = {"steps": 20, "step_size": 0.01, "restarts": 1, "random_start": True, "loss": "ce"}


def diagnostic(name: str, verdict: str = "ok") -> Diagnostic:
    flag = verdict == "flag"
    return Diagnostic(
        name=name,
        verdict=verdict,
        evidence=f"what was seen of {name}",
        examples=40,
        stronger="square" if flag else None,
        robust_then=proportion(10, 40) if flag else None,
    )


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def spec(model: str = "small_cnn", attack: str = "pgd-20", **changes: Any) -> EvalSpec:
    """A question; count, threat, parameters, weights, seed, dataset and split_size may be given."""
    count = changes.get("count", 50)
    return EvalSpec(
        model=ModelIdentity(
            id=model,
            weights_sha256=sha(changes.get("weights", f"weights of {model}")),
            architecture=Configured(name="small_cnn", parameters={"width": 1}),
        ),
        examples=Examples(
            dataset=changes.get("dataset", "mnist"),
            split="test",
            split_sha256=sha("split"),
            split_size=changes.get("split_size", count),
            count=count,
            ids_sha256=sha(f"ids {count}"),
        ),
        threat=ThreatModel.parse(changes.get("threat", "Linf@0.3")),
        attack=AttackIdentity(
            name=attack, entry=attack.partition("-")[0], version=1, parameters=changes.get("parameters", PGD)
        ),
        seed=changes.get("seed", 0),
        precision="fp32",
    )


def rows(robust: Iterable[bool], *, clean: Iterable[bool] | None = None) -> dict[str, np.ndarray]:
    """One row per example: `robust` as given, `clean` (correct without an attack) true unless given."""
    stands = np.array(list(robust), dtype=bool)
    correct = np.ones_like(stands) if clean is None else np.array(list(clean), dtype=bool)
    n = len(stands)
    label = np.arange(n, dtype=np.int32) % 10
    first = np.where(correct, label, (label + 1) % 10).astype(np.int32)
    return {
        "example_id": np.arange(n, dtype=np.int64),
        "label": label,
        "clean_prediction": first,
        "clean_rank": np.where(correct, 0, 1).astype(np.int32),
        "adversarial_prediction": np.where(stands, label, (label + 1) % 10).astype(np.int32),
        "adversarial_rank": np.where(stands, 0, 1).astype(np.int32),
        "attacked": correct,
        "broken": ~stands,
        "robust": stands,
        "linf": np.where(stands, 0.0, 0.3),
        "l2": np.where(stands, 0.0, 3.0),
        "relative_l2": np.where(stands, 0.0, 0.4),
        "broken_in_8_bit": ~stands,
        "wrong_decisions": np.zeros(n, np.int64),
        "broken_by": np.full(n, ""),
        "forward_passes": np.where(correct, 21, 0).astype(np.int32),
        "backward_passes": np.where(correct, 20, 0).astype(np.int32),
    }


def record(
    question: EvalSpec,
    outcomes: dict[str, np.ndarray],
    *,
    failed: bool = False,
    seconds: float = 12.5,
    diagnostics: tuple[Diagnostic, ...] = (),
) -> EvalRecord:
    """The answer that these rows make."""
    n = len(outcomes["robust"])
    fallen = outcomes["attacked"] & ~outcomes["robust"]
    length = outcomes[question.threat.norm.lower()][fallen]
    error = ShardError(first_id=0, count=10, kind="crash", message="RuntimeError: no gradient")
    return EvalRecord(
        spec=question,
        status="failed" if failed else "complete",
        clean=proportion(int((outcomes["clean_prediction"] == outcomes["label"]).sum()), n),
        robust=proportion(int(outcomes["robust"].sum()), n),
        median_distance=float(np.median(length)) if len(length) else None,
        diagnostics=diagnostics,
        errors=(error,) if failed else (),
        cost=Cost(forward_passes=21 * n, backward_passes=20 * n, seconds=seconds),
        provenance=PROVENANCE,
        outcomes_sha256=outcome_sha256(outcomes),
    )


def put(store: Store, question: EvalSpec, robust: Iterable[bool], **options: Any) -> EvalRecord:
    """Write the answer to a question, and return it."""
    outcomes, norm = rows(robust, clean=options.pop("clean", None)), question.threat.norm.lower()
    outcomes[norm] = np.minimum(outcomes[norm], question.threat.radius)
    answer = record(question, outcomes, **options)
    store.write(answer, outcomes)
    return answer


def put_minimum_norm(store: Store, question: EvalSpec, distances: Iterable[float], **options: Any) -> EvalRecord:
    """Write what an attack found that looks for the minimum norm: a distance per example, infinite where it failed."""
    reach = np.array(list(distances))
    found = np.isfinite(reach)
    length = np.where(found, reach, 0.0)
    outcomes = rows(~(found & (length <= question.threat.radius)), clean=options.pop("clean", None))
    outcomes |= {"broken": found | ~outcomes["attacked"], "robust": outcomes["robust"] & outcomes["attacked"]}
    outcomes |= {"linf": length, "l2": 10 * length, "relative_l2": length}
    norm, hit = question.threat.norm.lower(), outcomes["attacked"] & found
    outcomes[norm] = length
    reached = np.where(hit, length, np.inf)[outcomes["attacked"]]
    median = float(np.median(reached)) if len(reached) else np.inf
    distance = Distances(
        found=int(hit.sum()),
        attacked=int(outcomes["attacked"].sum()),
        median=median if np.isfinite(median) else None,
        mean_found=float(outcomes[norm][hit].mean()) if hit.any() else None,
        mean_all=float(np.where(hit, outcomes[norm], 0.0).mean()),
        relative=None,
    )
    answer = record(question, outcomes, **options).model_copy(update={"distances": distance})
    store.write(answer, outcomes)
    return answer


def put_transfer(
    store: Store, source: EvalSpec, target: ModelIdentity, robust: Iterable[bool], **options: Any
) -> TransferRecord:
    """Write what a model does on the images of a source."""
    outcomes = rows(robust, clean=options.pop("clean", None))
    n = len(outcomes["robust"])
    answer = TransferRecord(
        spec=TransferSpec(source=source, target=target),
        clean=proportion(int(outcomes["attacked"].sum()), n),
        robust=proportion(int(outcomes["robust"].sum()), n),
        fooled=None,
        cost=Cost(forward_passes=2 * n, backward_passes=0, seconds=1.0),
        provenance=PROVENANCE,
        outcomes_sha256=outcome_sha256(outcomes),
    )
    store.write_transfer(answer, outcomes)
    return answer


def first_of(n: int, count: int) -> np.ndarray:
    """A mask of `n` examples of which the first `count` are true."""
    return np.arange(n) < count


def card(folder: Path, model: str = "small_cnn", **changes: Any) -> StoredCard:
    """A model's card, written into `folder`, with a training log beside it."""
    value = ModelCard(
        id=model,
        summary=changes.get("summary", "The small network, trained against an adversary."),
        architecture=Configured(name="small_cnn", parameters={"width": 1}),
        input_shape=(1, 28, 28),
        num_classes=10,
        parameter_count=312_202,
        normalization=None,
        dataset="mnist",
        data_licence="CC BY-SA 3.0",
        threat=ThreatModel.parse("Linf@0.3") if changes.get("threat", True) else None,
        weights=WeightsFile(
            file="model.safetensors",
            sha256=sha(f"weights of {model}"),
            bytes=1_250_000,
            epoch=8,
            validation={"clean_accuracy": 0.98, "robust_accuracy": 0.91},
        ),
        recipe={"defense": {"name": "pgd_training", "steps": 40}, "epochs": 8},
        scale=changes.get("scale"),
        clean_accuracy=proportion(1960, 2000),
        clean_accuracy_split="validation",
        training_seconds=321.0,
        provenance=PROVENANCE,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.json").write_text(value.to_json(), encoding="utf-8")
    return StoredCard(folder, value)


#: Ten images: two abstentions, one wrong answer with a radius, seven right ones.
CERTIFIED_RADIUS = (0.0, 0.0, 0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
CERTIFIED_PREDICTION = (-1, -1, 2, 1, 1, 1, 1, 1, 1, 1)


def certificate_spec(model: str = "a", certificate: str = "cohen", *, sigma: float = 0.25) -> CertificateSpec:
    """A question about ten images."""
    like = spec(model, count=10)
    return CertificateSpec(
        model=like.model,
        examples=like.examples,
        certificate=identify_certificate(certificate, sigma=sigma),
        seed=0,
        precision="fp32",
    )


def put_certificate(
    store: Store,
    question: CertificateSpec,
    radius: Iterable[float] = CERTIFIED_RADIUS,
    prediction: Iterable[int] = CERTIFIED_PREDICTION,
) -> CertificateRecord:
    """Store an answer in which the label of every image is 1."""
    from robench.evaluation.certifying import record_of

    classes = np.array(list(prediction))
    made = {
        "example_id": np.arange(10),
        "label": np.ones(10),
        "plain_prediction": np.ones(10),
        "prediction": classes,
        "correct": classes == 1,
        "radius": np.array(list(radius)),
        "hits": np.full(10, 99_990),
        "samples": np.full(10, 100_100),
        "premise_gap": np.full(10, -1.0),
    }
    typed = {name: np.asarray(made[name]).astype(kind) for name, kind in CERTIFICATE_COLUMNS.items()}
    cost = Cost(forward_passes=1100, backward_passes=0, seconds=1.0)
    record = record_of(question, typed, cost=cost, provenance=PROVENANCE)
    store.write_certificate(record, typed)
    return record


def timing_record(model: str = "a", *, copies: int = 1, median: float = 0.01, **changes: Any) -> TimingRecord:
    """How long an image takes through a network."""
    asked: dict[str, Any] = {
        "subject": model,
        "architecture": Configured(name="resnet34_555", parameters={}),
        "input_shape": (3, 32, 32),
        "num_classes": 10,
        "copies": copies,
        "sigma": 0.25 if copies > 1 else 0.0,
        "device": "cpu (x86_64)",
        "threads": 2,
        **changes,
    }
    return TimingRecord(
        spec=TimingSpec(**asked),
        queries=100,
        median=median,
        low=0.9 * median,
        high=1.1 * median,
        quartiles=(0.8 * median, 1.2 * median),
        provenance=PROVENANCE,
    )


def put_timing(store: Store, model: str, **options: Any) -> TimingRecord:
    """Store how long an image takes."""
    record = timing_record(model, **options)
    store.write_timing(record)
    return record
