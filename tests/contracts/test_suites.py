"""What every suite keeps."""

from __future__ import annotations

import pytest

from robench import catalog, planning
from robench.records import Configured, Examples, ModelIdentity
from robench.threat_model import NORMS, ThreatModel

MODEL = ModelIdentity(id="m", weights_sha256="a" * 64, architecture=Configured(name="small_cnn"))
EXAMPLES = Examples(dataset="mnist", split="test", split_sha256="b" * 64, split_size=9, count=9, ids_sha256="c" * 64)


@pytest.fixture(params=catalog.plugins("suites"))
def suite(request) -> planning.Suite:
    return planning.load_suite(request.param)


def test_it_says_what_it_is_and_holds_something(suite):
    assert suite.summary
    assert suite.source
    assert suite.certificates or any(suite.under(norm) for norm in NORMS)


@pytest.mark.parametrize("norm", NORMS)
def test_its_attacks_have_a_form_for_the_norm_and_differ(suite, norm):
    attacks = suite.under(norm)
    if not attacks:
        pytest.skip("the suite says nothing for this norm, and planning says so")
    request = planning.Request(MODEL, EXAMPLES, [ThreatModel.parse(f"{norm}@0.5")], suite=suite)
    assert len(planning.plan(request)) == len(set(attacks)) == len(attacks)


def test_the_papers_run_under_both_norms():
    linf, l2 = (planning.load_suite("papers").under(norm) for norm in NORMS)
    assert "autoattack" in linf
    assert "autoattack" in l2
