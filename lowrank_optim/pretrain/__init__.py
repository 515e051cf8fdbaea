"""The pretraining harness behind ``train_llama.py``: options, data, model, schedule, checkpoints, report."""
