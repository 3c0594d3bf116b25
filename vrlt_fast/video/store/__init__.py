"""Decoded patches, kept: file format, folders shared by processes, eviction, and all tiers together."""
