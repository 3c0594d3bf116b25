"""Rollouts on the trainer's own weights."""
