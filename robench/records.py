"""The values where both halves of robench meet: what was asked (EvalSpec), what was found (EvalRecord), what a model is
(ModelCard).

All are frozen, refuse unknown fields and carry a schema version. A change of meaning raises the version; readers refuse
other versions with the remedy instead of guessing.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from robench.errors import UserError
from robench.threat_model import ThreatModel

Precision = Literal["fp32", "tf32", "bf16", "fp64"]

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Value(BaseModel):
    """Base of everything that is persisted."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def to_json(self) -> str:
        """Return the value as indented JSON with a stable order of keys."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, origin: str, remedy: str = "restore it, or delete it and measure again") -> Self:
        """Read what :meth:`to_json` wrote; for anything else UserError names `origin` (a file's path) and `remedy`."""
        current = cls.model_fields["schema_version"].default if "schema_version" in cls.model_fields else 1
        try:
            version = json.loads(text).get("schema_version", current)
        except (json.JSONDecodeError, AttributeError):
            raise UserError(f"{origin} is no {cls.__name__}: it is not a JSON object; {remedy}") from None
        if version != current:
            raise UserError(
                f"{origin} has schema version {version}, this robench reads {current}; "
                f"{'upgrade robench' if isinstance(version, int) and version > current else remedy}"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in first["loc"])
            problem = first["msg"].removeprefix("Value error, ")
            raise UserError(
                f"{origin} is no valid {cls.__name__}: {f'{place}: ' if place else ''}{problem}; {remedy}"
            ) from None


def canonical_hash(value: Any) -> str:
    """Return the SHA-256 of a JSON value written canonically (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Configured(Value):
    """A plugin by name, with all its parameters (defaults included), so that it can be built again."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class Normalization(Value):
    """The layer in front of the network: `(image - mean) / std` per channel, on the [0, 1] scale."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def problem(self, *, channels: int, remedy: str = "divide it by 255") -> str | None:
        """Return in a line why this is not of images in [0, 1] with so many channels; `remedy` if 0..255 is meant."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            shown = ",".join(f"{value:g}" for value in values)
            if len(values) != channels:
                return f"{name} {shown} has {len(values)} values, the images have {channels} channels"
            if not all(math.isfinite(value) for value in values):
                return f"{name} {shown} is not finite; write numbers, or leave mean and std out for none"
            if max(values, default=0) > 1:
                return f"{name} {shown} is of pixels from 0 to 255, images are in [0, 1] here; {remedy}"
        if not all(value > 0 for value in self.std):
            return (
                f"std {','.join(f'{value:g}' for value in self.std)} must be positive; leave mean and std out for none"
            )
        return None


class ModelIdentity(Value):
    """The model that was asked about."""

    id: str
    """Its name in the registry, or the reference that was typed (`torchvision:resnet50`, `file.py:factory`)."""
    weights_sha256: str
    """Of the weights file for registered models, of the names and values of all tensors for others."""
    architecture: Configured
    """For models that do not come from the registry the reference itself, without parameters."""
    normalization: Normalization | None = None


class Examples(Value):
    """Which examples of a split, by their positions in its stated order."""

    dataset: str
    """`mnist`, ..., `folder:NAME`, `npz:NAME`."""
    split: Literal["train", "validation", "test"]
    split_sha256: str
    """Of the split's images and labels; for image folders of every file's name and size."""
    split_size: int
    count: int
    """How many are evaluated. Fewer than the split's: the first `count` of the split's fixed shuffle."""
    ids_sha256: str
    """Of the sorted positions, as little-endian 64-bit integers."""


class AttackIdentity(Value):
    """An attack with everything that can change its answer."""

    name: str
    """As users know it (`pgd-20`)."""
    entry: str
    """The plugin's name (`pgd`)."""
    version: int
    parameters: dict[str, Any]
    """Every parameter, defaults included."""
    backend: Annotated[str, Field(pattern=r"^(native|[a-z]\w* \S+)$")] = "native"
    """Whose implementation: robench's own, or another library's with the same parameters. A library stands with its
    version, which changes numbers (`foolbox 3.3.4`); `version` is then its adapter's."""

    @property
    def library(self) -> str:
        """Return the backend without its version: a name of :mod:`robench.backends`."""
        return self.backend.partition(" ")[0]

    @property
    def title(self) -> str:
        """Return the name to print: `pgd-20`, or `pgd-20 (foolbox)` where another library ran it."""
        return self.name if self.backend == "native" else f"{self.name} ({self.library})"


class Decision(Value):
    """How a prediction is made and when it counts as right."""

    top_k: PositiveInt = 1
    """Right where the label is among so many largest logits."""
    votes: PositiveInt = 1
    """Forward passes that vote for one prediction: for models that are random themselves, or made so by `sigma`."""
    sigma: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise that is added to the image before each vote ([0, 1] scale)."""
    repeats: Annotated[int, Field(ge=1, le=62)] = 1
    """Independent decisions on every adversarial image: their spread is the model's own randomness."""

    @property
    def plain(self) -> bool:
        """Tell whether one forward pass decides, for ever."""
        return self.votes == 1 and self.sigma == 0 and self.repeats == 1


#: One pass, the largest logit.
PLAIN = Decision()


class EvalSpec(Value):
    """One question. Everything that can change the number is in here, and nothing else."""

    schema_version: Literal[2] = 2
    """Raise it when a field changes its meaning; old records then stay readable by old releases only."""
    model: ModelIdentity
    examples: Examples
    threat: ThreatModel
    attack: AttackIdentity
    seed: int
    precision: Precision
    """Of the search; success is always judged by the plain model in fp32 (in fp64 where the search is fp64)."""
    decision: Decision = PLAIN
    until: PositiveFloat | None = None
    """Examples are drawn in random order until the confidence sequence of the robust accuracy is no wider than this;
    None: all examples."""

    @property
    def identity(self) -> str:
        """Return the question's name: 16 hexadecimal digits of its hash."""
        return canonical_hash(self.model_dump(mode="json"))[:16]


class Proportion(Value):
    """A share of examples with its 95 % intervals."""

    successes: int
    n: int
    value: float
    clopper_pearson: tuple[float, float]
    """Exact: covers the true share with at least 95 % probability."""
    wilson: tuple[float, float]
    """Score interval: shorter, 95 % on average."""


class ShardError(Value):
    """A shard without an answer: its examples count as neither robust nor broken."""

    first_id: int
    count: int
    kind: Literal["crash", "not-a-number", "outside-box", "outside-ball", "wrong-shape"]
    message: str


class Distances(Value):
    """How far the nearest adversarial examples are that an attack found, in the threat model's norm."""

    found: int
    """Attacked examples that were really broken, at whatever distance."""
    attacked: int
    median: float | None
    """Of all attacked examples, where those that were not broken lie infinitely far; None: at least half do."""
    mean_found: float | None
    """Of those that were broken."""
    mean_all: float
    """Of all examples as the papers print it: wrong clean images and failures count 0."""
    relative: float | None
    """Mean of L2 distance over the image's L2 norm, of those that were broken (DeepFool, arXiv:1511.04599, eq. 2)."""


class Randomness(Value):
    """What a random model's repeated decisions say of one number."""

    repeats: int
    mean: float
    """Robust accuracy, averaged over the repeats."""
    interval: tuple[float, float]
    """95 % interval of that mean over the model's randomness (Student's t over the repeats)."""
    undecided: int
    """Examples that some decisions get right and others wrong."""


class ConfidenceSequence(Value):
    """The guarantee of an evaluation that stopped when it knew enough."""

    level: float
    """The interval covers at every moment of the evaluation together with at least this probability."""
    width: float
    """It stopped at the first interval no wider than this, or after the last example."""
    low: float
    high: float
    """Bounds on the robust accuracy on the *whole* list of examples."""
    of: int
    """How many examples the whole list has."""


class Diagnostic(Value):
    """One sign by which an evaluation gives itself away as too weak."""

    name: str
    """`zero-gradients`, `loss-does-not-rise`, `not-converged`, `black-box-stronger`, ..."""
    verdict: Literal["ok", "flag", "not applicable"]
    evidence: str
    """One sentence with the numbers."""
    examples: int
    """How many were looked at."""
    stronger: str | None = None
    """The attack that was run because of the flag."""
    robust_then: Proportion | None = None
    """What stood after it, of the same examples."""


class Cost(Value):
    """What the search took, its second looks included; the judge's passes are not in it."""

    forward_passes: int
    """Summed over examples: one image through the network once is one."""
    backward_passes: int
    seconds: float
    """Wall time of attack and verification, summed over the runs that an interrupted evaluation took."""


class Provenance(Value):
    """How to make the same thing again."""

    robench: str
    code: str
    """Git commit of the working tree, with `+changes` where it was not clean; the package version elsewhere."""
    torch: str
    python: str
    device: str
    threads: int
    command: str
    finished: str
    """UTC, ISO 8601."""
    compiled: bool = False
    """The search ran through torch.compile, which rounds differently, as another device does."""


class EvalRecord(Value):
    """One answer. Complete ones are written once; others never rank and may be replaced."""

    schema_version: Literal[2] = 2
    spec: EvalSpec
    status: Literal["complete", "partial", "failed"]
    """Partial: it was stopped on purpose, and answers for the examples that it has."""
    clean: Proportion
    """Correct on the unchanged image, of all examples evaluated."""
    robust: Proportion
    """Still correct after the attack, of all examples; wrong clean images count as wrong."""
    clean_top5: Proportion | None = None
    """Where there are more than ten classes."""
    median_distance: float | None
    """Of the adversarial examples found in the ball, in the threat model's norm."""
    distances: Distances | None = None
    """Of attacks that look for the minimum norm."""
    survives_8_bit: Proportion | None = None
    """Of the examples that fell: those whose adversarial image still is one after rounding to 256 levels."""
    members: dict[str, int] = Field(default_factory=dict)
    """Of a combined attack: how many examples fell to each member first."""
    randomness: Randomness | None = None
    """Of repeated decisions."""
    sequence: ConfidenceSequence | None = None
    """Of an evaluation that was asked to stop when it knew enough."""
    diagnostics: tuple[Diagnostic, ...] = ()
    notes: tuple[str, ...] = ()
    """What the attack did other than its parameters say, and why."""
    errors: tuple[ShardError, ...] = ()
    cost: Cost
    provenance: Provenance
    outcomes_sha256: str
    """Of the Parquet file with one row per example."""


class TransferSpec(Value):
    """One entry of a transfer matrix: what is left of a model's accuracy on images that fool another."""

    schema_version: Literal[1] = 1
    source: EvalSpec
    """The evaluation whose adversarial images are shown. Those of examples that its model gets wrong without an attack
    were attacked, too: else a weak source would make an easy test."""
    target: ModelIdentity
    """The model that classifies them."""

    @property
    def identity(self) -> str:
        """Return the question's name: 16 hexadecimal digits of its hash."""
        return canonical_hash(self.model_dump(mode="json"))[:16]

    @property
    def white_box(self) -> bool:
        """Tell whether the images were made on the model that classifies them."""
        return self.target == self.source.model


class TransferRecord(Value):
    """One answer, written once. Its rows have the columns of any outcomes; their predictions are the target's."""

    schema_version: Literal[1] = 1
    spec: TransferSpec
    clean: Proportion
    """Correct on the unchanged image, of all examples."""
    robust: Proportion
    """Still correct on the source's adversarial image, of all examples; wrong clean images count as wrong."""
    fooled: Proportion | None
    """Of the examples that the source's attack broke inside the ball and the target gets right unchanged: those that
    fool the target, too. None where there is no such example."""
    cost: Cost
    """Of the look at the images; what making them took is in the source's record."""
    provenance: Provenance
    outcomes_sha256: str
    """Of the Parquet file with one row per example."""


class CertificateIdentity(Value):
    """A way to certify with everything that can change its answer."""

    name: str
    """As users know it (`cohen`)."""
    entry: str
    """The plugin's name."""
    version: int
    parameters: dict[str, Any]
    """Every parameter, defaults included."""


class CertificateSpec(Value):
    """One question of certification: how far is each example's prediction guaranteed?"""

    schema_version: Literal[1] = 1
    model: ModelIdentity
    examples: Examples
    certificate: CertificateIdentity
    seed: int
    precision: Precision
    """Of the forward passes: what is certified is the function that was evaluated."""

    @property
    def identity(self) -> str:
        """Return the question's name: 16 hexadecimal digits of its hash."""
        return canonical_hash(self.model_dump(mode="json"))[:16]


class Radii(Value):
    """What there is to say of the radii of some examples."""

    n: int
    mean: float
    median: float
    std: float
    maximum: float


class CertificateRecord(Value):
    """One answer, written once."""

    schema_version: Literal[1] = 1
    spec: CertificateSpec
    status: Literal["complete", "failed"]
    guarantee: str
    """What the radii are, for which function, at which confidence."""
    plain: Proportion
    """Correct by one forward pass, of all examples."""
    correct: Proportion
    """Correct by the certified prediction, abstentions counted as wrong."""
    abstained: Proportion
    average_radius: float
    """Mean over all examples, where wrong ones and abstentions count 0: the average certified radius (ACR) of Zhai et
    al., arXiv:2001.02378."""
    radii: Radii | None
    """Of the correct examples; None where there is none."""
    positive_radii: Radii | None
    """Of the examples with a radius above 0, right or wrong, which the tables of L-bounds are over."""
    premise_gap: float | None = None
    """Where the certificate supposes that the model is a Gaussian average: the mean over the examples of the L2
    distance of its probabilities from that average."""
    errors: tuple[ShardError, ...] = ()
    cost: Cost
    provenance: Provenance
    outcomes_sha256: str
    """Of the Parquet file with one row per example."""


#: One row per example of a certificate.
CERTIFICATE_COLUMNS: dict[str, str] = {
    "example_id": "int64",
    "label": "int32",
    "plain_prediction": "int32",  # of one forward pass
    "prediction": "int32",  # the certified one; -1 where it abstains. Of top-k rules the first of the set
    "correct": "bool",
    "radius": "float64",  # L2; 0 where it abstains
    "hits": "int64",  # of the samples that the bound is of; -1 where there are none
    "samples": "int64",  # all that were drawn, selection included
    "premise_gap": "float64",  # -1 where nothing is supposed
}

#: One row per example: name and Parquet type. Distances are of the returned image from the clean one.
OUTCOME_COLUMNS: dict[str, str] = {
    "example_id": "int64",
    "label": "int32",
    "clean_prediction": "int32",
    "clean_rank": "int32",  # 0: the label has the largest logit
    "adversarial_prediction": "int32",  # equals clean_prediction where no attack ran
    "adversarial_rank": "int32",
    "attacked": "bool",  # false: wrong without an attack
    "broken": "bool",  # the returned image is misclassified, at whatever distance
    "robust": "bool",  # right without an attack, and not broken inside the ball (by noise without a bound: anywhere)
    "linf": "float64",
    "l2": "float64",
    "relative_l2": "float64",  # over the clean image's L2 norm; 0 for an image of zeros
    "broken_in_8_bit": "bool",  # still misclassified after rounding to 256 levels
    "wrong_decisions": "int64",  # bit i: the i-th repeated decision on the returned image is wrong
    "broken_by": "string",  # member of a combined attack that broke it, at whatever distance; empty where none did
    "forward_passes": "int32",  # -1: the attack does not say for which examples it made its passes
    "backward_passes": "int32",
}

#: The same for numpy.
OUTCOME_TYPES: dict[str, Any] = {name: "U" if kind == "string" else kind for name, kind in OUTCOME_COLUMNS.items()}


class TimingSpec(Value):
    """One question of time: how long one image takes, through which network, decided how, on which machine."""

    subject: str
    """The registered model, or the architecture, that was asked for; a time does not depend on weights."""
    architecture: Configured
    input_shape: tuple[int, int, int]
    num_classes: int
    copies: PositiveInt
    """Noisy copies that vote, in one batch; 1: one forward pass without noise."""
    sigma: NonNegativeFloat
    """Of the noise; 0 where there is none."""
    device: str
    threads: PositiveInt

    @property
    def identity(self) -> str:
        """Return the first 16 digits of the hash of the question."""
        return canonical_hash(self.model_dump(mode="json"))[:16]


class TimingRecord(Value):
    """How long single images took, one after the other. A later measurement on the same machine replaces it."""

    schema_version: Literal[1] = 1
    spec: TimingSpec
    queries: PositiveInt
    median: PositiveFloat
    """Seconds from the image to its class; so are all that follow."""
    low: PositiveFloat
    high: PositiveFloat
    """Its 95 % interval, exact for any distribution."""
    quartiles: tuple[float, float]
    """The first and the third."""
    provenance: Provenance


class WeightsFile(Value):
    """One file of weights beside a card."""

    file: str
    sha256: str
    bytes: int
    epoch: int | None = None
    """After which epoch of training it was taken (from 1)."""
    validation: dict[str, float] = Field(default_factory=dict)
    """What was measured on the validation split at that epoch, e.g. `clean_accuracy`, `robust_accuracy`."""


class ModelCard(Value):
    """What the registry knows of a model: how to build it, where it is from, what was measured while making it."""

    schema_version: Literal[1] = 1
    id: str
    summary: str
    architecture: Configured
    input_shape: tuple[int, int, int]
    num_classes: int
    parameter_count: int
    normalization: Normalization | None
    dataset: str
    data_licence: str
    threat: ThreatModel | None
    """What it was trained against; None for standard training and for imported weights of unknown training."""
    weights: WeightsFile
    """The selected ones: best on the validation split."""
    last: WeightsFile | None = None
    """Those of the last epoch, where they are not the selected ones."""
    defense_state: WeightsFile | None = None
    """What the defense had learned by itself at the end of the training (SGR's covariance); None where it keeps none.
    """
    recipe: dict[str, Any] | None = None
    """The resolved recipe; None for imported weights."""
    learned_from: dict[str, str] = Field(default_factory=dict)
    """Hashes of the weights that the recipe's `start` and `teacher` named."""
    scale: str | None = None
    """Says so where the run was smaller than the recipe's source: "8 of 100 epochs"."""
    clean_accuracy: Proportion | None = None
    """On the validation split (trained) or the test split (imported), as `clean_accuracy_split` says."""
    clean_accuracy_split: Literal["validation", "test"] | None = None
    clean_accuracy_data: str | None = None
    """Hash of that split."""
    training_seconds: float | None = None
    provenance: Provenance
