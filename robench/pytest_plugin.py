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
    """Attack the model; where that fails, fail with one line, outside of any except clause, which would add another."""
    if problem := _problem(item, mark):
        pytest.fail(problem, pytrace=False)


def _problem(item: pytest.Function, mark: pytest.Mark) -> str | None:
    """Return what is wrong with the mark or the model, None if the model withstands the attack."""
    from robench.errors import RobenchError, suggestion
    from robench.testing import assert_robust

    options = dict(mark.kwargs)
    model = options.pop("model", item.funcargs.get("model"))
    if model is None:
        return (
            f"@pytest.mark.{_MARK} attacks what the fixture `model` returns; write one, take it as an argument of "
            f"{item.name}, or name a model: model='mnist-pgd'"
        )
    options.setdefault("data", item.funcargs.get("data") if "dataset" not in options else None)
    signature = inspect.signature(assert_robust)
    if unknown := [name for name in options if name not in signature.parameters]:
        near = suggestion(unknown[0], signature.parameters)
        return f"@pytest.mark.{_MARK} has no argument {unknown[0]!r}; {near}"
    try:
        signature.bind(model, *mark.args, **options)
    except TypeError as error:
        return f"@pytest.mark.{_MARK}: {error}; see robench.testing.assert_robust"
    try:
        found = assert_robust(model, **options)
    except (AssertionError, RobenchError) as error:
        return str(error)
    item.user_properties.append(("robust_accuracy", found.accuracy))
    return None
