"""The written site: complete, self-contained, the same for the same records, and safe to open."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from synthetic import card, diagnostic, first_of, put, sha, spec

from robench.errors import StorageError, UnknownName, UserError
from robench.registry import read_cards
from robench.reporting import write_leaderboards
from robench.store import Store

GOLDEN = Path(__file__).parents[2] / "golden" / "leaderboards"
HOSTILE = '"><script>alert(1)</script>'
#: What the diagnostics said of PGD-20's zero gradients.
SEEN = {"mnist-pgd": "ok", "mnist-standard": "flag"}
LOG = """epoch,learning_rate,train_loss,validation_clean_accuracy,validation_robust_accuracy,seconds
1,0.1,2.25,0.5,,10.5
2,0.1,1.125,0.75,0.25,21
3,0.01,0.5,0.96875,0.875,31.5
"""


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """Two registered models, one from elsewhere, a failed evaluation, a missing attack, two threat models."""
    store = Store(tmp_path / "my #1 reports")
    for model, fgsm, pgd in (
        ("mnist-pgd", 45, 40),
        ("mnist-standard", 20, 0),
        ("torchvision:resnet50", 30, 10),
    ):
        put(store, spec(model, "fgsm"), first_of(50, fgsm), clean=first_of(50, 49))
        signs = (diagnostic("zero-gradients", SEEN[model]), diagnostic("not-converged")) if model in SEEN else ()
        put(store, spec(model, "pgd-20"), first_of(50, pgd), clean=first_of(50, 49), seconds=75.0, diagnostics=signs)
    put(store, spec(HOSTILE, "fgsm"), first_of(50, 33))
    put(store, spec(HOSTILE, "pgd-20"), first_of(50, 50), failed=True)
    put(store, spec("mnist-pgd", threat="L2@8/255", count=20, split_size=50), first_of(20, 13))
    card(tmp_path / "zoo" / "mnist-pgd", "mnist-pgd", scale="8 of 100 epochs")
    card(tmp_path / "zoo" / "mnist-standard", "mnist-standard", threat=None, summary=HOSTILE)
    (tmp_path / "zoo" / "mnist-pgd" / "training.csv").write_text(LOG)
    return store.root


def write(reports: Path, out_dir: Path | None = None) -> list[Path]:
    cards = read_cards([reports.parent / "zoo"])
    return write_leaderboards(["robustness"], Store(reports), cards, out_dir or reports / "leaderboards")


class Page(HTMLParser):
    """The links, the elements and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in {"href", "src"} and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def pages(written: list[Path]) -> dict[str, Page]:
    return {path.name: Page(path) for path in written if path.suffix == ".html"}


def test_golden_files(reports: Path) -> None:
    """Made-up records give the committed pages; after a wanted change, copy the new ones over them."""
    written = {path.name: path.read_text(encoding="utf-8") for path in write(reports)}
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(written)
    for name, text in written.items():
        assert text == (GOLDEN / name).read_text(encoding="utf-8"), name


def test_the_same_records_give_the_same_files(reports: Path) -> None:
    first = {path: path.read_bytes() for path in write(reports)}
    assert {path: path.read_bytes() for path in write(reports)} == first


@pytest.mark.parametrize("place", ["leaderboards", "../site"])
def test_every_link_leads_to_a_file(reports: Path, place: str) -> None:
    for path in write(reports, reports / place):
        if path.suffix == ".html":
            links = Page(path).links
            assert links
            for link in links:
                parts = urlsplit(link)
                assert (parts.scheme, parts.netloc) == ("", ""), link
                if parts.path:
                    assert (path.parent / unquote(parts.path)).is_file(), (path, link)


def test_nothing_is_loaded(reports: Path) -> None:
    for path in write(reports):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|@import|url\(|<(link|iframe|object|embed)\b|fetch\(", text), path
        assert not re.search(r'src="(?!data:image/)', text), path


def test_every_share_has_interval_n_and_record(reports: Path) -> None:
    page = pages(write(reports))["robustness-mnist-linf-0.3.html"]
    records = [link for link in page.links if link.startswith("../records/")]
    assert len(records) == 4 + 7  # clean of four models; seven complete answers
    assert len([1 for tag, a in page.tags if tag == "span" and a.get("class") == "interval"]) == 4 + 4 + 7
    assert page.text.count("n\xa050") == 15


def test_a_hostile_name_stays_text(reports: Path) -> None:
    for name, page in pages(write(reports)).items():
        scripts = [attributes for tag, attributes in page.tags if tag == "script"]
        data = [{"type": "application/json", "id": "data"}] if name.endswith("-compare.html") else []
        assert scripts == ([*data, {}] if name.startswith("robustness") else [])
    written = {path.name: path for path in write(reports)}
    assert all(HOSTILE not in path.read_text() for path in written.values() if path.suffix in {".html", ".svg"})
    compared = written["robustness-mnist-linf-0.3-compare.html"].read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', compared, re.DOTALL)
    assert HOSTILE in {model["name"] for model in json.loads(data)["models"]}
    assert not set("<>&'") & set(data)
    assert "\\textquotedbl{}\\textgreater{}\\textless{}script" in written["robustness-mnist-linf-0.3.tex"].read_text()
    assert HOSTILE in pages(write(reports))["robustness-mnist-linf-0.3.html"].text
    assert HOSTILE in pages(write(reports))["mnist-standard.html"].text


def test_the_csv_holds_the_exact_numbers(reports: Path) -> None:
    (text,) = [p.read_text() for p in write(reports) if p.name == "robustness-mnist-linf-0.3.csv"]
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["model"] for row in rows] == ["mnist-pgd", "torchvision:resnet50", "mnist-standard", HOSTILE]
    assert [row["rank"] for row in rows] == ["1", "2", "3", ""]
    assert [float(row["worst_case"]) for row in rows] == [0.8, 0.2, 0.0, 0.66]
    assert rows[3]["rank_note"] == "not ranked: without pgd-20"
    assert rows[0]["pgd-20_record"] == spec("mnist-pgd", "pgd-20").identity
    assert rows[3]["pgd-20"] == rows[3]["pgd-20_record"] == ""
    assert rows[0]["worst_case_n"] == "50"


def test_flags_stand_on_the_pages_with_their_evidence(reports: Path) -> None:
    found = pages(write(reports))
    table = found["robustness-mnist-linf-0.3.html"]
    told = "zero-gradients: what was seen of zero-gradients (10 of 40 still stand)"
    assert [a["title"] for tag, a in table.tags if tag == "span" and a.get("class") == "flags"] == [told]
    assert f"mnist-standard: {told}" in table.text
    assert "what was seen of zero-gradients" in found["mnist-standard.html"].text
    assert "pgd-20 under Linf@0.3: no flags" in found["mnist-pgd.html"].text
    assert "Reliability" not in found["index.html"].text


def test_a_model_page_tells_the_model_s_story(reports: Path) -> None:
    text = pages(write(reports))["mnist-pgd.html"].text
    for part in (
        "8 of 100 epochs",
        "312,202",
        "5 min 21 s",
        "rank 1 of 4",
        "Linf@0.3",
        "robench eval --model mnist-pgd",
    ):
        assert part in text
    assert sha("weights of mnist-pgd") in text
    assert text.count("validation, robust") == 1


def test_an_empty_workspace_says_what_to_do(tmp_path: Path) -> None:
    (index,) = write_leaderboards(["robustness"], Store(tmp_path), {}, tmp_path / "out")
    assert "robench eval --model" in Page(index).text


def test_only_failed_evaluations_rank_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, spec("a"), first_of(50, 50), failed=True)
    found = pages(write_leaderboards(["robustness"], store, {}, tmp_path / "out"))
    assert "nothing ranks yet" in found["robustness-mnist-linf-0.3.html"].text
    assert "a under pgd-20 failed" in found["robustness-mnist-linf-0.3.html"].text


def test_bad_input_writes_nothing(reports: Path) -> None:
    out = reports / "leaderboards"
    with pytest.raises(UnknownName, match="did you mean 'robustness'"):
        write_leaderboards(["robustnes"], Store(reports), {}, out)
    log = reports.parent / "zoo" / "mnist-pgd" / "training.csv"
    log.write_text("epoch,train_loss\n1,much\n")
    with pytest.raises(UserError, match=r"training\.csv is no training log"):
        write(reports)
    log.write_text(LOG)
    next(reports.glob("outcomes/*.parquet")).write_bytes(b"")
    with pytest.raises(UserError, match="does not match"):
        write(reports)
    assert not out.exists()


def test_a_folder_that_cannot_be_written(reports: Path) -> None:
    (reports / "leaderboards").write_text("a file in the way")
    with pytest.raises(StorageError, match="cannot write to"):
        write(reports)


def test_writing_imports_nothing_heavy(reports: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from robench.reporting import write_leaderboards
from robench.registry import read_cards
from robench.store import Store
root = Path({str(reports)!r})
write_leaderboards(["robustness"], Store(root), read_cards([root.parent / "zoo"]), root / "leaderboards")
print(*{{"torch", "pandas", "scipy", "statsmodels", "sklearn", "pyarrow.dataset"}} & set(sys.modules))
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
