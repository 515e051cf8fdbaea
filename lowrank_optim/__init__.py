"""Memory-efficient LLM pretraining: exact low-rank optimizers behind torch.optim APIs."""

from lowrank_optim.optim.dct import DCTAdamW
from lowrank_optim.optim.galore import GaLoreAdamW
from lowrank_optim.optim.galore_8bit import GaLoreAdamW8bit
from lowrank_optim.optim.groups import low_rank_groups
from lowrank_optim.optim.ldadam import LDAdamW
from lowrank_optim.optim.qgalore import QGaLoreAdamW8bit
from lowrank_optim.optim.trion import Trion

__all__ = ["DCTAdamW", "GaLoreAdamW", "GaLoreAdamW8bit", "LDAdamW", "QGaLoreAdamW8bit", "Trion", "low_rank_groups"]
__version__ = "0.1.0"
