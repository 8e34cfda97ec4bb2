"""`python -m vqcompress` is the command line."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C during its import prints one line."""
    try:
        from vqcompress.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
