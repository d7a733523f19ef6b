"""Pre-trained networks: their names, their weights, loading."""
