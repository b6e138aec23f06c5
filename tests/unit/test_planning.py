"""Questions, their names and their costs follow from what was asked."""

from __future__ import annotations

import dataclasses

import pytest

from robench import catalog, planning
from robench.errors import UserError
from robench.records import Configured, Decision, EvalSpec, Examples, ModelIdentity
from robench.threat_model import ThreatModel

MODEL = ModelIdentity(id="m", weights_sha256="a" * 64, architecture=Configured(name="small_cnn"))
EXAMPLES = Examples(
    dataset="mnist", split="test", split_sha256="b" * 64, split_size=10_000, count=500, ids_sha256="c" * 64
)
LINF, L2 = ThreatModel.parse("Linf@0.3"), ThreatModel.parse("L2@2")


def request(**changes):
    fields = {"model": MODEL, "examples": EXAMPLES, "threats": [LINF], "attacks": ["pgd-20"], **changes}
    return planning.Request(**fields)


def test_plan_is_every_attack_under_every_threat_once():
    specs = planning.plan(request(threats=[LINF, L2], attacks=["fgsm", "pgd-20", "pgd-20"]))
    assert [(str(s.threat), s.attack.name) for s in specs] == [
        ("Linf@0.3", "fgsm"),
        ("Linf@0.3", "pgd-20"),
        ("L2@2", "fgsm"),
        ("L2@2", "pgd-20"),
    ]
    assert specs[1].attack.parameters["steps"] == 20
    assert specs[1].attack.parameters["restarts"] == 1


def test_everything_that_can_change_the_number_changes_the_identity():
    (base,) = planning.plan(request())
    others = [
        request(seed=1),
        request(precision="bf16"),
        request(threats=[L2]),
        request(threats=[ThreatModel.parse("Linf@0.31")]),
        request(attacks=["pgd-40"]),
        request(attacks=["pgd-20:step_size=0.01"]),
        request(model=MODEL.model_copy(update={"weights_sha256": "d" * 64})),
        request(model=MODEL.model_copy(update={"architecture": Configured(name="lenet5")})),
        request(examples=EXAMPLES.model_copy(update={"ids_sha256": "e" * 64})),
        request(examples=EXAMPLES.model_copy(update={"split_sha256": "f" * 64})),
    ]
    identities = {base.identity} | {planning.plan(r)[0].identity for r in others}
    assert len(identities) == 1 + len(others)
    newer = base.model_copy(update={"attack": base.attack.model_copy(update={"version": base.attack.version + 1})})
    assert newer.identity not in identities


def test_the_same_question_typed_otherwise_has_the_same_name():
    (typed,) = planning.plan(request(attacks=["pgd-20:steps=20,restarts=1"]))
    (plain,) = planning.plan(request())
    assert typed.identity == plain.identity
    assert EvalSpec.from_json(plain.to_json(), origin="here").identity == plain.identity


def test_an_identity_is_for_ever():
    """Frozen: if this changes, every stored record is orphaned."""
    (spec,) = planning.plan(request())
    first = spec.model_copy(update={"attack": spec.attack.model_copy(update={"version": 1})})
    assert first.identity == "6bab6f024d6f49ce"


@pytest.mark.parametrize("text", ["pgd-20:steps", "pgd-20:", "pgd-20:steps=1,,"])
def test_attacks_are_written_with_key_and_value(text):
    with pytest.raises(UserError, match="key=value"):
        planning.attack_settings(text)


def test_a_norm_that_an_attack_lacks_is_refused_before_any_work(monkeypatch):
    plugin = catalog.find("attacks", "fgsm")
    only_l2 = catalog.Plugin("attacks", "fgsm", "fgsm", plugin.path, {**plugin.facts, "norms": ("L2",)}, {})
    monkeypatch.setattr(catalog, "find", lambda kind, name: only_l2)
    with pytest.raises(UserError, match="no form for Linf, only for L2"):
        planning.identify_attack("fgsm", LINF)


def test_estimates_bound_the_cost():
    (spec,) = planning.plan(request(attacks=["pgd-20:restarts=3"]))
    assert planning.estimate(spec, [], "cpu") == planning.Estimate(500 * 60, 0, None)
    assert planning.estimate(spec, [], "cpu", done=100) == planning.Estimate(400 * 60, 0, None)
    (one,) = planning.plan(request(attacks=["fgsm"]))
    assert planning.estimate(one, [], "cpu") == planning.Estimate(500, 0, None)


def test_an_attack_says_itself_what_it_costs(monkeypatch):
    (spec,) = planning.plan(request())
    plugin = catalog.find("attacks", "pgd")
    costs = {"passes": "steps * (classes + 2)", "queries": "steps * restarts + 7"}
    entry = dataclasses.replace(plugin, facts={**plugin.facts, **costs})
    monkeypatch.setattr(catalog, "find", lambda kind, name: entry)
    assert planning.estimate(spec, [], "cpu", classes=10) == planning.Estimate(500 * 20 * 12, 500 * 27, None)


def test_suites_are_checked_as_a_whole(monkeypatch, tmp_path):
    assert planning.load_suite("baseline").attacks == ("fgsm", "pgd-20", "pgd-40")
    path = tmp_path / "wrong.toml"
    path.write_text('summary = "s"\nsource = "s"\nattacks = ["pgd-21"]\n')
    monkeypatch.setattr(
        catalog,
        "find",
        lambda kind, name, find=catalog.find: (
            catalog.read_toml("suites", path) if kind == "suites" else find(kind, name)
        ),
    )
    with pytest.raises(catalog.PluginError, match=r"wrong\.toml is no valid suite: unknown attack 'pgd-21'"):
        planning.load_suite("wrong")


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("pgd:steps=20", "pgd-20"),
        ("pgd-40:steps=20", "pgd-20"),
        ("pgd", "pgd-40"),
        ("pgd-100:steps=1", "pgd:steps=1"),
        ("pgd-20:step_size=0.01", "pgd:steps=20,step_size=0.01"),
        ("fgsm:loss=ce", "fgsm"),
    ],
)
def test_an_attack_has_one_name_and_no_weak_one_a_strong_name(typed, name):
    assert planning.identify_attack(typed, LINF).name == name
    assert planning.identify_attack(name, LINF) == planning.identify_attack(typed, LINF)


@pytest.mark.parametrize(
    ("typed", "votes", "name"),
    [
        ("smoothed-pgd", 100, "smoothed-pgd:copies=25,sigma=0.1"),
        ("smoothed-ddn-20", 10, "smoothed-ddn:steps=20,levels=256,copies=10,sigma=0.1"),
        ("smoothed-pgd", 1, "smoothed-pgd:sigma=0.1"),
        ("smoothed-pgd:copies=7", 100, "smoothed-pgd:copies=7,sigma=0.1"),
        ("smoothed-pgd:sigma=0.3", 100, "smoothed-pgd:sigma=0.3"),
        ("smoothed-ddn:sigma=0", 100, "smoothed-ddn"),
        ("smoothed-pgd-20:step_size=0.4,copies=100,sigma=0.1", 100, "smoothed-pgd:step_size=0.4,copies=100,sigma=0.1"),
        ("pgd-20", 100, "pgd-20"),
    ],
)
def test_attacks_on_a_smoothed_model_take_its_noise_over_unless_they_say_their_own(typed, votes, name):
    attack = planning.identify_attack(typed, L2, Decision(sigma=0.1, votes=votes))
    assert attack.name == name
    assert planning.is_weak_estimate(attack) == ("sigma" in name and "copies" not in name)
    without = planning.identify_attack(typed, L2, Decision(votes=votes))
    assert (without.name == name) == ("sigma=" in typed or typed == "pgd-20")


def test_rows_of_other_code_are_not_gone_on_with(monkeypatch):
    (spec,) = planning.plan(request())
    before = planning.journal_key(spec)
    monkeypatch.setattr(planning, "code_fingerprint", lambda: "other")
    assert planning.journal_key(spec) != before


def write_suite(monkeypatch, tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(f'summary = "s"\nsource = "s"\n{text}')
    find = catalog.find
    own = lambda kind, name: catalog.read_toml("suites", path) if kind == "suites" else find(kind, name)  # noqa: E731
    monkeypatch.setattr(catalog, "find", own)
    return planning.load_suite("own")


def test_a_suite_has_attacks_of_its_own_for_each_norm(monkeypatch, tmp_path):
    suite = write_suite(monkeypatch, tmp_path, 'attacks = ["fgsm"]\nlinf = ["pgd-20"]\nl2 = ["pgd-40:restarts=2"]\n')
    specs = planning.plan(request(threats=[L2, LINF], suite=suite, attacks=["pgd-10"]))
    assert [(str(s.threat), s.attack.name) for s in specs] == [
        ("L2@2", "fgsm"),
        ("L2@2", "pgd:restarts=2"),
        ("L2@2", "pgd-10"),
        ("Linf@0.3", "fgsm"),
        ("Linf@0.3", "pgd-20"),
        ("Linf@0.3", "pgd-10"),
    ]


def test_a_suite_without_attacks_for_a_norm_is_refused_there_and_a_wrong_one_at_once(monkeypatch, tmp_path):
    suite = write_suite(monkeypatch, tmp_path, 'l2 = ["pgd-20"]\n')
    assert len(planning.plan(request(threats=[L2], attacks=[], suite=suite))) == 1
    with pytest.raises(UserError, match=r"the suite has no attack for Linf \(s\)"):
        planning.plan(request(threats=[L2, LINF], attacks=["pgd-20"], suite=suite))
    with pytest.raises(catalog.PluginError, match=r"own\.toml is no valid suite: attack atent-20-paper has no form"):
        write_suite(monkeypatch, tmp_path, 'l2 = ["atent-20-paper"]\n')
    with pytest.raises(catalog.PluginError, match=r"own\.toml is no valid suite: unknown attack"):
        write_suite(monkeypatch, tmp_path, 'linf = ["pgd-21"]\n')
    with pytest.raises(catalog.PluginError, match="l1"):
        write_suite(monkeypatch, tmp_path, 'l1 = ["pgd-20"]\n')
