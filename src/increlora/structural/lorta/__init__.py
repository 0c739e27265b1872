"""LoRTA: one low-rank tensor for all attention projections of a model."""
