"""What keys and hints say, as values: the parameters and the hints of every operator.

Planning writes them into stages with `to_json`, an operator reads its own with `from_json`; nobody
else knows the names that they have in keys. No torch here.
"""
