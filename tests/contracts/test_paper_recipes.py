"""Every training that the four papers report, their baselines included, is a recipe of the catalog."""

from __future__ import annotations

import pytest

from robench.recipe import load_recipe

#: The trainings by their names: paper, method and data. A recipe has the same name, or stands in ELSEWHERE.
_NAMES = """
    atent-l2-mnist atent-linf-mnist atent-linf-cifar10 atent-linf-finetune-cifar10 atent-l2-cifar10-eps1
    atent-l2-smooth-cifar10 atent-sgd-mnist atent-entropysgd-mnist atent-toy2d
    trades-cifar10-wrn trades-mnist trades-l2-mnist trades-smooth-cifar10 mart-cifar10-wrn mart-mnist
    pgd-at-cifar10-wrn pgd-at-es-cifar10-wrn pgd-at-mnist mma-mnist mma-cifar10-l2 pgd-at-cifar10-l2

    heat-baseline-cifar10 heat-cifar10 heat-imagenet-baseline heat-imagenet heat-imagenet-robust
    heat-rs-cifar10 heat-smoothadv-cifar10 heat-rs-imagenet heat-smoothadv-imagenet

    sgr-clean-mnist sgr-wdecay-mnist sgr-pgd_adv-mnist sgr-fgsm_adv-mnist sgr-gn-mnist
    sgr-sgr_grad-mnist sgr-sgr_sign-mnist sgr-fgsm_sgr-mnist sgr-pgd_sgr-mnist
    sgr-clean-cifar10 sgr-wdecay-cifar10 sgr-pgd_adv-cifar10 sgr-fgsm_adv-cifar10 sgr-gn-cifar10
    sgr-sgr_grad-cifar10 sgr-sgr_sign-cifar10 sgr-fgsm_sgr-cifar10 sgr-pgd_sgr-cifar10 sgr-lrc_augmented-cifar10

    emr-mlp-st emr-mlp-st-lsoftmax emr-mlp-st-emr emr-mlp-st-approx
    emr-mlp-at emr-mlp-at-lsoftmax emr-mlp-at-emr emr-mlp-at-approx
    emr-cnn-st emr-cnn-st-lsoftmax emr-cnn-st-emr emr-cnn-st-approx
    emr-cnn-at emr-cnn-at-lsoftmax emr-cnn-at-emr emr-cnn-at-approx
    emr-r18-at emr-r18-at-igr emr-r18-at-emr emr-r18-trades emr-r18-trades-igr emr-r18-trades-emr
    emr-wrn-at emr-wrn-at-igr emr-wrn-at-emr emr-wrn-trades emr-wrn-trades-igr emr-wrn-trades-emr
    emr-wrn-at-he emr-wrn-trades-he emr-wrn-at-mail emr-wrn-trades-mail emr-wrn-at-mail-emr emr-wrn-trades-mail-emr
    emr-wrn-mart emr-wrn-mart-emr emr-wrn-lbgat emr-wrn-lbgat-emr
"""
TRAININGS = _NAMES.split()

#: What another recipe, or two, stand for, and why.
ELSEWHERE = {
    "emr-wrn-mart": (["mart-cifar10-wrn"], "the paper evaluates the weights that MART's authors released"),
    "pgd-at-mnist": (["pgd-at-mnist", "pgd-at-l2-mnist"], "one entry for two networks and two norms"),
}


def recipes_of(training):
    return ELSEWHERE[training][0] if training in ELSEWHERE else [training]


@pytest.mark.parametrize("training", TRAININGS)
def test_is_a_recipe(training):
    paper = training.partition("-")[0]
    for name in recipes_of(training):
        recipe = load_recipe(name)
        assert recipe.source
        if paper in {"sgr", "emr", "atent"} and name == training:
            source = {"sgr": "1805.08736", "emr": "2210.05118", "atent": "2008.12338"}[paper]
            assert source in recipe.source, "says which paper it is from"
        for data in {"mnist", "cifar10", "imagenet"} & set(training.split("-")):
            assert recipe.dataset == data


def test_exceptions_are_trainings():
    assert len(set(TRAININGS)) == len(TRAININGS)
    assert set(ELSEWHERE) <= set(TRAININGS)
