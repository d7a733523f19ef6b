"""From a spec to the graph of stages; pure."""
