"""``lowrank-train`` and its subcommands."""
