"""Products and process helpers that everything else stands on."""
