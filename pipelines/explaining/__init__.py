"""Explains a plan: what is stored, what a run takes, and what stands in its way."""
