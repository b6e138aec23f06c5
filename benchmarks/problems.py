"""What the benchmarks attack: a model, images it gets right, and a threat model. Everything is seeded and cached.

The models are made here in a minute, so that a benchmark needs nothing but the data: their accuracy is beside the
point, what counts is that they have the real architecture and that most images stand through all steps, as they do for
the robust models that evaluations take long for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.checkpoints import build_classifier, load_model
from robench.classifier import Classifier, mode
from robench.datasets import ArrayImages, ImageSet, open_split
from robench.random_streams import RandomStream
from robench.records import Configured
from robench.threat_model import ThreatModel
from robench.workspace import Workspace

#: By name of the problem, which begins with the architecture's: data set, threat model, PGD's steps and step size,
#: number of images.
SETTINGS = {
    "lenet5": ("mnist", "Linf@0.3", 40, 0.01, 500),
    "lenet5-undefended": ("mnist", "Linf@0.3", 100, 0.01, 500),
    "resnet18": ("cifar10", "Linf@8/255", 10, 2 / 255, 64),
    "resnet20": ("cifar10", "Linf@8/255", 10, 2 / 255, 500),
}

#: Radii of the L2 balls that break about as many images as those of the Linf balls.
L2_THREATS = {"lenet5": "L2@2", "lenet5-undefended": "L2@2", "resnet18": "L2@0.5", "resnet20": "L2@0.5"}


@dataclass(frozen=True)
class Problem:
    """A model and what it is to be attacked with."""

    description: str
    model: Classifier
    """In eval mode, its weights ready to be trained, as users have it."""
    pixels: ArrayImages
    """Images that the model gets right."""
    threat: ThreatModel
    steps: int
    step_size: float

    @property
    def images(self) -> Tensor:
        """Return `(N, C, H, W)` float32 in [0, 1]."""
        return torch.from_numpy(self.pixels.images).float() / 255

    @property
    def labels(self) -> Tensor:
        """Return `(N,)` int64."""
        return torch.from_numpy(self.pixels.labels)


@dataclass(frozen=True)
class Choice:
    """Which problem, as it was asked for on the command line."""

    name: str
    """A key of `SETTINGS`: the data set and the attack, and the model where none is registered."""
    data_root: Path | None
    cache: Path
    """Folder for the weights that are made here."""
    images: int | None = None
    steps: int | None = None
    registered: str | None = None
    """A model of the registry instead."""


def make(choice: Choice) -> Problem:
    """Return the problem, whose weights are made now unless the cache has them."""
    dataset, threat_text, steps, step_size, count = SETTINGS[choice.name]
    threat, workspace = ThreatModel.parse(threat_text), Workspace.locate(data_root=choice.data_root)
    test = open_split(dataset, "test", workspace)
    if choice.registered:
        shape, classes = test.image_shape, len(test.classes)
        model = load_model(choice.registered, workspace, input_shape=shape, num_classes=classes).model.eval()
        description = f"{choice.registered}, as it is registered"
    else:
        model = trained(choice, empty(choice.name, test))
        description = _MAKERS[choice.name].__doc__ or ""
    own_labels = choice.name == "resnet18" and not choice.registered
    pixels = _recognised(model, test, count=choice.images or count, own_labels=own_labels)
    return Problem(description, model, pixels, threat, choice.steps or steps, step_size)


def trained(choice: Choice, model: Classifier) -> Classifier:
    """Return an empty model with the choice's weights, which are made now unless the cache has them."""
    path = choice.cache / f"{choice.name}.safetensors"
    if not path.is_file():
        choice.cache.mkdir(parents=True, exist_ok=True)
        dataset, threat, *_ = SETTINGS[choice.name]
        train = open_split(dataset, "train", Workspace.locate(data_root=choice.data_root))
        _MAKERS[choice.name](model, train, ThreatModel.parse(threat))
        safetensors.torch.save_file(model.network.state_dict(), path)
    model.network.load_state_dict(safetensors.torch.load_file(path))
    return model


def empty(architecture: str, images: ImageSet) -> Classifier:
    """Return a problem's untrained model for these images; what stands behind a hyphen only names the problem."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        configured = Configured(name=architecture.partition("-")[0])
        return build_classifier(configured, num_classes=10, input_shape=images.image_shape).eval()


def adversarial_lenet5(model: Classifier, train: ImageSet, threat: ThreatModel) -> None:
    """LeNet-5 of Madry et al., adversarially trained for 2 epochs on 30,000 MNIST images with one step of length
    1.25 epsilon from a random point of the ball (Wong, Rice, Kolter, arXiv:2001.03994).
    """
    _train(model, train, radius=threat.radius, count=30_000, epochs=2)


def undefended_lenet5(model: Classifier, train: ImageSet, threat: ThreatModel) -> None:
    """LeNet-5 of Madry et al., trained for 2 epochs on 30,000 MNIST images as they are."""
    del threat
    _train(model, train, radius=None, count=30_000, epochs=2)


def adversarial_resnet20(model: Classifier, train: ImageSet, threat: ThreatModel) -> None:
    """ResNet-20 for CIFAR-10, adversarially trained for 4 epochs on 10,000 images with one step of length 1.25 epsilon
    from a random point of the ball (Wong, Rice, Kolter, arXiv:2001.03994).
    """
    _train(model, train, radius=threat.radius, count=10_000, epochs=4)


def _train(model: Classifier, train: ImageSet, *, radius: float | None, count: int, epochs: int) -> None:
    """Train on the first `count` images, in Linf against one step; None: on the images as they are."""
    batch = 64
    model.train()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * (count // batch))
    everything = RandomStream(0, torch.arange(count))
    for epoch in range(epochs):
        random = everything.at("epoch", epoch)
        order = random.at("order").uniform(torch.empty(count, 1)).squeeze(1).argsort()
        for rows in order[: count // batch * batch].split(batch):
            images = torch.from_numpy(train.read(rows.numpy())).float() / 255
            labels = torch.from_numpy(train.labels[rows.numpy()])
            if radius is not None:
                offset = (2 * random[rows].at("start").uniform(images) - 1) * radius
                offset.requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(model(images + offset), labels), offset)
                offset = (offset.detach() + 1.25 * radius * gradient.sign()).clamp(-radius, radius)
                images = (images + offset).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def steady_resnet18(model: Classifier, train: ImageSet, threat: ThreatModel) -> None:
    """ResNet-18 for CIFAR-10 with its initial weights and the batch statistics of CIFAR-10. The labels are its own
    predictions, and one class is favoured just so much that about nine of ten images stand through all steps.
    """
    images = torch.from_numpy(train.read(np.arange(256))).float() / 255
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches seen
    with torch.no_grad(), mode(model, training=True):
        model(images)
    some = images[:32]
    with torch.no_grad():
        favourite = int(model(some).mean(0).argmax())
    labels = torch.full((len(some),), favourite)
    _, _, steps, step_size, _ = SETTINGS["resnet18"]
    attacked = plain_pgd(model, some, labels, threat=threat, steps=steps, step_size=step_size).last
    with torch.no_grad():
        logits = model(attacked)
        others = logits.clone()
        others[:, favourite] = -torch.inf
        shortfall = others.amax(1) - logits[:, favourite]
        model.get_parameter("network.linear.bias")[favourite] += shortfall.quantile(0.9)


_MAKERS = {
    "lenet5": adversarial_lenet5,
    "lenet5-undefended": undefended_lenet5,
    "resnet18": steady_resnet18,
    "resnet20": adversarial_resnet20,
}


def _recognised(model: Classifier, test: ImageSet, *, count: int, own_labels: bool) -> ArrayImages:
    """Return the first `count` test images that the model gets right: every one, where the labels are its own."""
    kept: list[int] = []
    labels = test.labels.copy()
    for start in range(0, len(test), 250):
        ids = np.arange(start, min(start + 250, len(test)))
        with torch.no_grad():
            predictions = model(torch.from_numpy(test.read(ids)).float() / 255).argmax(1).numpy()
        if own_labels:
            labels[ids] = predictions
        kept += ids[predictions == labels[ids]].tolist()
        if len(kept) >= count:
            break
    rows = np.array(kept[:count])
    return ArrayImages(images=test.read(rows), labels=labels[rows], classes=test.classes, origin="the benchmark")


@dataclass(frozen=True)
class Walk:
    """What plain PGD did."""

    last: Tensor
    """The last iterates (N, C, H, W)."""
    first_broken: Tensor
    """(N,) int64: how many steps it took until an image was misclassified for the first time; `steps` + 1: never."""


def plain_pgd(
    model: nn.Module, images: Tensor, labels: Tensor, *, threat: ThreatModel, steps: int, step_size: float
) -> Walk:
    """Projected gradient descent (Madry et al., arXiv:1706.06083) in Linf from the images, written down plainly."""
    current = images.clone()
    first_broken = torch.full_like(labels, steps + 1)
    for step in range(steps + 1):
        current.requires_grad_()
        logits = model(current)
        wrong = logits.argmax(1) != labels
        first_broken[wrong & (first_broken > steps)] = step
        if step == steps:
            break
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), current)
        moved = current.detach() + step_size * gradient.sign()
        current = (images + (moved - images).clamp(-threat.radius, threat.radius)).clamp(0, 1)
    return Walk(current.detach(), first_broken)
