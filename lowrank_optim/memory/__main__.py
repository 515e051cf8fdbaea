"""``python -m lowrank_optim.memory`` is ``lowrank-memory``."""

from lowrank_optim.memory.cli import main

raise SystemExit(main())
