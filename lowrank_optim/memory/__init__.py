"""How much memory a training run takes: closed form, simulated, measured."""
