"""Leaderboards: one file per family of tables, found by scanning this folder."""
