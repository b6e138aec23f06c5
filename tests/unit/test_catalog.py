"""The catalog reads plugins as data, and says loudly what is wrong with one."""

from __future__ import annotations

import importlib.metadata

import pytest

from robench import catalog
from robench.errors import UnknownName, UserError

GOOD = """
from robench.catalog import AttackEntry

def wiggle(model, images, labels, *, threat, random, steps: PositiveInt = 3, size: PositiveFloat | None = None,
           loss: Literal["ce", "margin"] = "ce", fast: bool = False, scales: tuple[int, ...] = (1, 2)):
    return images

ENTRY = AttackEntry(name="wiggle", attack=wiggle, summary="s", source="arXiv:0", version=2, norms=("L2",),
                    presets={"wiggle-9": {"steps": 9}})
"""


@pytest.fixture
def read(tmp_path):
    def from_text(text):
        path = tmp_path / "wiggle.py"
        path.write_text(text, encoding="utf-8")
        return {plugin.name: plugin for plugin in catalog.read_python("attacks", path)}

    return from_text


def test_reads_entry_presets_and_parameters_without_importing(read):
    found = read(GOOD + "\nraise RuntimeError('imported')\n")
    assert set(found) == {"wiggle", "wiggle-9"}
    assert found["wiggle"].facts["version"] == 2
    assert found["wiggle-9"].settings() == {
        "steps": 9,
        "size": None,
        "loss": "ce",
        "fast": False,
        "scales": (1, 2),
    }


ARGS = '''
    """Wiggle.

    Args:
        model: images to logits.
        steps: how many; None: as many
            as it takes: all.
        fast: `True` is half as far.

    Returns:
        scales: this is no argument.
    """
    return images'''


def test_what_is_said_of_a_parameter_comes_from_the_docstring(read):
    plugin = read(GOOD.replace("\n    return images", ARGS))["wiggle"]
    assert {p.name: p.description for p in plugin.parameters.values()} == {
        "steps": "how many; None: as many as it takes: all.",
        "size": "",
        "loss": "",
        "fast": "`True` is half as far.",
        "scales": "",
    }
    assert {p.description for p in read(GOOD)["wiggle"].parameters.values()} == {""}
    oddly = read(GOOD.replace("\n    return images", ARGS.replace("        model", "            model")))["wiggle"]
    assert oddly.parameters["fast"].description == "`True` is half as far."


@pytest.mark.parametrize("kind", ["attacks", "certificates", "defenses"])
def test_every_parameter_is_described(kind):
    for plugin in catalog.plugins(kind).values():
        assert [p.name for p in plugin.parameters.values() if not p.description] == [], plugin.name


def test_a_preset_may_have_fewer_norms(read):
    text = GOOD.replace('norms=("L2",)', 'norms=("L2", "Linf"), preset_norms={"wiggle-9": ("Linf",)}')
    found = read(text)
    assert found["wiggle"].facts["norms"] == ("L2", "Linf")
    assert found["wiggle-9"].facts["norms"] == ("Linf",)
    with pytest.raises(catalog.PluginError, match="norms to 'wiggle-8', which is none of its presets"):
        read(text.replace('preset_norms={"wiggle-9"', 'preset_norms={"wiggle-8"'))


def test_what_an_attack_costs_is_read_as_data(read):
    plugin = read(GOOD)["wiggle-9"]
    assert plugin.passes(plugin.settings(), classes=10) == (9, 0)
    costs = """version=2, passes="2 * steps - 1 if fast else max(classes, 4) * (steps + 1)",
                        queries='100 + (steps + 1) // 2 if loss == "margin" else 0'"""
    plugin = read(GOOD.replace("version=2", costs))["wiggle"]
    assert plugin.passes(plugin.settings(), classes=10) == (40, 0)
    assert plugin.passes(plugin.settings({"loss": "margin"}), classes=2) == (16, 102)
    assert plugin.passes(plugin.settings({"fast": True, "steps": 5}), classes=2) == (9, 0)


@pytest.mark.parametrize(
    ("cost", "problem"),
    [
        ('passes="steps * restart"', "passes names restart, which is no whole-number parameter"),
        ('queries="size"', "queries names size, which is no whole-number parameter"),
        ('passes="steps ** 2"', "cannot be read"),
        ('passes="steps // 0"', "cannot be read"),
        ('passes="steps // restart"', "cannot be read"),
        ('passes="len(scales)"', "cannot be read"),
        ('passes="max(steps)"', "cannot be read"),
        ('passes="steps if loss == 3 else 1"', "cannot be read"),
        ('passes="steps if slow else 1"', "looks at slow, which is no parameter"),
        ('passes="True"', "cannot be read"),
        ('passes="steps *"', "cannot be read"),
        ("passes=3", "cannot be read"),
        ('passes="1.5 * steps"', "cannot be read"),
    ],
)
def test_a_cost_that_cannot_be_computed_is_refused(read, cost, problem):
    with pytest.raises(catalog.PluginError, match=problem):
        read(GOOD.replace("version=2", f"version=2, {cost}"))


def test_settings_are_typed_by_the_annotation(read):
    plugin = read(GOOD)["wiggle"]
    typed = plugin.settings({"steps": "7", "size": "2/255", "loss": "margin", "fast": "true"})
    assert typed == {"steps": 7, "size": 2 / 255, "loss": "margin", "fast": True, "scales": (1, 2)}
    assert plugin.settings({"size": "none"})["size"] is None


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"step": 4}, "no parameter step; did you mean 'steps'"),
        ({"steps": 0}, "steps = 0: input should be greater than or equal to 1"),
        ({"steps": 2.5}, "steps = 2.5"),
        ({"size": "-1"}, "size = -1.0"),
        ({"size": "inf"}, "size = 'inf'"),
        ({"loss": "dlr"}, "'ce' or 'margin'"),
        ({"fast": "perhaps"}, "fast = 'perhaps'"),
    ],
)
def test_wrong_settings_name_key_and_value(read, overrides, problem):
    with pytest.raises(UserError, match="attack wiggle") as caught:
        read(GOOD)["wiggle"].settings(overrides)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("ENTRY =", "OTHER ="), "no constant ENTRY"),
        (("AttackEntry(name", "DefenseEntry(name"), "no constant ENTRY = AttackEntry"),
        (("def wiggle", "def waggle"), "does not define it"),
        (("version=2", "version=1 + 1"), "version must be a literal"),
        (("steps: PositiveInt = 3", "steps=3"), "no annotation for parameter steps"),
        (("steps: PositiveInt = 3", "steps: Tensor = 3"), "annotates parameter steps of wiggle with Tensor"),
        (("steps: PositiveInt = 3", "steps: PositiveInt = COUNT"), "must be a literal"),
        (('{"steps": 9}', '{"stepz": 9}'), "no parameter stepz"),
        (('{"steps": 9}', '{"steps": 0}'), "steps = 0"),
        (("return images", "return (images"), "does not parse"),
        (('name="wiggle", ', ""), "without name="),
    ],
)
def test_broken_files_fail_with_their_name(read, change, problem):
    with pytest.raises(UserError) as caught:
        read(GOOD.replace(*change))
    assert problem in str(caught.value)


def test_two_plugins_cannot_share_a_name(tmp_path, monkeypatch):
    (tmp_path / "attacks").mkdir()
    for name in ("one.py", "two.py", "_helper.py"):
        (tmp_path / "attacks" / name).write_text(GOOD if name != "_helper.py" else "no plugin")
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path)
    catalog.plugins.cache_clear()
    try:
        with pytest.raises(catalog.PluginError, match=r"attacks/two\.py takes the name 'wiggle', which one\.py has"):
            catalog.plugins("attacks")
    finally:
        catalog.plugins.cache_clear()


def test_a_plugin_that_does_not_import_fails_with_its_file():
    plugin = catalog.find("attacks", "pgd")
    broken = catalog.Plugin(plugin.kind, plugin.name, plugin.entry, plugin.path.with_name("gone.py"), plugin.facts)
    with pytest.raises(catalog.PluginError, match=r"attacks/gone\.py does not import"):
        broken.load()


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownName, match="unknown attack 'pgd20'; did you mean 'pgd-20'"):
        catalog.find("attacks", "pgd20")


def _installed(distribution):
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("kind", catalog.KINDS)
def test_every_plugin_says_what_it_is_and_loads(kind):
    found = catalog.plugins(kind)
    assert found
    for plugin in found.values():
        assert plugin.facts["summary"]
        assert plugin.facts["source"]
        if kind == "backends" and not _installed(plugin.facts["distribution"]):
            continue  # the library is optional
        if catalog.KINDS[kind].entry:
            assert plugin.load().name == plugin.entry


@pytest.mark.parametrize(("kind", "name"), [("recipes", "mine.toml"), ("attacks", "mine.py")])
def test_a_plugin_file_that_is_not_utf_8_is_named(tmp_path, kind, name):
    path = tmp_path / name
    path.write_bytes(b"# one\n# \xfc\n")
    read_file = catalog.read_toml if kind == "recipes" else catalog.read_python
    with pytest.raises(catalog.PluginError, match=rf"/{name} is no UTF-8 text \(line 2 has the byte 0xfc\); save it"):
        read_file(kind, path)
    path.unlink()
    with pytest.raises(catalog.PluginError, match=rf"/{name} cannot be read: No such file"):
        read_file(kind, path)
