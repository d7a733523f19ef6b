"""Programs that trained the small backbones, to run by hand: `python -m` and the module's name."""
