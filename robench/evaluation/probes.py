"""The probes: what is run on a small sample of a model's examples to see whether attacks on it can be believed.

A model whose gradients are masked looks robust to every attack that follows them. The signs of it are known (Athalye,
Carlini and Wagner, arXiv:1802.00420, section 3; Carlini et al., arXiv:1902.06705, section 5; Pintor et al.,
arXiv:2106.09947), and each is looked for here by an experiment of its own: gradients that are exactly zero, a loss that
does not rise, longer attacks, other losses and attacks without gradients that break more, a ball as large as the box
that does not break everything. Where a sign is seen, stronger attacks follow at once.

What was found holds for one model, threat model, precision and sample, whatever was asked about them;
:mod:`robench.evaluation.diagnostics` judges one record by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robench.classifier import logit_gap, tensor_float32
from robench.evaluation.deadline import OutOfTime
from robench.evaluation.verification import find_violation
from robench.evaluation.worker import Worker
from robench.findings import (
    ATTACKS,
    NO_RISE,
    NOISY_COPIES,
    NOT_EXAMINED,
    SAME_OUTPUTS,
    TOO_HIGH,
    UNBROKEN_IN_BOX,
    WALKS,
    ZERO_GRADIENTS,
    Findings,
    Role,
    Run,
)
from robench.losses import Criterion, cross_entropy
from robench.planning import attack_settings
from robench.random_streams import RandomStream
from robench.records import EvalSpec
from robench.statistics import exceeds
from robench.target import Ledger, Target
from robench.threat_model import ThreatModel, fraction_text

#: Forward passes per gradient of the average over a model's own randomness.
_PASSES = 8
#: On a model that answers at random no image counts as broken by luck: at least so many passes vote on it.
_VOTES = 9
#: Between an image's largest and smallest logit after rescaling: far from where float32's softmax saturates (at 100).
_SPREAD = 10.0
#: What those attacks see that do not see the model itself.
_ON: dict[Role, str] = {
    "surrogate": f" on the mean of {NOISY_COPIES} noisy copies",
    "rescaled": " on smaller logits",
    "averaged": f" on the mean of {_PASSES} passes",
}
#: Images at a time where the worker has not found its batch size yet.
_BATCH = 64


def probe(worker: Worker, spec: EvalSpec, ids: NDArray[np.int64]) -> Findings:
    """Return what the probes find on the examples `ids`, which the model classifies correctly.

    The attack that `spec` names is not looked at. A probe that crashes gives findings that say so: an evaluation that
    was paid for is not lost by it. So does one that the worker's deadline cuts off: half of the probes tell nothing.
    """
    sample = tuple(ids.tolist())
    if not sample:
        return Findings(ids=(), problem="no example is classified correctly")
    try:
        with tensor_float32(allowed=worker.allow_tf32):
            return _probe(_Bench(worker, spec, ids))
    except OutOfTime as error:
        return Findings(ids=sample, problem=f"{NOT_EXAMINED}: {error}")
    except Exception as error:  # noqa: BLE001 - whatever a user's model raises here, its answered questions stand
        first = str(error).partition("\n")[0]
        return Findings(ids=sample, problem=f"the probes failed: {type(error).__name__}: {first}")


def _probe(bench: _Bench) -> Findings:
    gap = logit_gap(bench.logits(), bench.logits())
    sigma = bench.spec.decision.sigma
    random = gap > SAME_OUTPUTS or sigma > 0
    if random:
        bench.decision = bench.decision.model_copy(update={"votes": max(bench.decision.votes, _VOTES)})
    zero = {"ce": bench.zero_gradients(cross_entropy), "margin": bench.zero_gradients(bench.criterion.margin)}
    ascent, margins = bench.trace(), bench.trace()
    bench.run("reference", trace=ascent)
    bench.run("longer")
    bench.run("margin", trace=margins)
    bench.run("black-box")
    bench.run("surrogate", model=Averaged(bench.search, bench.noise(NOISY_COPIES, bench.half_radius)))
    zero["ce"] |= ascent.zero
    zero["margin"] |= margins.zero
    no_rise = ~bench.broken["reference"] & (ascent.last <= ascent.first)
    unbroken = _unbroken_in_box(bench)
    n = len(bench.ids)
    flat = exceeds(max(int(rows.sum()) for rows in zero.values()), n, ZERO_GRADIENTS)
    if flat:
        bench.run("rescaled", model=Divided(bench.search, bench.logit_spread() / _SPREAD))
    if random:
        bench.run("averaged", model=Averaged(bench.search, bench.noise(_PASSES, sigma), within_box=False))
    further = bench.broken["black-box"] | bench.broken["surrogate"]
    if (
        flat
        or random
        or exceeds(int(no_rise.sum()), n, NO_RISE)
        or exceeds(int(unbroken["ce"].sum()), n, UNBROKEN_IN_BOX)
        or exceeds(int(further.sum()), n, TOO_HIGH)
    ):
        bench.run("long-black-box")
    return Findings(
        ids=tuple(bench.ids.tolist()),
        zero_gradients={name: bench.named(rows) for name, rows in zero.items()},
        no_rise=bench.named(no_rise),
        unbroken_in_box={name: bench.named(rows) for name, rows in unbroken.items()},
        output_gap=gap,
        runs=tuple(
            Run(role=role, attack=ATTACKS[role] + _ON.get(role, ""), broken=bench.named(rows))
            for role, rows in bench.broken.items()
        ),
    )


def _unbroken_in_box(bench: _Bench) -> dict[str, Tensor]:
    """Return by loss which examples stand where every image of the box is allowed.

    The walks start at the image: a random point of the box is noise, which fools sound and masked models alike. Half
    the box is enough for nearly all (there every image may become the same grey one); what stands goes on to all of it.
    """
    norm, pixels = bench.spec.threat.norm, bench.images[0].numel()
    diameter = 1.0 if norm == "Linf" else math.sqrt(pixels)
    standing = torch.ones(len(bench.ids), dtype=torch.bool, device=bench.images.device)
    found = {}
    for loss in ("ce", "margin"):
        for share, steps in WALKS:
            threat = ThreatModel(norm=norm, epsilon=Fraction(f"{share * diameter:.6f}"))
            text = f"pgd:steps={steps},start=image,loss={loss}"
            standing = standing & ~bench.attack(text, standing.nonzero().squeeze(1), threat=threat)
        found[loss] = standing
    return found


@dataclass
class _Trace:
    """What an attack sees of each example while it lasts."""

    labels: Tensor
    first: Tensor
    """(n,) cross-entropy at the first and the last gradient step; NaN before there is one."""
    last: Tensor
    zero: Tensor
    """(n,) bool: at some step the gradient was exactly zero or not finite."""


class _Watched(Target):
    """A target that keeps a trace; `rows` are the sample's."""

    def __init__(self, model: nn.Module, ledger: Ledger, rows: Tensor, trace: _Trace) -> None:
        super().__init__(model, ledger, rows)
        self.trace = trace

    def __getitem__(self, rows: Tensor) -> _Watched:
        return _Watched(self.model, self.ledger, self.rows[rows], self.trace)

    def forward(self, images: Tensor) -> Tensor:
        rows, trace = self.rows, self.trace
        if not images.requires_grad:
            return super().forward(images)
        seen = images.view_as(images)

        def look(gradient: Tensor) -> None:
            trace.zero[rows] |= _dead(gradient)

        seen.register_hook(look)
        logits = super().forward(seen)
        loss = cross_entropy(logits.detach(), trace.labels[rows]).to(trace.last.dtype)
        trace.last[rows] = loss
        trace.first[rows] = torch.where(trace.first[rows].isnan(), loss, trace.first[rows])
        return logits


class Averaged(nn.Module):
    """The mean logits over copies of the images, each with an offset of its own: `offsets` `(k, C, H, W)`.

    With noise for offsets a model whose steps and jags are narrower than the noise has a slope again; with zeros the
    randomness of a random model is averaged over (Athalye et al., arXiv:1802.00420, section 4.2).
    """

    def __init__(self, model: nn.Module, offsets: Tensor, *, within_box: bool = True) -> None:
        """Wrap `model`; the copies of a smoothed model's images may leave [0, 1]."""
        super().__init__()
        self.model, self.offsets, self.within_box = model, offsets, within_box

    def forward(self, images: Tensor) -> Tensor:
        """Return `(N, K)` logits."""
        copies = (images + offset for offset in self.offsets)
        return torch.stack([self.model(copy.clamp(0.0, 1.0) if self.within_box else copy) for copy in copies]).mean(0)


class Divided(nn.Module):
    """The logits over a constant: the same decisions, and a cross-entropy that is not saturated."""

    def __init__(self, model: nn.Module, divisor: float) -> None:
        """Wrap `model`."""
        super().__init__()
        self.model, self.divisor = model, divisor

    def forward(self, images: Tensor) -> Tensor:
        """Return `(N, K)` logits."""
        logits: Tensor = self.model(images) / self.divisor
        return logits


class _Bench:
    """The sample on the worker's device, and what has been broken of it."""

    def __init__(self, worker: Worker, spec: EvalSpec, ids: NDArray[np.int64]) -> None:
        self.worker, self.spec, self.ids = worker, spec, ids
        self.images, self.labels = worker.load(ids)
        self.search = worker.punctual(worker.search)
        self.criterion = Criterion(spec.decision.top_k)
        self.decision = spec.decision
        self.random = RandomStream(spec.seed, torch.from_numpy(ids).to(self.images.device)).at("probes")
        self.broken: dict[Role, Tensor] = {}
        """(n,) bool for each probe that ran."""

    def run(self, role: Role, *, model: nn.Module | None = None, trace: _Trace | None = None) -> None:
        """Run a probe on all examples (the reference), on those that it left, or (the last) on those that all left."""
        broken = torch.zeros(len(self.ids), dtype=torch.bool, device=self.images.device)
        before = list(self.broken.values()) if role == "long-black-box" else [*self.broken.values()][:1]
        for rows in before:
            broken |= rows
        rows = (~broken).nonzero().squeeze(1)
        self.broken[role] = self.attack(ATTACKS[role], rows, model=model, trace=trace)

    def attack(
        self,
        text: str,
        rows: Tensor,
        *,
        model: nn.Module | None = None,
        threat: ThreatModel | None = None,
        trace: _Trace | None = None,
    ) -> Tensor:
        """Attack some rows through `model` (None: the search copy); return which fell for the judge, (n,) bool."""
        plugin, settings = attack_settings(text)
        threat = threat or self.spec.threat
        random = self.random.at(text, f"{threat.norm}@{fraction_text(threat.epsilon)}")
        supplied = {"criterion": self.criterion} if "criterion" in plugin.supplied else {}
        ledger = Ledger.of(len(self.ids), self.images.device)
        broken = torch.zeros(len(self.ids), dtype=torch.bool, device=self.images.device)
        for part in rows.split(self.worker.batch_size or _BATCH):
            searched = model or self.search
            target = Target(searched, ledger, part) if trace is None else _Watched(searched, ledger, part, trace)
            found = plugin.load().attack(
                target,
                self.images[part],
                self.labels[part],
                threat=threat,
                random=random[part],
                **supplied,
                **settings,
            )
            if violation := find_violation(found, self.images[part], threat):
                raise ValueError(f"{text} {violation.message}")
            scores = self.worker.judge.scores(self.decision, found.detach(), random[part].at("judge"))
            broken[part] = self.criterion.broken(scores, self.labels[part])
        return broken

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Return the plain model's logits of the images, without TF32."""
        with tensor_float32(allowed=False):
            parts = self.images.split(self.worker.batch_size or _BATCH)
            return torch.cat([self.worker.judge.model(part) for part in parts])

    def zero_gradients(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return at which images the gradient of `loss` is exactly zero or not finite, (n,) bool."""
        dead = []
        for rows in torch.arange(len(self.ids), device=self.images.device).split(self.worker.batch_size or _BATCH):
            leaf = self.images[rows].requires_grad_()
            (gradient,) = torch.autograd.grad(loss(self.search(leaf), self.labels[rows]).sum(), leaf)
            dead.append(_dead(gradient))
        return torch.cat(dead)

    def logit_spread(self) -> float:
        """Return the median distance between an image's largest and smallest logit."""
        logits = self.logits()
        return float((logits.amax(1) - logits.amin(1)).median())

    @property
    def half_radius(self) -> float:
        """Return the deviation of Gaussian noise that is about half as long as the threat's radius."""
        threat = self.spec.threat
        return threat.radius / 2 / (1.0 if threat.norm == "Linf" else math.sqrt(self.images[0].numel()))

    def noise(self, copies: int, deviation: float) -> Tensor:
        """Return `(copies, C, H, W)` Gaussian noise, the same for all examples."""
        stream = RandomStream(self.spec.seed, torch.arange(copies, device=self.images.device), ("probes", "noise"))
        return deviation * stream.normal(self.images.new_empty(copies, *self.images.shape[1:]))

    def trace(self) -> _Trace:
        """Return an empty trace of the sample."""
        unknown = torch.full(self.labels.shape, torch.nan, dtype=torch.float64, device=self.labels.device)
        return _Trace(self.labels, unknown, unknown.clone(), torch.zeros_like(self.labels, dtype=torch.bool))

    def named(self, rows: Tensor) -> tuple[int, ...]:
        """Return the ids of the rows of a mask (n,)."""
        return tuple(self.ids[rows.cpu().numpy()].tolist())


def _dead(gradient: Tensor) -> Tensor:
    """Return which rows of a gradient `(N, ...)` are exactly zero or have a value that is not finite."""
    flat = gradient.flatten(1)
    return (flat == 0).all(1) | ~torch.isfinite(flat).all(1)
