"""`python -m hpc` lists the verbs."""

from __future__ import annotations

VERBS = {"submit": "start or resume a run, on Slurm or on this machine"}


def main() -> None:
    """Print them."""
    print("usage: python -m hpc.VERB --help\n")
    for verb, what in VERBS.items():
        print(f"  {verb:10} {what}")


if __name__ == "__main__":
    main()
