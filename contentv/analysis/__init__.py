"""What a model makes of imperfect clips: gradients of degraded twins against those of the golden clips."""
