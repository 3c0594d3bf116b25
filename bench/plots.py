"""A result file of the case ``kernels`` as one SVG picture: a panel a cell, a bar an arm, in multiples of the floor."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bench.cells import OURS
from bench.harness import Record

WIDTH, LEFT, RIGHT, BAR, GAP, HEAD = 760, 190, 120, 16, 5, 34
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.t{font-weight:600}.m{fill:#666}.o{fill:#2a6fbb}.p{fill:#b8bcc2}"
    ".w{stroke:#333;stroke-width:1.2}.f{stroke:#c0392b;stroke-dasharray:4 3}"
)
DEVICE = "device"


def bars(records: Sequence[Record], device: str) -> str:
    """Median times with their 20 % and 80 % quantiles; the dashed line is the floor, where its share is known."""
    shapes = dict.fromkeys(r.shape for r in records if r.metric == "time" and r.arm != DEVICE)
    panels, top = [], 10
    for shape in shapes:
        times = sorted((r for r in records if (r.shape, r.metric) == (shape, "time")), key=lambda r: r.median)
        times = [r for r in times if r.arm != DEVICE]
        shares = {r.arm: r.median for r in records if (r.shape, r.metric) == (shape, "floor")}
        panels.append(_panel(times, shares, f"{device}: {shape}", top))
        top += HEAD + len(times) * (BAR + GAP) + 14
    body = "\n".join(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _panel(times: Sequence[Record], shares: dict[str, float], title: str, top: int) -> str:
    # An arm far beyond the others would make them unreadable: its bar is cut, its number isn't.
    longest = min(times[-1].p80, 6 * times[len(times) // 2].median)
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts = [f'<text class="t" x="10" y="{top + 14}">{escape(title)}, milliseconds</text>']
    for i, r in enumerate(times):
        y = top + HEAD - 8 + i * (BAR + GAP)
        end = LEFT + min(r.median, longest) * scale
        kind = "o" if r.arm.startswith(OURS) else "p"
        low, high = (LEFT + min(v, longest) * scale for v in (r.p20, r.p80))
        share = f" · {100 * shares[r.arm]:.0f} % of the floor" if r.arm in shares else ""
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(r.arm)}</text>',
            f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR}"/>',
            f'<line class="w" x1="{low:.1f}" x2="{high:.1f}" y1="{y + BAR / 2}" y2="{y + BAR / 2}"/>',
            f'<text class="m" x="{max(end, high) + 6:.1f}" y="{y + 12}">{r.median:.4g}{share}</text>',
        ]
    floors = [shares[r.arm] * r.median for r in times if r.arm in shares]
    if floors:
        x, bottom = LEFT + min(floors[0], longest) * scale, top + HEAD - 8 + len(times) * (BAR + GAP)
        parts.append(f'<line class="f" x1="{x:.1f}" x2="{x:.1f}" y1="{top + HEAD - 12}" y2="{bottom}"/>')
    return "\n".join(parts)
