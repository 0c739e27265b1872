"""The engines' own code as referee of `check_export`, where it can be had without the engine."""
