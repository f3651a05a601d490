"""`python -m data_tools`, the same as the `siglip-data` command."""

from data_tools.cli import main

main()
