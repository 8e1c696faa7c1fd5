"""Makes docs/burgers.png, the error of a run of configs/burgers.yaml over its steps, from what the run wrote down.

safeloop train configs/burgers.yaml
python scripts/burgers_picture.py runs/burgers docs/burgers.png
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 480, 90, 30, 50, 60
BAR = 1e-3
TAG = "metric/error/relative_l2"


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--switch", type=int, default=500, help="the step after which LBFGS takes over")
    given = parser.parse_args()
    points = read(given.run / "metrics.jsonl")
    draw(points, given.switch).quantize(32, dither=Image.Dither.NONE).save(given.picture, optimize=True)
    print(f"{given.picture}: {given.picture.stat().st_size:,} bytes, last error {points[-1][1]:.3g}")


def read(path: Path) -> list[tuple[int, float]]:
    """Step and relative error of every evaluation."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], value) for line in lines if (value := line.get("scalars", line).get(TAG)) is not None]


def draw(points: list[tuple[int, float]], switch: int) -> Image.Image:
    """The error, logarithmic, over the steps: an LBFGS step is up to 50 iterations, so it gets as much room as ten."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    stretched = [(place(step, switch), error) for step, error in points]
    last = stretched[-1][0]
    low, high = math.floor(math.log10(min(min(e for _, e in points), BAR))), 0

    def at(x: float, error: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / last
        up = (math.log10(error) - low) / (high - low)
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    for power in range(low, high + 1):
        line(pen, at(0, 10.0**power), at(last, 10.0**power), "#dddddd")
        pen.text((LEFT - 12, at(0, 10.0**power)[1]), f"1e{power}", "#444444", font, "rm")
    for step in sorted({0, switch // 2, switch, (switch + points[-1][0]) // 2, points[-1][0]}):
        x, y = at(place(step, switch), 10.0**low)
        pen.text((x, y + 8), str(step), "#444444", font, "ma")
    line(pen, at(place(switch, switch), 1.0), at(place(switch, switch), 10.0**low), "#999999")
    for x, text in ((switch / 2, "Adam"), ((switch + last) / 2, "LBFGS, 50 iterations a step")):
        pen.text((at(x, 1.0)[0], TOP - 8), text, "#444444", font, "mb")
    line(pen, at(0, BAR), at(last, BAR), "#cc3333")
    pen.text((LEFT + 6, at(0, BAR)[1] - 4), "1e-3", "#cc3333", font, "lb")
    pen.line([at(x, error) for x, error in stretched], "#1f5fbf", 3, "curve")
    pen.text((WIDTH / 2, HEIGHT - 14), "step", "#444444", font, "mb")
    pen.text((LEFT - 70, 10), "relative L2 error against the exact solution", "#444444", font, "la")
    return image


def place(step: int, switch: int) -> float:
    """Where a step stands on the axis."""
    return min(step, switch) + 10.0 * max(step - switch, 0)


def line(pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """A thin line."""
    pen.line([start, end], colour, 1)


if __name__ == "__main__":
    main()
