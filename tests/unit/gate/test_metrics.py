"""From rows to one value per example."""

from __future__ import annotations

import numpy as np

from robench.gate.metrics import metrics_of
from robench.store import Store
from tests import synthetic


def test_a_wrong_clean_image_lies_at_distance_zero_and_an_unbroken_one_infinitely_far(tmp_path):
    store = Store(tmp_path)
    clean = np.array([False, True, True, True])
    reach = np.array([np.inf, 0.2, np.inf, 0.4])
    answer = synthetic.put_minimum_norm(store, synthetic.spec(attack="ddn-100", count=4), reach, clean=clean)
    rows = dict(store.outcomes(answer))
    rows["linf"] = np.array([0.7, 0.2, 0.0, 0.4])  # whatever the attack returned for the one that was wrong anyway
    found = {metric.name: metric for metric in metrics_of(answer, rows)}
    assert found["ddn-100 median Linf distance"].values.tolist() == [0.0, 0.2, np.inf, 0.4]
    assert found["clean"].values.tolist() == clean.tolist()
