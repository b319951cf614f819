"""What of a source could not be used as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

_LONGEST_EXAMPLE = 160  # characters


@dataclass
class Problems:
    """Records that could not be used as they are: counted by kind, with the first of each kind as an example."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count `count` more records of this kind."""
        self.counts[kind] = self.counts.get(kind, 0) + count
        if kind not in self.first:
            whole = example.encode("utf-8", "replace").decode("utf-8")
            self.first[kind] = whole if len(whole) <= _LONGEST_EXAMPLE else f"{whole[:_LONGEST_EXAMPLE]}..."

    def lines(self) -> list[str]:
        """Return one readable line per kind, the most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda pair: -pair[1])
        return [f"{count:,} x {kind} (first: {self.first[kind]})" for kind, count in ordered]
