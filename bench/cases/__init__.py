"""One module a case: run, claims, tables."""
