"""`python -m graftwork.pipelines`: the command as a cluster runs it, with nothing installed."""

from graftwork.pipelines.cli import main

main()
