"""How adapters leave: plain LoRA, merged weights, and what serving engines make of them."""
