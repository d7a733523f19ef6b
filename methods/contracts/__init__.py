"""Contracts of methods: card, hyper-parameters, and the functions that operators call."""
