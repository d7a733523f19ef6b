"""Pipelines: spec, plan, the `graftwork` command, reports."""
