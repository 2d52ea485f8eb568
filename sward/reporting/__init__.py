"""Pages about trained networks: `sward report`, one HTML page to decide by, and model cards."""
