"""Records in MLflow, through a journal that nothing waits for."""
