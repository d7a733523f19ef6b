"""Prompt-based methods of the survey: prompts are learned, the backbone stays."""
