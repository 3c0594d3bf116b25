"""The commands ``vrlt select ...``."""
