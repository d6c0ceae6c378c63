"""Sample answers during training, and reward them."""
