"""`python -m vqcompress` is the command line."""

import sys


def main() -> None:
    """The command line, and one line where Ctrl-C comes before it is there."""
    try:
        from vqcompress.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
