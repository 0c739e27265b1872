"""MELoRA: block-diagonal mini adapters."""
