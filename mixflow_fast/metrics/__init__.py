"""Numbers of a run: metrics.jsonl, the progress line, throughput, loggers."""
