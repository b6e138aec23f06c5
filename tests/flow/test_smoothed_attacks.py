"""Attacks on a smoothed model, as a user asks for them: they follow its noise without being told twice."""

from __future__ import annotations

from robench.store import Store

SMOOTHED = ("eval", "--model", "tiny", "--device", "cpu", "--examples", "20", "--threat", "L2@0.6", "--sigma", "0.3")


def test_the_models_noise_is_the_attacks_and_stands_in_the_record(workspace, robench):
    asked = (*SMOOTHED, "--votes", "9", "--attack", "smoothed-pgd:steps=5", "--attack", "smoothed-ddn:steps=5")
    status, _, err = robench(*asked)
    assert status == 0, err
    assert "one noisy copy" not in err
    for stored in Store(workspace / "reports").records():
        parameters = stored.record.spec.attack.parameters
        assert (parameters["sigma"], parameters["copies"]) == (0.3, 9)
        assert stored.record.cost.backward_passes <= 20 * 5 * 9


def test_a_single_copy_is_said_to_be_weak(workspace, robench):
    asked = (*SMOOTHED, "--dry-run", "--attack", "smoothed-pgd")
    status, out, err = robench(*asked, "--json")
    assert (status, out[0]) == (0, "[")
    (line,) = err.splitlines()
    assert line.startswith("robench: smoothed-pgd:sigma=0.3 follows one noisy copy of each image")
    assert "write smoothed-pgd:copies=25" in line
    assert robench(*asked, "--votes", "9")[2] == ""
    assert robench(*SMOOTHED, "--dry-run", "--attack", "fgsm")[2] == ""
