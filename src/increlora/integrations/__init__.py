"""Plugins that other frameworks load by name; nothing in the library imports them, and they import the framework."""
