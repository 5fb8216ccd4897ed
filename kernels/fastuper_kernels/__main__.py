"""`python -m fastuper_kernels`: print the way that each operation takes on this machine, and the reason."""

from fastuper_kernels.dispatch.choices import LIMITS, show

show()
print(*LIMITS, sep="\n")
