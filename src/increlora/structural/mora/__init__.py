"""MoRA and ReMoRA: one square matrix between two fixed maps."""
