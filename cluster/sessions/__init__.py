"""The Ray that a run uses: one of its own, or a cluster that is there already."""
