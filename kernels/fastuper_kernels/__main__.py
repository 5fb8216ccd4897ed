"""`python -m fastuper_kernels`: which way each operation takes on this machine, and why."""

from fastuper_kernels.cpu.linear import LIMITS
from fastuper_kernels.dispatch.choices import table

print(*table(), *LIMITS, sep="\n")
