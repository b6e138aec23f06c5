"""The part of `robench eval` that certifies: from certificates as typed to records, and how they are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from robench import catalog, planning
from robench.cli.answering import Job, Manner, Options, checked_model
from robench.cli.options import command_line, percent, print_table, resolve_device
from robench.errors import EvaluationFailed, UserError
from robench.records import CertificateRecord, CertificateSpec
from robench.reporting.formatting import duration

if TYPE_CHECKING:
    from robench.store import Store


def check(texts: Sequence[str], *, sigma: float, idle: Mapping[str, bool]) -> None:
    """Refuse certificates that could not be computed, before anything is loaded.

    `idle` says which options were given that no certificate follows, where nothing else does, either; it is empty where
    something is attacked.
    """
    unused = [option for option, given in idle.items() if given]
    if idle and sigma and not any(map(takes_noise, texts)):
        unused.append("--sigma")
    if texts and unused:
        raise UserError(f"{unused[0]} changes nothing about {', '.join(texts)}; leave it out, or add --attack NAME")
    for text in texts:
        if takes_noise(text) and not sigma and "sigma=" not in text:
            name = text.partition(":")[0].strip()
            raise UserError(f"certificate {name} needs the noise that smooths the model: add --sigma 0.25")
        own = planning.identify_certificate(text, sigma=sigma).parameters.get("sigma", sigma)
        if sigma and own != sigma:
            raise UserError(
                f"certificate {text} has the noise sigma {own:g}, but --sigma is {sigma:g}; leave one of the two out"
            )


def title(name: str, parameters: Mapping[str, Any]) -> str:
    """Return a certificate's name with the noise, which it leaves out because there is no usual one."""
    return f"{name}, sigma {parameters['sigma']:g}" if "sigma" in parameters else name


def takes_noise(text: str) -> bool:
    """Tell whether a certificate as typed is about a model under noise."""
    return "sigma" in catalog.find("certificates", text.partition(":")[0].strip()).parameters


def questions(job: Job, texts: Sequence[str], options: Options, *, sigma: float) -> list[CertificateSpec]:
    """Return the questions about a job's model, each once; raise UserError for one that has no answer."""
    specs = {}
    for text in texts:
        spec = CertificateSpec(
            model=job.identity,
            examples=job.examples,
            certificate=planning.identify_certificate(text, sigma=sigma),
            seed=options.seed,
            precision=options.precision,
        )
        specs[spec.identity] = spec
        if ":" in text:
            # Somebody's own parameters; those of the catalog go together, and torch takes its time to come.
            from robench.evaluation.certifying import rehearse

            rehearse(spec.certificate, job.images)
    return list(specs.values())


def run(
    job: Job, specs: Sequence[CertificateSpec], options: Options, store: Store, how: Manner
) -> list[CertificateRecord]:
    """Answer the questions; torch is imported only if something is to be computed.

    Raises EvaluationFailed where an attack that is on record goes inside a radius that is guaranteed.
    """
    known = [record for spec in specs if (record := store.find_certificate(spec))]
    if len(known) < len(specs):
        from robench.evaluation.campaign import Execution
        from robench.evaluation.certifying import Certifier
        from robench.provenance import provenance

        device = resolve_device(options.device)
        model = checked_model(job, options)
        execution = Execution(
            device=device,
            provenance=lambda: provenance(device, command_line(), compiled=how.compile_search),
            batch_size=how.batch_size,
            shard_size=how.shard_size,
            compile_search=how.compile_search,
        )
        known = Certifier(model, job.images, store=store, execution=execution).answer(specs, job.ids)
    check_soundness(known, store)
    return known


def check_soundness(records: Sequence[CertificateRecord], store: Store) -> None:
    """Compare radii with every attack on the same smoothed classifier that is on record."""
    from robench.evaluation.soundness import contradictions

    for record in records:
        sigma = record.spec.certificate.parameters.get("sigma")
        if record.spec.certificate.entry not in {"cohen", "anytime"}:
            continue
        for attack in store.complete_of(record.spec.model):
            same_data = attack.spec.examples.split_sha256 == record.spec.examples.split_sha256
            if same_data and attack.spec.decision.sigma == sigma and attack.spec.decision.top_k == 1:
                found = contradictions(record, store.outcomes(record), attack, store.outcomes(attack))
                if found:
                    raise EvaluationFailed(
                        f"{len(found)} contradictions between a certificate and an attack on {record.spec.model.id}: "
                        f"{found[0]}; one of the two is wrong"
                    )


def plan_rows(asked: Sequence[tuple[Job, Sequence[CertificateSpec]]], store: Store) -> list[dict[str, Any]]:
    """Return what there is to compute."""
    rows = []
    for classes, spec in [(len(job.images.classes), spec) for job, specs in asked for spec in specs]:
        plugin = catalog.find("certificates", spec.certificate.entry)
        passes, _ = plugin.passes(spec.certificate.parameters, classes=classes)
        known = store.find_certificate(spec) is not None
        total = 0 if known else passes * spec.examples.count
        begun = store.journal_size(planning.journal_key(spec))
        status = "known" if known else f"begun ({begun})" if begun else "new"
        rows.append(
            {
                "identity": spec.identity,
                "model": spec.model.id,
                "examples": spec.examples.count,
                "certificate": spec.certificate.name,
                "parameters": spec.certificate.parameters,
                "status": status,
                "passes at most": total,
            }
        )
    return rows


def print_plan(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what would be computed, if anything was asked."""
    if not rows:
        return
    columns = ["model", "examples", "certificate", "status", "passes at most"]
    rows = [{**row, "certificate": title(row["certificate"], row["parameters"])} for row in rows]
    cells = [[f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in columns] for row in rows]
    print_table(columns, cells, title="Plan (nothing was computed)")


def print_records(records: Sequence[CertificateRecord]) -> None:
    """Print what was found, if anything was asked, and what of it is a guarantee."""
    if not records:
        return
    rows = []
    for record in records:
        spec = record.spec
        radii = record.radii
        rows.append(
            [
                spec.model.id,
                title(spec.certificate.name, spec.certificate.parameters),
                f"{spec.examples.count:,} of {spec.examples.split_size:,}",
                percent(record.correct),
                percent(record.abstained),
                f"{radii.median:.3f}" if radii else "-",
                f"{record.average_radius:.3f}",
                f"{record.cost.forward_passes:,}",
                duration(record.cost.seconds),
                spec.identity,
            ]
        )
    examples = f"{records[0].spec.examples.split} examples"
    columns = ["model", "certificate", examples, "correct", "abstained", "median radius", "average radius"]
    print_table([*columns, "passes", "time", "record"], rows)
    for text in dict.fromkeys(f"{row[1]}: {record.guarantee}" for row, record in zip(rows, records, strict=True)):
        print(text)
