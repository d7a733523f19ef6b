"""The operators: `stages/NAME.py` computes a stage of the operator NAME."""
