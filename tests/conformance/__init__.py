"""peft's own test suite as referee over our methods: `python -m tests.conformance`, or `make conformance`."""
