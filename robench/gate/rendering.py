"""One check, written for people and for machines: text, Markdown, JUnit XML, JSON, GitHub's annotations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from robench.gate.verdicts import Check, Kind, Verdict, change_of

_SIGNS: Mapping[Kind, str] = {
    "better": "🟢",
    "same": "⚪",
    "worse": "🔴",
    "not comparable": "🟠",
    "missing": "🟠",
    "damaged": "🟠",
}

COLUMNS = ("model", "question", "metric", "baseline", "now", "change", "p", "verdict")


def headline(check: Check) -> str:
    """Return the answer in one line."""
    failing = [f"{check.count(k)} {k}" for k in _SIGNS if check.count(k) and k not in {"better", "same"}]
    what = "robustness" if check.rules.gate == "model" else "the engine"
    passing = f"{check.count('same')} same, {check.count('better')} better"
    if check.passes:
        return f"passed: {what} did not get worse ({passing})"
    return f"failed: {', '.join(failing)} ({passing})"


def number(verdict: Verdict, value: float | None) -> str:
    """Return a share in percent or a length."""
    if value is None:
        return "-"
    if verdict.summary == "share":
        return f"{100 * value:.{2 if (verdict.n or 0) >= 5000 else 1}f} %"
    return f"{value:.4g}" if math.isfinite(value) else "∞"


def change(verdict: Verdict) -> str:
    """Return the change with its interval: "-2.1 [-2.6, -1.5] points"."""
    if verdict.before is None:
        return "-"
    difference = change_of(verdict)
    if verdict.change is None:
        return f"{difference:+.1f} {'points' if verdict.summary == 'share' else '%'}"
    low, high = (100 * bound for bound in verdict.change)
    return f"{difference:+.2f} [{low:+.2f}, {high:+.2f}] points"


def cells(verdict: Verdict) -> tuple[str, ...]:
    """Return a line of the table, in the order of COLUMNS."""
    p = "-" if verdict.p is None else f"{verdict.p:.2g}"
    before, now = (number(verdict, value) for value in (verdict.before, verdict.now))
    return verdict.model, verdict.question, verdict.metric, before, now, change(verdict), p, verdict.kind


def line(verdict: Verdict) -> str:
    """Return a verdict as one line: what happened and what to do."""
    where = ", ".join(part for part in (verdict.model, verdict.question) if part)
    if verdict.before is None:
        return f"{verdict.kind}: {where}: {verdict.reason}"
    moved = f"{verdict.metric} {number(verdict, verdict.before)} -> {number(verdict, verdict.now)} ({change(verdict)})"
    return f"{verdict.kind}: {where}: {moved}" + (f"; {verdict.reason}" if verdict.reason else "")


def notable(check: Check) -> list[Verdict]:
    """Return the verdicts that need words: those that fail, and those with a remark."""
    return [v for v in check.verdicts if not v.passes or v.reason or v.kind == "better"]


def rule(check: Check) -> str:
    """Return how it was judged."""
    rules = check.rules
    chance = f"all numbers together, alpha {rules.alpha:g}"
    if rules.fast:
        return (
            f"Examples were drawn in random order until it was clear that a number is behind {check.baseline}, by more "
            f"than {rules.tolerance:g} points, or not by so much ({chance}, whenever it stopped). Certificates and "
            "distances were not looked at."
        )
    if rules.gate == "engine":
        return (
            f"Against {check.baseline}, on frozen weights: robust accuracy and distances must not rise by more than "
            f"{rules.tolerance:g} points or percent, clean accuracy and certificates must not move; what rounding "
            f"explains does not count ({chance})."
        )
    return (
        f"A number is worse where it is more than {rules.tolerance:g} points (lengths: percent) behind "
        f"{check.baseline} and the answers to the same examples differ by more than chance ({chance})."
    )


def markdown(check: Check) -> str:
    """Return a comment for a pull request."""
    head = [f"### {'✅' if check.passes else '❌'} robench check {headline(check)}", ""]
    rows = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for verdict in check.verdicts:
        text = [cell.replace("|", "\\|") for cell in cells(verdict)]
        rows.append(f"| {_SIGNS[verdict.kind]} | " + " | ".join(text) + " |")
    words = [f"- {line(verdict)}" for verdict in notable(check)]
    return "\n".join([*head, *rows, "", *words, *([""] if words else []), rule(check), ""])


def junit(check: Check) -> str:
    """Return JUnit XML: a test case for each verdict."""
    failures = sum(not verdict.passes for verdict in check.verdicts)
    suite = f'<testsuite name="robench check" tests="{len(check.verdicts)}" failures="{failures}" errors="0">'
    parts = ['<?xml version="1.0" encoding="UTF-8"?>', suite]
    for verdict in check.verdicts:
        name = ", ".join(part for part in (verdict.question, verdict.metric) if part)
        parts.append(f"<testcase classname={quoteattr(verdict.model)} name={quoteattr(name)}>")
        if not verdict.passes:
            parts.append(f"<failure type={quoteattr(verdict.kind)} message={quoteattr(line(verdict))}/>")
        parts += [f"<system-out>{escape(' | '.join(cells(verdict)))}</system-out>", "</testcase>"]
    return "\n".join([*parts, "</testsuite>", ""])


def as_json(check: Check) -> str:
    """Return everything for programs; infinite lengths are null, the examples that fell their ids."""
    rules = {"gate": check.rules.gate, "tolerance": check.rules.tolerance, "alpha": check.rules.alpha}
    verdicts = [_fields(verdict) for verdict in check.verdicts]
    value = {"passes": check.passes, "baseline": check.baseline, "rules": rules, "verdicts": verdicts}
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _fields(verdict: Verdict) -> dict[str, Any]:
    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return {
        "model": verdict.model,
        "question": verdict.question,
        "metric": verdict.metric,
        "verdict": verdict.kind,
        "baseline": finite(verdict.before),
        "now": finite(verdict.now),
        "change": finite(change_of(verdict)) if verdict.before is not None else None,
        "interval": verdict.change,
        "p": verdict.p,
        "examples": verdict.n,
        "reason": verdict.reason,
        "lost": [] if verdict.lost is None else verdict.lost.tolist(),
    }


def github(check: Check) -> str:
    """Return workflow commands, which GitHub shows as annotations of the run."""
    made = []
    for verdict in notable(check):
        level = "notice" if verdict.passes else "error"
        title = f"robench: {verdict.metric} of {verdict.model} {verdict.kind}"
        made.append(f"::{level} title={_command_property(title)}::{_command_text(line(verdict))}")
    made.append(f"::notice title=robench check::{_command_text(headline(check))}")
    return "\n".join(made) + "\n"


def _command_text(text: str) -> str:
    """Escape what a workflow command would read as its own (GitHub, "Workflow commands")."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _command_property(text: str) -> str:
    return _command_text(text).replace(":", "%3A").replace(",", "%2C")


#: By the name that `--format` takes.
FORMATS: Mapping[str, Callable[[Check], str]] = {
    "markdown": markdown,
    "junit": junit,
    "json": as_json,
    "github": github,
}
