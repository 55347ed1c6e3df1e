"""Records, randomness, devices, logging and errors: what every other package may use."""
