"""Data sets: sources, tables, indexes, labels, scenarios, exemplars."""
