"""Which model, and what it is: its files, shape, identity and rates on this machine."""
