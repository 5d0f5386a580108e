"""Drift and rise at equal learning, of the cells of a comparison that exist so far, as Markdown.

    python benchmarks/equal_learning.py CONFIG.yaml [SHARE]

Also writes the comparison's report, and computes no cell. SHARE: of the unprotected arm's improvement over Base, which
sets the answer NLL at which arms are compared (0.98). The report has 0.9, where strong arms are at their last strength.
"""

from __future__ import annotations

import sys
from typing import get_args

from hlora.comparison.compare import compare
from hlora.config.reading import load_comparison
from hlora.report.comparison.equal_domain import Quantity
from hlora.report.comparison.rise_table import rise_table
from hlora.report.comparison.tables import equal_domain_table

share = float(sys.argv[2]) if len(sys.argv) > 2 else 0.98
found = compare(load_comparison(sys.argv[1], []), " ".join(sys.argv), compute=lambda grid, cells, retry: None)
drift = [equal_domain_table(found, share, quantity=each) for each in get_args(Quantity) if each != "nll"]
for table in (*drift, rise_table(found, share)):
    print(table.markdown())
