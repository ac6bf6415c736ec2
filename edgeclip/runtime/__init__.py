"""Loading and running towers, and measuring them."""
