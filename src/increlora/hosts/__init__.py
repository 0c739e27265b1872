"""The world: peft, transformers, and the formats adapters leave in."""

from .versions import warn_outside

warn_outside()  # before anything is imported from packages that may be too old for it
