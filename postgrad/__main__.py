"""`python -m postgrad`, also for `torchrun -m postgrad`."""

from postgrad.cli import main

main()
