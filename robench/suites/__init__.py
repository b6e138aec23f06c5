"""Suites: one TOML file each, a list of attacks that are run together (`summary`, `source`, `attacks`)."""
