"""`python -m vqcompress` is the command line."""

from vqcompress.cli import main

if __name__ == "__main__":
    main()
