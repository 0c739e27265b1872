"""How fast is a training step, and why: every method beside the frozen floor, peft's LoRA and the published code.

.venv/bin/python -m benchmarks.speed                     the table of docs/performance.md, and its numbers as JSON
.venv/bin/python -m benchmarks.speed run --help          any methods on any model of these, step by step
"""
