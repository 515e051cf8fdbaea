"""The recomputed tables match as often as an independent recomputation by hand found."""

import json

import pytest

from lowrank_optim.memory.cli import main
from lowrank_optim.memory.estimate import estimate
from lowrank_optim.memory.job import Job
from lowrank_optim.memory.published import RANKS, SIZES, counts, tables

MATCHES = {
    "GaLore (2403.03507), Table 2, exact": (1, 20),
    "GaLore, Table 2, exact": (1, 20),
    "GaLore, Table 2, as it follows": (16, 20),
    "GaLore, Table 6a, weights": (18, 20),
    "GaLore, Table 6b, states": (19, 20),
    "Q-GaLore (2407.08296), Table 1": (4, 4),
    "Fira (2410.01623), Table 3": (11, 12),
    "APOLLO (2412.05270), Table 2": (7, 8),
    "SLTrain (2406.02214), Table 2": (17, 20),
    "SCALE (2506.16659), README": (19, 20),
    "SCALE, README, 7B": (2, 3),
    "RACS (2502.07752), Table 3": (13, 16),
    "GaLore, Table 3, 7B": (3, 4),
    "APOLLO, Table 3, 7B": (1, 1),
    "Q-GaLore, Table 2, 7B": (0, 1),
}


def test_matches():
    assert {table.name: table.matches for table in tables()} == MATCHES


@pytest.mark.parametrize("size", [*SIZES, "llama_7b"])
def test_counts_are_those_of_the_models(size):
    c = counts(size, RANKS[size])
    dense = estimate(Job(model=size, optimizer="GaLoreAdamW8bit", optimizer_args={"rank": RANKS[size]}))
    assert (dense.parameters, dense.low_rank_parameters) == (c.P, c.P - c.E)
    assert dense.optimizer_by_key["basis"] == 2 * c.B
    assert estimate(Job(model=size, parameterization="lowrank")).parameters == c.L


def test_the_sheet_shows_both_numbers_where_they_differ(capsys):
    assert main(["papers"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.split()[:2] == ["GaLore", "0.24"])
    assert "0.24 [0.28]" in row and "4.38 [4.76]" in row
    assert main(["papers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tables"]
    assert [(table["matches"], table["numbers"]) for table in found] == list(MATCHES.values())
