"""The files that stages store, one module for each kind."""
