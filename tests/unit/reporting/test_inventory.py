"""A page goes with what it was of, and nothing that robench did not write ever does."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
from synthetic import card, first_of, put, put_minimum_norm, spec

from robench.cli import run
from robench.errors import UnsafeFile
from robench.reporting.inventory import add_files, listed_files, remove_others
from robench.store import Store

Robench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def robench(capsys: pytest.CaptureFixture[str]) -> Robench:
    """Run a command; return its status, standard output and standard error."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return run([str(a) for a in arguments]), *capsys.readouterr()

    return command


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with answers of a model of its own and of a paper's, and with no models but its own."""
    monkeypatch.setattr("robench.workspace.PACKAGE", tmp_path / "package")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "personal"))
    place = tmp_path / "place"
    store = Store(place / "reports")
    for model in ("mine", "trades-mnist"):
        card(place / "model_zoo" / model, model)
        for attack in ("fgsm", "pgd-20", "pgd-40"):
            put(store, spec(model, attack), first_of(50, 30))
    put_minimum_norm(store, spec("mine", "deepfool", threat="L2@2"), [1.5] * 50)
    return place


def site(place: Path) -> Path:
    return place / "reports" / "leaderboards"


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def forget(place: Path, model: str) -> None:
    """Remove a model and all its answers."""
    shutil.rmtree(place / "model_zoo" / model)
    shutil.rmtree(place / "reports" / "records" / model)


def removed_by(error: str, place: Path) -> set[str]:
    lines = re.findall(r"^robench: removed (.*) \(of an earlier site\)$", error, re.MULTILINE)
    return {Path(line).relative_to(site(place)).as_posix() for line in lines}


def test_the_inventory_lists_what_is_there_and_comes_out_the_same(workspace: Path, robench: Robench) -> None:
    status, out, err = robench("leaderboard", "--workspace", workspace)
    first = files(site(workspace))
    assert (status, err) == (0, "")
    listed = first["files.txt"].decode().splitlines()
    assert listed == sorted(listed) == sorted(set(first) - {"files.txt"})
    assert sorted(out.splitlines()) == sorted(str(site(workspace) / name) for name in listed)
    assert {Path(name).parent.as_posix() for name in listed} == {".", "models", "paper-figures"}
    assert {Path(name).suffix for name in listed} == {".html", ".csv", ".json", ".tex", ".svg"}
    assert robench("leaderboard", "--workspace", workspace)[::2] == (0, "")
    assert files(site(workspace)) == first


def test_a_model_that_is_gone_takes_its_pages_along(workspace: Path, robench: Robench) -> None:
    """Its page with its numbers, its tables, the papers' pages and figures; a user's own files stay."""
    robench("leaderboard", "--workspace", workspace)
    before = files(site(workspace))
    own = {"CNAME": b"robench.example\n", "models/notes.html": b"mine", "mine.csv": b"1,2\n"}
    for name, data in own.items():
        (site(workspace) / name).write_bytes(data)
    forget(workspace, "trades-mnist")
    status, out, err = robench("leaderboard", "--workspace", workspace, "--json")
    after = files(site(workspace))
    assert status == 0
    gone = removed_by(err, workspace)
    assert gone == set(before) - set(after)
    assert {"models/trades-mnist.html", "paper-atent.html", "claims.html", "claims.csv", "atent-1.csv"} < gone
    assert any(name.startswith("paper-figures/") for name in gone)
    assert not (site(workspace) / "paper-figures").exists()
    assert {name: after[name] for name in own} == own
    written = {Path(path).relative_to(site(workspace)).as_posix() for path in json.loads(out)}
    assert written == set(after) - set(own) - {"files.txt"} == listed_files(site(workspace))
    for name in written:
        for link in re.findall(r'href="([^"#:]+)(?:#[^"]*)?"', after[name].decode()) if name.endswith(".html") else ():
            assert ((site(workspace) / name).parent / unquote(link)).exists(), (name, link)


def test_a_part_of_the_site_removes_nothing_and_is_removed_with_the_rest(workspace: Path, robench: Robench) -> None:
    assert robench("leaderboard", "--workspace", workspace)[0] == 0
    forget(workspace, "trades-mnist")
    before = files(site(workspace))
    for arguments in (["robustness"], ["--format", "csv"], ["atent-2", "--format", "latex"]):
        status, _, err = robench("leaderboard", *arguments, "--workspace", workspace)
        assert (status, err) == (0, "")
    after = files(site(workspace))
    assert set(after) == {*before, "atent-2.tex"}
    assert listed_files(site(workspace)) == set(after) - {"files.txt"}
    _, _, err = robench("leaderboard", "--workspace", workspace)
    assert {"atent-2.tex", "models/trades-mnist.html"} < removed_by(err, workspace)


def test_a_table_that_is_gone_goes_with_its_figures(workspace: Path, robench: Robench) -> None:
    robench("leaderboard", "--workspace", workspace)
    tables = {name for name in files(site(workspace)) if name.startswith("minimum-norm-")}
    assert {Path(name).suffix for name in tables} == {".html", ".csv", ".json", ".tex", ".svg"}
    for path in (workspace / "reports" / "records" / "mine").glob("*.json"):
        if "deepfool" in path.read_text():
            path.unlink()
    _, _, err = robench("leaderboard", "--workspace", workspace)
    assert tables < removed_by(err, workspace)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"index.html\n../records/mine/a.json\n", "(line 2: '../records/mine/a.json')"),
        (b"models/../../../model_zoo/mine/card.json\n", "(line 1: 'models/../../../model_zoo/mine/card.json')"),
        (b"/etc/motd.html\n", "(line 1: '/etc/motd.html')"),
        (b"index.html\n\n", "(line 2: '')"),
        (b"<<<<<<< HEAD\nindex.html\n", "(line 1: '<<<<<<< HEAD')"),
        (b"CNAME\n", "(line 1: 'CNAME')"),
        (b"./index.html\n", "(line 1: './index.html')"),
        (b"models//a.html\n", "(line 1: 'models//a.html')"),
        (b"ind\xffex.html\n", "is no UTF-8 text (line 1 has the byte 0xff)"),
    ],
)
def test_a_damaged_inventory_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "files.txt").write_bytes(text)
    (tmp_path / "index.html").write_text("page")
    for change in (add_files, remove_others):
        with pytest.raises(UnsafeFile) as caught:
            change(tmp_path, [])
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(
            f"restore it from version control, or delete it: what is in {tmp_path} then stays there"
        )
    assert files(tmp_path) == {"files.txt": text, "index.html": b"page"}


@pytest.mark.parametrize("arguments", [[], ["robustness"], ["atent-2"], ["atent-2", "--format", "latex"]])
def test_a_damaged_inventory_is_one_line_and_nothing_is_written(
    workspace: Path, robench: Robench, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read or drawn, which takes its time."""
    monkeypatch.setattr(Store, "results", lambda *_: pytest.fail("the records were read"))
    site(workspace).mkdir(parents=True)
    (site(workspace) / "files.txt").write_text("../records/mine/a.json\n")
    before = files(workspace)
    status, out, err = robench("leaderboard", *arguments, "--workspace", workspace)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "(line 1: '../records/mine/a.json'); restore it" in err
    assert files(workspace) == before


def test_a_folder_in_the_inventorys_place(workspace: Path, robench: Robench) -> None:
    (site(workspace) / "files.txt").mkdir(parents=True)
    status, _, err = robench("leaderboard", "--workspace", workspace)
    assert (status, err.count("\n")) == (2, 1)
    assert "files.txt cannot be read" in err


def test_no_link_leads_a_removal_out_of_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "site", tmp_path / "outside"
    for made in (folder, outside):
        made.mkdir()
    (outside / "a.html").write_text("of somebody else")
    (folder / "b.html").write_text("old")
    (folder / "models").symlink_to(outside)
    add_files(folder, [folder / "models" / "a.html", folder / "b.html"])
    before = (folder / "files.txt").read_bytes()
    with pytest.raises(UnsafeFile, match=r"models/a\.html leads out of .*, so nothing was removed; delete its line in"):
        remove_others(folder, [])
    assert (outside / "a.html").exists()
    assert (folder / "b.html").exists()
    assert (folder / "files.txt").read_bytes() == before


def test_a_link_in_a_pages_place_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (tmp_path / "a.html").write_text("of somebody else")
    (folder / "a.html").symlink_to(tmp_path / "a.html")
    add_files(folder, [folder / "a.html"])
    assert remove_others(folder, []) == [folder / "a.html"]
    assert (tmp_path / "a.html").exists()
    assert not (folder / "a.html").is_symlink()


def test_what_is_gone_already_or_a_folder_now_is_passed_over(tmp_path: Path) -> None:
    add_files(tmp_path, [tmp_path / "gone.html", tmp_path / "folder.html"])
    (tmp_path / "folder.html").mkdir()
    assert remove_others(tmp_path, []) == []
    assert (tmp_path / "folder.html").is_dir()
    assert (tmp_path / "files.txt").read_text() == ""


def test_a_new_name_of_the_same_file_keeps_it(tmp_path: Path) -> None:
    """As where upper and lower case are one: Model.html and model.html."""
    (tmp_path / "new.html").write_text("page")
    os.link(tmp_path / "new.html", tmp_path / "old.html")
    add_files(tmp_path, [tmp_path / "old.html"])
    assert remove_others(tmp_path, [tmp_path / "new.html"]) == []
    assert (tmp_path / "files.txt").read_text() == "new.html\n"


def test_files_are_listed_before_they_are_written(
    workspace: Path, robench: Robench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed in the middle leaves no page that a later one does not know of."""
    from robench.reporting import site as boards

    def killed(path: Path, data: bytes, *, durable: bool = True) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(boards, "publish", killed)
    assert robench("leaderboard", "robustness", "--workspace", workspace)[0] == 130
    assert "models/mine.html" in listed_files(site(workspace))
