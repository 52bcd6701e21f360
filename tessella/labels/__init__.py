"""Dense labels as planes that an autoencoder takes, and back: exact in both directions."""
