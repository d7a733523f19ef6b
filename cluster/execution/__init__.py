"""How a graph runs: what is missing, what may start, who computes it, what a failure means."""
