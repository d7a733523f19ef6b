"""Work of one stage: data, features, fits, evaluation, the store, records."""
