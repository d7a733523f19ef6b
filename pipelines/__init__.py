"""What runs: spec, plan, the `graftwork` command, reports."""
