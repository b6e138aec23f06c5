"""The preflight: what is wrong with a model is found before it is attacked, and named with its likely cause.

A model in train mode, one that returns probabilities, or one that sees wrongly scaled images still gives
numbers. They would be published as robustness.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from robench.classifier import LOGIT_TOLERANCE, Classifier, frozen, logit_gap, tensor_float32
from robench.errors import PreflightFailed
from robench.losses import Criterion, loss_named
from robench.records import PLAIN, Decision, Proportion

#: Two equal calls may differ by this share of the largest logit: parallel sums on a GPU have no fixed order.
_REPEAT_TOLERANCE = 1e-5
#: A sound model is stopped for its accuracy at most this often (two-sided).
_ACCURACY_LEVEL = 1e-4
#: More images than this share without any gradient of an attack's loss stop the evaluation: its number would be the
#: clean accuracy by another name. Fewer leave a number that means something and is too high by an amount that can be
#: measured: that is a diagnostic's business (:mod:`robench.evaluation.diagnostics`), which also runs stronger attacks.
_FLAT_SHARE = 0.5
#: Images at a time: the activations of a large ImageNet network stay below a gigabyte.
_BATCH = 32


def preflight(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    card_accuracy: Proportion | None = None,
    losses: Collection[str] = (),
    decision: Decision = PLAIN,
) -> None:
    """Stop an evaluation that would mislead.

    Args:
        model: the plain classifier, in eval mode.
        images: `(N, C, H, W)` clean images in [0, 1] on the model's device, N at least 1; some hundred make
            the comparison of accuracies sharp.
        labels: `(N,)` int64.
        losses: names of the losses (:data:`robench.losses.LOSSES`) that attacks are going to ascend.
        card_accuracy: clean accuracy on images of the same kind, None where unknown.
        decision: how predictions are made. A model that answers at random is let through where several passes
            decide; then whether the answer depends on the batch cannot be told, and is not looked at.

    Raises PreflightFailed, one line with the likely cause, for the first of these: a submodule in train mode;
    images or labels that do not fit; an output that is not `(N, K)` and finite, is made of probabilities,
    changes when the call is repeated, depends on the rest of the batch, or changes the model; no gradient to
    the images; a loss without any gradient for most images; clean accuracy that is implausible (two-sided
    binomial test at 1e-4) for every value in the card's interval.

    What stops here would make every number meaningless. What makes one too high, by how much and for which
    attack, is told by the record's diagnostics.
    """
    _check_mode(model)
    _check_data(model, images, labels)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), tensor_float32(allowed=False):
        parts = [_checked_logits(model, part) for part in torch.split(images, _BATCH)]
        _check_pure(model, images[:_BATCH], parts[0], before=before, decision=decision)
    _check_gradient(model, images[:_BATCH])
    for loss in losses:
        _check_loss(model, images, labels, loss=loss, criterion=Criterion(decision.top_k))
    if card_accuracy is not None:
        correct = int((torch.cat(parts).argmax(1) == labels).sum())
        _check_accuracy(correct, len(labels), card_accuracy)


def _check_mode(model: Classifier) -> None:
    # Named as in the user's own network; the classifier around it is ours.
    own = type(model.network).__name__
    names = [name.removeprefix("network").lstrip(".") for name, module in model.named_modules() if module.training]
    training = [name or own for name in names]
    if training:
        raise PreflightFailed(
            f"the model is in train mode ({training[0]}{' and others' if len(training) > 1 else ''}): "
            "dropout and batch statistics would be on; call .eval() where it is made (return model.eval())"
        )


def _check_data(model: Classifier, images: Tensor, labels: Tensor) -> None:
    if images.dim() != 4 or tuple(images.shape[1:]) != tuple(model.input_shape) or not len(images):
        raise PreflightFailed(
            f"images have shape {tuple(images.shape)}, the model takes {_shape('N', *model.input_shape)}; "
            "choose the data set that it was trained on"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        low, high = images.min().item(), images.max().item()
        raise PreflightFailed(
            f"images range from {low:.4g} to {high:.4g}, not within [0, 1]; divide pixels by 255 and leave "
            "normalisation to the model"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise PreflightFailed(
            f"labels are {labels.dtype} {tuple(labels.shape)}, not one int64 for each of {len(images)} images"
        )
    wrong = (labels < 0) | (labels >= model.num_classes)
    if bool(wrong.any()):
        raise PreflightFailed(
            f"label {labels[wrong][0].item()} is not in 0..{model.num_classes - 1}, the model's classes; "
            "choose the data set that it was trained on, and number classes from 0"
        )


def _call(model: Classifier, images: Tensor) -> Any:
    try:
        return model(images)
    except Exception as error:
        raise PreflightFailed(
            f"the model fails on images of shape {tuple(images.shape)}: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error


def _checked_logits(model: Classifier, images: Tensor) -> Tensor:
    logits, count, classes = _call(model, images), len(images), model.num_classes
    if not isinstance(logits, Tensor):
        raise PreflightFailed(f"the model returns a {type(logits).__name__}, not a tensor of logits {_shape('N', 'K')}")
    if tuple(logits.shape) != (count, classes):
        raise PreflightFailed(
            f"the model returns {tuple(logits.shape)} for {count} images, not {_shape(count, classes)}; "
            f"does it have the data set's {classes} classes?"
        )
    if not bool(torch.isfinite(logits).all()):
        raise PreflightFailed("the model returns NaN or infinite logits on clean images; are its weights damaged?")
    sums = logits.sum(1)
    if bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise PreflightFailed(
            "the model returns probabilities (rows are positive and sum to 1): attacks on saturated softmax "
            "find no gradient; return the logits in front of it"
        )
    return logits


def _check_pure(
    model: Classifier, images: Tensor, logits: Tensor, *, before: dict[str, Tensor], decision: Decision
) -> None:
    changed = [n for n, b in model.named_buffers() if n not in before or not torch.equal(b, before[n])]
    if changed:
        raise PreflightFailed(
            f"evaluating the model changes it (buffer {changed[0]}); are running statistics still on?"
        )
    gap = logit_gap(_call(model, images), logits)
    if gap > _REPEAT_TOLERANCE:
        if not decision.plain:
            return
        raise PreflightFailed(
            f"the model answers the same images differently (by {gap:.1e} of the largest logit): is dropout on? A "
            "randomised defense needs several votes for each prediction, and attacks that average over its randomness"
        )
    for row in {0, len(images) - 1}:
        alone = _call(model, images[row : row + 1])
        if alone.shape[0] != 1:
            raise PreflightFailed(
                f"the model returns {tuple(alone.shape)} for one image; it must keep the batch's size"
            )
        # Relative to the batch's logits: one image's may all be near zero.
        gap = (alone[0] - logits[row]).abs().max().item() / max(logits.abs().max().item(), 1e-6)
        if gap > LOGIT_TOLERANCE:
            raise PreflightFailed(
                f"the model's answer to an image depends on the rest of the batch (by {gap:.1e} of the "
                "largest logit): does it normalise with batch statistics?"
            )


def _check_gradient(model: Classifier, images: Tensor) -> None:
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad(), frozen(model):
        # The largest logit, not a loss: the loss of a confident, sound model can be flat in float32.
        largest = _call(model, leaf).amax(1).sum()
        if not largest.requires_grad:
            raise PreflightFailed(
                "no gradient leads from the logits to the images; does the model detach, round or run under no_grad?"
            )
        (gradient,) = torch.autograd.grad(largest, leaf, allow_unused=True)
    if gradient is None or not bool((gradient != 0).any()):
        if _is_constant(model, images):
            raise PreflightFailed(
                "the model gives every image the same answer: it has collapsed to a constant, and there is nothing to "
                "attack; train it anew, with another seed, a lower learning rate or less regularisation"
            )
        raise PreflightFailed(
            "the gradient to the images is zero for all of them, so that gradient attacks would report "
            "robustness; does the model detach, round or quantise its input?"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise PreflightFailed("the gradient to the images has NaN or infinite values; attacks cannot follow it")


@torch.no_grad()
def _is_constant(model: Classifier, images: Tensor) -> bool:
    """Tell whether the logits are the same at images, their negatives and one in grey."""
    shown = torch.cat([images, 1 - images, torch.full_like(images[:1], 0.5)])
    logits = _call(model, shown)
    return logit_gap(logits, logits[:1].expand_as(logits)) < LOGIT_TOLERANCE


def _check_loss(model: Classifier, images: Tensor, labels: Tensor, *, loss: str, criterion: Criterion) -> None:
    """Stop where a loss is flat: with huge logits the cross-entropy's gradient underflows, and attacks stand still."""
    # What attacks ascend under this name: the DLR has no form below 3 classes.
    ascended, flat = loss_named(loss, criterion, model), 0
    for some, own in zip(torch.split(images, _BATCH), torch.split(labels, _BATCH), strict=True):
        leaf = some.detach().clone().requires_grad_()
        with torch.enable_grad(), frozen(model):
            (gradient,) = torch.autograd.grad(ascended(model(leaf), own).sum(), leaf)
        flat += int((gradient.flatten(1) == 0).all(1).sum())
    if flat > _FLAT_SHARE * len(images):
        with torch.no_grad():
            largest = model(images[:_BATCH]).abs().max().item()
        raise PreflightFailed(
            f"the gradient of the loss {loss!r} is exactly zero for {flat} of {len(images)} images (logits up to "
            f"{largest:.3g}): attacks on it would report robustness; divide the logits by a constant, or attack "
            "another loss, such as pgd-20:loss=margin"
        )


def _check_accuracy(correct: int, count: int, card_accuracy: Proportion) -> None:
    low, high = card_accuracy.clopper_pearson
    nearest = min(max(correct / count, low), high)
    if correct / count == nearest:
        return
    # Imported here: it brings scipy, a second that only models with a surprising accuracy cost.
    from statsmodels.stats.proportion import binom_test

    side = "larger" if correct / count > nearest else "smaller"
    if binom_test(correct, count, nearest, alternative=side) < _ACCURACY_LEVEL / 2:
        raise PreflightFailed(
            f"clean accuracy is {correct / count:.1%} ({correct} of {count}), the card says "
            f"{card_accuracy.value:.1%}; wrong normalisation, wrong data or wrong weights?"
        )


def _shape(*sizes: object) -> str:
    return f"({', '.join(map(str, sizes))})"
