"""The `sward` command line; its entry point is `sward.cli.main.main`."""
