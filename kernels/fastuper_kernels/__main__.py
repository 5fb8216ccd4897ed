"""`python -m fastuper_kernels`: which way each operation takes on this machine, and why."""

from fastuper_kernels.choices import table
from fastuper_kernels.linear import LIMITS

print(*table(), *LIMITS, sep="\n")
