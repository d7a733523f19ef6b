"""Continual learning with pre-trained models, as a distributed pipeline of workflow DAGs."""

__version__ = "0.1.0"
