"""The spec: what a user writes, parsed and checked."""
