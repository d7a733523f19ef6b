"""Execution of a graph: missing stages, what may start, who computes it, what failures mean."""
