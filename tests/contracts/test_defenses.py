"""What every defense of the catalog promises; a new file in robench/defenses/ is tested by itself."""

from __future__ import annotations

import contextlib
import inspect
import re

import pytest
import torch
from torch import nn

from robench import catalog
from robench.architectures.with_head import CosineHead
from robench.defenses import LossParts, seen
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.recipe import parse_recipe
from robench.threat_model import NORMS, ThreatModel
from robench.training.objective import Objective, Term, build_objective
from tests.models import Linear, SmallNet, numbers, pictures

DEFENSES = list(catalog.plugins("defenses").values())
EPSILON = {"Linf": "0.05", "L2": "0.3"}


def _wants_threat(plugin) -> bool:
    code = plugin.load().objective
    return "threat" in inspect.signature(code.__call__ if inspect.isclass(code) else code).parameters


#: By name, parameters under which a loss has no constants that move with the weights, where the defaults have such: the
#: weights of EMR's mean row are equal at high temperatures. The defense's own tests differentiate the rest.
WITHOUT_CONSTANTS = {
    "emr": {"temperature": 1e9},
    "emr_official": {"temperature": 1e9},
    "l_softmax_official": {"gamma": 0.0},
    "awp": {"gamma": 0.0},
    "awp_at_official": {"gamma": 0.0},
    "awp_trades_official": {"gamma": 0.0},
}

CASES = [(p, norm) for p in DEFENSES for norm in (NORMS if _wants_threat(p) else [None])]
each_defense = pytest.mark.parametrize(
    ("plugin", "norm"), CASES, ids=[p.name + (f"-{norm}" if norm else "") for p, norm in CASES]
)


def objective_of(plugin, norm, teacher=None, parameters=None, classes=5):
    """Build what the plugin adds up to: a regularizer stands on standard training."""
    chosen = {"name": plugin.name, "parameters": parameters or {}}
    regularizer = plugin.facts.get("role") == "regularizer"
    threat = f"{norm}@{EPSILON[norm]}" if norm else None
    recipe = {
        "summary": "s",
        "source": "p",
        "dataset": "digits",
        "epochs": 1,
        "batch_size": 8,
        "architecture": {"name": "digits_cnn"},
        "defense": {"name": "standard"} if regularizer else chosen,
        "regularizers": [chosen] if regularizer else [],
        "threat": threat,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "selection": {"metric": "clean_accuracy"},
    }
    return build_objective(
        parse_recipe(recipe, origin="test"),
        teacher=teacher or SmoothTeacher(),
        new_network=lambda _: Linear(classes, 16, seed=8),
    )


def trainable(objective, model, last):
    """Return the model with the last layer, whose name is given, that the objective wants."""
    with contextlib.suppress(UserError):
        objective.check(model)
        return model
    old = model.get_submodule(last)
    for head in (
        CosineHead(old.in_features, old.out_features, scale=15.0),
        nn.Linear(old.in_features, old.out_features, bias=False),
    ):
        head.weight = nn.Parameter(old.weight.detach().clone())
        model.set_submodule(last, head)
        with contextlib.suppress(UserError):
            objective.check(model)
            return model
    raise AssertionError("no model that it could train")


def small_net_for(objective):
    return trainable(objective, SmallNet(), "classify")


class SmoothNet(nn.Module):
    """Differentiable everywhere and the same in both modes: differences of losses are gradients.

    How an inner maximisation moves with the weights is no part of the gradient (Danskin's theorem). So while weights
    are changed a little, the network is shown what it was shown before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, 6, dtype=torch.float64)
        self.last = nn.Linear(6, 4, dtype=torch.float64)
        with torch.no_grad():
            for position, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * numbers(*parameter.shape, seed=position))
        self.shown = []
        self.replay = None

    def forward(self, images):
        if self.last.weight.requires_grad:  # an inner maximisation freezes the weights
            if self.replay is None:
                self.shown.append(images.detach().clone())
            else:
                images = images + (next(self.replay) - images).detach()
        return self.last(torch.tanh(self.hidden(images.flatten(1))))


class SmoothTeacher(nn.Module):
    """Knows 4 or 5 classes, whichever `classes` says, and any precision."""

    classes = 5

    def forward(self, images):
        flat = images.flatten(1)
        return torch.tanh(flat @ numbers(flat.shape[1], self.classes, seed=9).to(flat.dtype))


def batch(classes, count=6, dtype=torch.float64):
    images = pictures(count).to(dtype)
    return images, torch.arange(count) % classes, RandomStream(3, torch.arange(count), ("test",))


@each_defense
def test_gradients_agree_with_finite_differences(plugin, norm):
    teacher = SmoothTeacher()
    teacher.classes = 4
    objective = objective_of(plugin, norm, teacher, WITHOUT_CONSTANTS.get(plugin.name), classes=4)
    model = trainable(objective, SmoothNet(), "last")
    images, labels, random = batch(4)

    def loss():
        return objective(model, images, labels, random=random, progress=0.5).total

    def replayed():
        model.replay = iter(model.shown)
        objective.restore(learned)
        return loss().item()

    loss().backward()
    # What an objective learns from batches is no part of the gradient, either.
    learned = {name: value.clone() for name, value in objective.state().items()}
    step = 1e-6
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for position in range(0, len(flat), max(1, len(flat) // 4)):
            before = flat[position].item()
            flat[position] = before + step
            above = replayed()
            flat[position] = before - step
            below = replayed()
            flat[position] = before
            expected = (above - below) / (2 * step)
            assert parameter.grad.view(-1)[position].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@each_defense
def test_every_weight_gets_a_gradient(plugin, norm):
    objective = objective_of(plugin, norm)
    model = small_net_for(objective).train()
    images, labels, random = batch(5, dtype=torch.float32)
    loss = objective(model, images, labels, random=random, progress=0.5)
    assert loss.total.shape == ()
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name != "features.0.bias":  # a constant before a batch norm changes nothing
            assert parameter.grad.abs().sum() > 0, name


@each_defense
def test_same_stream_same_loss_and_parts_are_plain_numbers(plugin, norm):
    images, labels, random = batch(5, dtype=torch.float32)
    results = []
    for _ in range(2):
        objective = objective_of(plugin, norm)
        model = small_net_for(objective).train()
        results.append(objective(model, images, labels, random=random, progress=0.5))
    assert results[0].total.item() == results[1].total.item()
    assert ("accuracy" in results[0].parts) is plugin.facts.get("uses_labels", True)
    for name, value in results[0].parts.items():
        assert value.shape == (), name
        assert not value.requires_grad, name
        assert value.item() == results[1].parts[name].item(), name


@each_defense
@pytest.mark.parametrize("training", [True, False])
def test_leaves_images_flags_modes_and_generators_alone(plugin, norm, training):
    objective = objective_of(plugin, norm)
    model = small_net_for(objective).train(training)
    model.features[1].eval()
    images, labels, random = batch(5, dtype=torch.float32)
    before = images.clone(), torch.get_rng_state(), [m.training for m in model.modules()]
    weights = [p.detach().clone() for p in model.parameters()]
    objective(model, images, labels, random=random, progress=0.5)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert torch.equal(images, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert [m.training for m in model.modules()] == before[2]
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


class Untouchable(torch.Tensor):
    """Labels that nobody may look at."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"labels were touched: {func}")


@each_defense
def test_labels_are_used_if_it_says_so(plugin, norm):
    images, labels, random = batch(5, dtype=torch.float32)
    hidden = labels.as_subclass(Untouchable)
    objective = objective_of(plugin, norm)
    if plugin.facts.get("uses_labels", True):
        with pytest.raises(AssertionError, match="labels were touched"):
            objective(small_net_for(objective).train(), images, hidden, random=random, progress=0.5)
    else:
        seen = objective(SmallNet().train(), images, hidden, random=random, progress=0.5)
        plain = objective(SmallNet().train(), images, labels, random=random, progress=0.5)
        assert seen.total.item() == plain.total.item()


@each_defense
def test_progress_from_start_to_end(plugin, norm):
    images, labels, random = batch(5, dtype=torch.float32)
    for progress in (0.0, 0.999):
        objective = objective_of(plugin, norm)
        loss = objective(small_net_for(objective).train(), images, labels, random=random, progress=progress)
        assert loss.total.isfinite()


@pytest.mark.parametrize("plugin", DEFENSES, ids=lambda p: p.name)
def test_entry_agrees_with_its_file(plugin):
    entry = plugin.load()
    assert entry.name == plugin.entry
    assert re.search(r"[ (](19|20)\d\d(?![.\d])", entry.source), "names the paper and its year"
    code = entry.objective.__call__ if inspect.isclass(entry.objective) else entry.objective
    parameters = [p for p in inspect.signature(code).parameters if p != "self"]
    assert parameters[:3] == ["model", "images", "labels"]
    assert {"random", "progress"} <= set(parameters)
    assert ("base" in parameters) is (entry.role == "regularizer")
    assert set(entry.views) <= {"clean", "adversarial"}


class Penalty:
    """The squared norm of the loss's gradient by the images, as a regularizer that another one follows."""

    def __call__(self, model, images, labels, *, random, progress, base, learning_rate):
        view = seen(base, "clean", model, images)
        chosen = view.logits.gather(1, labels[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, view.images, create_graph=True)
        penalty = learning_rate * gradient.square().flatten(1).sum(1).mean()
        return LossParts(penalty, {"penalty": penalty.detach()})


@pytest.mark.parametrize("name", ["standard", "pgd_training"])
def test_a_regularizer_adds_to_any_objective_and_evaluates_nothing_twice(name):
    images, labels, random = batch(4)
    model = SmoothNet()
    threat = {"threat": ThreatModel.parse("Linf@0.05")} if name == "pgd_training" else {}
    base = Term(name, catalog.find("defenses", name).load().objective, threat, frozenset())
    added = Term("penalty", Penalty(), {}, frozenset({"base", "learning_rate"}))
    alone = Objective(base)(model, images, labels, random=random, progress=0.0)
    count = len(model.shown)
    both = Objective(base, (added,), differentiates_images=True)(
        model, images, labels, random=random, progress=0.0, learning_rate=0.5
    )
    assert len(model.shown) == count * 2 + (name == "pgd_training")
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).gather(1, labels[:, None]).sum(), leaf)
    penalty = 0.5 * gradient.square().flatten(1).sum(1).mean().item()
    assert both.parts["penalty"].item() == pytest.approx(penalty)
    assert both.total.item() == pytest.approx(alone.total.item() + penalty)
    assert set(both.parts) == {"accuracy", "penalty"}
    both.total.backward()
    assert not images.requires_grad


def test_pgd_training_of_a_linear_net_is_the_closed_form():
    # Two classes, linear logits: the worst image moves every pixel by epsilon against the difference of the weights.
    weight = torch.tensor([[1.0, -2.0], [-0.5, 1.0]], dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False, dtype=torch.float64))
    model[1].weight.data.copy_(weight)
    images = torch.tensor([[0.4, 0.6], [0.5, 0.5]], dtype=torch.float64).view(2, 1, 1, 2)
    labels = torch.tensor([0, 1])
    loss = (
        catalog.find("defenses", "pgd_training")
        .load()
        .objective(
            model,
            images,
            labels,
            random=RandomStream(0, torch.arange(2)),
            progress=0.0,
            threat=ThreatModel.parse("Linf@0.1"),
            steps=5,
        )
    )
    gaps = []
    for row, label in enumerate(labels.tolist()):
        difference = weight[label] - weight[1 - label]
        gaps.append((difference * images[row].flatten()).sum() - 0.1 * difference.abs().sum())
    expected = torch.log1p(torch.exp(-torch.stack(gaps))).mean()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)


def test_warmup_shrinks_radius_and_step_size():
    images, labels, random = batch(4)
    objective = catalog.find("defenses", "pgd_training").load().objective
    model = SmoothNet()

    def loss(progress, threat, **options):
        parsed = ThreatModel.parse(threat)
        return objective(model, images, labels, random=random, progress=progress, threat=parsed, **options).total.item()

    clean = nn.functional.cross_entropy(model(images), labels).item()
    assert loss(0.0, "Linf@0.2", warmup=0.4, step_size=0.04) == clean
    assert loss(0.1, "Linf@0.2", warmup=0.4, step_size=0.04) == loss(0.9, "Linf@0.05", step_size=0.01)
    assert loss(0.4, "Linf@0.2", warmup=0.4) == loss(0.4, "Linf@0.2")


@pytest.mark.parametrize(("attack_mode", "moves"), [("train", True), ("eval", False)])
def test_attack_mode_decides_whether_iterates_move_running_statistics(attack_mode, moves):
    images, labels, random = batch(5, dtype=torch.float32)
    model, reference = SmallNet().train(), SmallNet().train()
    objective = catalog.find("defenses", "pgd_training").load().objective
    threat = ThreatModel.parse("Linf@0.05")
    objective(model, images, labels, random=random, progress=0, threat=threat, steps=3, attack_mode=attack_mode)
    reference(images)
    passes = model.features[1].num_batches_tracked - reference.features[1].num_batches_tracked
    assert (passes.item() > 0) is moves
