"""`python -m dali_llava` is `dali-llava`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
