"""Decoding in processes that may crash or hang."""
