"""Streams of tasks: sets of images that arrive one after another."""
