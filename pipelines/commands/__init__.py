"""Subcommands of `graftwork`, a file each where there is more than a call."""
