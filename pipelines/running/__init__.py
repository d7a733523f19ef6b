"""One run of a graph, and what is recorded of it."""
