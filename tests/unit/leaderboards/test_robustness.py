"""The robustness tables: what ranks, by what, and what does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import card, diagnostic, first_of, put, record, rows, sha, spec

from robench.errors import UnsafeFile
from robench.leaderboards.robustness import first_breaker, robustness
from robench.records import Decision
from robench.store import Results, Store
from robench.tables import Table


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "reports")


def tables(store: Store) -> list[Table]:
    return robustness(store.results({}))


def values(table: Table, key: str) -> list[object]:
    return [cell.value for cell in table.column(key)]


def test_the_worst_case_is_the_intersection(store: Store) -> None:
    random = np.random.default_rng(3)
    expected = {}
    for model in "abcdefgh":
        clean = random.random(50) < 0.9
        stands = {attack: clean & (random.random(50) < 0.6) for attack in ("fgsm", "pgd-20", "pgd-100")}
        for attack, mask in stands.items():
            put(store, spec(model, attack), mask, clean=clean)
        # Brute force: one image after the other.
        expected[model] = sum(all(mask[i] for mask in stands.values()) for i in range(50)) / 50
    (table,) = tables(store)
    assert dict(zip(values(table, "model"), values(table, "worst_case"), strict=True)) == expected
    for key in ("clean", "fgsm", "pgd-20", "pgd-100"):
        for worst, single in zip(table.column("worst_case"), table.column(key), strict=True):
            assert worst.value <= single.value
    for cell in table.column("worst_case"):
        assert cell.low <= cell.value <= cell.high
        assert cell.n == 50
    assert [column.key for column in table.columns][8:11] == ["fgsm", "pgd-20", "pgd-100"]


def test_disjoint_weaknesses_add_up(store: Store) -> None:
    put(store, spec("a", "fgsm"), first_of(50, 25))
    put(store, spec("a", "pgd-20"), ~first_of(50, 25))
    put(store, spec("b", "fgsm"), first_of(50, 10))
    put(store, spec("b", "pgd-20"), first_of(50, 10))
    (table,) = tables(store)
    assert values(table, "model") == ["b", "a"]
    assert values(table, "worst_case") == [0.2, 0.0]
    assert values(table, "rank") == [1, 2]


def test_a_failed_record_never_ranks(store: Store) -> None:
    put(store, spec("weak", "pgd-20"), first_of(50, 5))
    put(store, spec("broken", "pgd-20"), first_of(50, 50), failed=True)
    (table,) = tables(store)
    assert values(table, "model") == ["weak"]
    (remark,) = table.remarks
    assert "broken under pgd-20 failed" in remark
    assert "RuntimeError: no gradient" in remark


def test_only_failed_records_make_an_empty_table(store: Store) -> None:
    put(store, spec("broken"), first_of(50, 50), failed=True)
    (table,) = tables(store)
    assert table.rows == ()
    assert len(table.remarks) == 1


def test_a_missing_attack_unranks(store: Store) -> None:
    put(store, spec("easy", "fgsm"), first_of(50, 49))
    put(store, spec("tried", "fgsm"), first_of(50, 48))
    put(store, spec("tried", "pgd-20"), first_of(50, 50), failed=True)
    for attack in ("fgsm", "pgd-20"):
        put(store, spec("full", attack), first_of(50, 20))
    (table,) = tables(store)
    assert values(table, "model") == ["full", "easy", "tried"]
    assert values(table, "rank") == [1, None, None]
    assert [cell.note for cell in table.column("rank")] == [None, *["not ranked: without pgd-20"] * 2]
    assert [cell.note for cell in table.column("pgd-20")] == [None, "not evaluated", "failed"]
    assert [cell.note for cell in table.column("worst_case")] == [None, *["over 1 of 2 attacks"] * 2]


def test_equal_worst_cases_share_a_rank(store: Store) -> None:
    for model, robust in {"c": 10, "b": 20, "a": 20, "d": 30}.items():
        put(store, spec(model), first_of(50, robust))
    (table,) = tables(store)
    assert values(table, "model") == ["d", "a", "b", "c"]
    assert values(table, "rank") == [1, 2, 2, 4]


def test_different_questions_never_share_a_column(store: Store) -> None:
    put(store, spec("a", parameters={"steps": 20, "step_size": 0.01}), first_of(50, 20))
    put(store, spec("b", parameters={"steps": 20, "step_size": 0.02}), first_of(50, 30))
    put(store, spec("b", seed=1, parameters={"steps": 20, "step_size": 0.02}), first_of(50, 30))
    (table,) = tables(store)
    titles = [column.title for column in table.columns if column.title.startswith("pgd")]
    assert titles == [
        "pgd-20 (step_size=0.01, seed=0)",
        "pgd-20 (step_size=0.02, seed=0)",
        "pgd-20 (step_size=0.02, seed=1)",
    ]
    assert values(table, "rank") == [None, None]


def test_a_table_for_each_threat_data_set_and_choice_of_examples(store: Store) -> None:
    for changes in (
        {},
        {"threat": "L2@8/255"},
        {"dataset": "folder:cats & dogs"},
        {"count": 20, "split_size": 50},
    ):
        put(store, spec(**changes), first_of(changes.get("count", 50), 10))
    names = [table.name for table in tables(store)]
    assert names[1:] == [
        "robustness-mnist-l2-8-255",
        "robustness-mnist-linf-0.3",
        "robustness-mnist-linf-0.3-20",
    ]
    assert names[0].startswith("robustness-folder-cats-dogs-")
    assert tables(store)[3].caption == "20 of the 50 test images, each changed by at most 0.3 in Linf norm"


def test_data_of_one_name_and_different_content_are_kept_apart(store: Store) -> None:
    put(store, spec("a"), first_of(50, 10))
    put(store, spec("b", count=40, split_size=40), first_of(40, 10))
    one, two = tables(store)
    assert one.name != two.name
    assert len(one.rows) == len(two.rows) == 1


def test_cards_explain_the_weights_they_describe_and_no_others(store: Store, tmp_path: Path) -> None:
    put(store, spec("a"), first_of(50, 20))
    put(store, spec("a", weights="former weights"), first_of(50, 10))
    put(store, spec("torchvision:resnet50"), first_of(50, 1))
    cards = {"a": card(tmp_path / "a", "a", scale="8 of 100 epochs")}
    (table,) = robustness(store.results(cards))
    new, foreign = table.column("model")
    assert (new.model, new.note) == ("a", "8 of 100 epochs")
    assert (foreign.model, foreign.note) == (None, None)
    assert values(table, "trained_against") == ["Linf@0.3", None]
    assert values(table, "parameters") == [312_202, None]
    # The card's weights were not evaluated: the former ones are all there is, and say that they are.
    (other,) = robustness(store.results({"torchvision:resnet50": card(tmp_path / "x", "x")}))
    assert len(other.rows) == 3
    assert sum(str(cell.note).startswith("weights ") for cell in other.column("model")) == 3


def test_former_weights_and_versions_are_history(store: Store, tmp_path: Path) -> None:
    def version(model: str, number: int, robust: int, **changes: object) -> None:
        question = spec(model, **changes)
        attack = question.attack.model_copy(update={"version": number})
        put(store, question.model_copy(update={"attack": attack}), first_of(50, robust))

    version("a", 1, 25)
    version("a", 2, 20)
    version("a", 2, 10, weights="former weights")
    version("b", 1, 30)
    version("c", 2, 5)
    (table,) = robustness(store.results({"a": card(tmp_path / "a", "a")}))
    assert values(table, "model") == ["a", "c"]
    assert values(table, "worst_case") == [0.4, 0.1]
    assert values(table, "rank") == [1, 2]
    (grid,) = table.figures
    former, now = sha("former weights")[:8], sha("weights of a")[:8]
    found = {
        (model, weights, number, state): cells[1].value
        for (model, _, weights, number, _, state), cells in zip(grid.rows, grid.cells, strict=True)
    }
    assert found == {
        ("a", now, "1", "former"): 0.5,
        ("a", now, "2", "counts"): 0.4,
        ("a", former, "2", "former"): 0.2,
        ("b", sha("weights of b")[:8], "1", "former"): 0.6,
    }


def test_a_failed_answer_of_a_later_version_supersedes_nothing(store: Store) -> None:
    question = spec("a")
    later = question.model_copy(update={"attack": question.attack.model_copy(update={"version": 2})})
    put(store, question, first_of(50, 20))
    put(store, later, first_of(50, 20), failed=True)
    (table,) = tables(store)
    assert values(table, "worst_case") == [0.4]


def test_models_that_no_test_takes_apart_share_a_group(store: Store) -> None:
    for model, robust in {"a": 45, "b": 41, "c": 30, "d": 5, "e": 5}.items():
        put(store, spec(model, "fgsm"), first_of(50, robust))
        put(store, spec(model, "pgd-20"), first_of(50, robust))
    put(store, spec("f", "fgsm"), first_of(50, 50))
    (table,) = tables(store)
    # Nested successes: a has 4 that b has not (p = 0.125), b has 11 that c has not (p = 0.001), c 25 that d has not.
    assert dict(zip(values(table, "model"), values(table, "group"), strict=True)) == {
        "a": "A",
        "b": "A",
        "c": "B",
        "d": "C",
        "e": "C",
        "f": None,
    }
    assert [(cell.low, cell.high) for cell in table.column("rank")] == [
        (1, 2),
        (1, 2),
        (3, 3),
        (4, 5),
        (4, 5),
        (None, None),
    ]


def test_the_comparison_has_the_images_of_every_row(store: Store) -> None:
    clean, one, two = first_of(50, 45), first_of(50, 20), ~first_of(50, 30)
    put(store, spec("a", "fgsm"), one & clean, clean=clean)
    put(store, spec("a", "pgd-20"), two & clean, clean=clean)
    put(store, spec("b", "fgsm"), first_of(50, 33))
    (table,) = tables(store)
    found = table.comparison
    assert found.models == ("a", "b") if values(table, "model") == ["a", "b"] else ("b", "a")

    def mask(data: bytes) -> list[bool]:
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[:50].astype(bool).tolist()

    place = found.models.index("a")
    assert mask(found.clean[place]) == clean.tolist()
    assert mask(found.standing[place]) == (one & two & clean).tolist()
    assert mask(found.standing[1 - place]) == first_of(50, 33).tolist()
    assert np.frombuffer(found.ids, "<u4").tolist() == list(range(50))
    assert np.frombuffer(found.labels, "<u2").tolist() == [i % 10 for i in range(50)]
    assert found.attacks == ("fgsm", "pgd-20")


def test_rows_of_other_examples_are_refused(store: Store) -> None:
    results = store.results({})
    put(store, spec("a", "fgsm"), first_of(50, 20))
    put(store, spec("a", "pgd-20"), first_of(50, 20))
    written = store.results({})
    shifted = Results(
        written.records,
        {},
        lambda r: {
            **written.outcomes(r),
            "example_id": written.outcomes(r)["example_id"] + len(r.spec.attack.name),
        },
    )
    with pytest.raises(UnsafeFile, match="outcomes hold different ones"):
        robustness(shifted)
    assert robustness(results) == []


def test_each_attack_s_part_in_the_worst_case(store: Store) -> None:
    clean = first_of(50, 45)
    fgsm, pgd, square = ~first_of(50, 10), ~first_of(50, 20), first_of(50, 40)
    for attack, mask, seconds in (("square", square, 9.0), ("pgd-20", pgd, 5.0), ("fgsm", fgsm, 1.0)):
        put(store, spec("a", attack), mask & clean, clean=clean, seconds=seconds)
    put(store, spec("b", "fgsm"), fgsm)
    (table,) = tables(store)
    (grid,) = table.figures
    parts = {names: [cell.value for cell in cells] for names, cells in zip(grid.rows, grid.cells, strict=True)}
    # Brute force, image by image; these records' costs are equal, so that names decide the order.
    order = ["fgsm", "pgd-20", "square"]
    stands = {"fgsm": fgsm, "pgd-20": pgd, "square": square}
    for name in order:
        broken = [i for i in range(50) if clean[i] and not stands[name][i]]
        first = [i for i in broken if all(stands[other][i] for other in order[: order.index(name)])]
        alone = [i for i in broken if all(stands[other][i] for other in order if other != name)]
        assert parts["a", name] == [len(broken) / 50, len(first) / 50, len(alone) / 50], name
    assert sum(parts["a", name][1] for name in order) == pytest.approx(0.9 - next(table.column("worst_case")).value)
    assert parts["b", "fgsm"] == [0.2, 0.2, None], "alone of three nobody knows"


def test_the_cheapest_attack_is_tried_first(store: Store) -> None:
    for attack, passes in (("alpha", 900), ("beta", 30)):
        question, outcomes = spec("a", attack), rows(first_of(50, 20))
        cost = record(question, outcomes).cost.model_copy(update={"forward_passes": passes})
        store.write(record(question, outcomes).model_copy(update={"cost": cost}), outcomes)
    (table,) = tables(store)
    (grid,) = table.figures
    assert grid.rows == (("a", "beta"), ("a", "alpha"))
    assert [cells[1].value for cells in grid.cells] == [0.6, 0.0]
    assert first_breaker([np.array([False, True]), np.array([False, True])]).tolist() == [-1, 0]


def test_a_flag_stands_until_another_attack_passes_its_check(store: Store) -> None:
    def answer(model, attack, robust, *signs):
        put(store, spec(model, attack), first_of(50, robust), diagnostics=tuple(diagnostic(*sign) for sign in signs))

    answer("cleared", "fgsm", 40, ("not-converged", "flag"), ("zero-gradients",))
    answer("cleared", "pgd-20", 30, ("not-converged",), ("zero-gradients",))
    answer("flagged", "fgsm", 28, ("not-converged", "flag"), ("zero-gradients", "flag"))
    answer("flagged", "pgd-20", 29, ("not-converged", "flag"), ("zero-gradients", "not applicable"))
    answer("unseen", "fgsm", 20)
    answer("unseen", "pgd-20", 20, ("eight-bit",), ("zero-gradients", "not applicable"))
    (table,) = tables(store)
    assert values(table, "reliability") == ["no flags", "not-converged, zero-gradients", None]
    assert [cell.note for cell in table.column("reliability")] == [None, None, "not examined"]
    assert len(table.warnings) == 2
    assert all(warning.startswith("flagged: ") and "10 of 40 still stand" in warning for warning in table.warnings)


def test_an_attack_far_above_the_worst_case_is_marked_and_the_flag_is_not_the_tables(store: Store) -> None:
    def answer(model, attack, robust, loss, *signs):
        made = tuple(diagnostic(*sign) for sign in signs)
        put(store, spec(model, attack, parameters={"loss": loss}), first_of(50, robust), diagnostics=made)

    flagged = (("ce-above-worst", "flag"),)  # of which a quarter is left
    answer("known", "pgd-20", 40, "ce", *flagged)
    answer("known", "apgd-t", 12, "dlr-targeted", ("zero-gradients",))
    answer("worse", "pgd-20", 40, "ce", *flagged)
    answer("worse", "apgd-t", 30, "dlr-targeted", ("zero-gradients",))
    answer("sound", "pgd-20", 40, "ce", ("ce-above-worst",))
    answer("sound", "apgd-t", 36, "dlr-targeted", ("zero-gradients",))
    (table,) = tables(store)
    names, marks = values(table, "model"), [cell.note for cell in table.column("pgd-20")]
    assert dict(zip(names, marks, strict=True)) == {
        "known": "far above the worst case",
        "worse": "far above the worst case",
        "sound": None,
    }
    assert {cell.note for cell in table.column("apgd-t")} == {None}, "it follows another loss"
    reliability = dict(zip(names, values(table, "reliability"), strict=True))
    assert reliability == {"known": "no flags", "worse": "ce-above-worst", "sound": "no flags"}, (
        "where the table's worst case is what the flag says was left, nothing of it is too high"
    )


def test_another_rule_of_deciding_has_a_table_of_its_own(store: Store) -> None:
    plain = spec("a")
    put(store, plain, first_of(50, 20), clean=first_of(50, 40))
    put(store, spec("b"), first_of(50, 10), clean=first_of(50, 40))
    for rule in ({"top_k": 5}, {"votes": 100, "sigma": 0.25}, {"repeats": 8}):
        decided = plain.model_copy(update={"decision": Decision(**rule)})
        put(store, decided, first_of(50, 30), clean=first_of(50, 45))
    tables = {table.name: table for table in robustness(store.results({}))}
    assert set(tables) == {
        "robustness-mnist-linf-0.3",
        "robustness-mnist-linf-0.3-top-5",
        "robustness-mnist-linf-0.3-votes-100-sigma-0.25",
    }
    first = tables["robustness-mnist-linf-0.3"]
    assert {cell.value for cell in first.column("clean")} == {0.8}
    assert first.title == "mnist under Linf@0.3"
    top = tables["robustness-mnist-linf-0.3-top-5"]
    assert top.title == "mnist under Linf@0.3, top 5"
    assert top.caption.endswith("; right where the label is among the 5 largest logits")
    assert [cell.value for cell in top.column("clean")] == [0.9]
    assert tables["robustness-mnist-linf-0.3-votes-100-sigma-0.25"].caption.endswith(
        "; decided by 100 votes under noise of 0.25"
    )


def test_where_attacks_break_alike_none_is_the_strongest(store: Store) -> None:
    for attack, hits in (("fgsm", 20), ("pgd-20", 10), ("square", 10)):
        put(store, spec("a", attack), first_of(50, hits))
        put(store, spec("b", attack), first_of(50, hits if attack != "square" else 9))
    (table,) = tables(store)
    named = zip(table.column("model"), table.column("fooled_most_by"), strict=True)
    assert {model.value: by.value for model, by in named} == {"a": "2 attacks alike", "b": "square"}
