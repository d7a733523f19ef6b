"""What a method is: its card, its hyper-parameters, and what the operators call."""
