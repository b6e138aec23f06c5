"""Every sign of an attack that is too weak is seen where it is planted, and nowhere else.

The canaries (`tests/canaries.py`) that a user's `robench eval` stops before any attack are tested in `tests/flow/
test_canaries.py` too; here they meet the diagnostics themselves.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from robench import planning
from robench.checkpoints import load_card_model
from robench.classifier import Classifier
from robench.datasets import ArrayImages, fixed_shuffle, open_split, select_examples
from robench.evaluation.diagnostics import CHECKS, Attempt, diagnose
from robench.evaluation.probes import Averaged, probe
from robench.evaluation.shards import Shard
from robench.evaluation.worker import Worker
from robench.findings import Findings, Run, findings_key, sample_of
from robench.records import PLAIN, Configured, Decision, ModelIdentity
from robench.registry import find_card
from robench.threat_model import ThreatModel
from robench.workspace import Workspace
from tests import canaries
from tests.canaries import RADIUS
from tests.models import SmallNet
from tests.unit.evaluation.test_merging import rows_of

IDENTITY = ModelIdentity(id="canary", weights_sha256="0" * 64, architecture=Configured(name="canary"))


@functools.cache
def digit_images():
    images, labels = canaries.digits("test")
    pixels = (255 * images).round().to(torch.uint8).numpy()
    return ArrayImages(images=pixels, labels=labels.numpy(), classes=tuple("0123456789"), origin="digits")


def ask(attack="pgd-20", threat=f"Linf@{RADIUS}", *, images=None, count=100, decision=None, precision="fp32"):
    images = images or digit_images()
    examples, ids = select_examples(images, dataset="digits", split="test", count=count)
    (spec,) = planning.plan(
        planning.Request(IDENTITY, examples, [ThreatModel.parse(threat)], [attack], precision=precision)
    )
    return spec.model_copy(update={"decision": decision or PLAIN}), ids


#: Findings do not depend on the attack that was asked about, so tests that ask about several share them.
SEEN = {}


def examine(network, attack="pgd-20", *, shared=None, **options):
    """Evaluate, probe and judge; return the diagnostics by name, and the findings."""
    spec, ids = ask(attack, **options)
    images = options.get("images") or digit_images()
    shape, classes = images.image_shape, len(images.classes)
    model = network if isinstance(network, Classifier) else Classifier(network, input_shape=shape, num_classes=classes)
    worker = Worker(model, images, device=torch.device("cpu"), precision=spec.precision, batch_size=64)
    result = worker(Shard(spec, ids))
    assert result.error is None
    sample = sample_of(fixed_shuffle(len(images)), ids[result.rows["attacked"]], len(ids))
    found = SEEN.get(shared) or probe(worker, spec, sample)
    SEEN[shared] = found if shared else None
    assert found.problem is None
    assert found.ids == tuple(sample)
    return {d.name: d for d in diagnose(spec, result.rows, found)}, found


def flags(diagnostics):
    return {name for name, d in diagnostics.items() if d.verdict == "flag"}


def is_told(diagnostic, examples):
    """A flag names the attack that was stronger, and what it left of the examples that were looked at."""
    return (
        diagnostic.examples == diagnostic.robust_then.n == examples
        and diagnostic.stronger
        and diagnostic.stronger in diagnostic.evidence
    )


@pytest.mark.parametrize(
    ("network", "threat"),
    [(canaries.linear, f"Linf@{RADIUS}"), (canaries.robust, f"Linf@{RADIUS}"), (canaries.robust, "L2@0.5")],
)
def test_sound_models_light_no_flag(network, threat):
    diagnostics, found = examine(network(), threat=threat)
    assert flags(diagnostics) == set()
    assert {d.verdict for d in diagnostics.values()} == {"ok"}
    assert {run.role for run in found.runs} == {"reference", "longer", "margin", "black-box", "surrogate"}
    assert len(found.ids) == 50


@pytest.mark.parametrize("attack", ["fgsm", "apgd-dlr:steps=20", "square:queries=1000"])
def test_a_sound_model_lights_no_flag_under_other_attacks(attack):
    diagnostics, _ = examine(canaries.robust(), attack, shared="robust")
    assert flags(diagnostics) == set()


def test_huge_logits_light_zero_gradients():
    diagnostics, _ = examine(canaries.HugeLogits(canaries.robust(), 1e5), shared="huge")
    assert flags(diagnostics) >= {"zero-gradients", "loss-does-not-rise", "epsilon-not-fatal", "ce-above-worst"}
    found = diagnostics["zero-gradients"]
    assert "cross-entropy's gradient is exactly zero or not finite for 50 of 50, the margin's for 0" in found.evidence
    assert is_told(found, 50)
    assert found.robust_then.successes < 45, "the margin has its gradient, so there is a stronger attack"


def test_of_huge_logits_an_attack_on_the_margin_is_not_accused():
    diagnostics, found = examine(canaries.HugeLogits(canaries.robust(), 1e5), "pgd-20:loss=margin", shared="huge")
    assert flags(diagnostics) == set()
    assert len(found.zero_gradients["ce"]) == 50
    assert "break" in diagnostics["zero-gradients"].evidence, "what was tried because of the symptom is told"


def test_some_saturated_examples_are_enough():
    diagnostics, found = examine(canaries.HugeLogits(canaries.robust(), 15.0))
    assert 5 < len(found.zero_gradients["ce"]) < 45
    assert "zero-gradients" in flags(diagnostics)


def test_rounded_inputs_light_zero_gradients_and_fall_to_a_black_box():
    diagnostics, _ = examine(canaries.Quantised(canaries.robust()), shared="rounded")
    assert flags(diagnostics) >= {"zero-gradients", "loss-does-not-rise", "epsilon-not-fatal", "black-box-stronger"}
    assert "leaves 50 of 50 standing" in diagnostics["epsilon-not-fatal"].evidence, "walks begin at the image"
    assert is_told(diagnostics["black-box-stronger"], 50)
    assert "square" in diagnostics["black-box-stronger"].stronger
    assert "not-converged" not in flags(diagnostics)


def test_a_gradient_that_is_not_the_slope_is_seen_without_any_zero():
    diagnostics, found = examine(canaries.PartlyQuantised(canaries.robust()))
    assert found.zero_gradients == {"ce": (), "margin": ()}
    assert flags(diagnostics) >= {"loss-does-not-rise", "epsilon-not-fatal", "black-box-stronger"}


def test_a_gradient_that_leads_downhill_is_seen():
    diagnostics, found = examine(canaries.Misleading(canaries.robust()))
    assert found.zero_gradients == {"ce": (), "margin": ()}
    assert flags(diagnostics) >= {"loss-does-not-rise", "epsilon-not-fatal", "black-box-stronger"}


def test_of_masked_gradients_an_attack_without_gradients_is_not_accused():
    diagnostics, _ = examine(canaries.Quantised(canaries.robust()), "square:queries=1000", shared="rounded")
    assert flags(diagnostics) == set()
    for name in ("zero-gradients", "loss-does-not-rise", "epsilon-not-fatal", "ce-above-worst"):
        assert diagnostics[name].verdict == "not applicable"


@pytest.mark.parametrize(
    ("network", "decision"),
    [
        (lambda: canaries.Noisy(canaries.robust()), PLAIN),
        (lambda: canaries.Noisy(canaries.robust()), Decision(votes=5)),
        (canaries.dropout_left_on, PLAIN),
    ],
)
def test_random_outputs_are_seen_whether_several_passes_decide_or_one(network, decision):
    diagnostics, found = examine(network(), decision=decision)
    assert "random-outputs" in flags(diagnostics)
    assert "does not average" in diagnostics["random-outputs"].evidence
    assert diagnostics["random-outputs"].stronger == "pgd-20 on the mean of 8 passes"
    assert diagnostics["eight-bit"].verdict == "not applicable"
    assert found.output_gap > 1e-3


def test_a_smoothed_model_is_random_by_its_decision():
    diagnostics, found = examine(canaries.robust(), decision=Decision(votes=9, sigma=0.1))
    assert found.output_gap == 0
    assert diagnostics["random-outputs"].verdict == "flag"
    assert "noise of 0.1 is added, 9 votes" in diagnostics["random-outputs"].evidence


def test_steps_that_are_too_small_light_not_converged():
    diagnostics, _ = examine(canaries.robust(), "pgd-20:step_size=0.001")
    assert flags(diagnostics) == {"not-converged", "ce-above-worst"}
    assert is_told(diagnostics["not-converged"], 50)


def test_what_a_stronger_attack_left_of_a_linear_model_is_not_below_what_is_there():
    network = canaries.linear()
    diagnostics, found = examine(network, "pgd-20:step_size=0.001")
    images, labels = canaries.digits("test")
    weight, logits = network.layers[0].weight, network(images)
    gaps = logits.gather(1, labels[:, None]) - logits
    reach = RADIUS * (weight[labels][:, None] - weight[None]).abs().sum(2)
    stands = ((gaps > reach) | (torch.arange(10) == labels[:, None])).all(1)
    assert flags(diagnostics) == {"not-converged", "ce-above-worst"}
    assert diagnostics["not-converged"].robust_then.successes >= int(stands[list(found.ids)].sum()) > 0


def test_images_that_rounding_brings_back_light_eight_bit():
    # A ball of less than half a level holds no other file. Images beside the boundary: on the way from one to another.
    network, (images, _) = canaries.linear(), canaries.digits("test")
    way = torch.linspace(0, 1, 300).view(-1, 1, 1, 1, 1)
    between = (255 * ((1 - way) * images[:30] + way * images[30:60])).round().flatten(0, 1)
    logits = network(between / 255).topk(2, dim=1)
    close = logits.values.diff(dim=1).squeeze(1).abs() < 0.03
    images = ArrayImages(
        images=between[close].to(torch.uint8).numpy(),
        labels=logits.indices[close, 0].numpy(),
        classes=digit_images().classes,
        origin="between",
    )
    diagnostics, _ = examine(network, threat="Linf@0.0019", images=images, count=None)
    assert flags(diagnostics) == {"eight-bit"}
    lost = diagnostics["eight-bit"].examples
    assert lost >= 2
    assert f"{lost} of {lost} adversarial images are classified correctly again" in diagnostics["eight-bit"].evidence


@pytest.mark.data
def test_the_bundled_robust_network_lights_no_flag(data_root, tmp_path):
    place = Workspace(root=tmp_path, data_root=data_root, user_zoo=tmp_path)
    folder, card = find_card("mnist-pgd", place)
    images = open_split("mnist", "test", place)
    diagnostics, _ = examine(load_card_model(card, folder), threat="Linf@0.3", images=images, count=60)
    assert flags(diagnostics) == set()


# What one record is held responsible for: by hand.


def judged(spec, *, standing, roles, n=50, backward=1, others=(), **found):
    """Diagnose `n` answered examples of which the first `standing` are robust; `roles`: how many fall to each probe."""
    rows = rows_of(np.arange(n) < standing, np.ones(n, bool))
    rows["backward_passes"] = np.full(n, backward)
    rows["broken_in_8_bit"] = rows["broken"]
    runs = tuple(Run(role=role, attack=role, broken=tuple(range(count))) for role, count in roles.items())
    findings = Findings(
        ids=tuple(range(n)),
        zero_gradients=found.pop("zero_gradients", {"ce": (), "margin": ()}),
        unbroken_in_box=found.pop("unbroken_in_box", {"ce": (), "margin": ()}),
        runs=runs,
        **found,
    )
    return {d.name: d for d in diagnose(spec, rows, findings, others)}


@pytest.mark.parametrize(
    ("name", "role", "enough"),
    [("not-converged", "longer", 4), ("black-box-stronger", "surrogate", 4), ("ce-above-worst", "margin", 5)],
)
def test_harm_is_a_flag_from_where_it_can_hardly_be_chance(name, role, enough):
    spec, _ = ask()
    assert flags(judged(spec, standing=40, roles={role: enough})) == {name}
    assert flags(judged(spec, standing=40, roles={role: enough - 1})) == set()
    found = judged(spec, standing=40, roles={role: 10})[name]
    assert (found.robust_then.successes, found.robust_then.n) == (30, 50)
    assert found.evidence.endswith("leaves 40 of 50; " + f"{role} breaks 10 of the 40 that it left")
    # What the record broke itself is no harm.
    assert flags(judged(spec, standing=0, roles={role: 50})) == set()


def test_the_cross_entropy_is_compared_with_the_worst_of_all_that_was_tried():
    spec, _ = ask()
    # Each of the probes alone breaks too little: together, each other examples, it is much.
    probes = {"margin": range(3), "black-box": range(3, 5), "surrogate": range(2), "long-black-box": range(5, 6)}
    runs = tuple(Run(role=role, attack=role, broken=tuple(ids)) for role, ids in probes.items())
    few = {d.name: d for d in diagnose(spec, *_answered(standing=40, runs=runs[:1]))}
    assert few["ce-above-worst"].verdict == "ok"
    found = {d.name: d for d in diagnose(spec, *_answered(standing=40, runs=runs))}["ce-above-worst"]
    assert (found.verdict, found.robust_then.successes) == ("flag", 34)
    assert found.stronger == "margin + black-box + long-black-box", "as few as break all of it"
    # Another evaluation of the same examples counts like a probe; what it broke elsewhere, or the record too, is none.
    others = (Attempt("autoattack", frozenset(range(5, 80))), Attempt("fgsm", frozenset({5, 6})))
    found = judged(spec, standing=40, roles={"margin": 2}, others=others)
    assert flags(found) == {"ce-above-worst"}
    assert found["ce-above-worst"].stronger == "autoattack + margin"
    assert found["ce-above-worst"].evidence.endswith("autoattack + margin break 37 of the 40 that it left")
    within = (Attempt("autoattack", frozenset(range(2, 80)) - frozenset(range(4, 40))),)
    assert flags(judged(spec, standing=40, roles={"margin": 2}, others=within)) == set(), "a point or two is usual"
    margin, _ = ask("pgd-20:loss=margin")
    assert flags(judged(margin, standing=40, roles={}, others=others)) == set()


def _answered(*, standing, runs, n=50):
    """Return rows of which the first `standing` are robust, and findings of these runs."""
    rows = rows_of(np.arange(n) < standing, np.ones(n, bool))
    rows["broken_in_8_bit"] = rows["broken"]
    no = {"ce": (), "margin": ()}
    return rows, Findings(ids=tuple(range(n)), zero_gradients=no, unbroken_in_box=no, runs=runs)


def test_a_symptom_is_held_against_who_follows_it_or_is_harmed():
    dead = {"zero_gradients": {"ce": tuple(range(40)), "margin": ()}}
    (entropy, _), (margin, _) = ask("pgd-20"), ask("pgd-20:loss=margin")
    assert flags(judged(entropy, standing=40, roles={"margin": 0}, **dead)) == {"zero-gradients"}
    assert flags(judged(margin, standing=40, roles={"rescaled": 0}, **dead)) == set()
    assert flags(judged(margin, standing=40, roles={"rescaled": 9}, **dead)) == {"zero-gradients"}
    assert judged(entropy, standing=40, roles={}, backward=0, **dead)["zero-gradients"].verdict == "not applicable"
    unknown = judged(entropy, standing=40, roles={}, backward=-1, **dead)
    assert "zero-gradients" in flags(unknown), "an attack that does not tell its passes may follow gradients"


def test_an_attack_that_averages_over_a_random_model_is_not_accused():
    spec, _ = ask(decision=Decision(votes=5))
    assert "random-outputs" in flags(judged(spec, standing=40, roles={}, output_gap=0.1))
    for attack in ("smoothed-pgd:copies=8", "apgd-ce:eot_copies=8", "autoattack-rand"):
        several = ask(attack, decision=Decision(votes=5))[0]
        assert flags(judged(several, standing=40, roles={}, output_gap=0.1)) == set()
    assert flags(judged(several, standing=40, roles={"averaged": 9}, output_gap=0.1)) == {"random-outputs"}
    single = several.model_copy(update={"decision": PLAIN})
    assert flags(judged(single, standing=40, roles={}, output_gap=0.1)) == {"random-outputs"}


def test_what_could_not_be_made_is_said():
    spec, _ = ask()
    rows = rows_of(np.ones(5, bool), np.ones(5, bool), ids=[1, 2, 3, 4, 5])
    for findings, reason in [
        (Findings(ids=(1,), problem="the probes failed: ZeroDivisionError: on purpose"), "on purpose"),
        (Findings(ids=(77,)), "none of the examples"),
    ]:
        made = diagnose(spec, rows, findings)
        assert [d.name for d in made] == [*CHECKS, "eight-bit"]
        assert {d.verdict for d in made} == {"not applicable"}
        assert all(reason in d.evidence for d in made[:-1])
    unbounded = spec.model_copy(update={"attack": ask("lrc-noise")[0].attack})
    made = diagnose(unbounded, rows, Findings(ids=(1, 2)))
    assert {d.verdict for d in made} == {"not applicable"}
    assert "leaves the ball" in made[0].evidence

    class Crashing(SmallNet):
        def forward(self, images):
            if len(images) == 3:
                raise ZeroDivisionError("on purpose\nsecond line")
            return super().forward(images)

    images = ArrayImages(
        images=np.zeros((9, 1, 4, 4), np.uint8), labels=np.zeros(9, np.int64), classes=tuple("abcde"), origin="test"
    )
    model = Classifier(Crashing().eval(), input_shape=(1, 4, 4), num_classes=5)
    worker = Worker(model, images, device=torch.device("cpu"), precision="fp32")
    assert probe(worker, spec, np.arange(3)).problem == "the probes failed: ZeroDivisionError: on purpose"
    assert probe(worker, spec, np.arange(0)).problem == "no example is classified correctly"


def test_the_sample_is_the_first_of_the_fixed_order():
    order = fixed_shuffle(10_000)
    correct = np.sort(order[::2])
    for answered, size in [(60, 50), (1000, 50), (2000, 100), (10_000, 128)]:
        assert (sample_of(order, correct, answered) == order[::2][:size]).all()
    assert len(sample_of(order, correct[:7], 10_000)) == 7


def test_findings_are_the_same_in_other_batches():
    model = Classifier(canaries.HugeLogits(canaries.robust(), 15.0), input_shape=(1, 8, 8), num_classes=10)
    spec, ids = ask(precision="fp64")
    found = []
    for size in (64, 7):
        worker = Worker(model, digit_images(), device=torch.device("cpu"), precision="fp64", batch_size=size)
        found.append(probe(worker, spec, ids[:10]))
    assert found[0].problem is None
    assert found[0] == found[1]
    assert Findings.from_json(found[0].to_json(), origin="test") == found[0]


def test_findings_are_kept_under_all_that_can_change_them():
    spec, ids = ask()
    keys = {
        findings_key(question, some, code)
        for question, some, code in [
            (spec, ids, "a"),
            (spec, ids, "b"),
            (spec, ids[1:], "a"),
            (spec.model_copy(update={"seed": 1}), ids, "a"),
            (spec.model_copy(update={"precision": "bf16"}), ids, "a"),
            (spec.model_copy(update={"decision": Decision(votes=3)}), ids, "a"),
            (ask(threat="Linf@0.2")[0], ids, "a"),
        ]
    }
    assert len(keys) == 7
    assert findings_key(ask("fgsm")[0], ids, "a") in keys, "the attack that was asked about does not change them"


def test_the_mean_over_offsets_is_the_mean_of_the_logits():
    network = canaries.robust()
    images = canaries.digits("test")[0][:4]
    offsets = torch.linspace(-0.1, 0.1, 3).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    expected = sum(network((images + d).clamp(0, 1)) for d in (-0.1, 0.0, 0.1)) / 3
    assert torch.allclose(Averaged(network, offsets)(images), expected, atol=1e-5)
