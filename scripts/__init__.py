"""Command-line stages: each module is `main(cfg, runtime)` under a guard."""
