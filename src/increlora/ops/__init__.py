"""Matrix products and process helpers used by the rest of the library."""
