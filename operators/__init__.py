"""How one stage works: data, features, fits, evaluation, the store, records."""
