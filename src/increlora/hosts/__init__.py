"""The world: peft, transformers, and the formats adapters leave in."""
