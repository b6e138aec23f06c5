"""What is persisted comes back equal, and nothing else is accepted."""

from __future__ import annotations

import json

import pytest
from synthetic import spec

from robench.errors import UserError
from robench.records import EvalSpec, canonical_hash


def test_write_and_read_are_inverse():
    question = spec("m", "pgd-20")
    again = EvalSpec.from_json(question.to_json(), origin="here")
    assert again == question
    assert again.to_json() == question.to_json()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema_version": 3}, "upgrade robench"),
        ({"schema_version": 0}, "measure again"),
        ({"surprise": 1}, "surprise"),
        ({"seed": "seven"}, "seed"),
        ({"precision": "fp8"}, "precision"),
        ({"threat": {"norm": "Linf", "epsilon": "x"}}, "threat"),
    ],
)
def test_anything_else_is_refused_with_its_origin(change, problem):
    values = json.loads(spec("m", "pgd-20").to_json()) | change
    with pytest.raises(UserError, match=r"^reports/a\.json ") as caught:
        EvalSpec.from_json(json.dumps(values), origin="reports/a.json")
    assert problem in str(caught.value)


def test_what_is_damaged_is_refused_with_the_remedy():
    for text in ("", "[]", '{"schema_version": 0}', "{}"):
        with pytest.raises(UserError, match=r"^reports/a\.json .*[^;]; delete it and measure again$"):
            EvalSpec.from_json(text, origin="reports/a.json", remedy="delete it and measure again")


def test_what_is_no_json_is_refused():
    for text in ("", "[]", "{"):
        with pytest.raises(UserError, match="not a JSON object"):
            EvalSpec.from_json(text, origin="reports/a.json")


def test_hash_does_not_depend_on_the_order_of_keys():
    assert canonical_hash({"a": 1, "b": [1, 2]}) == canonical_hash({"b": [1, 2], "a": 1})
    assert canonical_hash({"a": 1}) != canonical_hash({"a": 2})
