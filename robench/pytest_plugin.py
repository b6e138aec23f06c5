"""The pytest plugin: `@pytest.mark.robustness(threat=..., at_least=...)` on a test that has a fixture `model`.

It is loaded in every run of pytest where robench is installed, so it imports nothing until a test has the mark.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator

import pytest

_MARK = "robustness"


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line(
        "markers",
        f"{_MARK}(threat, at_least, attack='pgd-20', dataset=..., examples=200): the fixture `model` withstands an "
        "attack (robench.testing.assert_robust)",
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Attack the model after the test itself has passed."""
    result = yield
    for mark in pyfuncitem.iter_markers(_MARK):
        _check(pyfuncitem, mark)
    return result


def _check(item: pytest.Function, mark: pytest.Mark) -> None:
    from robench.errors import RobenchError
    from robench.testing import assert_robust

    options = dict(mark.kwargs)
    model = options.pop("model", item.funcargs.get("model"))
    if model is None:
        pytest.fail(
            f"@pytest.mark.{_MARK} attacks what the fixture `model` returns; write one, take it as an argument of "
            f"{item.name}, or name a model: model='mnist-pgd'",
            pytrace=False,
        )
    options.setdefault("data", item.funcargs.get("data") if "dataset" not in options else None)
    try:
        inspect.signature(assert_robust).bind(model, *mark.args, **options)
    except TypeError as error:
        pytest.fail(f"@pytest.mark.{_MARK}: {error}; see robench.testing.assert_robust", pytrace=False)
    try:
        found = assert_robust(model, **options)
    except (AssertionError, RobenchError) as error:
        pytest.fail(str(error), pytrace=False)
    item.user_properties.append(("robust_accuracy", found.accuracy))
