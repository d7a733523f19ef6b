"""`python -m pipelines`: what a cluster runs from a shipped checkout, with nothing installed."""

from pipelines.cli import main

main()
