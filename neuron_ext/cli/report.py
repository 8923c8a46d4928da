"""What the demo prints: sections of comparisons, with a memory of those that disagree."""

from __future__ import annotations

from neuron_ext import backends


class Report:
    """Prints lines of ``ours / torch / difference``; ``failures`` says in words what disagreed."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self._sections = 0
        self._kernels: list[str] = []

    def section(self, title: str) -> None:
        """Starts a numbered section."""
        self._sections += 1
        self._kernels = []
        print(f"\n{self._sections}  {title}")

    def text(self, line: str) -> None:
        """Prints a line of explanation."""
        print(f"   {line}", flush=True)

    def row(self, label: str, ours: str, torch: str, difference: str) -> None:
        """Prints four columns; also used for their titles."""
        self.text(f"{label:<50}{ours:>12}{torch:>12}{difference:>12}".rstrip())

    def compare(
        self,
        label: str,
        ours: float,
        torch: float,
        *,
        limit: float,
        digits: int = 6,
        unit: str = "",
    ) -> None:
        """Prints two values and their difference, which must be at most ``limit``, not a NaN."""
        difference = abs(ours - torch)
        self.row(
            label,
            f"{ours:.{digits}f}{unit}",
            f"{torch:.{digits}f}{unit}",
            _format_difference(difference),
        )
        self._expect(
            difference <= limit,
            f"{label}: {ours:.9g} against torch's {torch:.9g}, which may differ by {limit:.1e}",
        )

    def limit(self, label: str, difference: float, *, limit: float) -> None:
        """Prints the largest difference of many, which must be at most ``limit``, not a NaN."""
        self.row(label, "", "", _format_difference(difference))
        self._expect(
            difference <= limit, f"{label}: {difference:.1e}, and may be {limit:.1e} at most"
        )

    def require(self, label: str, holds: bool) -> None:
        """Prints whether something holds that isn't a comparison of numbers."""
        self.row(label, "yes" if holds else "no", "", "")
        self._expect(holds, label)

    def note_kernel(self) -> None:
        """Remembers which kernel the last call on the CPU used, for ``kernels``."""
        kernel = backends.last_kernel()
        if kernel and kernel not in self._kernels:
            self._kernels.append(kernel)

    def kernels(self) -> None:
        """Prints the kernels noted since the section began."""
        if self._kernels:
            self.text(f"kernels: {', '.join(self._kernels)}")

    def _expect(self, agrees: bool, failure: str) -> None:
        if not agrees:
            self.text("^ DISAGREES with torch")
            self.failures.append(f"section {self._sections}: {failure}")


def _format_difference(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.1e}"
