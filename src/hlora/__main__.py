"""`python -m hlora`, as torchrun and accelerate launch start a module."""

from hlora.cli import main

main()
