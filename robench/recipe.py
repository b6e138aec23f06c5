"""Recipes: how a model is trained, as a value. A TOML file of `robench/recipes/` maps one to one on :class:`Recipe`.

Nothing here imports torch: a recipe is read, checked against the catalog and changed by `--set` in milliseconds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationError, model_validator

from robench import catalog
from robench.catalog import NonNegativeInt, PositiveInt
from robench.errors import UserError, bad_byte, nearest, suggestion
from robench.records import Configured, Normalization, Value
from robench.threat_model import ThreatModel, exact_fraction


def _real(value: Any) -> Any:
    """Read "2/255" as a number; what is no number is left for the type to refuse."""
    if isinstance(value, str):
        return float(exact_fraction(value))
    return value


def _threat(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return ThreatModel.parse(value)
        except UserError as error:
            raise ValueError(str(error)) from None
    return value


PositiveReal = Annotated[float, BeforeValidator(_real), Field(gt=0, allow_inf_nan=False)]
NonNegativeReal = Annotated[float, BeforeValidator(_real), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_real), Field(ge=0, lt=1)]
OpenShare = Annotated[float, BeforeValidator(_real), Field(gt=0, lt=1)]
#: Written `Linf@8/255`.
Threat = Annotated[ThreatModel, BeforeValidator(_threat), PlainSerializer(str, return_type=str)]


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError("must ascend")
    return values


class NoAugmentation(Value):
    """Images as they are."""

    name: Literal["none"] = "none"


class CropFlip(Value):
    """A random crop of the image padded with zeros, and a mirror image in half of the cases."""

    name: Literal["crop-flip"]
    pad: PositiveInt = 4
    """Pixels on each side."""
    flip: bool = True


class Sgd(Value):
    """Stochastic gradient descent; the weight decay is added to the gradient."""

    name: Literal["sgd"]
    lr: PositiveReal
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeReal = 0.0


class Adam(Value):
    """Adam (Kingma and Ba, arXiv:1412.6980) with its paper's betas; the weight decay is added to the gradient."""

    name: Literal["adam"]
    lr: PositiveReal
    weight_decay: NonNegativeReal = 0.0


class EntropySgd(Value):
    """Entropy-SGD (Chaudhari et al., arXiv:1611.01838; algorithm 3 of arXiv:2008.12338): every step is one of a walk
    around the weights, and one in `inner_steps` moves them towards the walk's average.

    The defaults are those of the authors' reference implementation. As printed: `outer_scale = "gamma"`,
    `momentum = 0`, `nesterov = false`.
    """

    name: Literal["entropy-sgd"]
    lr: PositiveReal
    """Of the weights' own steps; the schedule acts on it."""
    inner_steps: NonNegativeInt = 20
    """L, each on a new batch; 0 is SGD."""
    inner_lr: PositiveReal = 0.1
    gamma: NonNegativeReal = 1e-4
    """How strongly the walk is pulled back to the weights."""
    scoping: NonNegativeReal = 0.0
    """By which share gamma grows with every step of the weights. The reference implementation states 1e-3, but never
    counts."""
    noise: NonNegativeReal = 1e-4
    """Every step of the walk adds sqrt(2 inner_lr) * noise * N(0, I)."""
    averaging: Share = 0.75
    """What the walk's average keeps of itself in a step."""
    outer_scale: Literal["one", "gamma"] = "one"
    """What multiplies weights - average: 1, or gamma as equation (7) of arXiv:1611.01838 has it, which hardly moves."""
    momentum: Share = 0.9
    """Of the walk's steps, and of the weights' own."""
    nesterov: bool = True
    weight_decay: NonNegativeReal = 0.0


class Constant(Value):
    """The same learning rate throughout, after a linear warm-up."""

    name: Literal["constant"] = "constant"
    warmup: NonNegativeReal = 0.0
    """In epochs."""


class Step(Value):
    """The learning rate times `factor` at each milestone."""

    name: Literal["step"]
    milestones: Annotated[tuple[PositiveReal, ...], Field(min_length=1), AfterValidator(_ascending)]
    """In epochs, fractions allowed."""
    factor: OpenShare = 0.1
    warmup: NonNegativeReal = 0.0
    """In epochs."""


class Cosine(Value):
    """Half a cosine from the learning rate to 0 (Loshchilov and Hutter, arXiv:1608.03983, without restarts)."""

    name: Literal["cosine"]
    warmup: NonNegativeReal = 0.0
    """In epochs."""


class OneCycle(Value):
    """Linearly from 0 to the learning rate and back to 0 (Smith, arXiv:1708.07120; Wong et al., arXiv:2001.03994)."""

    name: Literal["one-cycle"]
    peak: OpenShare = 0.3
    """Share of the training after which the learning rate is largest."""


class Selection(Value):
    """Which epoch's weights become the model: the best on the validation split."""

    metric: Literal["robust_accuracy", "clean_accuracy", "last"]
    """`last`: no choice is made; the last epoch's weights."""
    attack: str | None = None
    """A name of the attacks' catalog (`pgd-10`), run as it stands there; None measures clean accuracy only."""
    threat: Threat | None = None
    """None: the one that is trained against."""
    examples: PositiveInt | None = None
    """How many of the validation split; None: all."""
    every: PositiveInt = 1
    """In epochs; the last epoch is always measured."""


#: What of a recipe is for its readers: it decides nothing about what comes out.
DESCRIPTIVE = frozenset({"summary", "source", "scale"})


class Recipe(Value):
    """Everything that decides what comes out of a training, except the machine."""

    summary: str
    source: str
    """Paper, and what of it."""
    scale: str | None = None
    """Says so where this is smaller than the source: "8 of 100 epochs"."""
    dataset: str
    architecture: Configured | None = None
    """None: that of the model that `start` names, with its normalisation."""
    normalization: Normalization | None = None
    defense: Configured
    regularizers: tuple[Configured, ...] = ()
    """What is added to the defense's loss; those of the defenses whose role is `regularizer`."""
    start: str | None = None
    """The registered model whose weights the training begins with; None: random ones."""
    teacher: str | None = None
    """The registered model that a defense learns from; None: the one that `start` names."""
    threat: Threat | None = None
    """What is trained against."""
    augmentation: Annotated[NoAugmentation | CropFlip, Field(discriminator="name")] = NoAugmentation()
    optimizer: Annotated[Sgd | Adam | EntropySgd, Field(discriminator="name")]
    schedule: Annotated[Constant | Step | Cosine | OneCycle, Field(discriminator="name")] = Constant()
    epochs: PositiveInt
    """Of each round."""
    rounds: PositiveInt = 1
    """How often all epochs are gone through, each time to learn from the model that came out before: weights (unless
    `start` is named), optimiser, schedule, average and selection begin anew."""
    train_examples: PositiveInt | None = None
    """How many of the train split are learned from: the first of its fixed shuffle; None: all."""
    batch_size: PositiveInt
    accumulate: PositiveInt = 1
    """Parts of a batch that are evaluated one after the other, which takes so much less memory: a step goes along the
    mean of their gradients. Batch norm, and whatever else looks at a batch, sees a part."""
    averaging: OpenShare | None = None
    """Decay per step of an exponential moving average of the weights, which then is the model."""
    selection: Selection
    seed: int = 0

    @property
    def total_epochs(self) -> int:
        """Return the epochs of all rounds."""
        return self.rounds * self.epochs

    @model_validator(mode="after")
    def _network_fits(self) -> Self:
        if self.architecture is None and self.start is None:
            raise ValueError("architecture is missing; only where start names a model can it be left out")
        if self.architecture is None and self.normalization is not None:
            raise ValueError("normalization belongs to architecture; leave both out, or neither")
        if self.normalization and len(self.normalization.mean) != len(self.normalization.std):
            raise ValueError("normalization.mean and normalization.std differ in length")
        if self.normalization and (problem := self.normalization.problem(channels=len(self.normalization.mean))):
            raise ValueError(f"normalization.{problem}")
        return self

    @model_validator(mode="after")
    def _selection_can_be_made(self) -> Self:
        against = self.selection.threat or self.threat
        if self.selection.attack and against is None:
            raise ValueError("selection.attack needs selection.threat, or the recipe's threat")
        if self.selection.metric == "robust_accuracy" and self.selection.attack is None:
            raise ValueError("selection.metric robust_accuracy needs selection.attack, such as pgd-10")
        return self

    @model_validator(mode="after")
    def _steps_can_be_taken(self) -> Self:
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate = {self.accumulate} makes more parts than batch_size = {self.batch_size}")
        if isinstance(self.optimizer, Sgd | EntropySgd) and self.optimizer.nesterov and self.optimizer.momentum == 0:
            raise ValueError("optimizer.nesterov needs optimizer.momentum above 0")
        if isinstance(self.optimizer, EntropySgd) and self.optimizer.inner_steps > 0:
            if self.averaging is not None:
                raise ValueError("averaging would average entropy-sgd's walk, not its weights; leave it out")
            if self.optimizer.outer_scale == "gamma" and self.optimizer.gamma == 0:
                raise ValueError("optimizer.outer_scale gamma needs optimizer.gamma above 0; nothing would move")
        if len({r.name for r in self.regularizers}) < len(self.regularizers):
            raise ValueError("regularizers: each may stand there once")
        return self


def load_recipe(name_or_path: str) -> Recipe:
    """Return the recipe of that name, or of that `.toml` file; raise UserError that names what is wrong in it."""
    if not name_or_path.endswith(".toml"):
        return parse_recipe(catalog.find("recipes", name_or_path).facts, origin=f"recipe {name_or_path}")
    try:
        text = Path(name_or_path).read_text(encoding="utf-8-sig")  # some editors put a mark before the first line
    except OSError as error:
        raise UserError(f"recipe {name_or_path} cannot be read: {error.strerror}; {_instead(name_or_path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {name_or_path} {bad_byte(error)}") from None
    try:
        return parse_recipe(tomllib.loads(text), origin=f"recipe {name_or_path}")
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {name_or_path} is no valid TOML: {error}") from None


def _instead(path: str) -> str:
    """Return what may have been meant by a file that cannot be read: one beside it, or a recipe by name."""
    beside = [other.name for other in Path(path).parent.glob("*.toml") if other.is_file()]
    guess = nearest(Path(path).name, beside) or nearest(Path(path).stem, catalog.plugins("recipes"))
    return f"{guess or 'name another file, or a recipe'} (robench list recipes)"


def parse_recipe(values: Mapping[str, Any], *, origin: str) -> Recipe:
    """Check a recipe's values against the types and the catalog; plugins get all their parameters, defaults included.

    Raises UserError that starts with `origin` and names the key, the value and what would be accepted.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: {_problem(error, values)}") from None
    if ":" not in recipe.dataset:
        # `folder:PATH` and `npz:PATH` are data sets by themselves.
        catalog.find("datasets", recipe.dataset)
    if recipe.selection.attack:
        catalog.find("attacks", recipe.selection.attack)
    return recipe.model_copy(
        update={
            "architecture": recipe.architecture and _resolved("architectures", recipe.architecture),
            "defense": _resolved("defenses", _with_role("objective", recipe.defense, origin)),
            "regularizers": tuple(
                _resolved("defenses", _with_role("regularizer", r, origin)) for r in recipe.regularizers
            ),
        }
    )


def _resolved(kind: str, configured: Configured) -> Configured:
    plugin = catalog.find(kind, configured.name)
    return Configured(name=configured.name, parameters=plugin.settings(configured.parameters))


def _with_role(role: str, configured: Configured, origin: str) -> Configured:
    plugin = catalog.find("defenses", configured.name)
    if plugin.facts.get("role", "objective") == role:
        return configured
    if role == "objective":
        raise UserError(
            f"{origin}: defense {configured.name!r} is a regularizer: write defense.name=standard and add it as "
            f"regularizers (--set regularizers.{configured.name}.strength=...)"
        )
    raise UserError(f"{origin}: {configured.name!r} is no regularizer; {suggestion(configured.name, _regularizers())}")


def _regularizers() -> list[str]:
    return [name for name, p in catalog.plugins("defenses").items() if p.facts.get("role") == "regularizer"]


def _problem(error: ValidationError, values: Mapping[str, Any]) -> str:
    """Say in one line what is wrong, by the first of pydantic's findings."""
    first = error.errors()[0]
    # The variant of a union stands in the location too, after the key that holds it: no key of the file.
    variants = {get_args(m.model_fields["name"].annotation)[0] for m in _variants()}
    place = [str(p) for p in first["loc"] if p not in variants]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; {suggestion(place[-1], _known_keys(place[:-1], values))}"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key} = {first['input']!r}: {message}" if key else message


def _variants() -> list[type[Value]]:
    return [NoAugmentation, CropFlip, Sgd, Adam, EntropySgd, Constant, Step, Cosine, OneCycle]


_GROUPS: Mapping[str, tuple[type[Value], ...]] = {
    "architecture": (Configured,),
    "defense": (Configured,),
    "normalization": (Normalization,),
    "augmentation": (NoAugmentation, CropFlip),
    "optimizer": (Sgd, Adam, EntropySgd),
    "schedule": (Constant, Step, Cosine, OneCycle),
    "selection": (Selection,),
}


def _known_keys(place: Sequence[str], values: Mapping[str, Any]) -> Iterable[str]:
    """Return the keys that a recipe may have at `place`: of the chosen variant, where there are several."""
    if not place:
        return Recipe.model_fields
    chosen = values[place[0]].get("name")
    for model in _GROUPS[place[0]]:
        if len(_GROUPS[place[0]]) == 1 or chosen in get_args(model.model_fields["name"].annotation):
            return model.model_fields
    return ()


def apply_settings(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Return the recipe with `KEY=VALUE` settings applied, each typed by its field.

    `optimizer.lr=2/255`, `threat=none`, `schedule.milestones=[30, 40]`, `defense.steps=10` (short for
    `defense.parameters.steps=10`). Changing a `name` drops what belongs to the former choice alone. Fewer epochs
    or training images than the recipe's are said in `scale`; another network is said in `summary`, which names one.
    Raises UserError for a wrong key or value, naming the nearest key.
    """
    values = recipe.model_dump(mode="json")
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {setting}: write KEY=VALUE, such as epochs=3 or optimizer.lr=0.1")
        _assign(values, key.strip().split("."), _value(text.strip()))
    changed = parse_recipe(values, origin="--set")
    less = [
        f"{getattr(changed, unit)} of {getattr(recipe, unit)} {unit}"
        for unit in ("rounds", "epochs")
        if getattr(changed, unit) < getattr(recipe, unit)
    ]
    if changed.train_examples is not None and changed.train_examples != recipe.train_examples:
        less.append(f"{changed.train_examples:,} training images")
    told: dict[str, str] = {}
    if less and changed.scale == recipe.scale:
        told["scale"] = "; ".join([", ".join(less), *([recipe.scale] if recipe.scale else [])])
    then, now = recipe.architecture, changed.architecture
    if then and now and then.name != now.name and changed.summary == recipe.summary:
        told["summary"] = f"{recipe.summary}, with {now.name} instead of {then.name}"
    return changed.model_copy(update=told)


def _value(text: str) -> Any:
    """Turn typed text into what a TOML file would hold where text alone cannot say it; fields type the rest."""
    if text.lower() == "none":
        return None
    if text.startswith(("[", "{")):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return text
    return text


def _assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    group, *rest = path
    if group not in Recipe.model_fields:
        raise UserError(f"--set {'.'.join(path)}: unknown key {group}; {suggestion(group, Recipe.model_fields)}")
    if not rest:
        values[group] = value
        return
    if group == "regularizers":
        _assign_regularizer(values, rest, value)
        return
    if group not in _GROUPS:
        raise UserError(f"--set {'.'.join(path)}: {group} is a single value; write {group}=VALUE")
    if group in {"architecture", "defense"} and rest[0] not in Configured.model_fields:
        rest = ["parameters", *rest]
    if rest == ["name"] and value is None:
        value = "none"  # no plugin's name is absent, but one augmentation is called so
    target = dict(values[group] or {})
    if rest == ["name"] and value != target.get("name"):
        target = _kept(group, target, value)
    if len(rest) == 1:
        target[rest[0]] = value
    elif len(rest) == 2 and rest[0] == "parameters":
        target["parameters"] = {**target.get("parameters", {}), rest[1]: value}
    else:
        raise UserError(f"--set {'.'.join(path)}: there is no key below {group}.{rest[0]}")
    values[group] = target


def _assign_regularizer(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set one parameter of a regularizer, which is added if it is not there."""
    name, *rest = path
    if len(rest) != 1:
        raise UserError(f"--set regularizers.{'.'.join(path)}: write regularizers.{name}.PARAMETER=VALUE")
    known = {r["name"]: r for r in values["regularizers"]}
    former = known.get(name, {"name": name, "parameters": {}})
    known[name] = {**former, "parameters": {**former["parameters"], rest[0]: value}}
    values["regularizers"] = list(known.values())


def _kept(group: str, former: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """Return what of a group's values the variant `name` has too; another plugin shares no parameter."""
    shared = _known_keys([group], {group: {"name": name}}) if len(_GROUPS[group]) > 1 else ()
    return {key: value for key, value in former.items() if key in shared}
