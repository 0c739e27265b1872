"""Methods whose rank is fixed and whose ΔW has another form: each delta beside its method."""
