"""Draws docs/needles.svg, right answers by length and depth: `python docs/needles_picture.py NEEDLES.jsonl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 74, 26, 74, 58
FONT = 'font-family="DejaVu Sans, Arial, sans-serif"'


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" {FONT} fill="#222">{words}</text>'


def colour(right: int, asked: int) -> str:
    """White to blue; grey where nothing was asked."""
    if not asked:
        return "#eee"
    red, green, blue = (round(255 + (end - 255) * right / asked * 0.6) for end in (33, 102, 172))
    return f"rgb({red},{green},{blue})"


def draw(cells: list[dict[str, Any]]) -> str:
    rows = len(cells[0]["by_depth"])
    width, height = LEFT + CELL_WIDTH * len(cells) + 16, TOP + CELL_HEIGHT * rows + 40
    parts = [text(LEFT, 20, "Right answers of the embedded model, by length and by depth of the fact", "start", 13)]
    for column, cell in enumerate(cells):
        x = LEFT + column * CELL_WIDTH
        tokens = cell["context"] // 1024
        parts.append(text(x + CELL_WIDTH / 2, TOP - 10, "1M" if tokens == 1024 else f"{tokens}K"))
        for row, (right, asked) in enumerate(cell["by_depth"]):
            y = TOP + row * CELL_HEIGHT
            size = f'width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}"'
            parts.append(f'<rect x="{x}" y="{y}" {size} fill="{colour(right, asked)}"/>')
            parts.append(text(x + CELL_WIDTH / 2 - 1, y + 17, f"{right}/{asked}" if asked else ""))
        parts.append(
            text(x + CELL_WIDTH / 2, TOP + rows * CELL_HEIGHT + 18, f"{cell['right']}/{cell['questions']}", size=13)
        )
    for row in range(rows):
        parts.append(text(LEFT - 8, TOP + row * CELL_HEIGHT + 17, f"{100 * row // rows}%", "end"))
    parts.append(text(LEFT - 8, TOP + rows * CELL_HEIGHT + 18, "all", "end", 13))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    single = sorted((line for line in lines if line["cell"].startswith("single")), key=lambda line: line["context"])
    Path(__file__).with_name("needles.svg").write_text(draw(single), encoding="utf-8")


if __name__ == "__main__":
    main()
