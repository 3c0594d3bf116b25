"""What the user sees: metrics.jsonl and its writers, the console, the HTML report. Imports without torch."""
