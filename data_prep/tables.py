"""What became of the clips, as a table: kept, and dropped by reason."""

from collections.abc import Iterable, Mapping


def add(counts: dict[str, int], name: str, number: int = 1) -> None:
    """Count `number` more of what is called `name`."""
    counts[name] = counts.get(name, 0) + number


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of several counts, in the order in which the names first come."""
    sums: dict[str, int] = {}
    for part in counts:
        for name, number in part.items():
            sums[name] = sums.get(name, 0) + number
    return sums


def table(title: str, counts: Mapping[str, int]) -> str:
    """Lines of names and numbers under a title, the dropped ones last."""
    ordered = sorted(counts.items(), key=lambda item: item[0].startswith("dropped"))
    width = max([len(title), *(len(name) for name in counts)], default=0)
    lines = [f"{name.replace('_', ' '):<{width}}  {number:>9}" for name, number in ordered]
    return "\n".join([f"{title}", "-" * (width + 11), *lines])
