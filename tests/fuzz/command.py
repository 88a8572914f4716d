"""The command line of the fuzz modules: the whole count, what became of the inputs, exit status 1 for a failure."""

import argparse
from collections import Counter
from collections.abc import Callable


def report(doc: str | None, run: Callable[..., tuple[Counter, list[str]]], **numbers: int) -> None:
    """Run with numbers from the command line and print the outcomes.

    Args:
        doc: of the module; its first line is the description. numbers: default of each option.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    outcomes, failures = run(**vars(parser.parse_args()))
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:6d}  {outcome}")
    print("\n".join(failures) or "no failure")
    raise SystemExit(bool(failures))
