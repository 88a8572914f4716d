"""Writes what benchmarks/studies shows anew from each results.json: python assets/draw_studies.py

report.md and figure.png of every folder, and README.md, the list of all claims. To add a study, copy its results.json
into a folder there and run this.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))
from training.engine.checkpoints.checkpoint_io import read_json
from training.studies import STUDIES
from training.studies.report import REPORT_NAME, RESULTS_NAME, answer, write_report


FOLDER = Path(__file__).parent.parent / "benchmarks" / "studies"


def index(folder: Path) -> str:
    """Every claim and whether it shows."""
    lines = [
        "# Studies that were run",
        "",
        "What counts as shown was written down before the first run; differences are paired by seed, ± is their "
        "standard error. Conditions, every score and the figure are in each report.",
        "",
        "| study | claim | shows? | numbers |",
        "|---|---|---|---|",
    ]
    for path in sorted(folder.glob(f"*/{RESULTS_NAME}")):
        found = read_json(path)
        scale, seeds = found["settings"]["scale"], len(found["settings"]["seeds"])
        name = f"[{path.parent.name}]({path.parent.name}/{REPORT_NAME}), {scale}, n = {seeds} seeds"
        for verdict in found["verdicts"]:
            word = answer(verdict["shows"], seeds).removesuffix(" at this scale")
            lines.append(f"| {name} | {verdict['claim']} | {word} | {verdict['numbers']} |")
            name = ""
    return "\n".join(lines) + "\n"


def main() -> None:
    for path in sorted(FOLDER.glob(f"*/{RESULTS_NAME}")):
        found = read_json(path)
        write_report(STUDIES[found["study"]], found, path.parent)
    (FOLDER / "README.md").write_text(index(FOLDER), encoding="utf-8")


if __name__ == "__main__":
    main()
