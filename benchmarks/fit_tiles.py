"""Fit the cost model of int4_conv2d's tiles to times measured on a GPU.

python benchmarks/fit_tiles.py [benchmarks/results/int4-tiles-nvidia-h100.csv]

Prints the constants of csrc/cuda/int4_conv2d_plan.cuh (kUnitCosts, kSegmentCosts), which has the
same model, and the time of the chosen tiles over that of the fastest tiles. The CSV file has a row
per layer, batch and tile. The name of a tile has the parameters of MatrixTile: rows, panels, rows
per warp, slices, stages.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

TABLE = Path(__file__).parent / "results" / "int4-tiles-nvidia-h100.csv"
#: Number of multiprocessors of an H100, and the resources of each.
MULTIPROCESSORS, THREADS, REGISTERS, SHARED_BYTES = 132, 2048, 65536, 227 * 1024
#: Registers per thread by rows per warp, as the compiler reports them.
REGISTERS_OF_ROWS = {64: 126, 32: 96, 16: 80}
LAUNCH = 2.0  # microseconds, the same for all tiles
#: The candidates of the plan, in its order. kSegmentCosts is for layers whose number of input
#: channels is not a multiple of 16.
CHOSEN = {
    "kUnitCosts": ("16x1x16x4x4", "32x1x32x4x3", "64x2x32x1x4", "128x1x32x1x4", "64x4x64x1x4"),
    "kSegmentCosts": ("32x1x32x2x4", "128x1x32x1x4", "128x2x32x1x4"),
}
SEGMENTS = ("7x7 3-", "3x3 3-", "1x1 24-")

Row = dict[str, str]


def sizes(tile: str) -> tuple[int, int, int, int, int]:
    rows, panels, warp_rows, slices, stages = map(int, tile.split("x"))
    return rows, panels, warp_rows, slices, stages


def resident(tile: str) -> int:
    """Return how many thread blocks fit on a multiprocessor."""
    rows, panels, warp_rows, slices, stages = sizes(tile)
    threads = rows // warp_rows * panels * slices * 32
    shared = stages * slices * (rows * 64 + panels * 2048) + 1024
    registers = REGISTERS_OF_ROWS[warp_rows] * threads
    return min(THREADS // threads, SHARED_BYTES // shared, REGISTERS // registers)


def time_of(tile: str, row: Row, start: float, step: float, share: float) -> float:
    """Return the microseconds by tile_time of the plan, plus the launch."""
    steps = -(-int(row["chunks"]) // sizes(tile)[3])
    blocks = -(-int(row["blocks"]) // MULTIPROCESSORS)

    def side_by_side(count: int) -> float:
        return start + steps * max(step, count * share) if count else 0.0

    full, rest = divmod(blocks, resident(tile))
    return LAUNCH + full * side_by_side(resident(tile)) + side_by_side(rest)


def fit(tile: str, rows: Sequence[Row]) -> list[float]:
    """Fit start, step and share to the logarithms of the times, with less weight for outliers."""

    def errors(logarithms: np.ndarray) -> list[float]:
        cost = np.exp(logarithms)
        return [np.log(time_of(tile, row, *cost) / float(row["microseconds"])) for row in rows]

    starts = ([0.5, step, step - 1] for step in (-2.0, -1.0, 0.0))
    best = min((least_squares(errors, x, loss="soft_l1") for x in starts), key=lambda r: r.cost)
    return [max(round(float(value), 2), 0.01) for value in np.exp(best.x)]


def read(path: Path) -> dict[str, list[Row]]:
    """Read the rows for each list of the plan."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    segments = [row for row in rows if row["layer"].startswith(SEGMENTS)]
    return {
        "kUnitCosts": [row for row in rows if not row["layer"].startswith(SEGMENTS)],
        "kSegmentCosts": segments,
    }


def behind_the_fastest(
    rows: Sequence[Row], costs: Mapping[str, Sequence[float]]
) -> tuple[float, float]:
    """Return the time of the chosen tile over that of the fastest: geometric mean and maximum."""
    cases: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cases[row["batch"], row["layer"]][row["tile"]] = row
    behind = []
    for measured in cases.values():
        chosen = min(costs, key=lambda t: time_of(t, measured[t], *costs[t]))
        fastest = min(float(row["microseconds"]) for row in measured.values())
        behind.append(float(measured[chosen]["microseconds"]) / fastest)
    return float(np.exp(np.mean(np.log(behind)))), max(behind)


def main(path: Path = TABLE) -> None:
    for name, rows in read(path).items():
        costs = {t: fit(t, [row for row in rows if row["tile"] == t]) for t in CHOSEN[name]}
        print(f"{name}:")
        for tile, cost in costs.items():
            print(
                f"  {{{resident(tile)}, {', '.join(f'{value:.2f}' for value in cost)}}},  // {tile}"
            )
        mean, worst = behind_the_fastest(rows, costs)
        print(f"  time over that of the fastest tile: {mean:.3f} on average, {worst:.3f} at worst")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
