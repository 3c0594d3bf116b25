"""Rewards as pure functions with named parts."""
