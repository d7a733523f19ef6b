"""Scores, decisions and metrics."""
