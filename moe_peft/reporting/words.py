"""Numbers as people say them."""


def duration(seconds: float) -> str:
    """A time."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def many(count: int, what: str) -> str:
    """A number of things."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def signed(value: float) -> str:
    """A difference, with the sign that typography has for it."""
    return f"{value:+.1f}".replace("-", "−")
