"""Results on disk: written once, whole or not at all, and loud when damaged."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from synthetic import first_of, put, put_transfer, record, rows, spec

from robench.errors import StorageError, UnsafeFile, UserError
from robench.records import OUTCOME_COLUMNS, Cost, Proportion
from robench.store import Store, file_name, outcome_bytes, outcome_sha256

COST = Cost(forward_passes=3, backward_passes=2, seconds=0.5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "reports")


def files(store: Store) -> list[str]:
    return sorted(str(p.relative_to(store.root)) for p in store.root.rglob("*") if p.is_file())


def test_what_is_written_is_read_back(store: Store) -> None:
    written = put(store, spec(), first_of(50, 30))
    assert store.find(spec()) == written
    assert store.find(spec(seed=1)) is None
    assert [stored.record for stored in store.records()] == [written]
    expected, found = rows(first_of(50, 30)), store.outcomes(written)
    assert list(found) == list(OUTCOME_COLUMNS)
    for name, kind in OUTCOME_COLUMNS.items():
        np.testing.assert_array_equal(found[name], expected[name])
        assert found[name].dtype.kind == "U" if kind == "string" else str(found[name].dtype) == kind


def test_a_complete_record_is_written_once(store: Store) -> None:
    first = put(store, spec(), first_of(50, 30))
    before = {name: (store.root / name).read_bytes() for name in files(store)}
    put(store, spec(), first_of(50, 10))
    assert store.find(spec()) == first
    assert {name: (store.root / name).read_bytes() for name in files(store)} == before


def test_a_failed_record_is_replaced_and_goes_when_a_complete_one_comes(store: Store) -> None:
    put(store, spec(), first_of(40, 1), failed=True)
    assert store.find(spec()) is None
    second = put(store, spec(), first_of(40, 2), failed=True)
    assert [stored.record for stored in store.records()] == [second]
    assert len(files(store)) == 2
    complete = put(store, spec(), first_of(50, 3))
    put(store, spec(), first_of(40, 4), failed=True)
    assert [stored.record for stored in store.records()] == [complete]
    assert len(files(store)) == 2


def test_a_failed_record_beside_a_complete_one_is_passed_over(store: Store) -> None:
    complete = put(store, spec(), first_of(50, 3))
    failed = record(spec(), rows(first_of(40, 1)), failed=True)
    store.record_path(spec()).with_suffix(".failed.json").write_text(failed.to_json())
    assert [stored.record for stored in store.records()] == [complete]


def test_rows_that_do_not_make_the_record_are_refused(store: Store) -> None:
    outcomes = rows(first_of(50, 30))
    good = record(spec(), outcomes)
    with pytest.raises(ValueError, match="outcomes_sha256"):
        store.write(good, rows(first_of(50, 29)))
    wrong = Proportion(successes=29, n=50, value=0.58, clopper_pearson=(0, 1), wilson=(0, 1))
    with pytest.raises(ValueError, match="30 of 50 rows are robust"):
        store.write(good.model_copy(update={"robust": wrong}), outcomes)
    assert files(store) == []


WRITER = """
import sys, time
from pathlib import Path
from robench.store import Store
from synthetic import first_of, put, spec
root, robust, start = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0.0, start - time.time()))
for seed in range(20):
    put(Store(root), spec(seed=seed), first_of(50, robust))
"""


def test_processes_that_write_the_same_records_at_once(store: Store) -> None:
    """Each record names the rows it was made from, and no other file is left, whoever comes first."""
    import time

    start = str(time.time() + 1.0)
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    command = [sys.executable, "-c", WRITER, str(store.root)]
    writers = [subprocess.Popen([*command, str(robust), start], env=environment) for robust in (10, 20, 30)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    records = [stored.record for stored in store.records()]
    assert len(records) == 20
    for found in records:
        assert store.outcomes(found)["robust"].sum() == found.robust.successes
    assert len(files(store)) == 40


@pytest.mark.parametrize("step", ["replace", "link"])
def test_the_later_of_two_writers_withdraws(store: Store, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The other record lands after this one's look: before its rows are there, or before its link."""
    original = getattr(os, step)

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, step, original)
        put(store, spec(), first_of(50, 10))
        original(source, target)

    monkeypatch.setattr(os, step, overtaken)
    put(store, spec(), first_of(50, 20))
    (stored,) = store.records()
    assert stored.record.robust.successes == store.outcomes(stored.record)["robust"].sum() == 10
    assert len(files(store)) == 2


@pytest.mark.parametrize("step", ["link", "fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "may not write"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_disk_that_refuses_leaves_no_half_record(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str, code: int, remedy: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, step, refuse)
        with pytest.raises(StorageError, match=remedy) as caught:
            put(store, spec(), first_of(50, 30))
    assert str(store.root) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(store.records()) == []
    assert not [name for name in files(store) if name.endswith(".tmp")]
    put(store, spec(), first_of(50, 30))
    assert len(files(store)) == 2


def test_check_writable(store: Store) -> None:
    store.check_writable()
    assert files(store) == []
    store.root.rename(store.root.with_name("elsewhere"))
    store.root.write_text("a file in the way")
    with pytest.raises(StorageError, match=r"cannot write to .*reports.*: a file is in the way"):
        store.check_writable()
    with pytest.raises(StorageError, match="a file is in the way"):
        put(store, spec(), first_of(50, 30))


def test_damaged_records_are_named(store: Store) -> None:
    put(store, spec(), first_of(50, 30))
    path = store.record_path(spec())
    text = path.read_bytes()
    for damage, problem in {
        text[: len(text) // 2]: "is not a JSON object",
        b"\xff\xfe": "is not a JSON object",
        b"{}": r"spec: Field required; restore it from version control, or delete it and run robench eval again$",
        text.replace(b'"seed": 0', b'"seed": 1'): "was changed",
        text.replace(b'"schema_version": 2', b'"schema_version": 3'): "schema version 3",
    }.items():
        path.write_bytes(damage)
        for read in (lambda: list(store.records()), lambda: store.find(spec())):
            with pytest.raises(UserError, match=problem) as caught:
                read()
            assert str(path) in str(caught.value)


def test_damaged_or_missing_outcomes_are_named(store: Store) -> None:
    written = put(store, spec(), first_of(50, 30))
    path = store.outcomes_path(written)
    path.write_bytes(outcome_bytes(rows(first_of(50, 31))))
    with pytest.raises(UnsafeFile, match="does not match") as caught:
        store.outcomes(written)
    assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(UnsafeFile, match="is missing"):
        store.outcomes(written)


def test_outcome_bytes_depend_on_the_rows_alone() -> None:
    outcomes = rows(first_of(50, 30))
    order = np.random.default_rng(0).permutation(50)
    shuffled = {name: outcomes[name][order] for name in reversed(outcomes)}
    narrow = {
        **outcomes,
        "linf": outcomes["linf"].astype(np.float64),
        "label": outcomes["label"].astype(np.int64),
    }
    assert outcome_bytes(outcomes) == outcome_bytes(shuffled) == outcome_bytes(narrow)
    assert outcome_bytes(outcomes) == outcome_bytes(pa.table(outcomes))
    assert outcome_sha256(outcomes) != outcome_sha256(rows(first_of(50, 29)))


def test_rows_of_another_form_are_refused() -> None:
    good = rows(first_of(5, 3))
    for wrong, problem in (
        ({name: v for name, v in good.items() if name != "l2"}, "missing or unknown columns: l2"),
        ({**good, "queries": good["label"]}, "missing or unknown columns: queries"),
        ({**good, "label": good["label"][:4]}, "do not fit"),
        ({**good, "label": good["label"] + 0.5}, "do not fit"),
        ({**good, "example_id": np.array([0, 1, 2, 2, 3])}, "example 2 twice"),
    ):
        with pytest.raises(ValueError, match=problem):
            outcome_bytes(wrong)


def test_the_journal_keeps_shards_until_it_is_cleared(store: Store) -> None:
    outcomes = rows(first_of(50, 30))
    assert len(store.journal_read("abc")["example_id"]) == 0
    assert store.journal_cost("abc") == Cost(forward_passes=0, backward_passes=0, seconds=0.0)
    for part in (slice(25, 50), slice(0, 25), slice(20, 30)):
        store.journal_write("abc", {name: values[part] for name, values in outcomes.items()}, cost=COST)
    store.journal_write("abcd", outcomes, cost=COST)
    found = store.journal_read("abc")
    for name, values in outcomes.items():
        np.testing.assert_array_equal(found[name], values)
    assert store.journal_cost("abc") == Cost(forward_passes=9, backward_passes=6, seconds=1.5)
    store.journal_clear("abc")
    assert len(store.journal_read("abc")["example_id"]) == 0
    assert len(store.journal_read("abcd")["example_id"]) == 50


def test_a_damaged_journal_file_counts_as_not_computed(store: Store) -> None:
    outcomes = rows(first_of(50, 30))
    for part in (slice(0, 25), slice(25, 50)):
        store.journal_write("abc", {name: values[part] for name, values in outcomes.items()}, cost=COST)
    for damage in (lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * len(data)):
        first = sorted((store.root / ".work").iterdir())[0]
        whole = first.read_bytes()
        first.write_bytes(damage(whole))
        np.testing.assert_array_equal(store.journal_read("abc")["example_id"], np.arange(25, 50))
        assert store.journal_cost("abc") == COST
        first.write_bytes(whole)


@pytest.mark.parametrize(
    "name", ["torchvision:resnet50", "my/file.py:make", "..", "../up", "", ".hidden", "a b", "é", "x" * 300]
)
def test_file_names_are_safe_and_distinct(name: str, tmp_path: Path) -> None:
    safe = file_name(name)
    assert (tmp_path / safe).parent == tmp_path
    assert safe != name
    assert not safe.startswith((".", "-"))
    assert len(safe) < 100
    assert safe != file_name(name + ":")
    assert file_name("small_cnn-1.0") == "small_cnn-1.0"


def test_a_transfer_is_written_once_and_read_back(store: Store) -> None:
    source, target = spec("a", "pgd-40"), spec("b").model
    first = put_transfer(store, source, target, first_of(50, 30))
    assert store.find_transfer(first.spec) == first
    assert [stored.record for stored in store.transfers()] == [first]
    assert store.outcomes(first)["robust"].sum() == 30
    before = files(store)
    put_transfer(store, source, target, first_of(50, 10))
    assert store.find_transfer(first.spec) == first
    assert files(store) == before
    assert [t.record for t in store.results({}).transfers] == [first]
    wrong = first.model_copy(update={"robust": first.robust.model_copy(update={"successes": 29})})
    with pytest.raises(ValueError, match="30 of 50 rows are robust"):
        store.write_transfer(wrong, rows(first_of(50, 30)))
    path = store.transfer_path(first.spec)
    path.rename(path.with_name("0" * 16 + ".json"))
    with pytest.raises(UnsafeFile, match="was changed"):
        list(store.transfers())


def test_of_two_writers_of_a_transfer_one_wins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = spec("a", "pgd-40"), spec("b").model
    exists = Path.exists
    first = put_transfer(store, source, target, first_of(50, 30))
    # The second looks before the first has written.
    monkeypatch.setattr(Path, "exists", lambda self: False if self.suffix == ".json" else exists(self))
    put_transfer(store, source, target, first_of(50, 10))
    assert store.find_transfer(first.spec) == first
    assert len(files(store)) == 2


def test_complete_records_of_a_model_pass_over_damaged_ones(store: Store) -> None:
    kept = put(store, spec("a", "fgsm"), first_of(50, 30))
    put(store, spec("a", "fgsm", weights="former"), first_of(50, 30))
    put(store, spec("a", "pgd-20"), first_of(50, 20), failed=True)
    put(store, spec("b", "fgsm"), first_of(50, 20))
    damaged = store.record_path(spec("a", "pgd-40"))
    damaged.write_text("{")
    assert list(store.complete_of(spec("a").model)) == [kept]
