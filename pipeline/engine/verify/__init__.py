"""Does the engine compute what the model does? Self-test, probes, arms, planted faults."""
