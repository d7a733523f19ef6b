"""What the subcommands of `graftwork` do, a file each where there is more than a call."""
