"""How a program runs: command line, devices and ranks, loading, training, inference, records."""
