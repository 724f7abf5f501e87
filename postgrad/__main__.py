"""`python -m postgrad`, also for `torchrun -m postgrad`."""

from postgrad.cli.main import main

main()
