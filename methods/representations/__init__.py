"""Representation-based methods of the survey: classifiers on features of the backbone."""
