"""The table of quantizers, from their catalogue.

Run as a script, it writes the README's:

python tests/support/quantizers_table.py
"""

from __future__ import annotations

from methods_table import README, with_table

from ricciq.errors import listed
from ricciq.quant.catalog import QUANTIZERS, Entry

HEAD = "| key under `quantization:` | value | how numbers are quantized |"


def quantizers() -> str:
    """A row a quantizer."""
    rows = [HEAD, "|---|---|---|"]
    for key, catalog in QUANTIZERS.items():
        for name, entry in catalog.items():
            rows.append(f"| `{key}` | `{name}` | {_line(entry)} |")
    return "\n".join(rows)


def _line(entry: Entry) -> str:
    paper = f" (arXiv {entry.reference})" if entry.reference else ""
    lacks = entry.widths != type(entry).widths
    return f"{entry.line}{paper}{f'; bits: {listed(entry.widths)}' if lacks else ''}"


def with_quantizers(page: str) -> str:
    """A README with the table of quantizers made anew."""
    return with_table(page, HEAD, quantizers())


if __name__ == "__main__":
    README.write_text(with_quantizers(README.read_text(encoding="utf-8")), encoding="utf-8")
