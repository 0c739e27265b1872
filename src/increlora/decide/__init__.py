"""Which modules get rank, and when: pure functions on data that depend only on torch."""
