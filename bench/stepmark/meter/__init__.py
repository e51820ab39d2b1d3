"""The ruler: latency, memory, energy, counts and the machine they were read on."""
