"""LoRA-Mini: a small trained pair between two frozen random factors."""
