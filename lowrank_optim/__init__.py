"""Memory-efficient LLM pretraining: exact low-rank optimizers behind torch.optim APIs."""

from lowrank_optim.optim.adafactor import GaLoreAdafactor
from lowrank_optim.optim.alice import Alice
from lowrank_optim.optim.apollo import APOLLOAdamW, APOLLOMini
from lowrank_optim.optim.dct import DCTAdamW
from lowrank_optim.optim.fira import FiraAdamW
from lowrank_optim.optim.foam import FOAM
from lowrank_optim.optim.frugal import FRUGALAdamW
from lowrank_optim.optim.galore import GaLoreAdamW, GaLoreAdamW8bit
from lowrank_optim.optim.golore import GoLoreAdamW
from lowrank_optim.optim.groups import long_side, low_rank_groups
from lowrank_optim.optim.in_backward import step_in_backward
from lowrank_optim.optim.ldadam import LDAdamW
from lowrank_optim.optim.lora_pre import LoRAPre
from lowrank_optim.optim.loro import LOROAdamW, factor_groups
from lowrank_optim.optim.muon import Muon
from lowrank_optim.optim.qgalore import QGaLoreAdamW8bit
from lowrank_optim.optim.racs import RACS
from lowrank_optim.optim.ranks import allocate_ranks
from lowrank_optim.optim.scale import SCALE
from lowrank_optim.optim.sinkgd import SinkGD
from lowrank_optim.optim.sst import SSTAdamW, spectral_groups
from lowrank_optim.optim.trion import Trion

__all__ = [
    "FOAM",
    "RACS",
    "SCALE",
    "APOLLOAdamW",
    "APOLLOMini",
    "Alice",
    "DCTAdamW",
    "FRUGALAdamW",
    "FiraAdamW",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GoLoreAdamW",
    "LDAdamW",
    "LOROAdamW",
    "LoRAPre",
    "Muon",
    "QGaLoreAdamW8bit",
    "SSTAdamW",
    "SinkGD",
    "Trion",
    "allocate_ranks",
    "factor_groups",
    "long_side",
    "low_rank_groups",
    "spectral_groups",
    "step_in_backward",
]
__version__ = "0.2.0"
