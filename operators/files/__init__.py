"""Files wherever they are: local folders, object stores, URLs."""
