"""Draws the plots of the documentation from records: `python -m benchmarks.docs_plots`, which needs matplotlib.

A record in `benchmarks/records/` holds what one run printed: per workload the time of our engine and that of the
fastest peer, with device, command and commit. Each becomes an SVG of the same name in `docs/plots/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import options

RECORDS = Path(__file__).parent / "records"
PLOTS = Path(__file__).parents[1] / "docs" / "plots"
OURS = "#3b72b9"
COLOURS = {"FlashAttention-3": "#e0a15e", "cuDNN": "#8fa3b5"}


def draw(record: dict[str, Any], path: Path) -> None:
    """A bar per workload: how many times as long as our engine the fastest peer takes. A line marks equal times."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]
    from matplotlib.lines import Line2D  # pyright: ignore[reportMissingImports]
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]

    # Text stays text, and the same record gives the same bytes.
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9}
    settings |= {f"figure.constrained_layout.{pad}": 0.1 for pad in ("w_pad", "h_pad")}
    pyplot.rcParams.update(settings)
    rows, engine = record["rows"], record["engine"]
    figure, axes = pyplot.subplots(figsize=(5.4, 1.3 + 0.27 * len(rows)), layout="constrained")
    places = np.arange(len(rows))
    form = ".1f" if any(isinstance(row["us"], float) for row in rows) else "d"
    ratios = [row["ratio"] for row in rows]
    axes.barh(places, ratios, 0.7, color=[COLOURS[row["peer"]] for row in rows])
    for place, row in zip(places, rows, strict=True):
        text = f"{row['ratio']:.2f}  ({row['peer_us']:{form}} / {row['us']:{form}} µs)"
        axes.annotate(text, (row["ratio"], place), (4, 0), textcoords="offset points", va="center", size=8)
    axes.axvline(1, color=OURS, linewidth=1.6)
    axes.set_xlim(0, max(ratios) * 1.5)
    axes.set_xlabel("time of the fastest peer, as a multiple of ours")
    axes.set_yticks(places, [row["workload"] for row in rows])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{record['title']}, {record['about']['device']}", size=10, loc="left")
    peers = dict.fromkeys(row["peer"] for row in rows)
    handles = [
        Line2D([], [], color="#3b72b9", label=engine),
        *(Patch(color=COLOURS[peer], label=peer) for peer in peers),
    ]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main() -> None:
    parser = options.parser("docs_plots", __doc__)
    parser.add_argument("--out", type=Path, default=PLOTS, help="where the plots go (default: docs/plots)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(RECORDS.glob("*.json")):
        draw(json.loads(path.read_text()), out / f"{path.stem}.svg")
        print(out / f"{path.stem}.svg")


if __name__ == "__main__":
    main()
