"""The catalog: every plugin of every kind, found by scanning its folder.

A plugin is one file with one constant, ``ENTRY = AttackEntry(name=..., ...)``, or one TOML file. Python plugins are
read *as data* (their syntax tree), so that listing them, planning with their parameters and checking what a user
typed costs milliseconds and never imports torch; a module is imported only when its plugin runs. What stands in
``ENTRY`` must therefore be literal, except the one reference to the plugin's own function or class. Its keyword-only
arguments, with their annotations and defaults, are the plugin's parameters: there is no second list to keep in step.

Scanning is loud: a missing constant, a name that is taken, an annotation that cannot be checked fail with
the file's name.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from robench.amounts import Amount
from robench.errors import UnknownName, UserError, bad_byte, suggestion
from robench.threat_model import ThreatModel, exact_fraction

PACKAGE = Path(__file__).parent

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]

#: The names that a plugin's parameter may be annotated with, and the type that checks a value.
PARAMETER_TYPES: dict[str, Any] = {
    "int": int,
    "float": Annotated[float, Field(allow_inf_nan=False)],
    "bool": bool,
    "str": str,
    "None": None,
    "PositiveInt": PositiveInt,
    "NonNegativeInt": NonNegativeInt,
    "PositiveFloat": PositiveFloat,
    "NonNegativeFloat": NonNegativeFloat,
    "Probability": Probability,
    "ThreatModel": ThreatModel,
}

#: Of the arguments in a docstring's `Args:` section; what goes on below one stands deeper.
_INDENT = 4

#: The annotations of parameters that an attack's `passes` and `queries` may multiply.
_WHOLE_NUMBERS = frozenset({"int", "PositiveInt", "NonNegativeInt"})

#: Arguments that the engine or the training loop supplies; they are no parameters.
SUPPLIED = frozenset(
    {
        "threat",
        "random",
        "criterion",
        "training_moments",
        "progress",
        "learning_rate",
        "teacher",
        "new_network",
        "num_rounds",
        "base",
        "num_classes",
        "input_shape",
    }
)


@dataclass(frozen=True, kw_only=True)
class AttackEntry:
    """An attack: ``attack(model, images, labels, *, threat, random, **parameters) -> adversarial images``."""

    name: str
    attack: Callable[..., Any]
    summary: str
    source: str
    """Paper, and equation or algorithm."""
    version: int
    """Raise it when the same parameters would give other numbers; it is part of every result's identity."""
    norms: tuple[str, ...]
    passes: str = "steps * restarts"
    """How many forward and backward passes it takes for an example that it does not break: its whole-number parameters,
    as :mod:`robench.amounts` reads them; `classes` is the number of classes. Where that depends on the model, a fair
    upper guess. `robench eval --dry-run` and the time that is left go by it, no answer does. In the default `steps` or
    `restarts` count 1 where the attack has no such parameter."""
    queries: str = "0"
    """Written the same way: how many forward passes without a backward pass."""
    minimum_norm: bool = False
    """It looks for the nearest adversarial example at any distance and does not use the threat's epsilon: what it
    returns may lie outside the ball, and where it finds nothing it returns the image itself. One that has a parameter
    `stop_within_epsilon` is an attack on the ball where that is true."""
    budget: Literal["ball", "none"] = "ball"
    """`none`: its noise has epsilon as a scale and no bound. Nothing says that the answer lies in the ball of a norm,
    so it is judged wherever it lies, and stands apart from the threat model's worst case. A parameter `clip` of such an
    attack says whether its images stay in [0, 1]."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further catalog names: parameters fixed under a name (`pgd-20`)."""
    preset_norms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`norms` of the presets whose numbers make sense for some of them only."""


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """Another library's attacks: ``search(model, images, labels, question) -> adversarial images``
    (:mod:`robench.backends`).
    """

    name: str
    search: Callable[..., Any]
    summary: str
    source: str
    version: int
    """Of the adapter: raise it when the same parameters would give other numbers with the same library."""
    distribution: str
    """What `pip install` knows the library as."""
    precisions: tuple[str, ...]
    """Of the search, that the library keeps to."""
    offers: Mapping[str, tuple[Mapping[str, Any], ...]]
    """What it can do, by the name of the attack's entry: the forms, as fields of :class:`robench.backends.Offer`."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CertificateEntry:
    """A certificate: ``certify(model, images, labels, **parameters) -> Certified`` (:mod:`robench.certification`)."""

    name: str
    certify: Callable[..., Any]
    summary: str
    source: str
    """Paper, and equation or algorithm."""
    version: int
    """Raise it when the same parameters would give other numbers; it is part of every result's identity."""
    guarantee: str
    """What the radii are, for which function, at which confidence; `{name}` stands for a parameter's value."""
    passes: str = "0"
    """How many forward passes it takes per example at most, as :mod:`robench.amounts` reads it; `classes` is the number
    of classes."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DefenseEntry:
    """A training objective: a function ``(model, images, labels, *, random, progress, **parameters) -> LossParts``,
    or a class whose constructor takes the parameters and whose instances are called that way
    (:mod:`robench.defenses`).
    """

    name: str
    objective: Callable[..., Any]
    summary: str
    source: str
    """Paper, and equation or algorithm."""
    role: Literal["objective", "regularizer"] = "objective"
    """A regularizer adds a term to any objective and is given what that one evaluated, as `base`."""
    views: tuple[str, ...] = ("clean",)
    """Which evaluations an objective hands to regularizers: `clean`, `adversarial`."""
    uses_labels: bool = True
    """Whether it learns from labels. One that does reports its `accuracy`; one that does not never touches them."""
    differentiates_images: bool = False
    """Whether a regularizer differentiates the evaluations by their images."""
    passes: str = "0"
    """How many forward and backward passes a step takes per example besides the one of an objective's loss: its
    whole-number parameters, as :mod:`robench.amounts` reads them, and `classes`. `robench train --dry-run` goes by it.
    """
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ArchitectureEntry:
    """A network family: ``build(*, num_classes, input_shape, **parameters) -> torch.nn.Module`` that maps images in
    [0, 1] (normalisation comes in front of it) to logits.
    """

    name: str
    build: Callable[..., Any]
    summary: str
    source: str
    input_shape: tuple[int, int, int]
    """(channels, height, width) of the published form."""
    num_classes: int
    """Of the published form."""
    parameter_counts: Mapping[str, int]
    """Published number of parameters of the family and of its presets, in their published form."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    preset_shapes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    """`input_shape` of the presets that were published for other images."""


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """A data set: ``load(root: Path | None, split: "train" | "test") -> ImageSet`` (:mod:`robench.datasets`)."""

    name: str
    load: Callable[..., Any]
    summary: str
    source: str
    licence: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """(channels, height, width)."""
    held_out: int
    """How many of the training images, from the end of their stated order, are the validation split."""
    threats: tuple[str, ...]
    """Threat models under which the field reports this data set; the first is the default."""
    images: Mapping[str, int] = field(default_factory=dict)
    """How many its files hold, `train` (validation included) and `test`, where that is known without reading them."""
    plane: tuple[str, float, float] | None = None
    """Of images of two pixels: what the two axes are called, and what the pixel values 0 and 1 stand for on them."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LeaderboardEntry:
    """A table: ``build(results) -> list[Table]`` (:mod:`robench.tables`)."""

    name: str
    build: Callable[..., Any]
    summary: str
    source: str
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DrawingEntry:
    """A way of drawing: ``draw(evidence, **parameters) -> list[Panel]`` (:mod:`robench.papers.figures`,
    :mod:`robench.panels`).
    """

    name: str
    draw: Callable[..., Any]
    summary: str
    source: str
    measures: bool = True
    """It draws what records, cards or training logs hold; else it computes an illustration by itself."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """One kind of plugin: its folder, and for Python plugins the entry's class and which field refers to the code."""

    folder: str
    singular: str
    entry: str | None = None
    reference: str = ""


KINDS: dict[str, Kind] = {
    "attacks": Kind("attacks", "attack", "AttackEntry", "attack"),
    "backends": Kind("backends", "backend", "BackendEntry", "search"),
    "defenses": Kind("defenses", "defense", "DefenseEntry", "objective"),
    "certificates": Kind("certification", "certificate", "CertificateEntry", "certify"),
    "architectures": Kind("architectures", "architecture", "ArchitectureEntry", "build"),
    "datasets": Kind("datasets", "data set", "DatasetEntry", "load"),
    "leaderboards": Kind("leaderboards", "leaderboard", "LeaderboardEntry", "build"),
    "recipes": Kind("recipes", "recipe"),
    "suites": Kind("suites", "suite"),
    "tables": Kind("leaderboards", "paper table"),
    "papers": Kind("papers", "paper"),
    "figures": Kind("figures", "paper figure"),
    "drawings": Kind("figures", "drawing", "DrawingEntry", "draw"),
}


@dataclass(frozen=True)
class Parameter:
    """One keyword-only argument of a plugin."""

    name: str
    annotation: str
    type: Any
    default: Any
    required: bool
    description: str = ""
    """What the docstring's `Args:` section says of it, on one line."""


@dataclass(frozen=True)
class Plugin:
    """What is known of a plugin without importing it."""

    kind: str
    name: str
    """The name users type: the entry's own, or a preset's."""
    entry: str
    """The entry's name."""
    path: Path
    facts: Mapping[str, Any]
    """The literal fields of the entry, or the content of a TOML file."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    preset: Mapping[str, Any] = field(default_factory=dict)
    supplied: frozenset[str] = frozenset()
    """Which of the arguments that the engine or the training loop can supply it takes."""

    def load(self) -> Any:
        """Import the plugin's module and return its entry; a failing import names the file."""
        module = f"robench.{KINDS[self.kind].folder}.{self.path.stem}"
        try:
            return importlib.import_module(module).ENTRY
        except Exception as error:
            raise PluginError(self.path, f"does not import: {type(error).__name__}: {error}") from error

    def settings(self, overrides: Mapping[str, Any] | None = None, *, where: str = "") -> dict[str, Any]:
        """Return every parameter with its value: defaults, then the preset's, then `overrides`, each checked.

        Raises UserError that names the key, the value and what would be accepted; `where` is put before the key.
        """
        given = {**self.preset, **(overrides or {})}
        label = f"{KINDS[self.kind].singular} {self.name}"
        for key in given:
            if key not in self.parameters:
                raise UserError(f"{label} has no parameter {where}{key}; {suggestion(key, self.parameters)}")
        values = {}
        for key, parameter in self.parameters.items():
            if key not in given and parameter.required:
                raise UserError(f"{label} needs a value for {where}{key} ({parameter.annotation})")
            values[key] = checked(given.get(key, parameter.default), parameter, f"{label}: {where}{key}")
        return values

    def passes(self, parameters: Mapping[str, Any], *, classes: int) -> tuple[int, int]:
        """Return how many gradient passes, and how many forward passes besides, an attack takes per example at most."""
        usual = " * ".join(name for name in ("steps", "restarts") if name in self.parameters) or "1"
        gradients, queries = self.facts.get("passes", usual), self.facts.get("queries", AttackEntry.queries)
        values = {"classes": classes, **parameters}
        return Amount.read(gradients).value(values), Amount.read(queries).value(values)

    def training_passes(self, parameters: Mapping[str, Any], *, classes: int) -> int:
        """Return how many passes a step of a defense takes per example, that of an objective's loss included."""
        extra = Amount.read(self.facts.get("passes", DefenseEntry.passes)).value({"classes": classes, **parameters})
        return extra + int(self.facts.get("role", DefenseEntry.role) == "objective")


class PluginError(UserError):
    """A plugin file that breaks the rules of its kind."""

    def __init__(self, path: Path, problem: str) -> None:
        """Name the file by its folder and name."""
        super().__init__(f"plugin {path.parent.name}/{path.name} {problem}")


def checked(value: Any, parameter: Parameter, label: str) -> Any:
    """Return `value` converted to the parameter's type (text as typed on a command line included)."""
    if isinstance(value, str):
        value = _typed_text(value, parameter.annotation)
    try:
        return _adapter(parameter.annotation, parameter.type).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{label} = {value!r}: {problem[0].lower()}{problem[1:]} ({parameter.annotation})") from None


def _typed_text(text: str, annotation: str) -> Any:
    """Read what pydantic would not: `none`, lists, threat models, and radii written as fractions (`2/255`)."""
    if text.lower() == "none" and annotation.endswith("| None"):
        return None
    if annotation.startswith("tuple[") and text.startswith("["):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return tomllib.loads(f"value = {text}")["value"]
    if annotation.removesuffix(" | None") == "ThreatModel":
        return ThreatModel.parse(text)
    if annotation.removesuffix(" | None") in {"float", "PositiveFloat", "NonNegativeFloat", "Probability"}:
        with contextlib.suppress(ValueError):
            return float(exact_fraction(text))
    return text


_ADAPTERS: dict[str, TypeAdapter[Any]] = {}


def _adapter(annotation: str, kind: Any) -> TypeAdapter[Any]:
    if annotation not in _ADAPTERS:
        _ADAPTERS[annotation] = TypeAdapter(kind)
    return _ADAPTERS[annotation]


@functools.cache
def plugins(kind: str) -> Mapping[str, Plugin]:
    """Return all plugins of a kind by name, presets included; raise PluginError for a file that breaks the rules."""
    rules = KINDS[kind]
    pattern = "*.py" if rules.entry else "*.toml"
    found: dict[str, Plugin] = {}
    for path in sorted((PACKAGE / rules.folder).glob(pattern)):
        if path.name.startswith("_"):
            continue
        for plugin in read_python(kind, path) if rules.entry else [read_toml(kind, path)]:
            if plugin.name in found:
                raise PluginError(path, f"takes the name {plugin.name!r}, which {found[plugin.name].path.name} has")
            found[plugin.name] = plugin
    return found


def find(kind: str, name: str) -> Plugin:
    """Return the plugin of that name, or raise UnknownName with the nearest ones."""
    known = plugins(kind)
    if name not in known:
        raise UnknownName(KINDS[kind].singular, name, known)
    return known[name]


def is_bounded(attack: str) -> bool:
    """Tell whether epsilon bounds what counts for an attack's entry: false for noise that has it as its scale."""
    plugin = plugins("attacks").get(attack)
    return plugin is None or plugin.facts.get("budget", "ball") == "ball"


def read_toml(kind: str, path: Path) -> Plugin:
    """Read a TOML plugin; its name is the file's."""
    try:
        facts = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise PluginError(path, f"is no valid TOML: {error}") from None
    return Plugin(kind, path.stem, path.stem, path, facts)


def read_python(kind: str, path: Path) -> list[Plugin]:
    """Read a Python plugin's syntax tree: the entry's own name first, then its presets."""
    rules = KINDS[kind]
    try:
        tree = ast.parse(_text(path))
    except SyntaxError as error:
        raise PluginError(path, f"does not parse: line {error.lineno}: {error.msg}") from None
    call = _entry_call(tree)
    if call is None or getattr(call.func, "id", getattr(call.func, "attr", None)) != rules.entry:
        raise PluginError(path, f"has no constant ENTRY = {rules.entry}(...)")
    facts: dict[str, Any] = {}
    code: str | None = None
    for keyword in call.keywords:
        if keyword.arg == rules.reference and isinstance(keyword.value, ast.Name):
            code = keyword.value.id
        elif keyword.arg is not None:
            facts[keyword.arg] = _literal(keyword.value, path, f"ENTRY's {keyword.arg}")
    if code is None or "name" not in facts:
        raise PluginError(path, f"has an ENTRY without name= or {rules.reference}=")
    parameters, supplied = _parameters(tree, code, path)
    _check_amounts(facts, parameters, path)
    names = {facts["name"]: {}, **facts.get("presets", {})}
    norms = facts.pop("preset_norms", {})
    if unknown := [name for name in norms if name not in names]:
        raise PluginError(path, f"gives norms to {unknown[0]!r}, which is none of its presets")
    found = [
        Plugin(
            kind,
            name,
            facts["name"],
            path,
            {**facts, "norms": norms[name]} if name in norms else facts,
            parameters,
            preset,
            supplied,
        )
        for name, preset in names.items()
    ]
    for plugin in found:
        # A preset with a misspelt or mistyped parameter is refused here, not when somebody runs it.
        plugin.settings({k: _any_value(p) for k, p in parameters.items() if p.required and k not in plugin.preset})
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PluginError(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PluginError(path, bad_byte(error)) from None


def _check_amounts(facts: Mapping[str, Any], parameters: Mapping[str, Parameter], path: Path) -> None:
    """Refuse a cost that could not be computed from the parameters."""
    whole = {"classes", *(name for name, p in parameters.items() if p.annotation in _WHOLE_NUMBERS)}
    for key in {"passes", "queries"} & facts.keys():
        try:
            amount = Amount.read(facts[key])
        except ValueError as error:
            raise PluginError(path, f"has an ENTRY whose {key} cannot be read: {error}") from None
        if wrong := sorted(amount.numbers - whole):
            raise PluginError(path, f"has an ENTRY whose {key} names {wrong[0]}, which is no whole-number parameter")
        if wrong := sorted(amount.conditions - parameters.keys()):
            raise PluginError(path, f"has an ENTRY whose {key} looks at {wrong[0]}, which is no parameter")


def _any_value(parameter: Parameter) -> Any:
    """Return some valid value of a required parameter, to check the others of a preset."""
    for candidate in (1, 0.5, "Linf@8/255", True):
        try:
            return checked(candidate, parameter, "")
        except UserError:
            continue
    return TypeAdapter(parameter.type).json_schema().get("enum", [None])[0]


def _entry_call(tree: ast.Module) -> ast.Call | None:
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign):
            targets: list[ast.expr] = [statement.target]
        elif isinstance(statement, ast.Assign):
            targets = statement.targets
        else:
            continue
        if any(isinstance(t, ast.Name) and t.id == "ENTRY" for t in targets) and isinstance(statement.value, ast.Call):
            return statement.value
    return None


def _literal(node: ast.expr, path: Path, what: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise PluginError(path, f"line {node.lineno}: {what} must be a literal, not {ast.unparse(node)}") from None


def _parameters(tree: ast.Module, code: str, path: Path) -> tuple[dict[str, Parameter], frozenset[str]]:
    """Return what can be set about a plugin, and which arguments it wants to be supplied with."""
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == code:
            function: ast.FunctionDef | None = statement
            break
        if isinstance(statement, ast.ClassDef) and statement.name == code:
            function = next(
                (f for f in statement.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None
            )
            break
    else:
        raise PluginError(path, f"names {code} in ENTRY but does not define it")
    if function is None:
        return {}, frozenset()
    found, said = {}, described(ast.get_docstring(function) or "")
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if argument.arg in SUPPLIED:
            continue
        where = f"parameter {argument.arg} of {code}"
        if argument.annotation is None:
            raise PluginError(path, f"has no annotation for {where}")
        value = None if default is None else _literal(default, path, where)
        kind = _type(argument.annotation, path, where)
        annotation = ast.unparse(argument.annotation)
        found[argument.arg] = Parameter(
            argument.arg, annotation, kind, value, default is None, said.get(argument.arg, "")
        )
    return found, SUPPLIED & {argument.arg for argument in function.args.kwonlyargs}


def described(docstring: str) -> dict[str, str]:
    """Return what a docstring's `Args:` section says of each argument, by name, each on one line."""
    _, _, section = docstring.partition("\nArgs:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        depth = len(line) - len(line.lstrip())
        if depth == 0:
            break
        if depth == _INDENT:
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif name:
            found[name] += f" {line.strip()}"
    return found


def _type(node: ast.expr, path: Path, where: str) -> Any:
    """Turn an annotation into a type that pydantic can check, from a closed list of names."""
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.Name) and node.id in PARAMETER_TYPES:
        return PARAMETER_TYPES[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _type(node.left, path, where) | _type(node.right, path, where)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        if node.value.id == "Literal":
            choices = ast.literal_eval(node.slice)
            return Literal[choices if isinstance(choices, tuple) else (choices,)]
        if node.value.id == "tuple" and isinstance(node.slice, ast.Tuple):
            items = [... if ast.unparse(e) == "..." else _type(e, path, where) for e in node.slice.elts]
            return tuple[tuple(items)]  # type: ignore[misc]
    known = ", ".join([*PARAMETER_TYPES, "Literal[...]", "tuple[...]"])
    raise PluginError(path, f"annotates {where} with {ast.unparse(node)}; use one of {known}")
