"""How long it takes to rebuild the whole site from 1,000 records of 10,000 examples, and how heavy its pages are.

    python -m benchmarks.site                        # 100 models, 10 attacks, one table: the largest pages
    python -m benchmarks.site --models 50 --tables 2

Made-up records are written first, which is not measured. Then `robench leaderboard` runs in a process of its own:
wall and processor time, peak memory, whether torch was imported, and the heaviest pages. Where a Chromium is at hand
(`ROBENCH_CHROMIUM` names one) the heaviest are opened, too. The bounds are printed beside what was found, and the exit
status is 1 where one is missed: 20 s, 1 GiB, 1.5 MB a page, 1 s to open one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from robench.records import (
    OUTCOME_TYPES,
    AttackIdentity,
    Configured,
    Cost,
    EvalRecord,
    EvalSpec,
    Examples,
    ModelIdentity,
    Provenance,
    canonical_hash,
)
from robench.statistics import proportion
from robench.store import Store, outcome_sha256
from robench.threat_model import ThreatModel

SECONDS, MEMORY, PAGE, OPENING = 20.0, 2**30, 1.5e6, 1.0

_RUN = """
import sys
from robench.cli import run
status = run(["leaderboard", "--workspace", sys.argv[1]])
sys.exit(status or 9 * ("torch" in sys.modules))
"""


def main() -> int:
    """Write the records, rebuild the site, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--attacks", type=int, default=10)
    parser.add_argument("--tables", type=int, default=1, help="threat models under which all models are evaluated")
    parser.add_argument("--examples", type=int, default=10_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        count = write_records(root, asked)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", _RUN, folder], stdout=subprocess.DEVNULL, check=False)
        wall = time.perf_counter() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            print("torch was imported" if done.returncode == 9 else f"robench leaderboard ended with {done.returncode}")
            return 1
        pages = sorted((root / "reports" / "leaderboards").rglob("*.html"), key=lambda p: -p.stat().st_size)
        print(f"{count} records of {asked.examples} examples, {len(pages)} pages, without torch")
        found = [
            ("rebuilding, s wall", wall, SECONDS),
            ("rebuilding, s of processor", used.ru_utime + used.ru_stime, SECONDS),
            ("peak memory, GiB", used.ru_maxrss * 1024 / 2**30, MEMORY / 2**30),
            *((f"{page.name}, MB", page.stat().st_size / 1e6, PAGE / 1e6) for page in pages[:3]),
            *((f"{page.name} opens, s", seconds, OPENING) for page, seconds in opened(pages[:3])),
        ]
    for title, value, bound in found:
        print(f"{title:50} {value:8.2f}   at most {bound:g}{'' if value <= bound else '   MISSED'}")
    return int(any(value > bound for _, value, bound in found))


def write_records(root: Path, asked: argparse.Namespace) -> int:
    """Write models whose outcomes differ as real ones do: the same images are hard for all of them."""
    store, random = Store(root / "reports"), np.random.default_rng(0)
    n = asked.examples
    hardness = random.random(n)
    ids = canonical_hash(list(range(n)))
    rows = {name: np.zeros(n, kind) for name, kind in OUTCOME_TYPES.items()}
    rows |= {"example_id": np.arange(n), "label": random.integers(0, 10, n).astype(np.int32)}
    written = 0
    for table in range(asked.tables):
        for model in range(asked.models):
            clean = hardness < 0.9 + 0.1 * random.random()
            for attack in range(asked.attacks):
                robust = clean & (hardness + 0.1 * random.random(n) < 0.75 - 0.4 * model / asked.models - 0.01 * attack)
                fell = clean & ~robust
                rows |= {
                    "clean_prediction": np.where(clean, rows["label"], (rows["label"] + 1) % 10).astype(np.int32),
                    "attacked": clean,
                    "broken": fell,
                    "robust": robust,
                    "linf": np.where(fell, 0.03, 0.0),
                    "l2": fell * random.random(n),
                    "broken_by": np.where(fell, "apgd-ce", ""),
                }
                spec = EvalSpec(
                    model=ModelIdentity(
                        id=f"model-{model:03}",
                        weights_sha256=canonical_hash(model),
                        architecture=Configured(name=f"resnet{18 + model % 5}"),
                    ),
                    examples=Examples(
                        dataset="cifar10", split="test", split_sha256="0" * 64, split_size=n, count=n, ids_sha256=ids
                    ),
                    threat=ThreatModel.parse(f"Linf@{8 + table}/255"),
                    attack=AttackIdentity(
                        name=f"attack-{attack}", entry="attack", version=1, parameters={"steps": 10, "step_size": None}
                    ),
                    seed=0,
                    precision="fp32",
                )
                record = EvalRecord(
                    spec=spec,
                    status="complete",
                    clean=proportion(int(clean.sum()), n),
                    robust=proportion(int(robust.sum()), n),
                    median_distance=0.03 if fell.any() else None,
                    cost=Cost(forward_passes=20 * n, backward_passes=10 * n, seconds=100.0),
                    provenance=Provenance(
                        robench="0",
                        code="0",
                        torch="0",
                        python="0",
                        device="cpu",
                        threads=1,
                        command="robench eval",
                        finished="2026-01-01T00:00:00Z",
                    ),
                    outcomes_sha256=outcome_sha256(rows),
                )
                store.write(record, rows)
                written += 1
    return written


def opened(pages: list[Path]) -> list[tuple[Path, float]]:
    """Return how long each page takes from the click to the end of loading, best of three; none without a browser."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from chromium import Browser, find_chromium

    if find_chromium() is None:
        print("no Chromium at hand: pages were not opened")
        return []
    found = []
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        for page in pages:
            times = []
            for _ in range(3):
                browser.open(page)
                timing = "JSON.stringify(performance.getEntriesByType('navigation')[0])"
                times.append(json.loads(browser.value(timing))["loadEventEnd"] / 1000)
            found.append((page, min(times)))
    return found


if __name__ == "__main__":
    sys.exit(main())
