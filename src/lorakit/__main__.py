"""``python -m lorakit`` is the program `lorakit`."""

from lorakit.cli import main

if __name__ == "__main__":
    main()
