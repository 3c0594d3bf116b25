"""Reinforcement learning tuning of video LLMs."""

__version__ = "0.1.0"
