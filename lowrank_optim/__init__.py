"""Memory-efficient LLM pretraining: exact low-rank optimizers behind torch.optim APIs."""

from lowrank_optim.optim.galore import GaLoreAdamW
from lowrank_optim.optim.groups import low_rank_groups
from lowrank_optim.optim.sst import SSTAdamW, spectral_groups

__all__ = ["GaLoreAdamW", "SSTAdamW", "low_rank_groups", "spectral_groups"]
__version__ = "0.1.0"
