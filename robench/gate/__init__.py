"""The gate: did robustness get worse? Records against a baseline, one exit status. It reads; torch is never imported.

::

    baseline     what is compared against: a TOML file that names records by their hashes
    metrics      from a record's rows to one value per example for each thing that is compared
    paired_tests whether two such columns differ by more than chance
    verdicts     the table: better, same, worse, not comparable, missing, damaged
    rendering    the table as text, Markdown, JUnit, JSON and GitHub annotations; page as HTML
"""
