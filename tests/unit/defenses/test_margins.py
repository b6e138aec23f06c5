"""HE and L-Softmax: the margins by independent transcriptions, their limits, what is deployed, what they refuse."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robench.architectures.with_head import CosineHead, build
from robench.checkpoints import load_model
from robench.defenses import LossParts, pgd_training, standard, trades
from robench.defenses.he import HypersphereEmbedding
from robench.defenses.l_softmax import LargeMarginSoftmax, psi
from robench.errors import UserError
from robench.random_streams import RandomStream
from robench.threat_model import ThreatModel
from robench.training import Run, forecast
from robench.training.objective import Objective, Term
from tests.models import SmallNet, numbers, pictures
from tests.unit.training.problems import make_workspace, run_training, small_recipe

THREAT = {"threat": ThreatModel.parse("Linf@0.05"), "attack_mode": "eval"}
BASES = {
    "standard": (standard.standard, {}),
    "pgd_training": (pgd_training.pgd_training, THREAT),
    "trades": (trades.trades, {**THREAT, "beta": 2.0}),
}
each_base = pytest.mark.parametrize("base", BASES)


def network(head):
    model = SmallNet().double().train()
    last = CosineHead(96, 5, scale=15.0) if head == "cosine" else nn.Linear(96, 5, bias=False)
    last.weight = nn.Parameter(0.3 * numbers(5, 96, seed=4))
    model.classify = last
    return model


def batch(count=6):
    return pictures(count), torch.arange(count) % 5, RandomStream(3, torch.arange(count), ("test",))


def loss_of(model, base, *terms):
    function, bound = BASES[base]
    added = tuple(Term("margin", term, {}, frozenset({"base"})) for term in terms)
    images, labels, random = batch()
    return Objective(Term(base, function, bound, frozenset()), added)(
        model, images, labels, random=random, progress=0.5
    )


def divergence(clean, worst):
    p, q = clean.softmax(1), worst.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


def hypersphere_loss(model, base, views, margin, scale=15.0):
    """The published loss from the features, the attack's images given."""
    labels = batch()[1]

    def cosines(images):
        rows = model.classify.weight
        features = model.features(images).flatten(1)
        return torch.stack([torch.stack([(x @ w) / (x.norm() * w.norm()) for w in rows]) for x in features])

    found = {at: cosines(view.images) for at, view in views.items()}
    trained = found.get("clean", found.get("adversarial"))
    loss = 0
    for i, y in enumerate(labels.tolist()):
        true = torch.exp(scale * (trained[i, y] - margin))
        others = sum(torch.exp(scale * trained[i, j]) for j in range(5) if j != y)
        loss = loss - torch.log(true / (true + others))
    loss = loss / len(labels)
    if base == "trades":
        loss = loss + 2.0 * divergence(scale * found["clean"], scale * found["adversarial"])
    return loss


def psi_by_angles(cosine, m):
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    k = min(int(theta * m / math.pi), m - 1)
    return (-1) ** k * math.cos(m * theta) - 2 * k


def large_margin_loss(model, base, views, m, weight):
    """The same with angles: the gradient through theta itself."""
    labels = batch()[1]

    def features(view):
        return model.features(view.images).flatten(1)

    found = {at: features(view) for at, view in views.items()}
    trained = found.get("clean", found.get("adversarial"))
    rows, loss = model.classify.weight, 0
    for x, y in zip(trained, labels.tolist(), strict=True):
        logits = rows @ x
        length = x.norm() * rows[y].norm()
        theta = torch.acos(logits[y] / length)
        k = int(theta.item() * m / math.pi)
        mixed = (weight * logits[y] + length * ((-1) ** k * torch.cos(m * theta) - 2 * k)) / (1 + weight)
        others = torch.cat([logits[:y], logits[y + 1 :]])
        loss = loss - (mixed - torch.logsumexp(torch.cat([mixed[None], others]), 0))
    loss = loss / len(labels)
    if base == "trades":
        loss = loss + 2.0 * divergence(found["clean"] @ rows.T, found["adversarial"] @ rows.T)
    return loss


def assert_same(loss, expected, model, twin):
    loss.total.backward()
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)


@each_base
@pytest.mark.parametrize("margin", [0.1, 0.2])
def test_hypersphere_embedding_is_its_formula(base, margin):
    model = network("cosine")
    twin = copy.deepcopy(model)
    loss = loss_of(model, base, HypersphereEmbedding(margin=margin))
    assert_same(loss, hypersphere_loss(twin, base, loss.views, margin), model, twin)


@each_base
@pytest.mark.parametrize(("m", "weight"), [(2, 0.0), (3, 0.0), (4, 0.0), (4, 2.5)])
def test_large_margin_softmax_is_its_formula(base, m, weight):
    model = network("unbiased")
    twin = copy.deepcopy(model)
    loss = loss_of(model, base, LargeMarginSoftmax(margin=m, lambda_start=weight))
    assert_same(loss, large_margin_loss(twin, base, loss.views, m, weight), model, twin)


@each_base
@pytest.mark.parametrize(
    ("head", "term"), [("cosine", HypersphereEmbedding(margin=0.0)), ("unbiased", LargeMarginSoftmax(margin=1))]
)
def test_without_a_margin_it_is_the_plain_loss(base, head, term):
    with_term, plain = network(head), network(head)
    loss, expected = loss_of(with_term, base, term), loss_of(plain, base)
    loss.total.backward()
    expected.total.backward()
    assert loss.total.item() == pytest.approx(expected.total.item(), rel=1e-12)
    for ours, theirs in zip(with_term.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@each_base
@pytest.mark.parametrize(("head", "term"), [("cosine", HypersphereEmbedding()), ("unbiased", LargeMarginSoftmax())])
def test_the_margin_changes_neither_the_search_nor_what_is_deployed(base, head, term):
    model, plain = network(head), network(head)
    views, expected = loss_of(model, base, term).views, loss_of(plain, base).views
    for at, view in expected.items():
        assert torch.equal(views[at].images, view.images)
        assert torch.equal(views[at].logits, view.logits)
    images = pictures(4, seed=5)
    assert torch.equal(model.eval()(images), plain.eval()(images))


@each_base
def test_a_margin_makes_it_harder(base):
    for head, terms in (
        ("cosine", [HypersphereEmbedding(margin=m) for m in (0.0, 0.1, 0.3)]),
        ("unbiased", [LargeMarginSoftmax(margin=m) for m in (1, 2, 4)]),
    ):
        losses = [loss_of(network(head), base, term).total.item() for term in terms]
        assert losses == sorted(losses)
        assert losses[0] < losses[2]


@pytest.mark.parametrize("m", [1, 2, 3, 4, 6])
def test_psi_falls_from_1_without_a_jump(m):
    cosines = torch.linspace(1, -1, 4001, dtype=torch.float64)
    values = psi(cosines, m)
    assert torch.allclose(values, torch.tensor([psi_by_angles(c, m) for c in cosines.tolist()]).double(), atol=1e-6)
    assert values[0] == 1
    assert values[-1] == pytest.approx(1 - 2 * m)
    steps = values.diff()
    assert steps.max() <= 1e-9
    assert steps.min() > -2 * m**2 / 1000


def test_lambda_falls_with_the_steps_and_comes_back():
    term = LargeMarginSoftmax(margin=4, lambda_start=8.0, gamma=1.0, power=2.0, lambda_min=0.4)
    found = []
    for step in range(5):
        found.append(loss_of(network("unbiased"), "standard", term).total.item())
        other = LargeMarginSoftmax(margin=4, lambda_start=max(0.4, 8.0 / (1 + step) ** 2))
        assert found[-1] == pytest.approx(loss_of(network("unbiased"), "standard", other).total.item(), rel=1e-12)
    assert found[:4] == sorted(found[:4])
    again = LargeMarginSoftmax(margin=4, lambda_start=8.0, gamma=1.0, power=2.0, lambda_min=0.4)
    state = LargeMarginSoftmax(margin=4)
    state.load_state_dict({"step": torch.tensor(2)})
    again.load_state_dict(state.state_dict())
    assert loss_of(network("unbiased"), "standard", again).total.item() == found[2]


def test_at_chooses_the_images():
    for head, make in (("cosine", HypersphereEmbedding), ("unbiased", LargeMarginSoftmax)):
        by_default = loss_of(network(head), "trades", make()).total.item()
        assert by_default == loss_of(network(head), "trades", make(at="clean")).total.item()
        assert by_default != loss_of(network(head), "trades", make(at="adversarial")).total.item()


def test_refuses_networks_and_objectives_that_it_cannot_have(tmp_path):
    plain = SmallNet()
    with pytest.raises(UserError, match=r"he: .* no cosines; take an architecture with a cosine head"):
        HypersphereEmbedding().check(plain)
    with pytest.raises(UserError, match=r"l_softmax: .*linear layer without bias; take an architecture"):
        LargeMarginSoftmax().check(plain)
    with pytest.raises(UserError, match="linear layer without bias"):
        LargeMarginSoftmax().check(network("cosine"))
    images, labels, random = batch()
    with pytest.raises(UserError, match=r"he: this objective shows none of its adversarial images"):
        HypersphereEmbedding()(
            network("cosine"), images, labels, random=random, progress=0.0, base=LossParts(torch.zeros(()))
        )
    # Before the first step, and where it is only asked what a training would take.
    workspace = make_workspace(tmp_path)
    recipe = small_recipe(workspace, regularizers=[{"name": "he"}])
    run = Run(name="x", device=torch.device("cpu"), command="x")
    with pytest.raises(UserError, match=r"no cosines"):
        forecast(recipe, run, workspace=workspace)


def build_with(head, **options):
    return build(num_classes=10, input_shape=(1, 8, 8), network="digits_cnn", head=head, **options)


def test_cosine_head_has_no_lengths():
    model = build_with("cosine").double().eval()
    images = pictures(3, (1, 8, 8))
    before = model(images)
    assert before.abs().max() <= 15
    with torch.no_grad():
        model.linear2.weight.mul_(torch.arange(1, 11).double()[:, None])
    assert torch.allclose(model(images), before)
    assert torch.allclose(build_same(model, scale=3.0)(images), before / 5)
    features = numbers(3, 32)
    head = model.linear2
    expected = 15 * F.cosine_similarity(features[:, None], head.weight[None], dim=2)
    assert torch.allclose(head(features), expected)
    assert torch.allclose(head(7 * features), expected)


def build_same(model, **options):
    fresh = build_with("cosine", **options).double().eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_heads_of_networks_that_start_at_zero_have_a_direction():
    for head in ("cosine", "unbiased"):
        model = build(num_classes=10, input_shape=(1, 28, 28), network="small_cnn", head=head)
        assert model.classifier.fc3.weight.norm(dim=1).min() > 0.1


def test_with_head_refuses_what_makes_no_sense():
    with pytest.raises(UserError, match=r"scale = 3 belongs to head=cosine, and head is unbiased"):
        build_with("unbiased", scale=3.0)
    with pytest.raises(UserError, match=r"network = resnet34_555 does not end in a linear layer"):
        build(num_classes=10, input_shape=(3, 32, 32), network="resnet34_555")
    with pytest.raises(UserError, match="unknown architecture"):
        build(num_classes=10, input_shape=(3, 32, 32), network="resnet17")


@pytest.mark.parametrize(
    ("architecture", "regularizer"), [("digits_cnn_cosine", "he"), ("digits_cnn_unbiased", "l_softmax")]
)
def test_a_trained_model_loads_without_its_defense(tmp_path, monkeypatch, architecture, regularizer):
    workspace = make_workspace(tmp_path)
    recipe = small_recipe(
        workspace, architecture={"name": architecture}, regularizers=[{"name": regularizer}], epochs=1
    )
    card = run_training(workspace, recipe)
    assert card.architecture.name == architecture
    for term in (HypersphereEmbedding, LargeMarginSoftmax):
        monkeypatch.delattr(term, "__call__")
        monkeypatch.delattr(term, "__init__")
    loaded = load_model("x", workspace, input_shape=(1, 16, 16), num_classes=3)  # compares the golden logits
    last = list(loaded.model.modules())[-1]
    assert isinstance(last, CosineHead if regularizer == "he" else nn.Linear)
    assert getattr(last, "bias", None) is None
