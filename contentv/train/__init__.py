"""The training loop, what a stage consumes and produces, metrics, and the stage graph."""
