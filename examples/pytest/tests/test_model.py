import pytest


@pytest.mark.robustness(threat="Linf@0.05", attack="pgd-20", at_least=0.6, dataset="digits")
def test_withstands_small_changes(model):
    assert not model.training


def test_withstands_l2(model):
    from robench.testing import assert_robust

    left = assert_robust(model, threat="L2@0.3", attack="pgd-20", at_least=0.6, dataset="digits")
    assert left.clean > 0.85
