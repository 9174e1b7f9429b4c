"""Training: the nano family's data, losses and loops, and the scorer of what the trained models show."""
