"""The one engine: a model over dp x sp x tp ranks, its optimiser, moving average and checkpoints, on DeepSpeed."""
