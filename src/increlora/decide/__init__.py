"""Who deserves rank, and when: pure functions on data, which know torch alone."""
