"""Steps from an encoded image to the tensor that a network sees."""
