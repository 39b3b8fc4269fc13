"""Colours, and how a drawing takes those of the page.

Every colour of a drawing is one of the names below; in the page they become CSS variables, so that a picture follows
the reader's light or dark scheme.
"""

import re

PAPER, INK, MUTED, LINE, HEAT = "#fdfdfb", "#1c2024", "#5c656f", "#dfe2e6", "#1f6fb5"
SERIES = ("#0072b2", "#c85a00", "#00805e", "#a8508a", "#8f6b00", "#3b8fc4")
VARIABLES = {PAPER: "paper", INK: "ink", MUTED: "muted", LINE: "line", HEAT: "heat"} | {
    color: f"series-{index}" for index, color in enumerate(SERIES)
}
STYLES = ("-", "--", ":", "-.")


def line_of(index: int) -> tuple[str, str]:
    """Colour and style of the n-th curve."""
    return SERIES[index % len(SERIES)], STYLES[index // len(SERIES) % len(STYLES)]


def themed(svg: str, name: str, width: float, height: float) -> str:
    """Turns matplotlib's SVG into an element of the page: its colours and fonts, its own ids, no more than is needed.

    Args:
        svg: the file's text.
        name: put before every id, which must be unique within a page.
        width: inches.
        height: inches.
    """
    start = svg.index("<svg")
    body = svg[svg.index(">", start) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', body))

    def tag(found: re.Match[str]) -> str:
        text = re.sub(r' id="([^"]*)"', lambda own: f' id="{name}-{own[1]}"' if own[1] in used else "", found[0])
        text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
        text = re.sub(r"#[0-9a-f]{6}\b", lambda color: _variable(color[0]), text)
        return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)

    body = re.sub(r"<[^>]*>", tag, body)  # a name that looks like markup is escaped, so it is no tag
    body = re.sub(r">\s+<", "><", body).strip()
    size = f'width="{96 * width:.0f}" height="{96 * height:.0f}"'
    return f'<svg {size} viewBox="0 0 {72 * width:g} {72 * height:g}">{body}</svg>'


def _variable(color: str) -> str:
    return f"var(--{VARIABLES[color]})" if color in VARIABLES else color
