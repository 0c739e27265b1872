"""The libraries that increlora plugs into: peft and transformers."""

from .versions import warn_untested

warn_untested()  # before anything is imported from packages that may be too old for it
