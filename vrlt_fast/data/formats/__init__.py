"""Readers of annotation files of public data sets (docs/data.md, "Converting public data sets")."""
