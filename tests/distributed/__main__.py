"""Every optimizer under FSDP2 against one process.

    python -m tests.distributed [--worlds 2 4] [--dtypes float64 float32] [--only GaLore]

prints for every row of ``tests/optimizers.py`` how far the parameters are from those of one process after 20 updates,
as a share of the largest value: split as ``fully_shard`` does by itself, with ``long_side``, and with it on a mesh of
two copies (HSDP); then the same for runs that torch.distributed.checkpoint saved on 2 processes and that go on on 1, 2
and 4.
"""

from __future__ import annotations

import argparse
import tempfile

from tests.distributed.fsdp import PLACEMENTS, compare, fewer_bits, limit, resharded
from tests.distributed.processes import run
from tests.optimizers import IDS, VARIANTS

# Their groups are the layers of a model.
OF_LAYERS = ("LOROAdamW", "SSTAdamW")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32"])
    parser.add_argument("--placements", nargs="+", default=list(PLACEMENTS))
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    rows = [i for i, name in enumerate(IDS) if options.only in name and VARIANTS[i][0] not in OF_LAYERS]
    missed = 0
    for world in options.worlds:
        for dtype in options.dtypes:
            for placement in options.placements:
                if placement == "replicated" and world < 4:
                    continue
                print(f"\n{world} processes, {dtype}, {placement}")
                results = run(compare, world, rows, dtype, placement, start="fork")[0]
                for i, (error, splits) in zip(rows, results):
                    bound = limit(i, dtype)
                    missed += error > bound
                    met = "" if error <= bound else f"  MISSED {bound:g}"
                    print(f"{IDS[i]:100.100} {error:8.1e}  {splits}{met}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print("\nsaved on 2 processes, continued on 1, 2, 4 (float64)")
        run(resharded, 2, rows, folder, True, start="fork")
        continued = [run(resharded, world, rows, folder, False, start="fork")[0] for world in (1, 2, 4)]
        for row, errors in zip(rows, zip(*continued)):
            bound = 0.05 if fewer_bits(row) else 1e-12
            missed += max(errors) > bound
            met = "" if max(errors) <= bound else f"  MISSED {bound:g}"
            print(f"{IDS[row]:100.100} {' '.join(f'{error:8.1e}' for error in errors)}{met}", flush=True)
    print(f"\n{missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
