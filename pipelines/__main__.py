"""`python -m graftwork.pipelines`: what a cluster runs from a shipped checkout, with nothing installed."""

from graftwork.pipelines.cli import main

main()
