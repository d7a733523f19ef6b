"""Columns of Parquet files as values: labels, domains, and the names that files give to classes."""
