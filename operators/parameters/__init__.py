"""Parameters and hints of every operator: what keys and hints hold, as values.

Planning writes them into stages with `to_json`, an operator reads its own with `from_json`; nobody
else knows the names that they have in keys. No torch here.
"""
