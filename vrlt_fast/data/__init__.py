"""Samples, their JSONL files, the order in which a run visits them, and the demo data set."""
