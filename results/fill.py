"""Write the tables of README.md and REPRODUCTION.md anew from the files beside this script.

    export PATH=$PWD/.venv/bin:$PATH PYTHONPATH=src
    python results/fill.py
    python results/fill.py --check     only say whether a table differs; then the exit status is 1

`bash report.sh RECIPE --quote results/NAME.json` makes such a file of a run. The table of a GPU is of the lines that
`benchmarks/gpu.sh` wrote.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from twice_rec.errors import InputError
from twice_rec.evaluation.quotation import fill
from twice_rec.files import write_text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # for gpu_tables
from gpu_tables import gpu_table  # noqa: E402

DOCUMENTS = (ROOT / "README.md", ROOT / "REPRODUCTION.md")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, differs = parser.parse_args().check, False
    for document in DOCUMENTS:
        try:
            text = fill(document, {"gpu": gpu_table})
        except InputError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        if text != document.read_text(encoding="utf-8"):
            differs = True
            sys.stderr.write(f"{document.name} {'differs from results/' if check else 'is written anew'}\n")
            if not check:
                write_text(document, text)
    return int(check and differs)


if __name__ == "__main__":
    sys.exit(main())
