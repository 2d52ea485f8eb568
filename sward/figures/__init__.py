"""Figures of runs and predictions. Needs matplotlib: `pip install 'sward[figures]'`."""
