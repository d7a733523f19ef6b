"""Building blocks that several families of methods share."""
