"""The command line `sward`; `sward.cli.main.main` runs it."""
