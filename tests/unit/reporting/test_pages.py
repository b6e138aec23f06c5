"""What the pages say follows from the records: cells, comparisons, figures, pictures, galleries."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file
from synthetic import (
    card,
    certificate_spec,
    first_of,
    put,
    put_certificate,
    put_minimum_norm,
    put_transfer,
    record,
    rows,
    spec,
)

from robench.datasets import ArrayImages
from robench.errors import MissingData, UnsafeFile, UserError
from robench.records import EvalRecord
from robench.registry import read_cards
from robench.reporting import FORMATS, write_leaderboards
from robench.reporting.pictures import picture
from robench.store import Store

MODELS = {"a": 7, "b": 8, "c": 9, "torchvision:resnet50": 10}
N = 200


def outcomes(seed: int, attack: str) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the examples are right, without and after an attack."""
    hard = np.random.default_rng(0).random(N)
    own = np.random.default_rng([seed, *attack.encode()]).random(N)
    clean = hard < 0.95
    return clean, clean & (hard + 0.2 * own < 1.2 - 0.08 * seed)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "reports")
    for model, seed in MODELS.items():
        for attack in ("fgsm", "pgd-20"):
            clean, robust = outcomes(seed, attack)
            put(made, spec(model, attack, count=N), robust, clean=clean)
    put(made, spec("a", "pgd-20", count=N, threat="Linf@0.1"), outcomes(6, "x")[1], clean=outcomes(6, "x")[0])
    put_minimum_norm(made, spec("a", "ddn", threat="L2@0.5"), [0.1 + i * 0.01371 for i in range(50)])
    put_certificate(made, certificate_spec("a"))
    put_transfer(made, spec("b", "pgd-40"), spec("a").model, first_of(50, 20))
    card(tmp_path / "zoo" / "a", "a")
    return made


def write(store: Store, **options: object) -> dict[str, str]:
    """Return the site's files by name below its folder."""
    names = ["robustness", "minimum-norm", "certification", "transfer"]
    out = store.root / "leaderboards"
    cards = read_cards([store.root.parent / "zoo"])
    return {str(p.relative_to(out)): p.read_text() for p in write_leaderboards(names, store, cards, out, **options)}


def table(text: str) -> dict[str, dict[str, str]]:
    return {row["model"]: row for row in csv.DictReader(io.StringIO(text))}


def raw(store: Store, model: str, attack: str) -> dict[str, np.ndarray]:
    """Return a record's rows, read without robench's reader."""
    (answer,) = (
        s.record
        for s in store.records()
        if (s.record.spec.model.id, s.record.spec.attack.name, s.record.spec.examples.count) == (model, attack, N)
        and str(s.record.spec.threat) == "Linf@0.3"
    )
    read = pq.read_table(store.outcomes_path(answer))
    return {name: np.array(read[name].to_pylist()) for name in read.column_names}


def test_every_number_is_that_of_its_outcomes(store: Store) -> None:
    found = table(write(store)["robustness-mnist-linf-0.3.csv"])
    assert set(found) == set(MODELS)
    worst = {}
    for model, row in found.items():
        own = {attack: raw(store, model, attack) for attack in ("fgsm", "pgd-20")}
        for attack, read in own.items():
            right = sum(
                bool(r) and p == label
                for r, p, label in zip(read["robust"], read["clean_prediction"], read["label"], strict=True)
            )
            assert float(row[attack]) == pytest.approx(right / N, abs=1e-9)
        assert float(row["clean"]) == pytest.approx(np.mean(own["fgsm"]["clean_prediction"] == own["fgsm"]["label"]))
        worst[model] = sum(a and b for a, b in zip(own["fgsm"]["robust"], own["pgd-20"]["robust"], strict=True)) / N
        assert float(row["worst_case"]) == pytest.approx(worst[model], abs=1e-9)
        assert int(row["worst_case_n"]) == N
    assert [float(row["worst_case"]) for row in found.values()] == sorted(worst.values(), reverse=True)


def test_changing_one_record_changes_exactly_its_cells(store: Store, tmp_path: Path) -> None:
    before = write(store)
    # b gets an image right after FGSM that PGD breaks anyway: no worst case, rank or group moves.
    clean, robust = outcomes(MODELS["b"], "fgsm")
    both = robust & outcomes(MODELS["b"], "pgd-20")[1]
    place = int(np.flatnonzero(clean & ~robust & ~both)[0])
    robust[place] = True
    question = spec("b", "fgsm", count=N)
    store.record_path(question).unlink()
    for path in store.root.glob(f"outcomes/{question.identity}-*"):
        path.unlink()
    put(store, question, robust, clean=clean)
    after = write(store)
    assert set(after) == set(before)

    name = "robustness-mnist-linf-0.3.csv"
    one, two = table(before[name]), table(after[name])
    changed = {(model, key) for model in one for key in one[model] if one[model][key] != two[model][key]}
    assert changed <= {("b", key) for key in ("fgsm", "fgsm_low", "fgsm_high", "fooled_most_by")}
    assert ("b", "fgsm") in changed
    assert float(two["b"]["fgsm"]) - float(one["b"]["fgsm"]) == pytest.approx(1 / N)
    others = {file for file in before if before[file] != after[file]}
    stem = "robustness-mnist-linf-0.3"
    allowed = {f"{stem}{end}" for end in (".csv", ".json", ".tex", ".html", "-compare.html", "-contributions.csv")}
    assert others <= {*allowed, "models/b.html"}
    assert {f"{stem}.csv", f"{stem}.html", "models/b.html"} <= others


def test_formats_are_what_was_asked_for(store: Store) -> None:
    assert all(name.endswith(".tex") for name in write(store, formats=["latex"]))
    page = write(store, formats=["html", "json"])
    assert "robustness-mnist-linf-0.3.csv" not in page
    assert "download>JSON" in page["robustness-mnist-linf-0.3.html"]
    assert "download>LaTeX" not in page["robustness-mnist-linf-0.3.html"]
    assert set(FORMATS) == {"html", "csv", "json", "latex"}


def page_data(text: str) -> dict:
    (found,) = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def test_a_comparison_holds_the_outcomes(store: Store) -> None:
    data = page_data(write(store)["robustness-mnist-linf-0.3-compare.html"])

    def mask(text: str) -> np.ndarray:
        return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), bitorder="little")[:N].astype(bool)

    assert data["count"] == N
    assert data["ids"] is None
    assert np.frombuffer(base64.b64decode(data["labels"]), "<u2").tolist() == [i % 10 for i in range(N)]
    assert data["columns"] == ["Worst case", "Clean", "fgsm", "pgd-20"]
    for model in data["models"]:
        own = [raw(store, model["name"], attack)["robust"] for attack in ("fgsm", "pgd-20")]
        assert mask(model["standing"]).tolist() == (own[0] & own[1]).tolist()
        assert mask(model["clean"]).tolist() == raw(store, model["name"], "fgsm")["attacked"].tolist()
        assert model["shares"][0][0] == pytest.approx((own[0] & own[1]).mean())
    assert data["pictures"] == {}
    assert "not looked for" in data["missing"]


def images() -> ArrayImages:
    pixels = np.random.default_rng(1).integers(0, 256, (N, 1, 8, 8), dtype=np.uint8)
    return ArrayImages(images=pixels, labels=np.arange(N) % 10, classes=tuple("klmnopqrst"), origin="made up")


def known(store: Store) -> None:
    """Make the records' split that of the made-up images."""
    for stored in list(store.records()):
        rest = stored.record.model_dump(mode="json")
        rest["spec"]["examples"]["split_sha256"] = images().sha256
        changed = EvalRecord.model_validate_json(json.dumps(rest))
        old = store.outcomes_path(stored.record)
        stored.path.unlink()
        store.record_path(changed.spec).write_text(changed.to_json())
        old.rename(store.outcomes_path(changed))


def test_pictures_are_the_very_images_and_outlive_the_data(store: Store) -> None:
    known(store)
    first = write(store, open_images=lambda examples: images())
    data = page_data(first["robustness-mnist-linf-0.3-compare.html"])
    assert data["classes"] == list("klmnopqrst")
    assert data["missing"] is None
    assert len(data["pictures"]) > 20
    for example, address in data["pictures"].items():
        shown = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        assert (np.asarray(shown) == images().images[int(example), 0]).all()
    # Every pair has pictures of what only one of the two gets right.
    right = {
        m["name"]: np.unpackbits(np.frombuffer(base64.b64decode(m["standing"]), np.uint8), bitorder="little")[:N]
        for m in data["models"]
    }
    for (one, mine), (two, other) in permutations(right.items(), 2):
        alone = set(np.flatnonzero((mine == 1) & (other == 0)).tolist())
        assert len(alone & set(map(int, data["pictures"]))) >= min(8, len(alone)), (one, two)

    def gone(examples: object) -> ArrayImages:
        raise MissingData("the data are not here")

    assert write(store, open_images=gone) == first
    assert write(store) == first
    (kept,) = (store.root / "pictures").glob("*.json")
    kept.write_text('{"classes": [], "pictures": {"1": "\\"><script>"}}')
    with pytest.raises(UserError, match="holds no pictures; delete it"):
        write(store)


def test_other_images_are_not_shown(store: Store) -> None:
    data = page_data(write(store, open_images=lambda examples: images())["robustness-mnist-linf-0.3-compare.html"])
    assert data["pictures"] == {}
    assert "not those that were evaluated" in data["missing"]
    assert not (store.root / "pictures").exists()


def test_large_pictures_become_small() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 300, 200), dtype=np.uint8)
    shown = Image.open(io.BytesIO(base64.b64decode(picture(pixels))))
    assert (shown.format, max(shown.size)) == ("JPEG", 64)
    assert picture(pixels) == picture(pixels)


def test_a_model_page_has_certificates_transfers_and_figures(store: Store) -> None:
    files = write(store)
    page = files["models/a.html"]
    for part in (
        "registry.find_card(&#39;a&#39;",
        "Certificates and margins",
        "cohen",
        "On images made to fool others",
    ):
        assert part in page
    assert "Accuracy over epsilon, Linf" in page
    (curve,) = (text for name, text in files.items() if name.startswith("models/a-epsilon-"))
    read = list(csv.DictReader(io.StringIO(curve)))
    expected = {0.0: outcomes(7, "x")[0].mean(), 0.1: outcomes(6, "x")[1].mean(), 0.3: outcomes(7, "pgd-20")[1].mean()}
    assert {float(r["epsilon"]): float(r["share"]) for r in read} == pytest.approx(expected)
    assert {r["attack"] for r in read} == {"pgd-20"}
    (nearest,) = (text for name, text in files.items() if name.startswith("models/a-nearest-"))
    bars = list(csv.DictReader(io.StringIO(nearest)))
    assert sum(int(bar["images"]) for bar in bars) == 50
    lengths = np.array([0.1 + i * 0.01371 for i in range(50)])
    for bar in bars[:-1]:
        assert (
            int(bar["images"]) == ((float(bar["from"]) <= lengths + 1e-9) & (lengths + 1e-9 < float(bar["to"]))).sum()
        )
    assert any(name.startswith("models/a-radii-") for name in files)
    foreign = files["models/torchvision-resnet50-6b7aa1c0.html"]
    assert "not in the registry" in foreign
    assert "load_card_model" not in foreign


def test_saved_adversarial_examples_are_shown(store: Store) -> None:
    known(store)
    question = next(
        s.record.spec
        for s in store.records()
        if s.record.spec.attack.name == "pgd-20"
        and s.record.spec.model.id == "a"
        and str(s.record.spec.threat) == "Linf@0.3"
    )
    clean = images().images.astype(np.float32) / 255
    moved = np.clip(clean + 0.3, 0, 1)
    facts = {"identity": question.identity, "weights_sha256": question.model.weights_sha256, "misclassified": "left"}
    path = store.root / "adversarials" / f"{question.identity}.safetensors"
    path.parent.mkdir()
    save_file({"example_ids": np.arange(N), "adversarial_images": moved}, path, metadata=facts)
    page = write(store, open_images=lambda examples: images())["models/a.html"]
    assert "Adversarial examples: pgd-20, Linf@0.3" in page
    shown = [
        Image.open(io.BytesIO(base64.b64decode(text)))
        for text in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]
    fell = np.flatnonzero(outcomes(7, "pgd-20")[0] & ~outcomes(7, "pgd-20")[1])[:8]
    assert len(shown) == 3 * len(fell)
    for place, example in enumerate(fell):
        before, after, change = (np.asarray(s) for s in shown[3 * place : 3 * place + 3])
        assert (before == images().images[example, 0]).all()
        assert (after == (moved[example, 0] * 255).round()).all()
        assert change.min() >= 127
    # The pictures outlive the images and the data, as long as the answer is the one that they are of.
    path.unlink()
    assert write(store, open_images=None)["models/a.html"] == page
    kept = store.root / "pictures" / f"fallen-{question.identity}.json"
    text = kept.read_text()
    assert list(json.loads(text)["pictures"]) == [str(example) for example in fell]
    for damaged in (text.replace("outcomes_sha256", "outcomes"), text.replace(f'"{fell[0]}":', '"first":'), "{", "[]"):
        kept.write_text(damaged)
        with pytest.raises(UserError, match="holds no pictures; delete it"):
            write(store)
    kept.write_text(re.sub(r'"outcomes_sha256": "\w+"', '"outcomes_sha256": "of another answer"', text))
    assert "Adversarial examples" not in write(store)["models/a.html"]
    save_file({"example_ids": np.arange(N), "adversarial_images": moved}, path, metadata=facts)
    assert write(store)["models/a.html"] == page
    assert kept.read_text() == text
    save_file({"example_ids": np.arange(N), "adversarial_images": moved}, path, metadata={**facts, "identity": "other"})
    with pytest.raises(UnsafeFile, match="images of another question"):
        write(store)


def test_a_covariance_is_drawn_where_one_was_learned(store: Store, tmp_path: Path) -> None:
    import hashlib

    folder = tmp_path / "zoo" / "a"
    values = np.linspace(1, 0, 8, dtype=np.float32).reshape(1, 1, 8)
    save_file({"sgr/covariance": values}, folder / "defense.safetensors")
    text = json.loads((folder / "card.json").read_text())
    digest = hashlib.sha256((folder / "defense.safetensors").read_bytes()).hexdigest()
    text["defense_state"] = {"file": "defense.safetensors", "sha256": digest, "bytes": 1}
    (folder / "card.json").write_text(json.dumps(text))
    files = write(store)
    assert "Covariance of the attacks it saw" in files["models/a.html"]
    read = list(csv.DictReader(io.StringIO(files["models/a-covariance.csv"])))
    assert [float(r["grey-grey"]) for r in read] == pytest.approx(values.ravel().tolist())


def test_former_weights_stand_on_the_page_and_count_nowhere(store: Store) -> None:
    question = spec("a", "fgsm", count=N, weights="former weights")
    answer = rows(first_of(N, 10))
    store.write(record(question, answer), answer)
    files = write(store)
    assert "Former weights" in files["models/a.html"]
    assert "Former weights" not in files["models/b.html"]
    assert float(table(files["robustness-mnist-linf-0.3.csv"])["a"]["fgsm"]) == pytest.approx(
        outcomes(7, "fgsm")[1].mean()
    )
    assert "former" in files["robustness-mnist-linf-0.3-history.csv"]
