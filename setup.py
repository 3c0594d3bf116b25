"""Everything is in pyproject.toml. The optional compiled ops of csrc/ will be declared here; none exist yet."""

from setuptools import setup

setup()
