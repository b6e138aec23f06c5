"""What is committed holds together, and a sample of it comes out again when it is computed anew."""

from __future__ import annotations

import filecmp
import html
import re

import numpy as np
import pytest
import torch

from robench import catalog
from robench.checkpoints import load_card_model
from robench.datasets import open_split, select_examples
from robench.evaluation.campaign import Execution
from robench.evaluation.certifying import Certifier
from robench.evaluation.shards import Shard
from robench.evaluation.worker import Worker
from robench.planning import is_bounded, is_minimum_norm
from robench.registry import read_cards
from robench.reporting import write_leaderboards, write_papers
from robench.reporting.inventory import INVENTORY, remove_others
from robench.smoothing_bounds import clopper_pearson_lower, radius_of
from robench.store import Store
from robench.workspace import Workspace
from tests.flow.conftest import ROOT

CARDS = read_cards([ROOT / "model_zoo"])
STORE = Store(ROOT / "reports")
RECORDS = [stored.record for stored in STORE.records()]
CERTIFICATES = [stored.record for stored in STORE.certificates()]
TIMINGS = [stored.record for stored in STORE.timings()]
WHOLE = [r for r in RECORDS if r.spec.examples.count == r.spec.examples.split_size]


def name_of(record):
    return f"{record.spec.model.id}-{record.spec.attack.name}"


def test_both_twins_are_there_with_three_attacks_on_all_test_images():
    found = {(r.spec.model.id, r.spec.attack.name): r for r in WHOLE if str(r.spec.threat) == "Linf@0.3"}
    for attack in ("fgsm", "pgd-20", "pgd-40"):
        for model in ("mnist-standard", "mnist-pgd"):
            assert found[model, attack].robust.n == 10_000
    assert found["mnist-pgd", "pgd-40"].robust.value > 0.85
    assert found["mnist-standard", "pgd-40"].robust.value < 0.01


def test_every_number_says_the_command_that_makes_it_anywhere():
    provenances = {
        **{card.id: card.provenance for _, card in (CARDS[name] for name in CARDS)},
        **{r.spec.identity: r.provenance for r in (*RECORDS, *CERTIFICATES, *TIMINGS)},
    }
    wrong = {
        name: found.command
        for name, found in provenances.items()
        if len(found.command.split()) < 3 or "--workspace" in found.command or "--data-root" in found.command
    }
    assert not wrong


@pytest.mark.parametrize("name", CARDS)
def test_weights_match_their_card_and_golden_logits(name):
    folder, card = CARDS[name]
    assert load_card_model(card, folder).num_classes == card.num_classes
    epochs = card.recipe["epochs"] * card.recipe.get("rounds", 1)
    assert (folder / "training.csv").read_text().count("\n") == epochs + 1


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_records_are_of_these_weights_and_follow_from_their_rows(record):
    card = CARDS[record.spec.model.id].card
    assert record.status == "complete"
    assert record.spec.model.weights_sha256 == card.weights.sha256
    rows = STORE.outcomes(record)
    assert len(rows["example_id"]) == record.robust.n == record.spec.examples.count
    assert record.robust.successes == rows["robust"].sum()
    assert record.clean.successes == (rows["clean_rank"] == 0).sum()
    assert (rows["broken"] == (rows["adversarial_prediction"] != rows["label"])).all()
    radius = record.spec.threat.radius
    # The tolerance that README states; noise without a bound has no ball.
    inside = (rows[record.spec.threat.norm.lower()] <= radius + 1e-6 * max(1, radius)) | (not is_bounded(record.spec))
    assert (rows["robust"] == (rows["attacked"] & ~(rows["broken"] & inside))).all()
    assert inside.all() or is_minimum_norm(record.spec)


@pytest.mark.parametrize("record", CERTIFICATES, ids=lambda r: f"{r.spec.model.id}-{r.spec.certificate.name}")
def test_certificates_are_of_these_weights_and_follow_from_their_rows(record):
    rows = STORE.outcomes(record)
    assert record.spec.model.weights_sha256 == CARDS[record.spec.model.id].card.weights.sha256
    assert len(rows["example_id"]) == record.correct.n == record.spec.examples.count
    assert (record.correct.successes, record.abstained.successes) == (
        rows["correct"].sum(),
        (rows["prediction"] < 0).sum(),
    )
    assert not rows["correct"][rows["prediction"] < 0].any()
    alpha = record.spec.certificate.parameters.get("alpha")
    if record.spec.certificate.entry == "cohen":
        lower = clopper_pearson_lower(rows["hits"], record.spec.certificate.parameters["n"], alpha)
        assert np.allclose(rows["radius"], radius_of(lower, record.spec.certificate.parameters["sigma"]))


@pytest.mark.data
@pytest.mark.parametrize("record", CERTIFICATES, ids=lambda r: f"{r.spec.model.id}-{r.spec.certificate.name}")
def test_a_sample_of_radii_comes_out_again(record, data_root, tmp_path):
    spec = record.spec
    images = open_split(
        spec.examples.dataset, spec.examples.split, Workspace(root=ROOT, data_root=data_root, user_zoo=tmp_path)
    )
    _, ids = select_examples(images, dataset=spec.examples.dataset, split="test", count=spec.examples.count)
    stored = STORE.outcomes(record)
    # Those that took the fewest samples: the others take a minute each.
    order = np.argsort(stored["samples"], kind="stable")[:2]
    sample = stored["example_id"][order]
    assert np.isin(sample, ids).all()
    folder, card = CARDS[spec.model.id]
    device = torch.device("cpu")
    execution = Execution(device=device, provenance=lambda: record.provenance, batch_size=200)
    certifier = Certifier(load_card_model(card, folder), images, store=STORE, execution=execution)
    rows, _ = certifier._shard(spec, sample)
    assert (rows["prediction"] == stored["prediction"][order]).all()
    # Rounding in float32 may turn one noisy copy in thousands.
    assert np.abs(rows["hits"] - stored["hits"][order]).max() <= 2
    assert np.allclose(rows["radius"], stored["radius"][order], rtol=1e-2, atol=1e-3)


def test_more_steps_break_no_fewer_images():
    by_model = {}
    for record in WHOLE:
        by_model.setdefault(record.spec.model.id, {})[record.spec.attack.name] = record.robust.successes
    for broken in by_model.values():
        weak_to_strong = [broken[attack] for attack in ("fgsm", "pgd-20", "pgd-40") if attack in broken]
        assert weak_to_strong == sorted(weak_to_strong, reverse=True)


def test_three_lines_of_a_model_page_load_it():
    page = (ROOT / "reports" / "leaderboards" / "models" / "mnist-pgd.html").read_text()
    lines = html.unescape(re.search(r"<h2>Load it</h2>\s*<pre><code>(.*?)</code>", page, re.DOTALL)[1])
    assert lines.count("\n") == 2
    names = {}
    exec(lines, names)
    assert names["model"](torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_leaderboards_come_out_byte_for_byte(tmp_path):
    names = list(catalog.plugins("leaderboards"))
    # The pages link to records and cards beside them, so they are written into a mirror of the checkout.
    parts = ("records", "certificates", "transfers", "timings", "outcomes", "pictures", "regions", "lines")
    for part in (*(f"reports/{part}" for part in parts), "model_zoo"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part).symlink_to(ROOT / part)
    out = tmp_path / "reports" / "leaderboards"
    store = Store(tmp_path / "reports")
    cards = read_cards([tmp_path / "model_zoo"])
    written = write_papers(catalog.plugins("tables"), store, cards, out, formats=("html", "csv"))
    written += write_leaderboards(names, store, cards, out)
    committed = ROOT / "reports" / "leaderboards"
    assert remove_others(out, written) == []
    written.append(out / INVENTORY)
    assert {p.relative_to(out) for p in written} == {
        p.relative_to(committed) for p in committed.rglob("*") if p.is_file()
    }
    for path in written:
        assert filecmp.cmp(path, committed / path.relative_to(out), shallow=False), path.relative_to(out)


@pytest.mark.data
@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_a_sample_comes_out_again(record, data_root, tmp_path):
    spec = record.spec
    place = Workspace(root=ROOT, data_root=data_root, user_zoo=tmp_path)
    images = open_split(spec.examples.dataset, spec.examples.split, place)
    examples, ids = select_examples(images, dataset=spec.examples.dataset, split="test", count=spec.examples.count)
    assert examples == spec.examples, "the data and the choice of examples are those of the record"
    folder, card = CARDS[spec.model.id]
    worker = Worker(
        load_card_model(card, folder),
        images,
        device=torch.device("cpu"),
        precision="fp32",
        batch_size=50,
        training=lambda: open_split(spec.examples.dataset, "train", place),
    )
    sample = ids[::200]
    found = worker(Shard(spec, sample)).rows
    stored = STORE.outcomes(record)
    rows = np.searchsorted(stored["example_id"], sample)
    # Rounding in float32 may turn a rare example; a wrong weight, image, label, seed or step turns many.
    assert (found["robust"] != stored["robust"][rows]).sum() <= 1
    assert (found["clean_prediction"] == stored["clean_prediction"][rows]).all()
