"""`python -m fastuper_kernels`: print the way that each operation takes on this machine, and the reason."""

import sys

from fastuper_kernels.dispatch.choices import LIMITS, show

try:
    show()
except ValueError as error:  # an environment variable that names no choice
    sys.exit(f"fastuper_kernels: {error}")
print(*LIMITS, sep="\n")
