"""The toy plane of figure 1 of ATENT: its points, its map to pixels, and what its lengths become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robench.attacks.atent import LangevinWalk
from robench.attacks.pgd import pgd
from robench.checkpoints import build_classifier
from robench.classifier import Classifier
from robench.datasets import _tsne_plane, mnist, mnist_5v8_tsne
from robench.datasets._tsne_plane import HEADER, embed, read_points, write_points
from robench.datasets.mnist_5v8_tsne import load, pixels_of
from robench.errors import MissingData, UnsafeFile, UserError
from robench.random_streams import RandomStream
from robench.recipe import load_recipe
from robench.threat_model import ThreatModel

RECIPES = ("atent-toy2d", "atent-toy2d-trades", "atent-toy2d-pgd", "atent-toy2d-naive")
IDS = np.arange(64)


def plane(recipe: str = "atent-toy2d") -> Classifier:
    """A recipe's untrained classifier."""
    found = load_recipe(recipe)
    return build_classifier(
        found.architecture, num_classes=2, input_shape=(1, 1, 2), normalization=found.normalization
    ).eval()


def test_the_splits_are_those_of_the_notebook() -> None:
    train, test = load(Path(), "train"), load(Path(), "test")
    assert (len(train), len(test)) == (1307, 559)
    assert sum(int((s.labels == 0).sum()) for s in (train, test)) == 892, "MNIST's test images of 5"
    assert sum(int((s.labels == 1).sum()) for s in (train, test)) == 974, "and of 8"
    points, digits = read_points()
    both = np.concatenate([train.read(np.arange(1307)), test.read(np.arange(559))]).reshape(-1, 2)
    labels = np.concatenate([train.labels, test.labels])
    stored = [(*xy, int(d == 8)) for xy, d in zip(pixels_of(points).reshape(-1, 2).tolist(), digits, strict=True)]
    split = [(*xy, int(k)) for xy, k in zip(both.tolist(), labels, strict=True)]
    assert sorted(split) == sorted(stored), "every point is in one split"


def test_the_map_to_pixels_is_known_and_comes_back() -> None:
    corners = np.array([[-10.0, 10.0], [0.0, -10.0], [10.0, 4.0]])
    assert pixels_of(corners).tolist() == [[[[0, 255]]], [[[128, 0]]], [[[255, 178]]]]
    points = read_points()[0]
    back = pixels_of(points).reshape(-1, 2) / 255 * 20 - 10
    assert np.abs(back - points).max() <= 10 / 255 + 1e-12
    assert np.abs(back - points).max() > 0.03, "bytes, no floats"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_networks_see_the_planes_own_coordinates(recipe: str) -> None:
    points = torch.tensor([[-10.0, 10.0], [0.0, 3.0], [7.5, -9.0]])
    seen = plane(recipe).normalize(((points + 10) / 20).view(3, 1, 1, 2))
    torch.testing.assert_close(seen.view(3, 2), points, atol=1e-5, rtol=0)


def test_within_a_twentieth_in_pixels_is_within_one_in_the_plane() -> None:
    recipe = load_recipe("atent-toy2d")
    linear = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))  # its gradients have the same signs everywhere
    model = Classifier(linear, input_shape=(1, 1, 2), num_classes=2, normalization=recipe.normalization)
    data = load(Path(), "test")
    images, labels = torch.from_numpy(data.read(IDS)).float() / 255, torch.from_numpy(data.labels[IDS])
    random = RandomStream(0, torch.from_numpy(IDS))
    moved = pgd(model, images, labels, threat=recipe.threat, random=random, steps=40, stop_when_broken=False)
    shift = (model.normalize(moved) - model.normalize(images)).abs().flatten(1).amax(1)
    assert shift.max() <= 1 + 1e-5
    assert shift.min() > 0.99, "the ball is no smaller"


@pytest.mark.parametrize("noise", [1e-9, 0.3])
def test_atents_walk_is_the_planes_walk(noise: float) -> None:
    """x' <- x' + 0.1 sign(g) + sqrt(0.2) noise z in the plane, with the pixels' walk scaled as the recipe scales it."""
    recipe = load_recipe("atent-toy2d").defense.parameters
    assert recipe["noise"] == pytest.approx(1e-9 / 20**0.5, rel=1e-12)
    assert recipe["gamma"] * 0.05 == 1
    threat = ThreatModel.parse("Linf@0.05")
    names = ("step_size", "gradient_transform", "init", "projection_target", "steps", "restoring", "init_std")
    walk = LangevinWalk.planned(
        threat, noise=noise / 20**0.5, gamma=None, projection_when="never", **{n: recipe[n] for n in names}
    )
    pixels = torch.full((64, 1, 1, 2), 0.5, dtype=torch.float64)
    gradient = torch.linspace(-3, 4, 128, dtype=torch.float64).view(64, 1, 1, 2)
    random = RandomStream(3, torch.from_numpy(IDS))
    stepped = 20 * walk.step(gradient, pixels, pixels, number=7, random=random) - 10
    z = random.at("noise", 7).normal(pixels)
    torch.testing.assert_close(stepped, 0.1 * gradient.sign() + 0.2**0.5 * noise * z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_four_trainings_differ_in_the_defense_alone(recipe: str) -> None:
    own, first = load_recipe(recipe), load_recipe(RECIPES[0])
    same = ("dataset", "architecture", "normalization", "epochs", "batch_size", "optimizer", "schedule", "selection")
    assert all(getattr(own, name) == getattr(first, name) for name in (*same, "train_examples", "rounds", "seed"))
    if own.threat:
        assert (own.threat, own.defense.parameters["step_size"], own.defense.parameters["steps"]) == (
            ThreatModel.parse("Linf@0.05"),
            0.005,
            40,
        )


def test_the_generator_repeats_itself(data_root: Path) -> None:
    images = mnist_of(data_root, "images-idx3", (28, 28))[:300]
    points = embed(images)
    assert points.shape == (300, 2)
    assert np.array_equal(points, embed(images))
    with pytest.raises(UserError, match="40 images have no embedding of perplexity 40"):
        embed(images[:40])


def test_the_file_is_written_as_it_is_read(data_root: Path, tmp_path: Path, monkeypatch) -> None:
    points, digits = read_points()
    labels = mnist_of(data_root, "labels-idx1", ())
    plane = np.zeros((10_000, 2))
    plane[np.isin(labels, (5, 8))] = points
    monkeypatch.setattr(_tsne_plane, "embed", lambda images: plane)
    write_points(data_root, tmp_path / "points.csv")
    assert (tmp_path / "points.csv").read_bytes() == _tsne_plane.POINTS.read_bytes()
    assert np.array_equal(labels[np.isin(labels, (5, 8))], digits)


def test_without_mnist_the_generator_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="robench data mnist"):
        write_points(tmp_path, tmp_path / "points.csv")
    assert not (tmp_path / "points.csv").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is damaged"),
        ("a,b\n1,2\n", "is damaged: no rows of test image,digit"),
        (f"{HEADER}\n1,5,0.5\n", "is damaged: no rows of"),
        (f"{HEADER}\n1,5,0.5,x\n", "is damaged"),
        (f"{HEADER}\n1,3,0.5,1\n", "is damaged: no rows of"),
        (f"{HEADER}\n1,5,0.5,1\n2,8,-10.5,1\n", r"point \[-10.5, 1.0\] is not in \[-10, 10\]"),
        (f"{HEADER}\n1,5,0.5,nan\n", "is not in"),
        (f"{HEADER}\n1,5,0.5,1\n", "1 points, not 1866"),
    ],
)
def test_a_damaged_file_is_named(text: str, problem: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "points.csv"
    path.write_text(text)
    monkeypatch.setattr(mnist_5v8_tsne, "read_points", lambda: read_points(path))
    with pytest.raises(UnsafeFile, match=problem):
        load(Path(), "test")


def mnist_of(data_root: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The test images or labels, where they are at hand."""
    try:
        return mnist.read_idx(data_root, f"t10k-{name}-ubyte", item_shape=shape)
    except MissingData as error:
        pytest.skip(str(error))
