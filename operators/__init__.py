"""How one stage works: data, features, fits, evaluation, the store, records."""

__version__ = "0.1.0"
