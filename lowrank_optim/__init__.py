"""Memory-efficient LLM pretraining: exact low-rank optimizers behind torch.optim APIs."""
