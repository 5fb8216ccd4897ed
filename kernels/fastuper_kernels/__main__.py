"""`python -m fastuper_kernels`: which way each operation takes on this machine, and why."""

from fastuper_kernels.choices import table

print(*table(), sep="\n")
